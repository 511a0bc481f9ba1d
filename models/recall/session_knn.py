"""Session-kNN and user-kNN: baskets like the one at hand, and what else is in them.

A basket is a session (Jannach & Ludewig, RecSys 2017; rare items weigh more as in VS-kNN: Ludewig & Jannach, UMUAI
2018; recent baskets as in STAN: Garg et al., SIGIR 2019), or all that a user did, which makes it user-based
collaborative filtering with the cosine (Herlocker et al., SIGIR 1999).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions

MS_PER_MINUTE = 60_000
OLDEST_HALF_LIVES = 8.0
"""Older events weigh no less, so that float16 holds the weights."""

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]


class Baskets(NamedTuple):
    """From an item to its baskets, and from a basket to its items.

    With the anchors of a user, items i that weigh a[i]:

        likeness(b) = sum of a[i] * of_weights[i, b] over the anchors i
        score(j) = sum of likeness(b) * weights[b, j] over the likest baskets b, 200 or so; of equals the first
    """

    of_item: npt.NDArray[np.int32]
    """[n, K1]: the baskets with the item, latest first, padded with -1. Basket 0 is the latest of all."""
    of_weights: npt.NDArray[np.float32]
    """[n, K1], padded with 0."""
    items: npt.NDArray[np.int32]
    """[m, K2]: the items of the basket, best first, padded with -1."""
    weights: npt.NDArray[np.float32]
    """[m, K2], padded with 0."""


def fit(
    past: Interactions,
    *,
    idle_minutes: float | None = 30.0,
    half_life_days: float = 120.0,
    damping: float = 0.25,
    baskets_of_item: int = 128,
    items_of_basket: int = 64,
) -> Baskets:
    """Baskets of a user end where nothing happens for `idle_minutes`; with None each user is one basket.

    With x[b, i] the greatest decayed strength of the events on i in basket b, over (how many baskets have
    i) ** damping: `weights` are x and `of_weights` x over the root of how many items b has. The two
    limits keep the latest baskets of an item and the weightiest items of a basket; baskets that no item
    leads to are left out. The defaults were chosen on RetailRocket sessions and, with users as baskets, on
    Online Retail, both cut before their test windows.
    """
    user, row, ts_ms, kind, n_items = past.where(STRENGTH[past.kind] > 0)
    begins = session_begins(user, ts_ms, np.inf if idle_minutes is None else idle_minutes)
    ends = ts_ms[np.roll(begins, -1)]
    number = np.empty(len(ends), np.int64)
    number[np.argsort(-ends, kind="stable")] = np.arange(len(ends))
    basket = number[np.cumsum(begins) - 1]
    half_lives = np.minimum((ts_ms.max(initial=0) - ts_ms) / DAY_MS / half_life_days, OLDEST_HALF_LIVES)
    pair, index = np.unique(basket * n_items + row, return_inverse=True)
    x = np.zeros(len(pair), np.float32)
    np.maximum.at(x, index, STRENGTH[kind] * np.exp2(-half_lives, dtype=np.float32))
    basket, item = pair // n_items, pair % n_items
    x *= np.bincount(item, minlength=n_items)[item] ** np.float32(-damping)
    size = np.bincount(basket)
    root = np.sqrt(size[basket]).astype(np.float32)
    of_item, of_weights = _padded(item, basket, x / root, basket, n_items, baskets_of_item)
    items, weights = _padded(basket, item, x, -x, len(size), items_of_basket)
    reached = np.unique(of_item[of_item >= 0])
    of_item = np.where(of_item >= 0, np.searchsorted(reached, of_item), -1).astype(np.int32)
    return Baskets(of_item, of_weights, items[reached], weights[reached])


def session_begins(
    user: npt.NDArray[np.int32], ts_ms: npt.NDArray[np.int64], idle_minutes: float
) -> npt.NDArray[np.bool_]:
    """[E]: whether a session begins with the event: it is its user's first, or the first after a pause."""
    begins = np.ones(len(user), bool)
    begins[1:] = (user[1:] != user[:-1]) | (np.diff(ts_ms) > idle_minutes * MS_PER_MINUTE)
    return begins


def _padded(
    group: Ints, member: Ints, weight: Floats, order: npt.NDArray[np.generic], size: int, width: int
) -> tuple[npt.NDArray[np.int32], Floats]:
    """The members [size, width] of each group and their weights, the lowest `order` first."""
    by = np.lexsort((order, group))
    starts = np.searchsorted(group[by], np.arange(size))
    place = np.arange(len(by)) - starts[group[by]]
    by, place = by[place < width], place[place < width]
    width = int(place.max(initial=0)) + 1
    members, weights = np.full((size, width), -1, np.int32), np.zeros((size, width), np.float32)
    members[group[by], place], weights[group[by], place] = member[by], weight[by]
    return members, weights
