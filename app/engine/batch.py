"""What the stages share: the batch of queries as tensors, and sets of (query, row) pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from app.catalog import NO_ROW, Catalog
from app.engine import Query
from app.state.events import EVENT, EXCLUSION, Events, UserState, item_key

MS_PER_DAY = 86_400_000.0
PROFILE_BUCKETS = 4096


def profile_codes(profile: Mapping[str, str], width: int) -> list[int]:
    """Each attribute as a code in 1..PROFILE_BUCKETS-1, by attribute name, cut or padded with 0 to `width`."""
    codes = [_profile_code(name, profile[name]) for name in sorted(profile)[:width]]
    return codes + [0] * (width - len(codes))


@lru_cache(maxsize=65_536)
def _profile_code(name: str, value: str) -> int:
    digest = blake2b(f"{name}={value}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % (PROFILE_BUCKETS - 1)


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
    query: Tensor
    """int64 [E]: which query the event belongs to."""
    row: Tensor
    """int64 [E]: catalog row of the event's item."""
    kind: Tensor
    """int64 [E]: `EventType`."""
    age_days: Tensor
    """float32 [E], never negative."""
    value: Tensor
    """float32 [E], NaN where unknown."""
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
    """int64 [X]: exclusions of the users."""
    states: Sequence[UserState]
    user_vectors: dict[str, Tensor] = field(default_factory=dict)
    """float32 [B, d] by vector source, left there by its recall."""

    @property
    def size(self) -> int:
        return len(self.queries)

    def profile(self, width: int) -> Tensor:
        """int64 [B, width]: the users' hashed profile attributes, padded with 0."""
        hashed = [profile_codes(state.profile, width) for state in self.states]
        return torch.tensor(hashed, dtype=torch.int64, device=self.device)


def collate(queries: Sequence[Query], states: Sequence[UserState], catalog: Catalog, window: int, now_ms: int) -> Batch:
    """The batch of `queries`; `states` are those of their users, in the same order."""
    device = catalog.device
    # A state may hold more events than the bundle was trained to see, and events of the future: the
    # clock of `now_ms` may be that of a recorded query or of a training cut.
    histories = [state.events[-window:] for state in states]
    events = _joined(histories, EVENT)
    query = np.repeat(np.arange(len(queries)), [len(history) for history in histories])
    row = catalog.rows(_tensor(events["item"], device))
    known = row != NO_ROW
    query_known = _tensor(query, device)[known]
    counts = torch.bincount(query_known, minlength=len(queries))
    from_end = counts.cumsum(0)[query_known] - 1 - torch.arange(len(query_known), device=device)

    exclusions = [state.exclusions for state in states]
    excluded = _joined(exclusions, EXCLUSION)
    excluded_query = np.repeat(np.arange(len(queries)), [len(exclusion) for exclusion in exclusions])
    excluded_row = catalog.rows(_tensor(excluded["item"], device))
    excluded_known = excluded_row != NO_ROW

    anchors = [(index, item_key(item)) for index, query in enumerate(queries) for item in query.anchors]
    anchor = torch.tensor(anchors, dtype=torch.int64, device=device).reshape(-1, 2)
    anchor_row = catalog.rows(anchor[:, 1].contiguous())
    anchor_known = anchor_row != NO_ROW

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return _tensor(events[name], device).to(dtype)[known]

    age_ms = now_ms - column("ts", torch.int64)
    return Batch(
        queries=queries,
        now_ms=now_ms,
        device=device,
        items=catalog.size,
        query=query_known,
        row=row[known],
        kind=column("type", torch.int64),
        age_days=(age_ms.clamp(min=0).double() / MS_PER_DAY).float(),
        value=column("value", torch.float32),
        quantity=column("quantity", torch.float32),
        from_end=from_end,
        anchor_query=anchor[:, 0][anchor_known],
        anchor_row=anchor_row[anchor_known],
        excluded_query=_tensor(excluded_query, device)[excluded_known],
        excluded_row=excluded_row[excluded_known],
        excluded_kind=_tensor(excluded["kind"], device).long()[excluded_known],
        states=states,
    )


def _joined(parts: Sequence[Events], dtype: np.dtype[np.void]) -> Events:
    # Their bytes: numpy would compare the record types of each part anew, for longer than all else here takes.
    return np.frombuffer(b"".join([part.tobytes() for part in parts]), dtype)


def _tensor(column: np.ndarray[tuple[int], np.dtype[np.generic]], device: torch.device) -> Tensor:
    # Copied: the bytes came from Redis read-only, and fields of records have strides that torch refuses.
    return torch.from_numpy(column.copy()).to(device)


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
        if not len(members):
            return torch.full_like(query, -1)
        self._cells.index_copy_(0, members, torch.arange(len(members), dtype=torch.int32, device=members.device))
        key = query * self.rows + row
        index = self._cells.index_select(0, key).long().clamp_(max=len(members) - 1)
        return torch.where(members[index] == key, index, -1)
