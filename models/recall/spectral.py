"""A spectral method: users and items in the leading singular vectors of the damped user-item matrix.

The ideal low-pass filter of GF-CF (Shen, Wu, Zhang, Shan, Zhang, Letaief & Li, CIKM 2021); its linear filter is the
walk of `rp3beta`, and the fusion adds the two up. Singular vectors by randomised subspace iteration (Halko,
Martinsson & Tropp, SIAM Review, 2011).
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from models.recall import Interactions, Vectors
from models.recall.ease import user_items

OVERSAMPLED = 32
ROUNDS = 4


def fit(
    past: Interactions,
    *,
    half_life_days: float | None = 60.0,
    width: int = 512,
    of_user: float = 0.25,
    of_item: float = 0.35,
    entry: float = 0.35,
    leave: float = 0.35,
    cutoff: float = 0.25,
    history: int = 256,
    seed: int = 0,
) -> Vectors:
    """The score of item j for a user of items i is sum over i of x[i] g[i]^-entry (V V')[i, j] g[j]^leave

    with V the leading right singular vectors of D^-of_user X G^-of_item, at most `width`, those whose singular value is
    at least `cutoff` of the greatest; X of `user_items`, and D and G (g) the sums of its rows and columns. Published
    are 256 vectors and 1/2 for all four powers; the defaults here were better on a part cut from the training data of
    gowalla. Small catalogs need the cutoff: with nearly all vectors there are, an item is like itself alone.
    """
    matrix = user_items(past, int(past.ts_ms.max(initial=0)), half_life_days)
    items = degrees(matrix, 0)
    values, right = leading(damped(matrix, of_user, of_item), width, np.random.default_rng(seed))
    right = right[:, values >= cutoff * values[0]]
    return Vectors(
        right * items[:, None] ** leave,
        None,
        history,
        inputs=right * items[:, None] ** -entry,
        half_life_days=half_life_days,
    )


def degrees(matrix: sp.csr_matrix, axis: int) -> npt.NDArray[np.float32]:
    """Sums along an axis, 1 where nothing is: there no vector has anything for it to scale."""
    total = np.asarray(matrix.sum(axis), np.float32).ravel()
    return np.where(total > 0, total, np.float32(1.0))


def damped(matrix: sp.csr_matrix, of_user: float, of_item: float) -> sp.csr_matrix:
    users = sp.diags_array(degrees(matrix, 1) ** np.float32(-of_user))
    items = sp.diags_array(degrees(matrix, 0) ** np.float32(-of_item))
    return (users @ matrix @ items).tocsr()


def leading(
    matrix: sp.csr_matrix, width: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Singular values [w], greatest first, and right singular vectors [n, w]; w is `width` or what there is."""
    transposed = matrix.T.tocsr()
    width = min(width, *matrix.shape)
    sketch = min(width + OVERSAMPLED, *matrix.shape)
    basis = np.linalg.qr(rng.standard_normal((matrix.shape[1], sketch), np.float32))[0]
    for _ in range(ROUNDS):
        basis = np.linalg.qr(transposed @ (matrix @ basis))[0]
    small = matrix @ basis
    squared, axes = np.linalg.eigh(small.T @ small)
    order = np.argsort(-squared)[:width]
    return np.sqrt(np.maximum(squared[order], 0.0)), basis @ axes[:, order]
