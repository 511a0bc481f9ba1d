"""What the stages share: the batch of queries as tensors, and sets of (query, row) pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.catalog import NO_ROW, Catalog
from app.engine import Query, kernels
from app.state.events import EVENT, EXCLUSION, MS_PER_DAY, Events, UserState, item_key

PROFILE_BUCKETS = 4096
NAMED = 3
"""The exclusion of one request, beside HIDDEN and BOUGHT."""


def profile_codes(profile: Mapping[str, str], width: int) -> list[int]:
    """Each attribute as a code in 1..PROFILE_BUCKETS-1, by attribute name, cut or padded with 0 to `width`."""
    codes = [_profile_code(name, profile[name]) for name in sorted(profile)[:width]]
    return codes + [0] * (width - len(codes))


@lru_cache(maxsize=65_536)
def _profile_code(name: str, value: str) -> int:
    digest = blake2b(f"{name}={value}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % (PROFILE_BUCKETS - 1)


Pairs = tuple[Tensor, Tensor]
"""Queries and catalog rows, int64 [M] each."""


class Scratch:
    """What the compiled stages keep of every item, at rest between two queries."""

    def __init__(self, rows: int) -> None:
        self.total = np.zeros(rows, np.float32)
        self.index = np.full(rows, -1, np.int32)


@dataclass(slots=True)
class Batch:
    """`size` queries of one scene. Events are flattened: ascending by query, then by time.

    Everything that a feature or a source may know of a user is here, and all of it is as of `now_ms`.
    Events of items that the bundle does not know are left out.
    """

    queries: Sequence[Query]
    now_ms: int
    device: torch.device
    items: int
    """Rows of the catalog."""
    scratch: "Scratch | PairSet"
    """Which form the stages take: compiled loops with a `Scratch`, tensor operations with a `PairSet`."""
    query: Tensor
    """int64 [E]: which query the event belongs to."""
    row: Tensor
    """int64 [E]: catalog row of the event's item."""
    kind: Tensor
    """int64 [E]: `EventType`."""
    age_days: Tensor
    """float32 [E], never negative."""
    quantity: Tensor
    """float32 [E]."""
    from_end: Tensor
    """int64 [E]: 0 for the query's last event, 1 for the one before, ..."""
    anchor_query: Tensor
    anchor_row: Tensor
    """int64 [A]: the items on the page."""
    excluded_query: Tensor
    excluded_row: Tensor
    excluded_kind: Tensor
    """int64 [X]: what the users excluded, and as `NAMED` what is on the page or the request excludes."""
    states: Sequence[UserState]
    user_vectors: dict[str, Tensor] = field(default_factory=dict)
    """float32 [B, d] by vector source, left there by its recall."""
    _host: tuple[npt.NDArray[Any], ...] | None = None
    _profiles: dict[int, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.queries)

    def host(self) -> tuple[npt.NDArray[Any], ...]:
        """What the users did and what is on the page, as the compiled loops take it: starts, rows, ages in days and
        kinds, and the starts and rows of the page."""
        # Every source asks.
        if self._host is None:
            self._host = (
                kernels.starts(self.query.numpy(), self.size),
                self.row.numpy(),
                self.age_days.numpy(),
                self.kind.numpy(),
                kernels.starts(self.anchor_query.numpy(), self.size),
                self.anchor_row.numpy(),
            )
        return self._host

    def profile(self, width: int) -> Tensor:
        """int64 [B, width]: the users' hashed profile attributes, padded with 0."""
        if width not in self._profiles:
            hashed = [profile_codes(state.profile, width) for state in self.states]
            self._profiles[width] = torch.tensor(hashed, dtype=torch.int64, device=self.device)
        return self._profiles[width]


