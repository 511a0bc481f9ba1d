"""What an evaluation found, as one JSON document: written by `millirec evaluate`, read by `millirec report`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from models.data import DataError
from models.metrics import COLUMNS
from models.ranking.calibration import Bin

Number = Annotated[float | None, BeforeValidator(lambda value: None if value != value else value)]
"""None where nothing can be said: JSON has no NaN."""
Range = tuple[Number, Number]
"""A 95 % interval."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Line(_Part):
    """One row of the leaderboard."""

    name: str
    metrics: Mapping[str, Number]
    interval: Range
    """Of NDCG@20."""
    lead: Range | None
    """Of the pipeline's NDCG@20 less this row's, paired; None for the pipeline itself."""


class Segment(_Part):
    """What the pipeline does for some of the users, and the best of the other rows there."""

    attribute: str
    """`history` for the number of events before the cut, or the name of a profile attribute."""
    value: str
    users: int
    ndcg: Number
    interval: Range
    recall: Number
    rival: str
    rival_ndcg: Number


class Spread(_Part):
    """The gap between the segments of one attribute: see `metrics.Gap`."""

    attribute: str
    best: str
    worst: str
    gap: Number
    interval: Range
    by_chance: Number


class ItemGroup(_Part):
    """How many of the wanted items of one kind reach the slates."""

    attribute: str
    """`popularity` or `department`."""
    value: str
    users: int
    """Users who wanted such an item."""
    pairs: int
    """(user, wanted item) pairs."""
    recall: Number
    """Recall@20 of these items, mean over users."""
    interval: Range
    candidate_recall: Number
    """The same of the candidates: the ceiling."""


class SourceRecall(_Part):
    """What one source adds to the candidates."""

    name: str
    k: int
    recall: Number
    """Mean share of a user's wanted items that it proposes."""
    alone: Number
    """That no other source proposes."""


class Ablated(_Part):
    """The pipeline without one of its parts, the ranker as it is."""

    part: Literal["source", "features"]
    name: str
    ndcg: Number
    loss: Range
    """Of the full pipeline's NDCG@20 less this one's, paired; above 0 as a whole, the part helps."""


class ViewResult(_Part):
    """One view of the shop (`new` or `all`), judged."""

    name: str
    users: int
    candidate_recall: Number
    leaderboard: tuple[Line, ...]
    segments: tuple[Segment, ...]
    spreads: tuple[Spread, ...]
    items: tuple[ItemGroup, ...]
    sources: tuple[SourceRecall, ...]
    ablation: tuple[Ablated, ...] = ()
    reliability: tuple[Bin, ...] = ()
    """Of the served items, where the ranker says how likely each is wanted."""


class Result(_Part):
    """One bundle, judged on what its users did in the days after the cut."""

    format: Literal[1] = 1
    version: str
    created_at: str
    cut_ms: int
    days: float
    provenance: Mapping[str, Any]
    losses: Mapping[str, tuple[Range, ...]]
    """By model: training and validation loss of each epoch."""
    views: tuple[ViewResult, ...]


def read(path: Path) -> Result:
    """Raises `DataError` for a file that is no such document."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not a result of `millirec evaluate --out`: {where} {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table to show: texts, the first column left, the others right."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        # What a shop calls its categories may hold what ends a cell or a line.
        rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in self.rows]
        head = [[*self.columns], ["---", *["---:"] * (len(self.columns) - 1)]]
        return f"{self.title}: {self.note}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in [*head, *rows])


def sheets(view: ViewResult) -> list[Sheet]:
    """Everything beside the leaderboard."""
    found = [
        Sheet(
            "Candidates",
            f"the sources propose {_text(view.candidate_recall)} of what was wanted, the slates show "
            f"{_text(view.leaderboard[-1].metrics['recall@20'])}",
            ("source", "k", "recall", "alone"),
            [(source.name, str(source.k), _text(source.recall), _text(source.alone)) for source in view.sources],
        ),
        Sheet(
            "Users",
            "the pipeline by what is known of them, and the best other row of the leaderboard there",
            ("users", "count", "ndcg@20", "95 %", "recall@20", "best other", "its ndcg@20"),
            [
                (
                    f"{one.attribute}: {one.value}",
                    f"{one.users:,}",
                    _text(one.ndcg),
                    _range(one.interval),
                    _text(one.recall),
                    one.rival,
                    _text(one.rival_ndcg),
                )
                for one in view.segments
            ],
        ),
        Sheet(
            "Items",
            "recall@20 of the wanted items of a kind, and the share of them among the candidates",
            ("items", "users", "wanted", "recall@20", "95 %", "candidates"),
            [
                (
                    f"{one.attribute}: {one.value}",
                    f"{one.users:,}",
                    f"{one.pairs:,}",
                    _text(one.recall),
                    _range(one.interval),
                    _text(one.candidate_recall),
                )
                for one in view.items
            ],
        ),
        Sheet(
            "Fairness",
            "ndcg@20 of the best segment less that of the worst; below what chance gives it says nothing. Gini of the "
            f"items' exposure: {_text(view.leaderboard[-1].metrics['gini@20'])}",
            ("attribute", "best", "worst", "gap", "95 %", "by chance"),
            [
                (one.attribute, one.best, one.worst, _text(one.gap), _range(one.interval), _text(one.by_chance))
                for one in view.spreads
            ],
        ),
        Sheet(
            "Ablation",
            "ndcg@20 without a source, or with a group of features set to their mean; the ranker as it is",
            ("without", "ndcg@20", "loss, 95 %"),
            [(f"{one.part}: {one.name}", _text(one.ndcg), _range(one.loss)) for one in view.ablation],
        ),
    ]
    return [sheet for sheet in found if sheet.rows]


def leaderboard(view: ViewResult) -> Sheet:
    """The pipeline and everything it is held against."""
    return Sheet(
        "Leaderboard",
        f"{view.users:,} users, the whole catalog ranked",
        ("", *COLUMNS[:1], "95 %", *COLUMNS[1:], "gini@20", "the pipeline's lead, 95 %"),
        [
            (
                line.name,
                *[_text(line.metrics.get(name)) for name in COLUMNS[:1]],
                _range(line.interval),
                *[_text(line.metrics.get(name)) for name in (*COLUMNS[1:], "gini@20")],
                _range(line.lead) if line.lead else "",
            )
            for line in view.leaderboard
        ],
    )


def _text(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _range(interval: Range) -> str:
    return "-" if None in interval else f"{_text(interval[0])} .. {_text(interval[1])}"
