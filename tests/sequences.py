"""Sequences with one rule, and histories as an encoder reads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from app.state.events import EventType
from models.recall import Interactions, Vectors, gru4rec, sasrec, sequences

DAY_MS = 86_400_000
ITEMS = 12
HISTORY = 6


@contextmanager
def small_steps() -> Iterator[None]:
    """Training as a catalog of a dozen items needs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "TARGETS", 256)
        patch.setattr(sequences, "UNIFORM", 64)
        for model in (sasrec, gru4rec):
            patch.setattr(model, "EPOCHS", 8)
        yield


def bought(histories: Sequence[Sequence[int]], n_items: int) -> Interactions:
    """One user each, an item a day; everybody's last on the same day."""
    length = [len(sequence) for sequence in histories]
    row = np.array([row for sequence in histories for row in sequence], np.int32)
    ago = np.array([back for size in length for back in range(size, 0, -1)], np.int64)
    user = np.repeat(np.arange(len(histories), dtype=np.int32), length)
    return Interactions(user, row, (1000 - ago) * DAY_MS, np.full(len(row), EventType.PURCHASE, np.uint8), n_items)


def circle(users: int = 600, length: int = 9) -> Interactions:
    """After each item comes the next; the last is followed by the first."""
    return bought([[(user + place) % ITEMS for place in range(length)] for user in range(users)], ITEMS)


def inputs(rows: Sequence[Sequence[int]], fitted: Vectors, width: int | None = None) -> tuple[Tensor, ...]:
    """What the encoder reads of histories of purchases, a day apart, the last a day ago."""
    shape = (len(rows), width or fitted.history)
    read = torch.from_numpy(fitted.items if fitted.inputs is None else fitted.inputs)
    history, ages_s = torch.zeros(*shape, read.shape[1]), torch.zeros(shape)
    kinds = torch.zeros(shape, dtype=torch.int64)
    for index, of_user in enumerate(rows):
        for place, row in enumerate(reversed(of_user[-shape[1] :])):
            history[index, -1 - place] = read[row]
            kinds[index, -1 - place] = EventType.PURCHASE
            ages_s[index, -1 - place] = 86_400.0 * (place + 1)
    return history, kinds, ages_s, torch.zeros(len(rows), fitted.profile, dtype=torch.int64)


def scores(rows: Sequence[Sequence[int]], fitted: Vectors) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        users: npt.NDArray[np.float32] = fitted.encoder(*inputs(rows, fitted)).numpy()
    return users @ fitted.items.T
