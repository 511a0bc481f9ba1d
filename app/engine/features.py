"""Features of candidates: what the ranker sees, in training and in service, by this one code.

Every sum runs over a user's events in time order and never across users, so on a CPU a candidate's
features are the same to the last bit in whatever batch it sits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.catalog import Catalog
from app.engine.batch import MS_PER_DAY, Batch, PairSet
from app.engine.merge import Candidates
from app.state.events import EventType

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
NEVER_DAYS = 1000.0
"""Stands for 'never' where a feature is a number of days."""

_OWN = (
    ("views", (EventType.SELECT_ITEM, EventType.VIEW_ITEM)),
    ("carts", (EventType.ADD_TO_CART, EventType.ADD_TO_WISHLIST, EventType.BEGIN_CHECKOUT)),
    ("purchases", (EventType.PURCHASE,)),
)
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
        *(f"own.{name}{part}" for name, _ in _OWN for part in ("", ".recency")),
        "own.quantity",
        *_CROSS,
    )


def compute(batch: Batch, candidates: Candidates, catalog: Catalog, pairs: PairSet) -> Tensor:
    """float32 [M, F], columns as `feature_names` says; each column lies in one piece."""
    query, row = candidates.query, candidates.row
    user, weight = _user(batch, catalog)
    columns = [
        _sources(candidates),
        catalog.statistics.index_select(1, row),
        _item(batch, catalog, row),
        user.index_select(1, query),
        _own(batch, candidates, pairs),
        _cross(batch, candidates, catalog, weight, user),
    ]
    # Put together feature by feature and turned at the end: writing rows costs twenty times as much.
    return torch.cat(columns).t()


def _sources(candidates: Candidates) -> Tensor:
    score, rank = candidates.score, candidates.rank
    share = (score / candidates.best.clamp(min=1e-9).index_select(1, candidates.query)).clamp(-1, 1)
    columns = torch.stack([torch.sign(score) * torch.log1p(100.0 * score.abs()), share, 10.0 / (10.0 + rank)], 1)
    agreement = candidates.proposed.sum(0, dtype=torch.float32)
    return torch.cat([columns.view(-1, score.shape[1]), agreement[None]])


def _item(batch: Batch, catalog: Catalog, row: Tensor) -> Tensor:
    age_ms = (batch.now_ms - catalog.created_ms.index_select(0, row)).clamp(min=0)
    age = torch.log1p((age_ms.double() / MS_PER_DAY).float())
    return torch.stack([age, _log_price(catalog, row)])


def _user(batch: Batch, catalog: Catalog) -> tuple[Tensor, Tensor]:
    """float32 [U, B] and the weight of each event [E]."""
    by_kind = torch.zeros(256, device=batch.device)
    for kind, interest in INTEREST.items():
        by_kind[kind] = interest
    weight = by_kind[batch.kind] * torch.exp2(-batch.age_days / HALF_LIFE_DAYS)
    zero = torch.zeros(batch.size, device=batch.device)
    one = torch.ones(len(batch.query), device=batch.device)
    bought = (batch.kind == EventType.PURCHASE).float()
    price = _log_price(catalog, batch.row)
    priced = weight * (price > 0)
    mean_price = zero.index_add(0, batch.query, priced * price) / zero.index_add(0, batch.query, priced).clamp(min=1e-9)
    recency = torch.full_like(zero, NEVER_DAYS).scatter_reduce(0, batch.query, batch.age_days, "amin")
    columns = (
        torch.log1p(zero.index_add(0, batch.query, one)),
        torch.log1p(zero.index_add(0, batch.query, bought)),
        torch.log1p(zero.index_add(0, batch.query, weight)),
        torch.log1p(recency),
        mean_price,
    )
    return torch.stack(columns), weight


def _own(batch: Batch, candidates: Candidates, pairs: PairSet) -> Tensor:
    """What the user did with this very item: how often, and how long ago the last time was."""
    size = len(candidates.query)
    found = pairs.find(batch.query, batch.row, candidates.query, candidates.row)
    hit = (found >= 0).nonzero().squeeze(1)
    index, kind, age = found[hit], batch.kind[hit], batch.age_days[hit]
    columns = []
    for _, kinds in _OWN:
        of_kind = kind == kinds[0]
        for other in kinds[1:]:
            of_kind |= kind == other
        counts = torch.zeros(size, device=batch.device).index_add_(0, index, of_kind.float())
        days = torch.where(of_kind, age, NEVER_DAYS)
        recency = torch.full((size,), NEVER_DAYS, device=batch.device).scatter_reduce_(0, index, days, "amin")
        columns += [torch.log1p(counts), torch.log1p(recency)]
    quantity = torch.where(kind == EventType.PURCHASE, batch.quantity[hit], 0.0)
    columns.append(torch.log1p(torch.zeros(size, device=batch.device).index_add_(0, index, quantity)))
    return torch.stack(columns)


def _cross(batch: Batch, candidates: Candidates, catalog: Catalog, weight: Tensor, user: Tensor) -> Tensor:
    query, row = candidates.query, candidates.row
    total = torch.zeros(batch.size, device=batch.device).index_add_(0, batch.query, weight).clamp_(min=1e-9)
    total = total.index_select(0, query)

    def affinity(codes: Tensor, count: int) -> Tensor:
        """The share of the user's weighted events that went to the candidate's category or brand."""
        of_event, of_candidate = codes.index_select(0, batch.row).long(), codes.index_select(0, row).long()
        cells = torch.zeros(batch.size * (count + 1), device=batch.device)
        cells.index_add_(0, batch.query * (count + 1) + of_event + 1, weight)
        share = cells.index_select(0, query * (count + 1) + of_candidate + 1) / total
        return torch.where(of_candidate >= 0, share, 0.0)

    price, mean = _log_price(catalog, row), user[_USER.index("user.price")].index_select(0, query)
    gap = torch.where((price > 0) & (mean > 0), price - mean, 0.0)
    return torch.stack(
        [
            affinity(catalog.leaf, catalog.categories),
            affinity(catalog.category[:, 0], catalog.categories),
            affinity(catalog.brand, catalog.brands),
            gap.abs(),
            gap.clamp(max=0),
        ]
    )


def _log_price(catalog: Catalog, row: Tensor) -> Tensor:
    """log(1 + price), 0 where unknown."""
    return torch.log1p(catalog.price.index_select(0, row).nan_to_num(0.0).clamp(min=0))
