"""Features of candidates: what the ranker sees, in training and in service, by this one code.

Every sum runs over a user's events in time order and never across users, so on a CPU a candidate's
features are the same to the last bit in whatever batch it sits.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from app.catalog import Catalog
from app.engine import kernels
from app.engine.batch import Batch, PairSet, Scratch
from app.engine.merge import Candidates
from app.state.events import MS_PER_DAY, EventType

INTEREST: dict[EventType, float] = {
    EventType.SELECT_ITEM: 1.0,
    EventType.VIEW_ITEM: 1.0,
    EventType.ADD_TO_CART: 3.0,
    EventType.ADD_TO_WISHLIST: 3.0,
    EventType.BEGIN_CHECKOUT: 3.0,
    EventType.PURCHASE: 5.0,
    EventType.LIKE: 3.0,
}
"""How much an event says about the shopper's taste in categories, brands and prices."""
HALF_LIFE_DAYS = 30.0
NEVER_DAYS, MINUTES = float(kernels.NEVER_DAYS), float(kernels.MINUTES)

_OWN = ("views", "carts", "purchases")
_OWN_OF = {
    EventType.SELECT_ITEM: 0,
    EventType.VIEW_ITEM: 0,
    EventType.ADD_TO_CART: 1,
    EventType.ADD_TO_WISHLIST: 1,
    EventType.BEGIN_CHECKOUT: 1,
    EventType.PURCHASE: 2,
}
_OTHER = 3
_USER = ("user.events", "user.purchases", "user.items", "user.recency", "user.price")
_CROSS = ("affinity.category", "affinity.department", "affinity.brand", "price.gap", "price.below")


def feature_names(sources: Sequence[str], statistics: Sequence[str]) -> tuple[str, ...]:
    """The columns that `compute` returns for a scene with these sources."""
    return (
        *(f"{source}.{part}" for source in sources for part in ("score", "share", "rank")),
        "agreement",
        *(f"item.{name}" for name in statistics),
        "item.age",
        "item.price",
        *_USER,
        *(f"own.{name}{part}" for name in _OWN for part in ("", ".recency")),
        "own.quantity",
        *_CROSS,
    )


def compute(batch: Batch, candidates: Candidates, catalog: Catalog) -> Tensor:
    """float32 [M, F], columns as `feature_names` says."""
    pairs = batch.scratch
    if isinstance(pairs, Scratch):
        return _compiled(batch, candidates, catalog, pairs)
    query, row = candidates.query, candidates.row
    user, weight = _user(batch, catalog)
    columns = [
        _sources(candidates),
        catalog.statistics.index_select(0, row).t(),
        _item(batch, catalog, row),
        user.index_select(1, query),
        _own(batch, candidates, pairs),
        _cross(batch, candidates, catalog, weight, user),
    ]
    # Put together feature by feature and turned at the end: writing rows costs twenty times as much.
    return torch.cat(columns).t()


def _compiled(batch: Batch, candidates: Candidates, catalog: Catalog, scratch: Scratch) -> Tensor:
    interest, own = _by_kind(batch.device)
    found = kernels.features(
        candidates.query.numpy(),
        candidates.row.numpy(),
        candidates.score.numpy(),
        candidates.rank.numpy(),
        candidates.best.numpy(),
        catalog.records,
        catalog.no_group.numpy(),
        catalog.group_count,
        batch.now_ms / MS_PER_DAY,
        kernels.starts(batch.query.numpy(), batch.size),
        batch.row.numpy(),
        batch.kind.numpy(),
        batch.age_days.numpy(),
        batch.quantity.numpy(),
        interest.numpy(),
        own.numpy(),
        np.float32(-math.log(2) / HALF_LIFE_DAYS),
        int(EventType.PURCHASE),
        scratch.index,
    )
    return torch.from_numpy(found)


def _sources(candidates: Candidates) -> Tensor:
    score, rank = candidates.score, candidates.rank
    share = (score / candidates.best.clamp(min=1e-9).index_select(1, candidates.query)).clamp(-1, 1)
    columns = torch.stack([torch.sign(score) * torch.log1p(100.0 * score.abs()), share, 10.0 / (10.0 + rank)], 1)
    agreement = candidates.proposed.sum(0, dtype=torch.float32)
    return torch.cat([columns.flatten(0, 1), agreement[None]])


