"""Everybody's events as arrays, and the user states that the service would have had at any moment."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from app.state.events import (
    ALIASES,
    EVENT,
    EXCLUDES,
    EXCLUSION,
    FOLDED,
    Events,
    EventType,
    UserState,
    event_key,
    item_key,
)
from models.data.tables import Tables
from models.data.times import DAY_MS

Rows: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Log:
    """Events of many users. Cutting it in time keeps `users`, so that a row means the same user in every part."""

    users: list[str]
    profiles: list[Mapping[str, str]]
    """Attributes of each user, as of no particular time."""
    user: npt.NDArray[np.int32]
    """[E] row in `users` of each event, ascending."""
    events: Events
    """[E] of dtype EVENT, every type of it; of one user ascending by (ts, event)."""

    @classmethod
    def from_tables(cls, tables: Tables) -> "Log":
        people = tables.users.sort("user_id")
        users = people["user_id"].to_list()
        user = _codes(tables.events["user_id"], people["user_id"])
        events = event_records(tables.events)
        order = np.lexsort((events["event"], events["ts"], user))
        profiles = [json.loads(attributes) for attributes in people["attributes"]]
        return cls(users, profiles, user[order], events[order])

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Log":
        return Log(self.users, self.profiles, self.user[chosen], self.events[chosen])

    def between(self, start_ms: int, end_ms: int) -> "Log":
        """The events with start <= ts < end."""
        return self.where((self.events["ts"] >= start_ms) & (self.events["ts"] < end_ms))

    def before(self, cut_ms: int) -> "Log":
        return self.where(self.events["ts"] < cut_ms)

    def split(self, cut_ms: int, test_days: float) -> "tuple[Log, Log]":
        """What may be learned from, and the window after the cut in which it is judged."""
        return self.before(cut_ms), self.between(cut_ms, cut_ms + round(test_days * DAY_MS))

    def starts(self) -> npt.NDArray[np.int64]:
        """[U + 1] where each user's events begin and the last one's end: user u has events[starts[u]:starts[u + 1]]."""
        return np.searchsorted(self.user, np.arange(len(self.users) + 1, dtype=np.int32))

    def states(self, cut_ms: int, window: int, users: Rows | None = None) -> list[UserState]:
        """What `fold` makes of each user's events with ts < cut; `users` are rows of `self.users`, default all."""
        # Another type than that of `user` would make every search copy the whole column.
        rows = np.arange(len(self.users), dtype=np.int32) if users is None else np.asarray(users, np.int32)
        begin, end = np.searchsorted(self.user, rows), np.searchsorted(self.user, rows, "right")
        count = end - begin
        whose = np.repeat(np.arange(len(rows)), count)
        events = self.events[np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count)]
        chosen = (events["ts"] < cut_ms) & _FOLDED[events["type"]]
        events, whose = events[chosen], whose[chosen]
        bounds = np.searchsorted(whose, np.arange(len(rows) + 1))
        first = np.maximum(bounds[:-1], bounds[1:] - window)

        kind = _EXCLUDES[events["type"]]
        causes = np.flatnonzero(kind)
        causes = causes[np.lexsort((kind[causes], events["item"][causes], whose[causes]))]
        caused = np.empty(len(causes), EXCLUSION)
        caused["item"], caused["kind"] = events["item"][causes], kind[causes]
        new = np.ones(len(causes), bool)
        new[1:] = (whose[causes[1:]] != whose[causes[:-1]]) | (caused[1:] != caused[:-1])
        excluded = caused[new]
        limits = np.searchsorted(whose[causes[new]], np.arange(len(rows) + 1))
        return [
            UserState(events[first[i] : bounds[i + 1]], excluded[limits[i] : limits[i + 1]], self.profiles[row])
            for i, row in enumerate(rows.tolist())
        ]


_FOLDED = np.isin(np.arange(256), list(FOLDED))
_EXCLUDES = np.zeros(256, np.uint8)
_EXCLUDES[list(EXCLUDES)] = list(EXCLUDES.values())


def item_keys(item_ids: pl.Series) -> npt.NDArray[np.int64]:
    """`item_key` of every id."""
    distinct = item_ids.unique()
    keys = np.fromiter(map(item_key, distinct), np.int64, len(distinct))
    return keys[_codes(item_ids, distinct)]


def event_records(events: pl.DataFrame) -> Events:
    """[E] EVENT in the order of the canonical rows: what `records` makes of each event, byte for byte."""
    lines = _lines(events["event_id"])
    made = np.zeros(events.height, EVENT)
    made["ts"] = events["timestamp"].to_numpy()
    made["event"] = np.fromiter(map(event_key, events["event_id"], lines), np.uint64, events.height)
    made["item"] = item_keys(events["item_id"])
    made["value"] = events["value"].fill_null(np.nan).to_numpy()
    made["quantity"] = events["quantity"].clip(0, 65_535).to_numpy()
    distinct = events["type"].unique()
    kinds = np.array([ALIASES.get(name, EventType.OTHER) for name in distinct], np.uint8)
    made["type"] = kinds[_codes(events["type"], distinct)]
    return made


def _lines(event_ids: pl.Series) -> pl.Series:
    """How many rows before have the same id."""
    hashed = event_ids.hash().to_numpy()
    order = np.argsort(hashed)
    equal = np.flatnonzero(hashed[order[1:]] == hashed[order[:-1]])
    several = np.zeros(len(hashed), bool)
    several[order[equal]] = several[order[equal + 1]] = True
    # A window over all ids, most of which are there once, takes four hundred bytes of each.
    counted = event_ids.filter(pl.Series(several)).to_frame().select(pl.int_range(pl.len()).over("event_id"))
    lines = np.zeros(len(hashed), np.int64)
    lines[several] = counted.to_series().to_numpy()
    return pl.Series(lines)


def _codes(values: pl.Series, distinct: pl.Series) -> npt.NDArray[np.int32]:
    """The position in `distinct` of every value."""
    return values.cast(pl.Enum(distinct)).to_physical().cast(pl.Int32).to_numpy()
