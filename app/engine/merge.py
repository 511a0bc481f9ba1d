"""Merge: the union of what the sources propose, one score and one rank column a source."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.batch import Batch, PairSet

ABSENT = 10_000.0
"""The rank of an item in a source that does not propose it."""


@dataclass(slots=True)
class Candidates:
    """M distinct (query, row) pairs, ascending by query."""

    query: Tensor
    """int64 [M]."""
    row: Tensor
    """int64 [M]."""
    score: Tensor
    """float32 [M, S]: what each source gives the item; 0 where it says nothing."""
    rank: Tensor
    """float32 [M, S]: 0 for the best of a source, `ABSENT` where it does not propose the item."""
    best: Tensor
    """float32 [B, S]: the best score that each source gave in the query, 0 where it gave none."""

    def where(self, mask: Tensor) -> "Candidates":
        """The candidates for which the bool [M] holds, in the same order."""
        kept = mask.nonzero().squeeze(1)
        query, row, score, rank = (
            column.index_select(0, kept) for column in (self.query, self.row, self.score, self.rank)
        )
        return Candidates(query, row, score, rank, self.best)

    @property
    def proposed(self) -> Tensor:
        """bool [M, S]: which sources propose the item."""
        return self.rank < ABSENT


def merge(batch: Batch, recalled: Sequence[tuple[Tensor, Tensor]], ks: Sequence[int], pairs: PairSet) -> Candidates:
    """The union of the first `ks[s]` items of every source `s`; deeper ones only lend their scores.

    `recalled` holds rows [B, K] and scores [B, K] a source, best first, -1 for none.
    """
    device, sources = batch.device, len(recalled)
    rows = torch.cat([rows for rows, _ in recalled], 1)
    scores = torch.cat([scores for _, scores in recalled], 1)
    ranks = torch.cat([torch.arange(rows.shape[1], device=device) for rows, _ in recalled])
    source = torch.arange(sources, device=device).repeat_interleave(
        torch.tensor([rows.shape[1] for rows, _ in recalled], device=device)
    )
    width = rows.shape[1]
    cell = (rows.flatten() >= 0).nonzero().squeeze(1)
    column = cell % width
    query, row, score = cell // width, rows.flatten()[cell], scores.flatten()[cell]
    source, rank = source[column], ranks[column]
    proposed = rank < torch.tensor(ks, device=device)[source]

    first, inverse = pairs.distinct(query, row)
    cell = inverse * sources + source
    score_columns = torch.zeros(len(first) * sources, device=device).index_copy_(0, cell, score)
    rank_columns = torch.full((len(first) * sources,), ABSENT, device=device).index_copy_(
        0, cell, torch.where(proposed, rank.float(), ABSENT)
    )
    none = torch.zeros(batch.size, device=device)
    best = torch.stack([scores[:, 0].nan_to_num(neginf=0.0) if scores.shape[1] else none for _, scores in recalled], 1)
    union = Candidates(query[first], row[first], score_columns.view(-1, sources), rank_columns.view(-1, sources), best)
    return union.where(union.proposed.any(1))
