"""What a user tower learns from: moments of a history, with what came before each and what was wanted after it."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.recall import STRENGTH, Interactions

TARGETS = 16
"""Events after a moment that it has to foresee."""
BASKET_MS = 1000
"""Events that follow each other faster are of one basket."""
LARGEST = 1024
"""Events of a set that are told from it, at most."""
TOLD = 0.2
"""Share of a held-out set that has to be told from its rest."""


def _baskets(past: Interactions) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which events are the first of their user, and which the first of a basket."""
    first = np.ones(len(past.user), bool)
    first[1:] = past.user[1:] != past.user[:-1]
    later = first.copy()
    later[1:] |= np.diff(past.ts_ms) >= BASKET_MS
    return first, later


class Moments:
    """Times of which something can be learned: before each event that is later than the one before it by `BASKET_MS`.

    Lines of one basket are one moment: none of them is another's history. With `sets`, a user of a single basket is
    one: all of it is told from all of it, or, to be `tested`, its end from the rest.
    """

    def __init__(self, past: Interactions, history: int, sets: bool, tested: bool = False) -> None:
        first, later = _baskets(past)
        at, begin = np.flatnonzero(later), np.flatnonzero(first)
        owner = np.cumsum(first)[at] - 1
        begin, end = begin[owner], np.append(begin[1:], len(first))[owner]
        whole = (np.bincount(owner)[owner] == 1) & (end - begin > 1) & sets
        cut = end - np.ceil(TOLD * (end - begin)).astype(np.int64) if tested else end
        # The history ends at `now`. What is `known` is no negative, and wanted from `start` on.
        now = np.where(whole, cut, at)
        known = np.where(whole, np.maximum(begin, end - LARGEST), at)
        start = now if tested else known
        end = np.where(whole, end, np.minimum(at + TARGETS, end))
        wanted = np.append(0, np.cumsum(STRENGTH[past.kind] > 0))
        useful = wanted[end] > wanted[start]
        self.now, self.begin, self.known, self.start, self.end = (
            torch.from_numpy(x[useful]) for x in (now, begin, known, start, end)
        )
        self.user = past.user[at[useful]]
        self.ts_ms = past.ts_ms[np.minimum(now, end - 1)[useful]]
        self._row = torch.from_numpy(past.row.astype(np.int64))
        self._kind = torch.from_numpy(past.kind.astype(np.int64))
        self._strength = torch.from_numpy(STRENGTH[past.kind])
        self._ts_ms = torch.from_numpy(past.ts_ms)
        self._history = torch.arange(-history, 0)

    def before(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, L] (-1 where padding), kinds and ages in seconds of the last events before these moments."""
        index = self.now[chosen, None] + self._history
        real = index >= self.begin[chosen, None]
        index = index.clamp(min=0)
        age_s = (torch.from_numpy(self.ts_ms[chosen.numpy(), None]) - self._ts_ms[index]).float() / 1000.0
        return (
            torch.where(real, self._row[index], -1),
            torch.where(real, self._kind[index], 0),
            torch.where(real, age_s, 0.0),
        )

    def after(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows [B, T] that are no negatives (-1 where padding), and how much each is wanted."""
        known, end = self.known[chosen, None], self.end[chosen, None]
        index = known + torch.arange(int((end - known).numpy().max(initial=0)))
        real = index < end
        wanted = real & (index >= self.start[chosen, None])
        index = index.clamp(max=len(self._row) - 1)
        strength = torch.where(real, self._strength[index], 0.0)
        rows, order = torch.where(strength > 0, self._row[index], -1).sort(dim=1)
        again = torch.zeros_like(real)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]
        return torch.where(again, -1, rows), torch.where(wanted, strength, 0.0).gather(1, order)


def held_out(past: Interactions, judged: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which of the `judged` users' events [E] validation has to foresee: all, or of a set its end."""
    of, count, alone = owners(past.where(judged))
    from_end = np.cumsum(count)[of] - 1 - np.arange(len(of))
    told = judged.copy()
    told[judged] = ~(alone & (count > 1))[of] | (from_end < np.ceil(TOLD * count)[of])
    return told


def owners(past: Interactions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Which of the users [U] at hand each event is of, how many events they have, and who has one basket."""
    first, later = _baskets(past)
    of = np.cumsum(first) - 1
    return of, np.bincount(of), np.bincount(of, later) == 1
