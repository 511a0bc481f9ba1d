"""Small engines for tests of what stands in front of the engine."""

from collections.abc import Mapping

from app.engine import Query, Slate, SlateItem
from app.scenes import Scene, SceneSource


class ConstantEngine:
    """Answers every query with the same items and remembers what it was asked."""

    ready = True
    bundle: str | None = "20260101T000000-00000000"
    scenes: Mapping[str, Scene] = {
        "home": Scene(sources=(SceneSource(name="popular"), SceneSource(name="item_cf", k=50))),
        "detail": Scene(sources=(SceneSource(name="item_cf"),), context=True),
    }

    def __init__(self, *items: SlateItem, degraded: tuple[str, ...] = (), fault: Exception | None = None) -> None:
        self.items = items or (SlateItem("a", 0.5, ("popular",)),)
        self.degraded = degraded
        self.fault = fault
        self.asked: list[Query] = []

    @property
    def bundled_scenes(self) -> Mapping[str, Scene]:
        return self.scenes

    async def recommend(self, query: Query) -> Slate:
        self.asked.append(query)
        if self.fault:
            raise self.fault
        assert self.bundle
        return Slate(query.request_id, query.scene, self.items, self.bundle, None, self.degraded)
