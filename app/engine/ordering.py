"""Order of tensors: sums of equal keys, and each query's best first."""

import numpy as np
import torch
from torch import Tensor

from app.engine import kernels
from app.engine.batch import Batch, Scratch


def best_first(batch: Batch, query: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions [B, <=k] of each query's best scores [M], padded with -1, and these scores, padded with -inf."""
    size = batch.size
    if isinstance(batch.scratch, Scratch):
        positions, best = kernels.best_first(query.numpy(), score.numpy(), size, k)
        return torch.from_numpy(positions), torch.from_numpy(best)
    order, rank = ranked(query, score, size)
    width = min(k, int(rank.max()) + 1) if len(rank) else 0
    kept = (rank < width).nonzero().squeeze(1)
    cell = query.index_select(0, kept) * width + rank.index_select(0, kept)
    order = order.index_select(0, kept)
    shown = torch.full((size * width,), -1, dtype=torch.int64, device=query.device).index_copy_(0, cell, order)
    scores = torch.full((size * width,), -torch.inf, device=query.device)
    scores.index_copy_(0, cell, score.index_select(0, order))
    return shown.view(size, width), scores.view(size, width)


def ranked(query: Tensor, score: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The order that puts each query's best first, and the rank of each place; `query` [E] ascends before and after.

    Among equal scores the order is the query's own, whatever else is in the batch.
    """
    _, order = sort_with_position(query << 32 | _descending(score), size << 32)
    counts = torch.bincount(query, minlength=size)
    return order, torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts).index_select(0, query)


def _descending(score: Tensor) -> Tensor:
    """int64 in 0..2**32-1 that ascend as the float32 scores descend."""
    bits = (score + 0.0).view(torch.int32).long()  # makes -0.0 equal 0.0
    return 0x7FFFFFFF - torch.where(bits < 0, -0x80000000 - bits - 1, bits)


def sort_with_position(keys: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The int64 keys, all in 0..limit-1, ascending, and where each came from; equal keys keep their order."""
    bits = len(keys).bit_length()
    if keys.is_cuda or limit.bit_length() + bits > 63:
        ascending = keys.sort(stable=True)
        return ascending.values, ascending.indices
    # numpy sorts plain integers with SIMD, ten times as fast as torch sorts pairs on a CPU: the position
    # rides in the low bits.
    packed = keys.numpy() << bits
    packed |= np.arange(len(packed))
    packed.sort()
    return torch.from_numpy(packed >> bits), torch.from_numpy(packed & ((1 << bits) - 1))


def from_end(query: Tensor, counts: Tensor) -> Tensor:
    """0 for the last entry of each query, 1 for the one before, ... ; `query` ascends."""
    return counts.cumsum(0).index_select(0, query) - 1 - torch.arange(len(query), device=query.device)


def summed(pair: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of the ascending `pair`, and the sum of the scores of each."""
    new = torch.ones(len(pair), dtype=torch.bool, device=pair.device)
    torch.ne(pair[1:], pair[:-1], out=new[1:])
    distinct = pair.index_select(0, new.nonzero().squeeze(1))
    return distinct, torch.zeros(len(distinct), device=pair.device).index_add_(0, new.cumsum(0).sub_(1), score)
