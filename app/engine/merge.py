"""Merge: the union of what the sources propose, one score and one rank column a source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.batch import Batch, PairSet
from app.engine.recall import Recalled, sort_with_position

ABSENT = 10_000.0
"""The rank of an item in a source that does not propose it."""


Pairs = tuple[Tensor, Tensor]
"""Queries and catalog rows, int64 [M] each."""


@dataclass(slots=True)
class Candidates:
    """M distinct (query, row) pairs, ascending by query."""

    query: Tensor
    """int64 [M]."""
    row: Tensor
    """int64 [M]."""
    score: Tensor
    """float32 [S, M]: what each source gives the item; 0 where it says nothing."""
    rank: Tensor
    """float32 [S, M]: 0 for the best of a source, `ABSENT` where it does not propose the item."""
    best: Tensor
    """float32 [S, B]: the best score that each source gave in the query, 0 where it gave none."""

    @property
    def proposed(self) -> Tensor:
        """bool [S, M]: which sources propose the item."""
        return self.rank < ABSENT


def merge(
    batch: Batch, said: Recalled, source: Tensor, ks: Sequence[int], pairs: PairSet, allowed: Callable[[Pairs], Tensor]
) -> Candidates:
    """The union of the first `ks[s]` items of every source `s`, less what is not `allowed`.

    What a source ranks deeper only lends its score. `source` int64 [E] is who said what.
    """
    device, sources = batch.device, len(ks)
    query, row, score, rank = said
    proposed = rank < torch.tensor(ks, device=device).index_select(0, source)

    named = proposed.nonzero().squeeze(1)
    first = pairs.distinct(query.index_select(0, named), row.index_select(0, named))
    first = named.index_select(0, first)
    union, order = sort_with_position(query.index_select(0, first), batch.size)
    of_row = row.index_select(0, first.index_select(0, order))
    # Filtered before there is a column to filter.
    kept = allowed((union, of_row)).nonzero().squeeze(1)
    of_query, of_row = union.index_select(0, kept), of_row.index_select(0, kept)

    index = pairs.find(query, row, of_query, of_row)
    hit = (index >= 0).nonzero().squeeze(1)
    size = len(of_query)
    cell = source.index_select(0, hit) * size + index.index_select(0, hit)
    scores = torch.zeros(sources * size, device=device).index_copy_(0, cell, score.index_select(0, hit))
    ranks = torch.full((sources * size,), ABSENT, device=device)
    ranks.index_copy_(0, cell, torch.where(proposed, rank.float(), ABSENT).index_select(0, hit))
    top = (rank == 0).nonzero().squeeze(1)
    best = torch.zeros(sources * batch.size, device=device)
    of_top = source.index_select(0, top) * batch.size + query.index_select(0, top)
    best.index_copy_(0, of_top, score.index_select(0, top))
    return Candidates(
        of_query, of_row, scores.view(sources, size), ranks.view(sources, size), best.view(sources, batch.size)
    )
