"""Recall: the three kinds of artifact, each proposing candidates for a whole batch."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.bundle import BasketSpec, Bundle, BundleError, ListSpec, NeighbourSpec, SourceSpec, VectorSpec
from app.engine import kernels
from app.engine.anchors import Rule, anchors
from app.engine.batch import Batch, Scratch, profile_codes
from app.engine.ordering import ranked, sort_with_position, summed
from app.engine.users import halves, open_users

DEPTH = 2
"""Neighbour scores are kept for so many times the candidates: what one source ranks below its own still informs the
ranker when another source proposes it."""
PROFILE = 8
"""Profile attributes that lists by segment know."""


class Recalled(NamedTuple):
    """What a source says: E pairs of query and item, ascending by query, each query's best first."""

    query: Tensor
    """int64 [E]."""
    row: Tensor
    """int64 [E], distinct within a query."""
    score: Tensor
    """float32 [E]."""
    rank: Tensor
    """int64 [E], from 0 in each query."""


_NONE = torch.empty(0, dtype=torch.int64)
NOTHING = Recalled(_NONE, _NONE, torch.empty(0), _NONE)


class Source(Protocol):
    """A source of candidates, opened from the bundle by its name."""

    name: str

    def recall(self, batch: Batch, k: int, context: bool) -> Recalled:
        """At least the best `k` of every query, as far as there are so many."""
        ...


class VectorSource:
    """User vectors, and the nearest item vectors from FAISS."""

    def __init__(self, spec: VectorSpec, bundle: Bundle, device: torch.device) -> None:
        self.name = spec.name
        vectors = _item_vectors(spec.vectors, bundle)
        self._host, self.vectors = halves(vectors), vectors.to(device)
        self._users = open_users(
            spec, vectors if spec.inputs is None else _item_vectors(spec.inputs, bundle), bundle, device
        )
        if self._users.width != vectors.shape[1]:
            raise BundleError(
                f"users of {self.name!r} are {self._users.width} wide, {spec.vectors} {list(vectors.shape)}"
            )
        self.index = _open_index(str(bundle.path / spec.index), device)
        # Where every item is looked at anyway, rough scores and exact ones of the best take a quarter of FAISS's time.
        exact = isinstance(faiss.downcast_index(self.index), faiss.IndexFlat)
        self._scanned = vectors.bfloat16() if exact and device.type == "cpu" else None
        if (self.index.ntotal, self.index.d) != tuple(vectors.shape):
            raise BundleError(
                f"{spec.index} is [{self.index.ntotal}, {self.index.d}], {spec.vectors} {list(vectors.shape)}"
            )

    def recall(self, batch: Batch, k: int, context: bool) -> Recalled:
        users = batch.user_vectors[self.name] = self._users(batch, context)
        k = min(k, self.index.ntotal)
        if self._scanned is not None and isinstance(batch.scratch, Scratch):
            rough = (self._scanned @ users.bfloat16().t()).view(torch.uint16)
            found = kernels.nearest(rough.numpy(), users.numpy(), self._host, k)
            rows, scores = map(torch.from_numpy, found)
            if (found[0] >= 0).all():
                query, rank = _cells(*rows.shape)
                return Recalled(query, rows.flatten(), scores.flatten(), rank)
            return _flat(rows, scores)
        # The GPU build of faiss takes CUDA tensors as they are; the CPU build wants numpy.
        found = self.index.search(users if users.is_cuda else users.numpy(), k)
        scores, rows = map(torch.as_tensor, found)
        # Of whom nothing is known, nothing is near.
        return _flat(torch.where(users.any(1)[:, None], rows, -1), scores)

    def score(self, batch: Batch, query: Tensor, row: Tensor) -> Tensor:
        """Exact scores float32 [M] of (query, row) pairs of a batch that has been recalled."""
        if isinstance(batch.scratch, Scratch):
            found = np.empty(len(query), np.float32)
            users = batch.user_vectors[self.name].numpy()
            kernels.dots(users, self._host, query.numpy(), row.numpy(), found)
            return torch.from_numpy(found)
        return (batch.user_vectors[self.name].index_select(0, query) * self.vectors.index_select(0, row)).sum(1)


