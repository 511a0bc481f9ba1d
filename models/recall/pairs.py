"""The best partners of every item, from a sparse product too large to hold at once."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from models.recall import Neighbours

PAIRS = 8_000_000
"""Item pairs in memory at a time: some 250 MB beside the matrices and the result."""

Score = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def best_pairs(left: sp.csr_matrix, right: sp.csr_matrix, score: Score, k: int) -> Neighbours:
    """For each row i of `left` [n, m] the `k` columns j of `left @ right` [n, n] with the highest score, i aside.

    `score(i, j, product)` must be positive.
    """
    n_items = left.shape[0]
    near = Neighbours(np.full((n_items, k), -1, np.int32), np.zeros((n_items, k), np.float32))
    for start, end in _blocks(left, right):
        product = left[start:end] @ right
        anchor = np.repeat(np.arange(start, end), np.diff(product.indptr))
        other = product.indices
        apart = other != anchor
        anchor, other = anchor[apart], other[apart]
        weight = score(anchor, other, product.data[apart])
        # One key to sort by: rows ascending, then weights descending. Positive floats order as their bits do.
        key = ((anchor - start).astype(np.uint64) << 32) + (0xFFFFFFFF - weight.view(np.uint32)).astype(np.uint64)
        order = np.argsort(key)
        anchor, other, weight = anchor[order], other[order], weight[order]
        starts = np.searchsorted(anchor, np.arange(start, end))
        place = np.arange(len(anchor)) - starts[anchor - start]
        best = place < k
        near.rows[anchor[best], place[best]] = other[best]
        near.weights[anchor[best], place[best]] = weight[best]
    return near


def _blocks(left: sp.csr_matrix, right: sp.csr_matrix) -> list[tuple[int, int]]:
    """Ranges of rows whose products have about `PAIRS` entries; a single row may have more."""
    width = np.diff(right.indptr)
    pairs = np.concatenate([[0], np.cumsum(width[left.indices])])[left.indptr]
    edges = np.searchsorted(pairs, np.arange(PAIRS, pairs[-1], PAIRS))
    edges = np.unique(np.concatenate([[0], edges, [left.shape[0]]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
