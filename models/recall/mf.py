"""Matrix factorisation: weighted least squares and pairwise ranking, users computed from what they did.

- `fit_als`: Hu, Koren & Volinsky (ICDM, 2008) with the objective of Rendle, Krichene, Zhang & Koren (RecSys, 2022),
  whose regularisation grows with the frequency, by conjugate gradients (Takács, Pilászy & Tikk, RecSys 2011). The
  encoder solves for a user's vector outright.
- `fit_bpr`: Rendle, Freudenthaler, Gantner & Schmidt-Thieme (UAI, 2009), where a user is the sum of their items'
  vectors as in FISM (Kabbur, Ning & Karypis, KDD 2013), the items to be foreseen left out. Negatives are hard ones, the
  best of several drawn (Zhang, Chen, Wang & Yu, SIGIR 2013).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions, Vectors
from models.recall.ease import user_items
from models.recall.training import Losses, Run, train

STEPS = 3
"""Of conjugate gradients for each side in each iteration, starting from the last solution."""
CHUNK = 65_536
"""Pairs gathered at a time."""
LEARNING_RATE = 0.01
HARD = 32
"""Items drawn for a target of `fit_bpr`, of which the one that scores highest is told apart from it."""
BATCH = 512
"""Users in a step of `fit_bpr`; less where an epoch would have fewer than 16 steps."""


class Weights(nn.Module):
    """`forward(kinds, ages_s) -> [B, L]`: what `user_items` makes of events, 0 of padding."""

    def __init__(self, half_life_days: float | None) -> None:
        super().__init__()
        self.strength = nn.Buffer(torch.from_numpy(STRENGTH / STRENGTH[EventType.PURCHASE]))
        self.rate = 0.0 if half_life_days is None else -math.log(2) * 1000 / DAY_MS / half_life_days

    def forward(self, kinds: Tensor, ages_s: Tensor) -> Tensor:
        return torch.take(self.strength, kinds) * torch.exp(ages_s * self.rate)


class LeastSquares(nn.Module):
    """`forward(history, kinds, ages_s, profile) -> [B, d]`: the solution u of

    (diag(base) + sum of w (h h' + ridge I)) u = sum of w h, for vectors h and weights w of a history.
    """

    def __init__(self, base: Tensor, ridge: float, half_life_days: float | None) -> None:
        super().__init__()
        self.weights = Weights(half_life_days)
        self.base = nn.Buffer(base)
        self.ridge = ridge

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        weight = self.weights(kinds, ages_s)
        normal = torch.bmm((history * weight.unsqueeze(2)).transpose(1, 2), history)
        normal.diagonal(dim1=1, dim2=2).add_(self.base + self.ridge * weight.sum(1, keepdim=True))
        # In half the time of a general solver; `base` keeps the matrix positive.
        lower = torch.linalg.cholesky_ex(normal).L
        return torch.cholesky_solve(torch.bmm(weight.unsqueeze(1), history).transpose(1, 2), lower).squeeze(2)


def fit_als(
    past: Interactions,
    *,
    half_life_days: float | None = 60.0,
    width: int = 64,
    unobserved: float = 0.003,
    ridge: float = 0.01,
    iterations: int = 12,
    history: int = 64,
    seed: int = 0,
) -> Vectors:
    """Minimises sum of x (u'v - 1)^2 over what was wanted + `unobserved` times sum of (u'v)^2 over all pairs
    + `ridge` times sum over u of (|x_u| + unobserved n_items) |u|^2, and over v likewise; X of `user_items`.
    """
    matrix = user_items(past, int(past.ts_ms.max(initial=0)), half_life_days)
    sides = (matrix, matrix.T.tocsr())
    rng = np.random.default_rng(seed)
    users, items = (
        rng.standard_normal((side.shape[0], width), np.float32) * np.float32(0.1 / math.sqrt(width)) for side in sides
    )
    ridges = [ridge * (np.asarray(side.sum(1), np.float32) + np.float32(unobserved * side.shape[1])) for side in sides]
    for _ in range(iterations):
        users = _descend(users, items, sides[0], unobserved, ridges[0])
        items = _descend(items, users, sides[1], unobserved, ridges[1])
    items[np.diff(sides[1].indptr) == 0] = 0.0
    # In the axes of V'V all that users have in common is a diagonal.
    squared, axes = np.linalg.eigh(items.T @ items)
    base = unobserved * (np.maximum(squared, 0.0) + ridge * matrix.shape[1])
    base = torch.from_numpy(np.maximum(base, 1e-6).astype(np.float32))
    return Vectors(items @ axes, LeastSquares(base, ridge, half_life_days).eval(), history)


def _descend(
    own: npt.NDArray[np.float32],
    other: npt.NDArray[np.float32],
    wanted: sp.csr_matrix,
    unobserved: float,
    ridge: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Conjugate gradients towards the vectors that fit `other` best; a row is a system of its own."""
    gram = np.float32(unobserved) * (other.T @ other)
    row = np.repeat(np.arange(len(own), dtype=np.int32), np.diff(wanted.indptr))
    column, weight = wanted.indices, wanted.data

    def applied(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        fitted = np.empty(len(weight), np.float32)
        for start in range(0, len(weight), CHUNK):
            part = slice(start, start + CHUNK)
            np.einsum("nd,nd->n", vectors[row[part]], other[column[part]], out=fitted[part])
        observed = sp.csr_matrix((weight * fitted, column, wanted.indptr), shape=wanted.shape)
        result: npt.NDArray[np.float32] = vectors @ gram + ridge * vectors + observed @ other
        return result

    residual = wanted @ other - applied(own)
    direction = residual.copy()
    size = np.einsum("nd,nd->n", residual, residual)
    own = own.copy()
    for _ in range(STEPS):
        turned = applied(direction)
        step = size / np.maximum(np.einsum("nd,nd->n", direction, turned), 1e-20)
        own += step[:, None] * direction
        residual -= step[:, None] * turned
        last, size = size, np.einsum("nd,nd->n", residual, residual)
        direction = residual + (size / np.maximum(last, 1e-20))[:, None] * direction
    return own


def fit_bpr(
    past: Interactions,
    *,
    half_life_days: float | None = 60.0,
    width: int = 64,
    epochs: int = 30,
    history: int = 256,
    seed: int = 0,
    run: Run = Run(),
) -> Vectors:
    """Learns that a user wants what is hidden of them more than the hardest of `HARD` items drawn uniformly."""
    matrix = user_items(past, int(past.ts_ms.max(initial=0)), half_life_days)
    rng = np.random.default_rng(seed)
    shape = (matrix.shape[1], width)
    tables = [torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(0.1)) for _ in range(2)]
    inputs, items = model = nn.ParameterList([nn.Parameter(table.to(run.device)) for table in tables])
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def batches(epoch: int) -> Iterator[tuple[sp.csr_matrix, Tensor, Tensor]]:
        return halves(matrix, min(BATCH, math.ceil(matrix.shape[0] / 16)), rng)

    def loss(batch: tuple[sp.csr_matrix, Tensor, Tensor]) -> Tensor:
        given, line, target = batch
        rows = rng.integers(0, shape[0], (len(target), HARD))
        own = torch.from_numpy(_among(rows, given, line.numpy(), target.numpy())).to(run.device)
        drawn = torch.from_numpy(rows).to(run.device)
        users = bag(given, inputs)[line.to(run.device)]
        with torch.no_grad():
            # The hardest would else be what the user wants.
            hardest = torch.bmm(items[drawn], users[:, :, None]).masked_fill(own[:, :, None], -torch.inf).argmax(1)
        ahead = (users * (items[target.to(run.device)] - items[drawn.gather(1, hardest)[:, 0]])).sum(1)
        return -F.logsigmoid(ahead).mean()

    checkpoint = run.checkpoint(past[:4], items=shape[0], decay=half_life_days, width=width, epochs=epochs, seed=seed)
    losses: Losses = ()
    if (np.diff(matrix.indptr) > 1).any():
        losses = train(model, [optimiser], batches, loss, None, rng, epochs=epochs, run=run, checkpoint=checkpoint)
    return Vectors(
        items.detach().cpu().numpy(),
        None,
        history,
        inputs=inputs.detach().cpu().numpy(),
        half_life_days=half_life_days,
        losses=losses,
    )


def halves(
    matrix: sp.csr_matrix, size: int, rng: np.random.Generator
) -> Iterator[tuple[sp.csr_matrix, Tensor, Tensor]]:
    """An epoch: each user with two items or more once, a random part of their items given and the rest to be foreseen.

    Yields the given [B, n], and for each target its line in the batch and its item. The part is another for each
    user and epoch, uniformly from none of the items to all.
    """
    several = np.flatnonzero(np.diff(matrix.indptr) > 1)
    for users in np.array_split(rng.permutation(several), math.ceil(len(several) / size)) if len(several) else ():
        batch = matrix[users]
        line = np.repeat(np.arange(len(users)), np.diff(batch.indptr))
        draw = rng.random(batch.nnz, np.float32)
        hidden = draw < (rng.random(len(users), np.float32) * 0.8 + 0.1)[line]
        # At least one on either side.
        order = np.lexsort((draw, line))
        hidden[order[batch.indptr[:-1]]] = True
        hidden[order[batch.indptr[1:] - 1]] = False
        given = sp.csr_matrix(
            (batch.data[~hidden], (line[~hidden], batch.indices[~hidden])), shape=batch.shape, dtype=np.float32
        )
        yield given, torch.from_numpy(line[hidden]), torch.from_numpy(batch.indices[hidden].astype(np.int64))


def _among(
    drawn: npt.NDArray[np.int64], given: sp.csr_matrix, line: npt.NDArray[np.int64], target: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which of the items drawn [T, H] for the targets are the very users', given or targets themselves."""
    n_items = given.shape[1]
    of_given = np.repeat(np.arange(given.shape[0]), np.diff(given.indptr)) * n_items + given.indices
    return np.isin(line[:, None] * n_items + drawn, np.concatenate([of_given, line * n_items + target]))


def on(matrix: sp.csr_matrix, device: torch.device) -> Tensor:
    """The same matrix as a tensor."""
    listed = matrix.tocoo()
    at = torch.from_numpy(np.stack([listed.row, listed.col]))
    return torch.sparse_coo_tensor(at, torch.from_numpy(listed.data), matrix.shape, check_invariants=False).to(device)


def _times(matrix: sp.csr_matrix, table: Tensor) -> Tensor:
    if table.device.type == "cpu":
        return torch.from_numpy(matrix @ table.numpy())
    with torch.autocast(table.device.type, enabled=False):
        return on(matrix, table.device) @ table


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: sp.csr_matrix, table: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _times(matrix, table.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _times(ctx.matrix.T, gradient)


def product(matrix: sp.csr_matrix, table: Tensor) -> Tensor:
    """A constant sparse matrix times a table that learns: on a CPU several times faster than torch's sparse tensors."""
    result: Tensor = _Product.apply(matrix, table)  # type: ignore[no-untyped-call]
    return result


def bag(given: sp.csr_matrix, table: Tensor) -> Tensor:
    """[B, d]: what the service makes of histories that have no encoder, in training."""
    return F.normalize(product(given, table), dim=1)
