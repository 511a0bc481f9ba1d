"""Item transitions: what people wanted after an item; next, next but one, and so on.

A Markov chain over items (Rendle et al., FPMC, WWW 2010) that also counts steps over what came between, the
farther the less, as the sequential rules of Ludewig & Jannach (UMUAI, 2018) do. Order is all it reads of a user's
events: those of equal times follow each other as they are given.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions, Neighbours
from models.recall.pairs import best_pairs

DAMPED_FROM = 30.0
"""Events; a user with many more counts less per event, so that no reseller and no robot outweighs the others."""
OF_ANCHOR = 0.5
OF_NEIGHBOUR = 0.2
SHRINK = 3.0
OLDEST_HALF_LIVES = 8.0
"""Older events weigh no less, so that float16 holds the weights."""


def fit(
    past: Interactions,
    *,
    k: int = 100,
    steps: int = 10,
    step_decay: float = 0.85,
    backward: float = 0.25,
    half_life_days: float = 30.0,
) -> Neighbours:
    """For each item the `k` items that most people went on to, best first.

    t(i, j) sums over all events of i and of j, at most `steps` later in the same user's events: both strengths,
    times `step_decay` for each event between the two, halved every `half_life_days` of age of the later one, over
    sqrt(1 + events of the user / 30). With c = t + `backward` * t' and m the mean of the row sums of c, the weight
    of j for i is c(i, j) / ((row sum of i + 3m) ** 0.5 * (column sum of j + 3m) ** 0.2).

    The defaults were chosen on Amazon Beauty, predicting the item before last.
    """
    counts = _counts(past.where(STRENGTH[past.kind] > 0), steps, step_decay, half_life_days)
    counts = (counts + backward * counts.T).tocsr()
    leaving, entering = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
    floor = SHRINK * leaving[leaving > 0].mean() if counts.nnz else 1.0
    of_anchor: npt.NDArray[np.float32] = ((leaving + floor) ** OF_ANCHOR).astype(np.float32)
    of_neighbour: npt.NDArray[np.float32] = ((entering + floor) ** OF_NEIGHBOUR).astype(np.float32)

    def weight(
        anchor: npt.NDArray[np.int64], other: npt.NDArray[np.int32], count: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        weights: npt.NDArray[np.float32] = count / (of_anchor[anchor] * of_neighbour[other])
        return weights

    return best_pairs(sp.eye_array(past.n_items, dtype=np.float32, format="csr"), counts, weight, k)


def _counts(past: Interactions, steps: int, step_decay: float, half_life_days: float) -> sp.csr_array:
    """t without its diagonal, float32 [n, n]."""
    user, row, ts_ms, kind, n_items = past
    from_ = STRENGTH[kind]
    half_lives = (ts_ms.max(initial=0) - ts_ms) / DAY_MS / half_life_days
    to = from_ * np.exp2(-np.minimum(half_lives, OLDEST_HALF_LIVES))
    to /= np.sqrt(1.0 + np.bincount(user)[user] / DAMPED_FROM)
    counts = sp.csr_array((n_items, n_items), dtype=np.float32)
    for step in range(1, min(steps, len(user) - 1) + 1):
        near = (user[step:] == user[:-step]) & (row[step:] != row[:-step])
        value = (from_[:-step] * to[step:])[near] * step_decay ** (step - 1)
        pairs = row[:-step][near], row[step:][near]
        counts += sp.csr_array((value.astype(np.float32), pairs), shape=counts.shape)
    return counts
