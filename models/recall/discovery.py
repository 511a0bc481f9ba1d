"""Discoveries: what people who already had an item lately wanted for the first time.

Co-occurrence over all history tells what belongs together; this tells where owners of an item went
next, so it follows the season. On Online Retail it is the source whose absence costs the *new* view most.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from app.state.events import MS_PER_DAY
from models.recall import STRENGTH, Interactions, Neighbours
from models.recall.pairs import best_pairs

RECENT_DAYS = 45.0
HALF_LIFE_DAYS = 20.0
SHRINK = 20.0
DAMPING = 0.3


def fit(past: Interactions, *, now_ms: int, k: int = 100) -> Neighbours:
    """For each item the `k` best by weight(i, j) = f(i, j) / (owners of i + 20) / f(j) ** 0.3.

    f(j) are the decayed first times of j, f(i, j) those among people who have i.

    A first time counts if its user had been there on an earlier day: a newcomer's first basket is all
    first times and says nothing of what they will want next.
    """
    owner, item, age_days, returning = first_times(past, now_ms)
    n_items = past.n_items
    if not len(owner):
        return Neighbours(np.full((n_items, k), -1, np.int32), np.zeros((n_items, k), np.float32))
    shape = (int(owner.max()) + 1, n_items)
    recent = returning & (age_days <= RECENT_DAYS)
    fresh = sp.csr_matrix(
        ((0.5 ** (age_days[recent] / HALF_LIFE_DAYS)).astype(np.float32), (owner[recent], item[recent])), shape=shape
    )
    owned = sp.csr_matrix((np.ones(len(owner), np.float32), (owner, item)), shape=shape).T.tocsr()
    owners = np.bincount(item, minlength=n_items)
    found = np.asarray(fresh.sum(0)).ravel()
    scale = np.maximum(found, 1e-9) ** DAMPING
    return best_pairs(owned, fresh, lambda i, j, sums: (sums / ((owners[i] + SHRINK) * scale[j])).astype(np.float32), k)


def first_times(
    past: Interactions, now_ms: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """User, row and age in days of each pair's first event of the strongest kind there is; whether they returned."""
    strength = STRENGTH[past.kind]
    strong = strength == strength.max(initial=0.0)
    strong &= strength > 0
    user, row, ts_ms, _, n_items = past.where(strong)
    order = np.argsort(ts_ms, kind="stable")
    pair, first = np.unique(user[order].astype(np.int64) * n_items + row[order], return_index=True)
    age_days = (now_ms - ts_ms[order][first]) / MS_PER_DAY
    users, rows = pair // n_items, pair % n_items
    arrived = np.full(int(users.max()) + 1 if len(users) else 0, -np.inf)
    np.maximum.at(arrived, users, age_days)
    return users, rows, age_days, arrived[users] - age_days > 0.5
