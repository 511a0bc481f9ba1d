"""EASE: item-to-item weights in closed form (Steck, WWW 2019), here with time decay."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions, Neighbours

MEMORY_GB = 5.0
BLOCK = 1024
"""Items swept out at a time."""
SMALLEST = 1e-6
"""Weights below it are noise of float32."""


def fit(
    past: Interactions,
    *,
    now_ms: int,
    k: int = 100,
    half_life_days: float | None = 20.0,
    ridge: float = 60.0,
    signed: bool = False,
    memory_gb: float = MEMORY_GB,
) -> Neighbours | None:
    """The `k` largest weights of each item, or None for a catalog that needs more than `memory_gb`.

    B = I - P / diag(P) with P = (X'X + ridge I)^-1 and X of `user_items`; row i of the table is what having item i
    says of every other. The largest are those above 0, or, if `signed`, those of the largest magnitude.

    The time goes with the cube of the items, the memory with their square: 0.6 GB at 12,000, 4.4 GB at 41,000.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, not {ridge}")
    if needed_gb(past.n_items) > memory_gb:
        return None
    panels = _gram(user_items(past, now_ms, half_life_days), ridge)
    # Items that few old events join are told apart by less than float32 normally holds, and some processors take
    # several times as long over such numbers. They are far below `SMALLEST`.
    torch.set_flush_denormal(True)
    try:
        _invert(panels)
    finally:
        torch.set_flush_denormal(False)
    return _table(panels, min(k, past.n_items), signed)


def needed_gb(n_items: int) -> float:
    """Half of a float32 matrix, and what sweeping out one block holds beside it."""
    return (2.0 * n_items**2 + 24.0 * BLOCK * n_items) / 1e9


def user_items(past: Interactions, now_ms: int, half_life_days: float | None) -> sp.csr_matrix:
    """x, float32 [users, n_items]: of each pair min(1, sum of strength / 2, halved every `half_life_days` if given).

    So one purchase is 1, as are two views and a cart.
    """
    user, row, ts_ms, kind, n_items = past.where(STRENGTH[past.kind] > 0)
    weight = STRENGTH[kind] / STRENGTH[EventType.PURCHASE]
    if half_life_days is not None:
        weight = weight * np.exp2((ts_ms - now_ms) / DAY_MS / half_life_days)
    users = int(user.max()) + 1 if len(user) else 1
    matrix = sp.csr_matrix((weight, (user, row)), shape=(users, n_items), dtype=np.float32)
    matrix.data = np.minimum(matrix.data, 1.0)
    return matrix


def _gram(matrix: sp.csr_matrix, ridge: float) -> list[Tensor]:
    """X'X + ridge I as panels: the rows of a block, up to the end of their diagonal block."""
    by_item = matrix.T.tocsr()
    panels = []
    for start in range(0, by_item.shape[0], BLOCK):
        rows = by_item[start : start + BLOCK]
        panel = torch.from_numpy((rows @ by_item[: start + BLOCK].T).toarray())
        panel[:, start:].diagonal().add_(ridge)
        panels.append(panel)
    return panels


def _invert(panels: list[Tensor]) -> None:
    """Turns a positive definite matrix A into its inverse, negated, in place.

    Each block k is swept out (Beaton, 1964): for all others i and j, A[i, j] -= A[i, k] A[k, k]^-1 A[k, j], then
    A[i, k] <- A[i, k] A[k, k]^-1 and A[k, k] <- -A[k, k]^-1. A stays symmetric, so that half of it suffices, and
    without a Cholesky factor in between it needs no second matrix.
    """
    column = torch.empty(panels[-1].shape[1], BLOCK)
    for own in panels:
        size, end = own.shape
        start = end - size
        factor, failed = torch.linalg.cholesky_ex(own[:, start:])
        if failed:
            raise ValueError("the item-item matrix of EASE is not positive definite: the ridge is too small")
        pivot = torch.cholesky_inverse(factor)
        others = column[:, :size]
        others[:start] = own[:, :start].T
        others[start:end] = 0.0
        below = panels[start // BLOCK + 1 :]
        for panel in below:
            others[panel.shape[1] - len(panel) : panel.shape[1]] = panel[:, start:end]
        swept = others @ pivot
        for panel in panels:
            last = panel.shape[1]
            panel.addmm_(swept[last - len(panel) : last], others[:last].T, alpha=-1)
        for panel in below:
            panel[:, start:end] = swept[panel.shape[1] - len(panel) : panel.shape[1]]
        own[:, :start] = swept[:start].T
        own[:, start:] = -pivot


def _table(panels: list[Tensor], k: int, signed: bool) -> Neighbours:
    """From the panels of -P."""
    scale = torch.cat([-panel[:, -len(panel) :].diagonal() for panel in panels])
    rows, weights = [], []
    for number, panel in enumerate(panels):
        end = panel.shape[1]
        start = end - len(panel)
        whole = torch.cat([panel, *(below[:, start:end].T for below in panels[number + 1 :])], 1).div_(scale)
        whole[:, start:end].fill_diagonal_(0.0)
        near = (whole.abs() if signed else whole).topk(k)
        useful = near.values > SMALLEST
        rows.append(torch.where(useful, near.indices, -1).int())
        weights.append(torch.where(useful, whole.gather(1, near.indices), 0.0))
    return Neighbours(torch.cat(rows).numpy(), torch.cat(weights).numpy())
