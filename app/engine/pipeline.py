"""The pipeline: a batch of queries and their users' states in, slates out.

No I/O, no clock and no randomness but the queries' own: the service, training, evaluation, recorded
queries and property tests all call the same `Pipeline`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from operator import add

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from app.bundle import Bundle, ListSpec
from app.catalog import Catalog
from app.engine import Query, Slate, SlateItem
from app.engine.batch import Batch, PairSet, Scratch, collate
from app.engine.explain import reason
from app.engine.features import compute
from app.engine.filters import forbidden
from app.engine.merge import ABSENT, Candidates, merge
from app.engine.ranking import FUSIONS, Ranker, reciprocal_rank
from app.engine.recall import NOTHING, NeighbourSource, Recalled, Source, VectorSource, open_source, recall_neighbours
from app.engine.rerank import rerank
from app.scenes import Scene
from app.state.events import UserState

log = structlog.get_logger()

CELLS = 64_000_000
"""Pairs that the scratch table can hold; it bounds the batch of a scene at catalogs above a million items."""
BACKFILL = 200
"""Candidates that an exact search adds where the sources leave a filtered slate short."""
TOGETHER = 9
"""Sources of which every combination of names is kept: 512 of them, and a few such tables for any scene."""


_NONE = repeat(None)
_new_item: Callable[[Iterable[object]], SlateItem] = partial(tuple.__new__, SlateItem)


@dataclass(slots=True)
class Prepared:
    """A batch just before ranking."""

    batch: Batch
    candidates: Candidates
    degraded: list[str]


class Pipeline:
    """One bundle on one device. Not for use by two threads at a time: stages share scratch memory."""

    def __init__(self, bundle: Bundle, device: torch.device, max_batch: int, *, compiled: bool | None = None) -> None:
        """`compiled` chooses between loops and tensor operations; by default a CPU gets the former."""
        self.bundle = bundle
        self.device = device
        self.catalog = Catalog(bundle, device)
        self.window = bundle.manifest.window
        self.max_batch = max(1, min(max_batch, CELLS // max(self.catalog.size, 1)))
        if compiled is None:
            compiled = device.type == "cpu"
        rows = self.catalog.size
        self._scratch = Scratch(rows) if compiled else PairSet(self.max_batch, rows, device)
        self.sources: dict[str, Source] = {
            spec.name: open_source(spec, bundle, device) for spec in bundle.manifest.sources
        }
        self._rankers = {spec.name: Ranker(spec, bundle, device) for spec in bundle.manifest.rankers}
        self._lists = {spec.name for spec in bundle.manifest.sources if isinstance(spec, ListSpec)}
        self._popular = self.catalog.statistics[:, 0] if bundle.manifest.statistics else None
        self.scenes: Mapping[str, Scene] = {}
        self.use(bundle.manifest.scenes)

    def use(self, scenes: Mapping[str, Scene]) -> None:
        """Replaces the scenes; raises `BundleError` for one that its ranker does not fit."""
        for name, scene in scenes.items():
            if scene.ranker:
                names = tuple(source.name for source in scene.sources)
                self._rankers[scene.ranker].check(name, names, self.bundle.manifest.statistics)
        self.scenes = dict(scenes)

    def run(
        self, queries: Sequence[Query], states: Sequence[UserState], now_ms: int, late: bool = False
    ) -> list[Slate]:
        """The slate of each query, in order; every query names a scene of `scenes`.

        `late` leaves out all that takes long, and the slates say so.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for position, query in enumerate(queries):
            groups[query.scene].append(position)
        slates: dict[int, Slate] = {}
        for name, positions in groups.items():
            scene = self._in_a_hurry(self.scenes[name]) if late else self.scenes[name]
            for start in range(0, len(positions), self.max_batch):
                chunk = positions[start : start + self.max_batch]
                answers = self._slates(
                    scene, [queries[i] for i in chunk], [states[i] for i in chunk], now_ms, ["deadline"] * late
                )
                slates.update(zip(chunk, answers, strict=True))
        return [slates[position] for position in range(len(queries))]

    def prepare(self, scene: Scene, queries: Sequence[Query], states: Sequence[UserState], now_ms: int) -> Prepared:
        """State, recall, merge and filter, for queries of one scene."""
        batch = collate(queries, states, self.catalog, self.window, now_ms, self._scratch)
        said, source, degraded = self._recall(batch, scene)
        ks = [source.k for source in scene.sources]
        candidates = merge(batch, said, source, ks, scene.repeats, self.catalog)
        candidates = self._backfill(batch, candidates, scene)
        for column, wanted in enumerate(scene.sources):
            vectors = self.sources[wanted.name]
            if isinstance(vectors, VectorSource) and wanted.name in batch.user_vectors:
                candidates.score[column] = vectors.score(batch, candidates.query, candidates.row)
        return Prepared(batch, candidates, degraded)

    def _recall(self, batch: Batch, scene: Scene) -> tuple[Recalled, Tensor, list[str]]:
        """What the sources say, which of the scene's sources int64 [E] said it, and the stages that failed."""
        parts, said_by = [NOTHING], [NOTHING.query]
        degraded: list[str] = []

        def failed(names: Sequence[str], error: Exception) -> None:
            log.error("recall failed", sources=names, error=str(error))
            degraded.extend(f"recall:{name}" for name in names)

        sources = [self.sources[wanted.name] for wanted in scene.sources]
        neighbours = {number: one for number, one in enumerate(sources) if isinstance(one, NeighbourSource)}
        if neighbours:
            try:
                ks = [scene.sources[number].k for number in neighbours]
                numbers = torch.tensor(list(neighbours), device=self.device)
                for which, part in recall_neighbours(list(neighbours.values()), batch, ks, scene.context):
                    parts.append(part)
                    said_by.append(numbers.index_select(0, which))
            except (RuntimeError, ValueError, IndexError) as error:
                failed([one.name for one in neighbours.values()], error)
        for number, (wanted, one) in enumerate(zip(scene.sources, sources, strict=True)):
            if number in neighbours:
                continue
            try:
                part = one.recall(batch, wanted.k, scene.context)
                parts.append(part)
                said_by.append(torch.full_like(part.query, number))
            except (RuntimeError, ValueError, IndexError) as error:
                failed([wanted.name], error)
        return Recalled(*map(torch.cat, zip(*parts, strict=True))), torch.cat(said_by), degraded

    def features(self, prepared: Prepared) -> Tensor:
        """float32 [M, F] of the candidates; `feature_names` of the scene names the columns."""
        return compute(prepared.batch, prepared.candidates, self.catalog)

    @torch.inference_mode()
    def _slates(
        self, scene: Scene, queries: Sequence[Query], states: Sequence[UserState], now_ms: int, degraded: list[str]
    ) -> list[Slate]:
        prepared = self.prepare(scene, queries, states, now_ms)
        score = self.rank(scene, prepared)
        position, score = rerank(prepared.batch, prepared.candidates, score, scene, self.catalog)
        if scene.fusion == "learned" and scene.ranker and "rank" not in prepared.degraded:
            # Only now: as probabilities, the best of a long list could round to the same 1.
            score = self._rankers[scene.ranker].shown(score)
        return self._answers(scene, prepared, position, score, tuple(degraded + prepared.degraded))

    def rank(self, scene: Scene, prepared: Prepared) -> Tensor:
        """float32 [M]: the scene's score of every candidate."""
        if not len(prepared.candidates.row):
            return torch.empty(0, device=self.device)
        weights = torch.tensor([source.weight for source in scene.sources], device=self.device)
        if scene.fusion != "learned" or scene.ranker is None:
            return FUSIONS[scene.fusion](prepared.candidates, weights)
        try:
            return self._rankers[scene.ranker].score(self.features(prepared))
        except RuntimeError as error:
            log.error("ranker failed", ranker=scene.ranker, error=str(error))
            prepared.degraded.append("rank")
            return reciprocal_rank(prepared.candidates, weights)

    def _backfill(self, batch: Batch, candidates: Candidates, scene: Scene) -> Candidates:
        """Adds the best of *all* eligible items to the queries whose candidates do not fill the slate."""
        counts = torch.bincount(candidates.query, minlength=batch.size).tolist()
        short = [index for index, query in enumerate(batch.queries) if counts[index] < query.limit]
        if not short or not self.catalog.size:
            return candidates
        queries, rows = [candidates.query], [candidates.row]
        forbidden_query, forbidden_row = forbidden(batch, scene.repeats)
        for index in short:
            query = batch.queries[index]
            mask = self.catalog.eligible(query.where).clone()
            mask[candidates.row[candidates.query == index]] = False
            mask[forbidden_row[forbidden_query == index]] = False
            row = mask.nonzero().squeeze(1)
            best = self._exact(batch, index, row).topk(min(len(row), max(BACKFILL, query.limit))).indices
            rows.append(row[best])
            queries.append(torch.full_like(best, index))
        query_column, row_column = torch.cat(queries), torch.cat(rows)
        order = query_column.argsort(stable=True)
        added = len(query_column) - len(candidates.query)
        sources = candidates.score.shape[0]
        return Candidates(
            query_column[order],
            row_column[order],
            torch.cat([candidates.score, torch.zeros((sources, added), device=self.device)], 1)[:, order],
            torch.cat([candidates.rank, torch.full((sources, added), ABSENT, device=self.device)], 1)[:, order],
            candidates.best,
        )

    def _exact(self, batch: Batch, index: int, row: Tensor) -> Tensor:
        """Scores of any rows for one query: by its user vector, else by popularity."""
        for name, users in batch.user_vectors.items():
            source = self.sources[name]
            if isinstance(source, VectorSource):
                return source.vectors.index_select(0, row).float() @ users[index]
        if self._popular is not None:
            return self._popular.index_select(0, row)
        return torch.zeros(len(row), device=self.device)

    def _in_a_hurry(self, scene: Scene) -> Scene:
        lists = tuple(source for source in scene.sources if source.name in self._lists) or scene.sources
        return scene.model_copy(update={"sources": lists, "fusion": "reciprocal_rank", "ranker": None})

    def _answers(
        self, scene: Scene, prepared: Prepared, position: Tensor, score: Tensor, degraded: tuple[str, ...]
    ) -> list[Slate]:
        batch, candidates = prepared.batch, prepared.candidates
        counts = (position >= 0).sum(1).tolist()
        scores, width = score.tolist(), position.shape[1]
        rows: list[int] = []
        ids: list[str] = []
        sources: list[tuple[str, ...]] = []
        if len(candidates.row):
            shown = position.clamp(min=0).flatten()
            on_host = candidates.row.index_select(0, shown).cpu().numpy()
            rows, ids = on_host.tolist(), self.catalog.ids(on_host)
            proposed = (candidates.rank.index_select(1, shown) < ABSENT).cpu().numpy()
            sources = _proposers(tuple(source.name for source in scene.sources), proposed)
        slates = []
        for index, query in enumerate(batch.queries):
            own = slice(index * width, index * width + min(counts[index], query.limit))
            # What SlateItem(...) does, without a Python call an item.
            items = tuple(map(_new_item, zip(ids[own], scores[index], sources[own], _NONE, _NONE, strict=False)))
            if query.explain or query.fields:
                items = tuple(
                    self._detailed(item, row, index, query, scene, batch)
                    for item, row in zip(items, rows[own], strict=True)
                )
            slates.append(Slate(query.request_id, query.scene, items, self.bundle.version, None, degraded))
        return slates

    def _detailed(self, item: SlateItem, row: int, index: int, query: Query, scene: Scene, batch: Batch) -> SlateItem:
        attributes = self.catalog.attributes(row) if query.fields else {}
        return item._replace(
            reason=reason(index, row, item.sources, self.sources, batch, self.catalog, scene.context)
            if query.explain
            else None,
            attributes={name: attributes[name] for name in query.fields if name in attributes}
            if query.fields
            else None,
        )


@lru_cache(maxsize=256)
def _names(sources: tuple[str, ...]) -> list[tuple[str, ...]]:
    """By number: the names of the sources whose bits are set in it."""
    return [tuple(name for bit, name in enumerate(sources) if mask >> bit & 1) for mask in range(1 << len(sources))]


def _proposers(sources: tuple[str, ...], proposed: npt.NDArray[np.bool_]) -> list[tuple[str, ...]]:
    """Of each item, the names of the sources by which it is `proposed` [S, I]."""
    found: Iterable[tuple[str, ...]] = repeat((), proposed.shape[1])
    for first in range(0, len(sources), TOGETHER):
        part = proposed[first : first + TOGETHER]
        names = _names(sources[first : first + TOGETHER])
        masks = (1 << np.arange(len(part))) @ part
        found = map(add, found, map(names.__getitem__, masks.tolist()))
    return list(found)