def _item(batch: Batch, catalog: Catalog, row: Tensor) -> Tensor:
    created = (catalog.created_ms.index_select(0, row) / MS_PER_DAY).float()
    age = torch.log1p((batch.now_ms / MS_PER_DAY - created).clamp(min=0))
    return torch.stack([age, catalog.log_price.index_select(0, row)])


@cache
def _by_kind(device: torch.device) -> tuple[Tensor, Tensor]:
    """By event type: its interest float32 [256], and which of `_OWN` it is int64 [256]."""
    interest, own = torch.zeros(256), torch.full((256,), _OTHER)
    for kind, value in INTEREST.items():
        interest[kind] = value
    for kind, group in _OWN_OF.items():
        own[kind] = group
    return interest.to(device), own.to(device)


def _user(batch: Batch, catalog: Catalog) -> tuple[Tensor, Tensor]:
    """float32 [U, B] and the weight of each event [E]."""
    device, size = batch.device, batch.size
    interest = _by_kind(device)[0].index_select(0, batch.kind)
    weight = interest * torch.exp(batch.age_days * (-math.log(2) / HALF_LIFE_DAYS))
    price = catalog.log_price.index_select(0, batch.row)
    priced = weight * (price > 0)
    bought = (batch.kind == EventType.PURCHASE).float()
    parts = torch.stack([torch.ones_like(weight), bought, weight, priced * price, priced])
    cells = batch.query + torch.arange(len(parts), device=device)[:, None] * size
    sums = torch.zeros(len(parts) * size, device=device).index_add_(0, cells.flatten(), parts.flatten())
    sums = sums.view(len(parts), size)
    recency = torch.full((1, size), NEVER_DAYS, device=device)
    recency.scatter_reduce_(1, batch.query[None], batch.age_days[None], "amin")
    mean_price = sums[3:4] / sums[4:].clamp(min=1e-9)
    return torch.cat([torch.log1p(torch.cat([sums[:3], MINUTES * recency])), mean_price]), weight


def _own(batch: Batch, candidates: Candidates, pairs: PairSet) -> Tensor:
    """What the user did with this very item: how often, and how long ago the last time was."""
    device, size, groups = batch.device, len(candidates.query), _OTHER + 1
    found = pairs.find(batch.query, batch.row, candidates.query, candidates.row)
    hit = (found >= 0).nonzero().squeeze(1)
    group = _by_kind(device)[1].index_select(0, batch.kind.index_select(0, hit))
    cell = group * size + found.index_select(0, hit)
    counts = torch.zeros(groups * size, device=device).index_add_(0, cell, torch.ones(len(cell), device=device))
    recency = torch.full((groups * size,), NEVER_DAYS, device=device)
    recency.scatter_reduce_(0, cell, batch.age_days.index_select(0, hit), "amin")
    quantity = torch.zeros(groups * size, device=device).index_add_(0, cell, batch.quantity.index_select(0, hit))
    shape = (groups, size)
    by_group = torch.stack([counts.view(shape)[:_OTHER], MINUTES * recency.view(shape)[:_OTHER]], 1).flatten(0, 1)
    return torch.log1p(torch.cat([by_group, quantity.view(shape)[_OTHER - 1 : _OTHER]]))


def _cross(batch: Batch, candidates: Candidates, catalog: Catalog, weight: Tensor, user: Tensor) -> Tensor:
    query, row, width = candidates.query, candidates.row, catalog.group_count
    # The share of the user's weighted events that went to the candidate's category, department and brand.
    total = torch.zeros(batch.size, device=batch.device).index_add_(0, batch.query, weight).clamp_(min=1e-9)
    cells = torch.zeros(batch.size * width, device=batch.device)
    of_event = catalog.groups.index_select(1, batch.row) + batch.query * width
    cells.index_add_(0, of_event.flatten(), weight.expand(len(of_event), -1).flatten())
    cells.view(batch.size, width).index_fill_(1, catalog.no_group, 0.0)
    of_candidate = catalog.groups.index_select(1, row) + query * width
    share = cells.index_select(0, of_candidate.flatten()).view_as(of_candidate) / total.index_select(0, query)

    price, mean = catalog.log_price.index_select(0, row), user[_USER.index("user.price")].index_select(0, query)
    gap = torch.where((price > 0) & (mean > 0), price - mean, 0.0)
    return torch.cat([share, gap.abs()[None], gap.clamp(max=0)[None]])
