"""Scenes: what a list on a page is made of, as validated configuration inside the bundle."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fusion = Literal["learned", "reciprocal_rank", "voting", "weighted", "cascade"]


class SceneSource(BaseModel):
    """One source's part in a scene."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    k: Annotated[int, Field(ge=1, le=1000)] = 100
    """How many candidates the source may propose."""
    weight: Annotated[float, Field(ge=0)] = 1.0
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
