"""Filters: candidates in, a mask out. A filter never adds, never reorders and never fails."""

import torch
from torch import Tensor

from app.catalog import Catalog
from app.engine.batch import Batch, PairSet
from app.engine.merge import Candidates
from app.scenes import Scene
from app.state.events import HIDDEN, item_key


def allowed(batch: Batch, candidates: Candidates, scene: Scene, catalog: Catalog, pairs: PairSet) -> Tensor:
    """bool [M]: available, not excluded for this user, not on the page, and within the request's own filters."""
    mask = catalog.available.index_select(0, candidates.row)
    for owner, row in (
        (batch.anchor_query, batch.anchor_row),
        forbidden(batch, scene),
        _excluded_by_request(batch, catalog),
    ):
        found = pairs.find(owner, row, candidates.query, candidates.row)
        mask[found[found >= 0]] = False
    for index, query in enumerate(batch.queries):
        if query.where:
            mine = candidates.query == index
            mask[mine] &= catalog.eligible(query.where).index_select(0, candidates.row[mine])
    return mask


def forbidden(batch: Batch, scene: Scene) -> tuple[Tensor, Tensor]:
    """Query and row of what the scene must not show to the user: hidden items, and bought ones unless they repeat."""
    if not scene.repeats:
        return batch.excluded_query, batch.excluded_row
    hidden = batch.excluded_kind == HIDDEN
    return batch.excluded_query[hidden], batch.excluded_row[hidden]


def _excluded_by_request(batch: Batch, catalog: Catalog) -> tuple[Tensor, Tensor]:
    named = [(index, item_key(item)) for index, query in enumerate(batch.queries) for item in query.where.exclude]
    pairs = torch.tensor(named, dtype=torch.int64, device=batch.device).reshape(-1, 2)
    rows = catalog.rows(pairs[:, 1].contiguous())
    return pairs[:, 0][rows >= 0], rows[rows >= 0]
