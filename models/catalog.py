"""Catalog columns and item statistics, as of a point in time."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from app.catalog import pack_strings
from app.state.events import MS_PER_DAY, Events, EventType, item_key
from models.data.log import Log
from models.recall import Interactions
from models.recall.discovery import first_times

STATISTICS = (
    "purchases",
    "purchases.28d",
    "purchases.7d",
    "views",
    "views.7d",
    "buyers",
    "buyers.28d",
    "discoveries",
    "repeat",
    "gap",
    "trend",
    "conversion",
)
"""Column 0 is the popularity by which the engine orders items when it knows nothing of the user."""

VIEWS = (EventType.VIEW_ITEM, EventType.SELECT_ITEM)


@dataclass(frozen=True, slots=True)
class Items:
    """The items listed before `cut_ms`, ascending by `item_key`: their position is their catalog row."""

    frame: pl.DataFrame
    key: npt.NDArray[np.int64]
    created_ms: npt.NDArray[np.int64]

    def rows(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key, -1 where there is none."""
        if not len(self.key):
            return np.full(len(keys), -1)
        found = np.searchsorted(self.key, keys).clip(max=len(self.key) - 1)
        return np.where(self.key[found] == keys, found, -1)


def listed(items: pl.DataFrame, log: Log, cut_ms: int) -> Items:
    """The items that the shop had before `cut_ms`.

    An item without a `created_at` was there from its first event on; one with neither, always.
    """
    key = np.fromiter(map(item_key, items["item_id"]), np.int64, len(items))
    first: dict[int, int] = {}
    order = np.argsort(log.events["ts"], kind="stable")
    events = log.events[order]
    keys, index = np.unique(events["item"], return_index=True)
    first = dict(zip(keys.tolist(), events["ts"][index].tolist(), strict=True))
    given = items["created_at"].to_list()
    created = np.array(
        [c if c is not None else first.get(k, 0) for c, k in zip(given, key.tolist(), strict=True)], np.int64
    )
    kept = np.flatnonzero(created < cut_ms)
    kept = kept[np.argsort(key[kept])]
    if len(np.unique(key[kept])) != len(kept):
        raise ValueError("two items share an id")
    return Items(items[kept], key[kept], created[kept])


def columns(items: Items, log: Log, cut_ms: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of catalog.safetensors and the vocabularies of categories (path prefixes) and brands."""
    frame = items.frame
    paths = [_prefixes(path) for path in frame["category"].fill_null("")]
    categories = sorted({prefix for path in paths for prefix in path})
    category_code = {name: code for code, name in enumerate(categories)}
    depth = max((len(path) for path in paths), default=1) or 1
    category = np.full((len(frame), depth), -1, np.int32)
    for row, path in enumerate(paths):
        category[row, : len(path)] = [category_code[name] for name in path]
    brands = sorted({brand for brand in frame["brand"] if brand})
    brand_code = {name: code for code, name in enumerate(brands)}
    brand = np.array([brand_code.get(name or "", -1) for name in frame["brand"]], np.int32)
    tensors = {
        "key": torch.from_numpy(items.key),
        "price": torch.from_numpy(frame["price"].cast(pl.Float32).fill_null(float("nan")).to_numpy().copy()),
        "category": torch.from_numpy(category),
        "brand": torch.from_numpy(brand),
        "available": torch.ones(len(frame), dtype=torch.bool),
        "created_ms": torch.from_numpy(items.created_ms),
        "statistics": torch.from_numpy(statistics(items, log, cut_ms)),
        **pack_strings(frame["item_id"].to_list(), "id"),
        **pack_strings([_attributes(row) for row in frame.iter_rows(named=True)], "attributes"),
    }
    return tensors, categories, brands


def statistics(items: Items, log: Log, cut_ms: int) -> npt.NDArray[np.float32]:
    """float32 [n, len(STATISTICS)] over the events before `cut_ms`."""
    size = len(items.key)
    past = log.events["ts"] < cut_ms
    events, user = log.events[past], log.user[past]
    row = items.rows(events["item"])
    age_days = (cut_ms - events["ts"]) / MS_PER_DAY
    bought = (events["type"] == EventType.PURCHASE) & (row >= 0)
    viewed = np.isin(events["type"], VIEWS) & (row >= 0)

    def count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        return np.bincount(row[mask], minlength=size).astype(np.float64)

    def buyers(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        pairs = np.unique(row[mask] * np.int64(len(log.users)) + user[mask])
        return np.bincount(pairs // max(len(log.users), 1), minlength=size).astype(np.float64)

    purchases, recent, week = count(bought), count(bought & (age_days <= 28)), count(bought & (age_days <= 7))
    everyone = buyers(bought)
    repeat, gap = _repurchase(row[bought], user[bought], events["ts"][bought], size, everyone)
    views = count(viewed)
    stacked = np.stack(
        [
            np.log1p(purchases),
            np.log1p(recent),
            np.log1p(week),
            np.log1p(views),
            np.log1p(count(viewed & (age_days <= 7))),
            np.log1p(everyone),
            np.log1p(buyers(bought & (age_days <= 28))),
            np.log1p(_discoveries(row, user, events, size, cut_ms)),
            repeat,
            gap,
            np.log((week + 1) / (recent / 4 + 1)),
            (purchases + 1) / (views + purchases + 20),
        ],
        1,
    )
    return stacked.astype(np.float32)


def _discoveries(
    row: npt.NDArray[np.int64], user: npt.NDArray[np.int32], events: Events, size: int, cut_ms: int
) -> npt.NDArray[np.float64]:
    """Returning users who wanted the item for the first time in the last 28 days, those of the last 7 counted twice."""
    known = row >= 0
    past = Interactions(user[known], row[known].astype(np.int32), events["ts"][known], events["type"][known], size)
    _, rows, age_days, returning = first_times(past, cut_ms)
    weight = returning * ((age_days <= 28).astype(np.float64) + (age_days <= 7))
    return np.bincount(rows, weight, minlength=size).astype(np.float64)


def _repurchase(
    row: npt.NDArray[np.int64],
    user: npt.NDArray[np.int32],
    ts: npt.NDArray[np.int64],
    size: int,
    buyers: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per item, the smoothed share of buyers who came back for it on a later day, and log(1 + mean days between)."""
    day = ts // int(MS_PER_DAY)
    visits = np.unique(np.stack([row, user.astype(np.int64), day], 1), axis=0)
    again = (visits[1:, :2] == visits[:-1, :2]).all(1)
    gaps = (visits[1:, 2] - visits[:-1, 2])[again].astype(np.float64)
    item = visits[1:, 0][again]
    pairs = np.unique(visits[1:, :2][again], axis=0) if again.any() else np.empty((0, 2), np.int64)
    returned = np.bincount(pairs[:, 0], minlength=size)
    total, mean = np.bincount(item, gaps, minlength=size), float(gaps.mean()) if len(gaps) else 30.0
    overall = returned.sum() / max(buyers.sum(), 1.0)
    repeat = (returned + 10 * overall) / (buyers + 10)
    return repeat, np.log1p((total + 5 * mean) / (np.bincount(item, minlength=size) + 5))


def _prefixes(path: str) -> list[str]:
    parts = [part.strip() for part in path.split(">") if part.strip()]
    return [" > ".join(parts[: end + 1]) for end in range(len(parts))]


def _attributes(row: dict[str, Any]) -> str:
    named = {name: row[name] for name in ("title", "category", "brand", "price") if row[name] is not None}
    return json.dumps(named | json.loads(row["attributes"] or "{}"), ensure_ascii=False, separators=(",", ":"))