class Table:
    """Weighted edges from each of its rows to others, best first."""

    def __init__(self, rows: Tensor, weights: Tensor, file: str, size: int | None, reach: int, device: torch.device):
        """`size` rows, if that is known, name rows below `reach`; raises `BundleError` where they do not."""
        if (rows.dtype, weights.dtype) != (torch.int32, torch.float16):
            raise BundleError(f"{file} is of {rows.dtype} and {weights.dtype}, not int32 and float16")
        if rows.shape != weights.shape or rows.dim() != 2:
            raise BundleError(f"{file} has rows {list(rows.shape)} and weights {list(weights.shape)}")
        if size is not None and len(rows) != size:
            raise BundleError(f"{file} is {list(rows.shape)} for {size} items")
        _check_rows(rows, file, reach)
        self.rows, self.weights = rows.to(device), weights.to(device)
        # As the compiled loops take them.
        self.host = rows.numpy(), halves(weights)


class NeighbourSource:
    """Items near the user's recent items: gather their table rows, weigh, sum, keep the best."""

    def __init__(self, spec: NeighbourSpec, bundle: Bundle, device: torch.device) -> None:
        self.name = spec.name
        table, items = bundle.tensors(spec.table), bundle.manifest.items
        self.table = Table(table["rows"], table["weights"], spec.table, items, items, device)
        self.rule = Rule(spec.anchors, device)

    def recall(self, batch: Batch, k: int, context: bool) -> Recalled:
        return recall_neighbours([self], batch, [k], context)[0][1]


def recall_neighbours(
    sources: Sequence[NeighbourSource], batch: Batch, ks: Sequence[int], context: bool
) -> list[tuple[Tensor, Recalled]]:
    """What `recall` of the sources gives, in parts, each with which source int64 [E] said it."""
    depths = [DEPTH * k for k in ks]
    if isinstance(batch.scratch, Scratch):
        found = [
            _near_anchors(source.table, source.rule, batch, context, depth, batch.scratch.total)
            for source, depth in zip(sources, depths, strict=True)
        ]
        return [(torch.full_like(part.query, number), part) for number, part in enumerate(found)]
    # In one pass: a query of a source is treated as a query of its own.
    slot, row, weight = anchors([source.rule for source in sources], batch, context)
    bounds = torch.searchsorted(slot, torch.arange(len(sources) + 1, device=batch.device) * batch.size).tolist()
    steps = [
        (source.table, slot[start:end], row[start:end], weight[start:end])
        for source, (start, end) in zip(sources, pairwise(bounds), strict=True)
    ]
    slots = len(sources) * batch.size
    limit = torch.tensor(depths, device=batch.device).repeat_interleave(batch.size)
    slot, row, total, rank = _near(steps, slots, batch.items, limit)
    number = slot // batch.size
    return [(number, Recalled(slot - number * batch.size, row, total, rank))]


def _near_anchors(
    table: Table, rule: Rule, batch: Batch, context: bool, depth: int, total: npt.NDArray[np.float32]
) -> Recalled:
    found = kernels.neighbours(*table.host, *batch.host(), *rule.host, context, depth, total)
    return Recalled(*map(torch.from_numpy, found))


