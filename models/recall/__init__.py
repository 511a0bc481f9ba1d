"""Recall models: interactions in, one of the three artifact kinds out."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from app.state.events import MS_PER_DAY, EventType


class Interactions(NamedTuple):
    """What happened before the cut: [E] events of known items, sorted by (user, time)."""

    user: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    """Catalog rows, 0..n_items-1."""
    ts_ms: npt.NDArray[np.int64]
    """UTC epoch milliseconds."""
    kind: npt.NDArray[np.uint8]
    """`EventType`."""
    n_items: int

    def where(self, mask: npt.NDArray[np.bool_] | slice) -> "Interactions":
        return Interactions(self.user[mask], self.row[mask], self.ts_ms[mask], self.kind[mask], self.n_items)


class Neighbours(NamedTuple):
    """For each item its neighbours, best first, padded with -1 and 0."""

    rows: npt.NDArray[np.int32]
    """[n, K]."""
    weights: npt.NDArray[np.float32]
    """[n, K]."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """A user encoder and item vectors; the score of an item is the dot product of user and item vector."""

    items: npt.NDArray[np.float32]
    """[n, d]."""
    encoder: nn.Module | None
    """`forward(history, kinds, ages_s, profile) -> [B, d]`, exportable at any B; see `app.bundle.VectorSpec`. Without
    one a user is the sum of the inputs of their events, each by its strength and age, as a unit vector."""
    history: int
    """L: events that make a user."""
    profile: int = 1
    """P: profile attributes that the encoder reads."""
    inputs: npt.NDArray[np.float32] | None = None
    """[n, c]: what `history` holds of each item, where that is not its own vector."""
    half_life_days: float | None = None
    """In which an event loses half its weight where there is no encoder."""
    losses: tuple[tuple[float, float], ...] = ()
    """Training and validation loss of each epoch; empty where nothing was learned by gradient."""

    def users(self, past: Interactions, chosen: npt.NDArray[np.int32], now_ms: int) -> npt.NDArray[np.float32]:
        """Vectors [B, d] of users by number, without their profiles, as they ask at `now_ms`."""
        begin, end = (np.searchsorted(past.user, chosen, side) for side in ("left", "right"))
        index = end[:, None] + np.arange(-self.history, 0)
        real = index >= begin[:, None]
        read, event = self.items if self.inputs is None else self.inputs, index[real]
        history = np.zeros((*real.shape, read.shape[1]), np.float32)
        kinds, age_ms = np.zeros(real.shape, np.int64), np.zeros(real.shape, np.int64)
        history[real], kinds[real], age_ms[real] = read[past.row[event]], past.kind[event], now_ms - past.ts_ms[event]
        if self.encoder is None:
            weight = STRENGTH[kinds]
            if self.half_life_days is not None:
                weight = weight * np.exp2(-age_ms / MS_PER_DAY / self.half_life_days)
            summed = np.einsum("bld,bl->bd", history, weight)
            return np.asarray(summed / np.linalg.norm(summed, axis=1, keepdims=True).clip(1e-12), np.float32)
        given = history, kinds, (age_ms / 1000.0).astype(np.float32), np.zeros((len(chosen), self.profile), np.int64)
        with torch.inference_mode():
            # A solver leaves its answers column by column.
            return np.ascontiguousarray(self.encoder(*map(torch.from_numpy, given)).numpy())

    def export(self) -> torch.export.ExportedProgram:
        """The encoder for batches of any size, 1 included."""
        if self.encoder is None:
            raise ValueError("users that are sums have no encoder")
        width = (self.items if self.inputs is None else self.inputs).shape[1]
        inputs = (
            torch.zeros(2, self.history, width),
            torch.zeros(2, self.history, dtype=torch.int64),
            torch.zeros(2, self.history),
            torch.zeros(2, self.profile, dtype=torch.int64),
        )
        batch = torch.export.Dim("batch", min=1)
        return torch.export.export(self.encoder, inputs, dynamic_shapes=({0: batch},) * len(inputs))


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
