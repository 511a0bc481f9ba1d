"""A history too long to train on at once: on disk, as Parquet, and in memory a part at a time."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from models.recall import Interactions

PART = 2**21
"""Events of a part. A network makes of each up to 128 bytes, and has two parts while one takes the place of the other:
half a gigabyte."""

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Parts:
    """Interactions in files: all events of a user in one of them, in their order."""

    files: Sequence[Path]
    n_items: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Interactions:
        columns = {column.name: column.to_numpy(writable=True) for column in pl.read_parquet(self.files[index])}
        return Interactions(**columns, n_items=self.n_items)


@contextmanager
def spilled(past: Interactions, chosen: npt.NDArray[np.bool_], seed: int) -> Iterator[Parts]:
    """The `chosen` events [E], in as few parts as may be; which part a user is in is left to chance."""
    count = max(1, -(-int(chosen.sum()) // PART))
    users = int(past.user.max(initial=0)) + 1
    of_user = (np.random.default_rng(seed).permutation(users) % count).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.parquet") for index in range(count)]
        for index, file in enumerate(files):
            part = past.where(chosen & (of_user == index)[past.user])
            pl.DataFrame(dict(zip(Interactions._fields[:4], part[:4], strict=True))).write_parquet(file)
        yield Parts(files, past.n_items)


def forever(
    parts: Parts, batches: Callable[[int], Sequence[Batch]], rng: np.random.Generator, position: dict[str, Any]
) -> Iterator[tuple[int, Batch]]:
    """One pass over all parts after the other, each in another order: the number of a part and one of its batches.

    `batches` draws from `rng`, from which others may draw meanwhile. `position`, of what JSON can say, tells where the
    last pass is; given with the same `rng` to another call, that one goes on there.
    """
    while True:
        if not position:
            position.update(order=rng.permutation(len(parts)).tolist(), taken=0)
        now = rng.bit_generator.state
        # Of a part that was begun before, the batches have to be drawn as they were then.
        rng.bit_generator.state = position.setdefault("begun", now)
        index = position["order"][0]
        drawn = batches(index)
        if position["taken"]:
            rng.bit_generator.state = now
        for batch in drawn[position["taken"] :]:
            position["taken"] += 1
            yield index, batch
        left = position["order"][1:]
        position.clear()
        if left:
            position.update(order=left, taken=0)