def _near(steps: Sequence[tuple[Table, Tensor, Tensor, Tensor]], slots: int, reach: int, limit: Tensor) -> Recalled:
    """The best of what weighted rows lead to: from tables, with slots [A], rows [A] and weights [A] of each.

    All slots together ascend; `limit` [slots] of each are kept. What is reached is below `reach`.
    """
    # A pair is numbered slot * (reach + 1) + 1 + item, so that a table's -1 falls on an item 0 of its own and is
    # dropped when the pairs are few: these arrays are the largest of a batch, every pass over them counts.
    stride = reach + 1
    pairs = [
        table.rows.index_select(0, row).long().add_((slot * stride + 1)[:, None]).flatten()
        for table, slot, row, _ in steps
    ]
    scores = [(table.weights.index_select(0, row) * weight[:, None]).flatten() for table, _, row, weight in steps]
    pair, order = sort_with_position(torch.cat(pairs), slots * stride)
    pair, total = summed(pair, torch.cat(scores).index_select(0, order))
    real = (pair % stride).nonzero().squeeze(1)
    pair, total = pair.index_select(0, real), total.index_select(0, real)
    slot = pair // stride
    row = pair - slot * stride - 1
    order, rank = ranked(slot, total, slots)
    near = (rank < limit.index_select(0, slot)).nonzero().squeeze(1)
    order = order.index_select(0, near)
    return Recalled(
        slot.index_select(0, near), row.index_select(0, order), total.index_select(0, order), rank.index_select(0, near)
    )


class BasketSource:
    """What is in the baskets (sessions, users) most like the user's recent items."""

    def __init__(self, spec: BasketSpec, bundle: Bundle, device: torch.device) -> None:
        self.name, self.likest = spec.name, spec.likest
        table, items = bundle.tensors(spec.table), bundle.manifest.items
        self._items = Table(table["items"], table["weights"], spec.table, None, items, device)
        self._baskets = len(table["items"])
        self._of_item = Table(table["of_item"], table["of_weights"], spec.table, items, self._baskets, device)
        self.rule = Rule(spec.anchors, device)
        # Of items and of baskets, whichever is at hand.
        self._total = np.zeros(max(items, self._baskets), np.float32)

    def recall(self, batch: Batch, k: int, context: bool) -> Recalled:
        depth, size, device = DEPTH * k, batch.size, batch.device
        if isinstance(batch.scratch, Scratch):
            like = _near_anchors(self._of_item, self.rule, batch, context, self.likest, self._total)
            # The baskets as events, each of a type of its own, which weighs as much as the basket is like the user.
            kind, nowhere = np.arange(len(like.row)), np.zeros(size + 1, np.int64)
            found = kernels.neighbours(
                *self._items.host,
                kernels.starts(like.query.numpy(), size),
                like.row.numpy(),
                np.zeros(len(kind), np.float32),
                kind,
                nowhere,
                kind[:0],
                like.score.numpy(),
                np.float32(0),
                np.float32(0),
                self.likest,
                False,
                depth,
                self._total,
            )
            return Recalled(*map(torch.from_numpy, found))
        query, row, weight = anchors([self.rule], batch, context)
        every = torch.ones(size, dtype=torch.int64, device=device)
        like = _near([(self._of_item, query, row, weight)], size, self._baskets, every * self.likest)
        return _near([(self._items, like.query, like.row, like.score)], size, batch.items, every * depth)


