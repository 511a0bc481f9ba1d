"""Filters: candidates in, a mask out. A filter never adds, never reorders and never fails."""

from torch import Tensor

from app.catalog import Catalog
from app.engine.batch import Batch, Pairs, PairSet
from app.state.events import BOUGHT


def allowed(candidates: Pairs, batch: Batch, repeats: bool, catalog: Catalog, pairs: PairSet) -> Tensor:
    """bool [M]: available, not excluded for this user, not on the page, and within the request's own filters."""
    of_query, of_row = candidates
    mask = catalog.available.index_select(0, of_row)
    found = pairs.find(*forbidden(batch, repeats), of_query, of_row)
    mask.index_fill_(0, found.index_select(0, (found >= 0).nonzero().squeeze(1)), False)
    for index, query in enumerate(batch.queries):
        if query.where:
            mine = (of_query == index).nonzero().squeeze(1)
            eligible = catalog.eligible(query.where).index_select(0, of_row.index_select(0, mine))
            mask[mine] &= eligible
    return mask


def forbidden(batch: Batch, repeats: bool) -> tuple[Tensor, Tensor]:
    """Query and row of what must not be shown: hidden or named items, and bought ones unless the scene repeats."""
    if not repeats:
        return batch.excluded_query, batch.excluded_row
    kept = (batch.excluded_kind != BOUGHT).nonzero().squeeze(1)
    return batch.excluded_query.index_select(0, kept), batch.excluded_row.index_select(0, kept)
