"""RP3beta: where a random walk from an item to a user to an item ends, popular ends counting less.

Paudel, Christoffel, Newell & Bernstein (ACM TiiS, 2017), a walk's three steps by their degrees alone as in Fu et al.
(WWW, 2022).
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from models.recall import Interactions, Neighbours
from models.recall.ease import user_items
from models.recall.pairs import best_pairs


def fit(
    past: Interactions,
    *,
    k: int = 100,
    half_life_days: float | None = 30.0,
    alpha: float = 0.75,
    beta: float = 0.35,
) -> Neighbours:
    """For each item the `k` best by w(i, j) = sum over users u of x[u, i] x[u, j] / (d[i] d[u]) ** alpha / d[j] ** beta

    x as `user_items` has it, d[u] and d[i] its sums over items and users. All weights are divided by the greatest.
    """
    matrix = user_items(past, int(past.ts_ms.max(initial=0)), half_life_days)
    of_user, of_item = (np.asarray(matrix.sum(axis)).ravel() for axis in (1, 0))
    # What nobody wants has no pairs, so that it never matters what stands for its zero.
    of_user, of_item = np.where(of_user > 0, of_user, 1.0), np.where(of_item > 0, of_item, 1.0)
    walked = (sp.diags_array(of_user ** np.float32(-alpha)) @ matrix).tocsr()
    leave, arrive = of_item ** np.float32(-alpha), of_item ** np.float32(-beta)

    def weight(
        anchor: npt.NDArray[np.int64], other: npt.NDArray[np.int32], walks: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        return walks * leave[anchor] * arrive[other]

    near = best_pairs(matrix.T.tocsr(), walked, weight, k)
    greatest = near.weights.max(initial=0.0)
    if greatest > 0:
        near.weights[:] /= greatest
    return near
