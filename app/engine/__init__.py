"""The engine: queries in, slates out, many at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Where:
    """What the caller allows on the slate; an empty tuple or None allows everything."""

    category: tuple[str, ...] = ()
    brand: tuple[str, ...] = ()
    price_min: float | None = None
    price_max: float | None = None
    in_stock: bool = False
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != _EVERYTHING


_EVERYTHING = Where()


@dataclass(frozen=True, slots=True)
class Query:
    """One request inside the engine. `deadline` is on the clock of `time.monotonic()`, in seconds."""

    request_id: str
    user: str | None = None
    session: str | None = None
    scene: str = "home"
    limit: int = 20
    anchors: tuple[str, ...] = ()
    """Items on the page: the product of a detail page, the lines of a cart."""
    where: Where = _EVERYTHING
    fields: tuple[str, ...] = ()
    explain: bool = False
    deadline: float = float("inf")


class SlateItem(NamedTuple):
    """One place of a slate."""

    item_id: str
    score: float
    sources: tuple[str, ...]
    """Names of the sources that proposed the item, in the scene's order."""
    reason: str | None = None
    attributes: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Slate:
    """The ordered answer to one query, best first."""

    request_id: str
    scene: str
    items: tuple[SlateItem, ...]
    bundle: str
    """Version of the one bundle that every item and score came from."""
    variant: str | None = None
    degraded: tuple[str, ...] = field(default=())
    """Stages that were left out: `state`, `recall:<source>`, `rank`, `deadline`."""


class Overloaded(Exception):
    """The engine's waiting room is full; the caller may try again after `retry_after_s`."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(f"engine overloaded, retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnknownScene(Exception):
    """The query names a scene that the live bundle does not have."""

    def __init__(self, scene: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown scene {scene!r}; known: {', '.join(known)}")
        self.scene = scene
        self.known = known


class Engine(Protocol):
    """Answers queries; whoever calls does not know where the models live."""

    async def recommend(self, query: Query) -> Slate:
        """Raises `Overloaded` when nothing more can be queued and `UnknownScene`."""
        ...
