"""Anchors: the items that a user's events, or the page, make others be looked up for."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from app.bundle import Anchors
from app.engine.batch import Batch
from app.engine.ordering import sort_with_position, summed
from app.state.events import EventType


class Rule:
    """How events weigh, as `Anchors` says it."""

    def __init__(self, spec: Anchors, device: torch.device) -> None:
        self.decay = -math.log(2) / spec.half_life_days
        self.step = -math.log(2) / spec.half_life_events if spec.half_life_events else 0.0
        self.limit = spec.limit
        self.by_kind = torch.zeros(256, device=device)
        for name, weight in spec.weights.items():
            self.by_kind[EventType[name.upper()]] = weight
        self.host = self.by_kind.cpu().numpy(), np.float32(self.decay), np.float32(self.step), self.limit


def anchors(rules: Sequence[Rule], batch: Batch, context: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct items that count: their slot (rule * B + query), ascending, catalog row and weight."""
    device, size = batch.device, batch.size
    by_kind, decay, step, limit = _rules(tuple(rules), device)
    weights = by_kind.index_select(1, batch.kind) * torch.exp(batch.age_days * decay + batch.from_end * step)
    counted = (weights > 0) & (batch.from_end < limit)
    on_page = context and len(batch.anchor_row) > 0
    if on_page:
        counted &= torch.bincount(batch.anchor_query, minlength=size)[batch.query] == 0
    number, event = counted.nonzero(as_tuple=True)
    slot, row = number * size + batch.query.index_select(0, event), batch.row.index_select(0, event)
    weight = weights.flatten().index_select(0, number * len(batch.row) + event)
    if on_page:
        page = torch.arange(len(rules), device=device)[:, None] * size + batch.anchor_query
        slot = torch.cat([slot, page.flatten()])
        row = torch.cat([row, batch.anchor_row.repeat(len(rules))])
        weight = torch.cat([weight, torch.ones(page.numel(), device=device)])
    # Viewed, put in the cart, bought: one item to look up, not three.
    pair, order = sort_with_position(slot * batch.items + row, len(rules) * size * batch.items)
    pair, weight = summed(pair, weight.index_select(0, order))
    return pair // batch.items, pair % batch.items, weight


@lru_cache(maxsize=64)
def _rules(rules: tuple[Rule, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight by event type [R, 256], decay a day [R, 1] and an event [R, 1], and limit [R, 1] of the rules."""
    # exp and not exp2, whose last bit depends on where in a tensor a number lies: features must not.
    by_kind = torch.stack([rule.by_kind for rule in rules])
    decay, step, limit = (
        torch.tensor(column, device=device)[:, None]
        for column in zip(*((rule.decay, rule.step, rule.limit) for rule in rules), strict=True)
    )
    return by_kind, decay, step, limit