def collate(
    queries: Sequence[Query],
    states: Sequence[UserState],
    catalog: Catalog,
    window: int,
    now_ms: int,
    scratch: "Scratch | PairSet",
) -> Batch:
    """The batch of `queries`; `states` are those of their users, in the same order."""
    device, size = catalog.device, len(queries)
    # In numpy: the bytes come from the host, and on arrays this small its calls cost a quarter of torch's.
    # A state may hold more events than the bundle was trained to see, and events of the future: the
    # clock of `now_ms` may be that of a recorded query or of a training cut.
    histories = [state.events[-window:] for state in states]
    events = _joined(histories, EVENT)
    row = catalog.rows(events["item"])
    known = np.flatnonzero(row != NO_ROW)
    query = np.repeat(np.arange(size), [len(history) for history in histories])[known]
    from_end = np.bincount(query, minlength=size).cumsum()[query] - 1 - np.arange(len(query))
    age_days = np.maximum(now_ms - events["ts"][known], 0) / MS_PER_DAY

    excluded = _joined([state.exclusions for state in states], EXCLUSION)
    owner = np.repeat(np.arange(size), [len(state.exclusions) for state in states])
    anchor_query, anchor_row = _named([query.anchors for query in queries], catalog)
    refused_query, refused_row = _named([query.where.exclude for query in queries], catalog)
    excluded_row = np.concatenate([catalog.rows(excluded["item"]), anchor_row, refused_row])
    excluded_query = np.concatenate([owner, anchor_query, refused_query])
    excluded_kind = np.full(len(excluded_row), NAMED)
    excluded_kind[: len(excluded)] = excluded["kind"]
    excluding = np.flatnonzero(excluded_row != NO_ROW)

    def tensor(column: npt.NDArray[Any], dtype: npt.DTypeLike = np.int64) -> Tensor:
        return torch.from_numpy(column.astype(dtype)).to(device)

    return Batch(
        queries=queries,
        now_ms=now_ms,
        device=device,
        items=catalog.size,
        scratch=scratch,
        query=tensor(query),
        row=tensor(row[known]),
        kind=tensor(events["type"][known]),
        age_days=tensor(age_days, np.float32),
        quantity=tensor(events["quantity"][known], np.float32),
        from_end=tensor(from_end),
        anchor_query=tensor(anchor_query),
        anchor_row=tensor(anchor_row),
        excluded_query=tensor(excluded_query[excluding]),
        excluded_row=tensor(excluded_row[excluding]),
        excluded_kind=tensor(excluded_kind[excluding]),
        states=states,
    )


_NOBODY = np.empty(0, np.int64)


def _named(named: Sequence[tuple[str, ...]], catalog: Catalog) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Query and row of the items that the queries name, as far as the bundle knows them."""
    if not any(named):
        return _NOBODY, _NOBODY
    query = np.repeat(np.arange(len(named)), [len(items) for items in named])
    row = catalog.rows(np.array([item_key(item) for items in named for item in items], np.int64))
    return query[row != NO_ROW], row[row != NO_ROW]


def _joined(parts: Sequence[Events], dtype: np.dtype[np.void]) -> Events:
    # Their bytes: numpy would compare the record types of each part anew, for longer than all else here takes.
    return np.frombuffer(b"".join([part.tobytes() for part in parts]), dtype)


class PairSet:
    """Distinct (query, row) pairs of a batch, found through one scratch table instead of a sort.

    The table has a cell for every pair that could be; only the cells of pairs at hand are ever
    touched, and nothing is cleared: a cell is believed only if the pair that it points to agrees.
    """

    def __init__(self, queries: int, rows: int, device: torch.device) -> None:
        self.rows = rows
        self._cells = torch.zeros(queries * max(rows, 1), dtype=torch.int32, device=device)

    def distinct(self, query: Tensor, row: Tensor) -> Tensor:
        """Positions of one of each distinct pair, ascending."""
        key = query * self.rows + row
        position = torch.arange(len(key), dtype=torch.int32, device=key.device)
        self._cells.index_copy_(0, key, position)
        return (self._cells.index_select(0, key) == position).nonzero().squeeze(1)

    def find(self, query: Tensor, row: Tensor, of_query: Tensor, of_row: Tensor) -> Tensor:
        """Index of each pair [E] among the distinct pairs `of` [M], -1 where it is not one of them."""
        members = of_query * self.rows + of_row
        if not len(members) or not len(query):
            return torch.full_like(query, -1)
        self._cells.index_copy_(0, members, torch.arange(len(members), dtype=torch.int32, device=members.device))
        key = query * self.rows + row
        index = self._cells.index_select(0, key).long().clamp_(max=len(members) - 1)
        return torch.where(members.index_select(0, index) == key, index, -1)