class ListSource:
    """The same list for every query, or one by what its user is."""

    def __init__(self, spec: ListSpec, bundle: Bundle, device: torch.device) -> None:
        self.name = spec.name
        table = bundle.tensors(spec.rows)
        self._groups = {code: group for group, code in enumerate(table["groups"].tolist())} if "groups" in table else {}
        self.rows, self.scores = table["rows"].long().to(device), table["scores"].to(device)
        if self.rows.shape != self.scores.shape:
            raise BundleError(f"{spec.rows} has {len(self.rows)} rows and {len(self.scores)} scores")
        if self._groups and (len(self.rows) != len(self._groups) or self._groups.get(-1) != 0):
            raise BundleError(f"{spec.rows} has {len(self.rows)} lists for {len(self._groups)} groups from -1 on")
        _check_rows(self.rows, spec.rows, bundle.manifest.items)
        # Nothing of it depends on who asks, or only on what they have in common with many.
        self._of = lru_cache(maxsize=128)(self._for)
        self._of_profile = lru_cache(maxsize=4096)(self._for_profile)

    def recall(self, batch: Batch, k: int, context: bool) -> Recalled:
        if not self._groups:
            return self._of(batch.size, min(k, len(self.rows)))
        lists = [self._of_profile(tuple(profile_codes(state.profile, PROFILE)), k) for state in batch.states]
        query = torch.repeat_interleave(
            torch.arange(batch.size, device=batch.device),
            torch.tensor([len(one.row) for one in lists], device=batch.device),
        )
        return Recalled(query, *(torch.cat(column) for column in list(zip(*lists, strict=True))[1:]))

    def _for(self, size: int, k: int) -> Recalled:
        return _flat(self.rows[:k].expand(size, k), self.scores[:k].expand(size, k))

    def _for_profile(self, codes: tuple[int, ...], k: int) -> Recalled:
        groups = sorted({self._groups[code] for code in codes if code in self._groups}) or [0]
        chosen = self.rows[groups] >= 0
        row, place = torch.unique(self.rows[groups][chosen], return_inverse=True)
        total = torch.zeros(len(row), device=row.device).index_add_(0, place, self.scores[groups][chosen])
        order, rank = ranked(torch.zeros_like(row), total, 1)
        order, rank = order[:k], rank[:k]
        return Recalled(torch.zeros_like(rank), row[order], total[order], rank)


def _item_vectors(file: str, bundle: Bundle) -> Tensor:
    vectors = bundle.tensors(file)["vectors"]
    if vectors.dtype != torch.float16 or vectors.ndim != 2:
        raise BundleError(f"{file} is of {vectors.dtype} {list(vectors.shape)}, not float16 [n, c]")
    if len(vectors) != bundle.manifest.items:
        raise BundleError(f"{file} has {len(vectors)} vectors for {bundle.manifest.items} items")
    return vectors


def _check_rows(rows: Tensor, file: str, reach: int) -> None:
    # The compiled loops do not look again.
    if rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < reach:
        raise BundleError(f"{file} names rows beyond the {reach} items")


def open_source(spec: SourceSpec, bundle: Bundle, device: torch.device) -> Source:
    """Raises `BundleError` when the source's files do not fit together or the catalog."""
    try:
        match spec:
            case VectorSpec():
                return VectorSource(spec, bundle, device)
            case NeighbourSpec():
                return NeighbourSource(spec, bundle, device)
            case BasketSpec():
                return BasketSource(spec, bundle, device)
            case ListSpec():
                return ListSource(spec, bundle, device)
    except KeyError as error:
        raise BundleError(f"source {spec.name!r} has no {error}") from error


@lru_cache(maxsize=128)
def _cells(size: int, k: int) -> tuple[Tensor, Tensor]:
    """Query and rank [B * k] where every query has k."""
    cell = torch.arange(size * k)
    return cell // k, cell % k


def _flat(rows: Tensor, scores: Tensor) -> Recalled:
    """From rows [B, K], -1 where there is none, and scores [B, K]."""
    width = rows.shape[1]
    cell = (rows >= 0).flatten().nonzero().squeeze(1)
    query = cell // width
    return Recalled(
        query, rows.flatten().index_select(0, cell), scores.flatten().index_select(0, cell), cell - query * width
    )


def _open_index(path: str, device: torch.device) -> faiss.Index:
    try:
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise BundleError(f"cannot read the FAISS index: {error}") from error
    if device.type == "cuda":
        # Teaches the GPU index to take CUDA tensors.
        import_module("faiss.contrib.torch_utils")

        resources = faiss.StandardGpuResources()
        # HNSW has no GPU form; an exact GPU scan is faster than it at every size that fits.
        if not isinstance(faiss.downcast_index(index), faiss.IndexIVFFlat):
            flat = faiss.IndexFlatIP(index.d)
            flat.add(index.reconstruct_n(0, index.ntotal))
            index = flat
        index = faiss.index_cpu_to_gpu(resources, device.index or 0, index)
    return index
