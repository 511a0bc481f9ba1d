"""Session co-visitation: what is seen or bought within minutes of an item.

The candidate generator of the leading solutions of the OTTO challenge (Kaggle, 2022), built on the counts of
co-visits of Davidson et al. (RecSys 2010). It knows no direction: on RetailRocket sessions what came before an item
tells as much as what came after.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions, Neighbours
from models.recall.item_cf import OLDEST_HALF_LIVES
from models.recall.pairs import best_pairs
from models.recall.session_knn import MS_PER_MINUTE, session_begins

IDLE_MINUTES = 30.0
"""Pause that ends a session."""
LAGS = 32
"""Events of a session further apart are no pair."""
AT_A_TIME = 200_000
"""Events whose pairs are in memory at a time: some 400 MB."""


def fit(
    past: Interactions,
    *,
    k: int = 50,
    near_minutes: float = 2.0,
    half_life_days: float = 120.0,
    damping: float = 0.8,
) -> Neighbours:
    """For each item the `k` most co-visited, weights summing to 1.

    Two events of a session on different items weigh the root of the product of their strengths, decayed by
    `half_life_days`, times 2 ** (-minutes between them / near_minutes); v[i, j] is the sum over the sessions of
    their weightiest pair. With t[i] the sum of v[i, :] plus the mean of these sums, the weight of j for i goes
    as v[i, j] / (t[i] ** damping * t[j] ** (1 - damping)). The defaults were chosen on RetailRocket sessions and
    buyers, cut before their test windows.
    """
    visits = together(past, idle_minutes=IDLE_MINUTES, near_minutes=near_minutes, half_life_days=half_life_days)
    total = np.asarray(visits.sum(1), np.float32).ravel()
    total += total.sum() / max(np.count_nonzero(total), 1)
    of_anchor, of_neighbour = total ** np.float32(damping), total ** np.float32(1.0 - damping)
    itself = sp.identity(past.n_items, np.float32, "csr")
    near = best_pairs(visits, itself, lambda i, j, v: (v / (of_anchor[i] * of_neighbour[j])).astype(np.float32), k)
    listed = near.weights.sum(1, keepdims=True)
    np.divide(near.weights, listed, out=near.weights, where=listed > 0)
    return near


def together(past: Interactions, *, idle_minutes: float, near_minutes: float, half_life_days: float) -> sp.csr_matrix:
    """v of `fit`, symmetric [n, n]; a session ends where nothing happens for `idle_minutes`."""
    user, row, ts_ms, kind, n_items = past.where(STRENGTH[past.kind] > 0)
    session = np.cumsum(session_begins(user, ts_ms, idle_minutes), dtype=np.int64)
    half_lives = np.minimum((ts_ms.max(initial=0) - ts_ms) / DAY_MS / half_life_days, OLDEST_HALF_LIVES)
    decayed = STRENGTH[kind] * np.exp2(-half_lives)
    visits = sp.csr_matrix((n_items, n_items), dtype=np.float32)
    edges = [*np.unique(np.searchsorted(session, session[::AT_A_TIME])).tolist(), len(user)]
    for start, end in pairwise(edges):
        part = slice(start, end)
        visits += _weightiest(session[part], row[part], ts_ms[part], decayed[part], near_minutes, n_items)
    visits = (visits + visits.T).tocsr()
    visits.eliminate_zeros()
    return visits


def _weightiest(
    session: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    ts_ms: npt.NDArray[np.int64],
    strength: npt.NDArray[np.float64],
    near_minutes: float,
    n_items: int,
) -> sp.csr_matrix:
    """[n, n], entries above the diagonal alone: the weightiest pair of each session, summed over the sessions."""
    keys, weights = [np.empty(0, np.int64)], [np.empty(0)]
    for lag in range(1, LAGS + 1):
        one = np.flatnonzero((session[lag:] == session[:-lag]) & (row[lag:] != row[:-lag]))
        other = one + lag
        low, high = np.minimum(row[one], row[other]), np.maximum(row[one], row[other])
        keys.append(((session[one] - session[0]) * n_items + low) * n_items + high)
        minutes = (ts_ms[other] - ts_ms[one]) / MS_PER_MINUTE
        weights.append(np.sqrt(strength[one] * strength[other]) * np.exp2(-minutes / near_minutes))
    pair, index = np.unique(np.concatenate(keys), return_inverse=True)
    weight = np.zeros(len(pair), np.float32)
    np.maximum.at(weight, index, np.concatenate(weights).astype(np.float32))
    return sp.csr_matrix((weight, (pair // n_items % n_items, pair % n_items)), shape=(n_items, n_items))
