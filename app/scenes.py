"""Scenes: what a list on a page is made of, as validated configuration inside the bundle, and what operators change."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fusion = Literal["learned", "reciprocal_rank", "voting", "weighted", "cascade"]


Candidates = Annotated[int, Field(ge=1, le=1000)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class SceneSource(BaseModel):
    """One source's part in a scene."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    k: Candidates = 100
    """How many candidates the source may propose."""
    weight: Weight = 1.0
    """Its say in reciprocal-rank, voting and weighted fusion."""


class Scene(BaseModel):
    """The order of `sources` is the order of a cascade and of `sources` in answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: Annotated[tuple[SceneSource, ...], Field(min_length=1)]
    fusion: Fusion = "reciprocal_rank"
    ranker: str | None = None
    """Name of the bundle's ranker; learned fusion needs one."""
    repeats: bool = False
    """Whether items the user has bought may come again. Hidden items never do."""
    context: bool = False
    """Whether sources start from the items on the page, where there are any, instead of the history."""
    diversity: Annotated[float, Field(ge=0)] = 0.0
    """Score taken from an item for each better item of its category, in units of the slate's score spread."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of slates whose last place goes to an item of the lower ranks, so that it can earn a click."""

    @model_validator(mode="after")
    def _somebody_has_a_say(self) -> Self:
        if not any(source.weight for source in self.sources):
            raise ValueError("every source has weight 0")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("a source is named twice")
        return self


class SourceChange(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    k: Candidates | None = None
    weight: Weight | None = None


class SceneChange(BaseModel):
    """What an operator wants of a scene other than the bundle says; what is not named stays with the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fusion: Fusion | None = None
    sources: Mapping[str, SourceChange] = {}
    """By name."""


class SceneError(ValueError):
    """A change that its scene does not allow; `field` is what is at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def changed(scene: Scene, change: SceneChange) -> Scene:
    """The scene with the change; sources that it does not have are passed over. Raises `SceneError`."""
    fusion = change.fusion or scene.fusion
    if fusion == "learned" and scene.ranker is None:
        raise SceneError("fusion", "The bundle has no ranker for this scene")
    sources = tuple(
        source.model_copy(update=of_source.model_dump(exclude_none=True))
        if (of_source := change.sources.get(source.name))
        else source
        for source in scene.sources
    )
    if not any(source.weight for source in sources):
        raise SceneError("sources", "Every source would have weight 0")
    return scene.model_copy(update={"fusion": fusion, "sources": sources})
