"""The canonical form of a shop's history."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import polars as pl
from rich.table import Table

EVENTS = pl.Schema(
    {
        "user_id": pl.String(),
        "item_id": pl.String(),
        "type": pl.String(),
        "timestamp": pl.Int64(),
        "value": pl.Float64(),
        "quantity": pl.Int64(),
        "event_id": pl.String(),
    }
)
ITEMS = pl.Schema(
    {
        "item_id": pl.String(),
        "title": pl.String(),
        "category": pl.String(),
        "brand": pl.String(),
        "price": pl.Float64(),
        "created_at": pl.Int64(),
        "attributes": pl.String(),
    }
)
USERS = pl.Schema({"user_id": pl.String(), "attributes": pl.String()})


class DataError(ValueError):
    """A table that cannot be used; the message is one line that names it and what it lacks."""


Effect: TypeAlias = Literal["dropped", "repaired", "noted", "added"]


@dataclass(frozen=True, slots=True)
class Finding:
    table: str
    effect: Effect
    reason: str
    rows: int
    first: int | None = field(default=None, compare=False)
    """The first of these rows, counted from 1 below any header; None where rows have no order."""

    def line(self) -> str:
        first = "" if self.first is None else f", first in row {self.first:,}"
        return f"{self.effect}: {self.reason}{first}"


@dataclass(frozen=True, slots=True)
class Report:
    """What became of every row: `kept` = `read` - dropped + added, in every table that was read."""

    source: str
    read: Mapping[str, int]
    kept: Mapping[str, int]
    findings: tuple[Finding, ...] = ()

    def rows(self, reason: str, table: str = "events") -> int:
        return sum(found.rows for found in self.findings if (found.table, found.reason) == (table, reason))

    def __rich__(self) -> Table:
        table = Table("table", "rows", "what", title=self.source, title_justify="left")
        table.columns[1].justify = "right"
        for name, kept in self.kept.items():
            table.add_section()
            table.add_row(
                name,
                f"{self.read[name]:,}" if name in self.read else "",
                "read" if name in self.read else "made from the events",
            )
            for found in self.findings:
                if found.table == name:
                    table.add_row("", f"{found.rows:,}", found.line())
            table.add_row("", f"{kept:,}", "kept", style="bold")
        return table


@dataclass(frozen=True, slots=True)
class Tables:
    """A shop's history. Rows of `events` that share an event_id are the lines of one event, in its order.

    events: user_id, item_id, type (a lowercase `EventType` name, or the unknown type as it came),
    timestamp (UTC epoch ms), value (unit price paid, or the rating; null where unknown), quantity,
    event_id; ascending by time. items: item_id (unique), title, category ("A > B > C"), brand, price,
    created_at (UTC epoch ms), attributes (a JSON object of everything else), and vector (List[f32])
    where the shop has one. users: user_id (unique, everyone in events is there), attributes (a JSON
    object whose values are strings).
    """

    events: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    report: Report
