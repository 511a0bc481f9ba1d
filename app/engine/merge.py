"""Merge: the union of what the sources propose, one score and one rank column a source."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.catalog import Catalog
from app.engine import kernels
from app.engine.batch import Batch, Scratch
from app.engine.filters import allowed, forbidden
from app.engine.ordering import sort_with_position
from app.engine.recall import Recalled

ABSENT = float(kernels.ABSENT)


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
    batch: Batch, said: Recalled, source: Tensor, ks: Sequence[int], repeats: bool, catalog: Catalog
) -> Candidates:
    """The union of the first `ks[s]` items of every source `s`, less what the filters do not allow.

    What a source ranks deeper only lends its score. `source` int64 [E] is who said what. The union is filtered
    before there are columns to filter.
    """
    pairs = batch.scratch
    if isinstance(pairs, Scratch):
        return _merge_compiled(batch, said, source, ks, repeats, catalog, pairs)
    device, sources = batch.device, len(ks)
    query, row, score, rank = said
    proposed = rank < torch.tensor(ks, device=device).index_select(0, source)

    named = proposed.nonzero().squeeze(1)
    first = pairs.distinct(query.index_select(0, named), row.index_select(0, named))
    first = named.index_select(0, first)
    union, order = sort_with_position(query.index_select(0, first), batch.size)
    of_row = row.index_select(0, first.index_select(0, order))
    kept = allowed((union, of_row), batch, repeats, catalog, pairs).nonzero().squeeze(1)
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


def _merge_compiled(
    batch: Batch, said: Recalled, source: Tensor, ks: Sequence[int], repeats: bool, catalog: Catalog, scratch: Scratch
) -> Candidates:
    asking = [index for index, query in enumerate(batch.queries) if query.where]
    eligible_of = np.full(batch.size, -1)
    eligible_of[asking] = np.arange(len(asking))
    eligible = np.empty((len(asking), catalog.size), np.bool_)
    for place, index in enumerate(asking):
        eligible[place] = catalog.eligible(batch.queries[index].where).numpy()
    found = kernels.merge(
        *(column.numpy() for column in said),
        source.numpy(),
        np.array(ks, np.int64),
        batch.size,
        catalog.available.numpy(),
        *(column.numpy() for column in forbidden(batch, repeats)),
        eligible,
        eligible_of,
        scratch.index,
    )
    return Candidates(*map(torch.from_numpy, found))
