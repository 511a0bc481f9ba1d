"""Recall models: arrays in, one of the three artifact kinds out.

Catalog rows are 0..n-1. Interactions come as four arrays of the same length, sorted by (user, time):
`user` and `row` int32, `ts_ms` int64 (UTC epoch milliseconds), `kind` uint8 (`EventType`).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app.state.events import EventType


class Neighbours(NamedTuple):
    """For each item its neighbours, best first, padded with -1 and 0."""

    rows: npt.NDArray[np.int32]
    """[n, K]."""
    weights: npt.NDArray[np.float32]
    """[n, K]."""


STRENGTH = np.zeros(256, np.float32)
"""By event type: how much an event says that its user wants its item. What says the opposite, or nothing, has 0."""
STRENGTH[EventType.SELECT_ITEM] = 0.5
STRENGTH[EventType.VIEW_ITEM] = 0.5
STRENGTH[EventType.RATE] = 1.0
STRENGTH[EventType.ADD_TO_WISHLIST] = 1.0
STRENGTH[EventType.ADD_TO_CART] = 1.5
STRENGTH[EventType.BEGIN_CHECKOUT] = 1.5
STRENGTH[EventType.LIKE] = 1.5
STRENGTH[EventType.PURCHASE] = 2.0
