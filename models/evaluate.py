"""Evaluation through the very engine that serves: held-out histories in, slates out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from app.bundle import Bundle, VectorSpec
from app.engine import Query
from app.engine.merge import ABSENT, Candidates
from app.engine.pipeline import Pipeline, Prepared
from app.engine.ranking import FUSIONS, Ranker
from app.engine.rerank import rerank
from app.scenes import Fusion, Scene
from app.state.events import MS_PER_DAY, EventType
from models import baselines
from models.catalog import Items, listed
from models.data import Tables
from models.data.log import Log
from models.metrics import (
    Catalog,
    Interval,
    Row,
    Scores,
    bootstrap,
    evaluate,
    gap,
    known_mean,
    long_tail,
    paired_bootstrap,
    shares,
)
from models.ranking.calibration import Bin, reliability
from models.result import Ablated, ItemGroup, Line, Result, Segment, SourceRecall, Spread, ViewResult
from models.sources import WINDOW, Progress
from models.train import BATCH, targets

LIMIT = 20
HEADLINE = "ndcg@20"
VIEWS = {"new": "home", "all": "buy_again"}
"""The two views of a shop where people buy again, and the scenes that serve them."""
HISTORY = ((0, "no event"), (1, "1 or 2 events"), (3, "3 to 9 events"), (10, "10 events or more"))
"""The users by the events that they had before the cut, each group from its number on."""
COLD = 3
"""Events before the cut; an item with fewer is cold."""
SEGMENT = 20
"""Users; of fewer no segment is made."""
SEGMENTS = range(2, 13)
"""Attributes with another number of segments are left out."""
SAMPLE = 512
"""Users whose candidates say what a feature is on average."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class View:
    """One view's leaderboard, how sure the pipeline's lead is, and where it is good and where not."""

    name: str
    rows: Sequence[Row]
    leads: Mapping[str, Interval]
    """By row name: the paired bootstrap interval of the pipeline's NDCG@20 less the row's."""
    candidate_recall: float
    users: int
    sources: Sequence[SourceRecall]
    segments: Sequence[Segment]
    spreads: Sequence[Spread]
    items: Sequence[ItemGroup]
    ablation: Sequence[Ablated]
    reliability: Sequence[Bin]

    def result(self) -> ViewResult:
        return ViewResult(
            name=self.name,
            users=self.users,
            candidate_recall=self.candidate_recall,
            leaderboard=tuple(
                Line(
                    name=row.name,
                    metrics={name: row.scores[name] for name in (*row.scores.per_user, *row.scores.overall)},
                    interval=row.interval or (None, None),
                    lead=self.leads.get(row.name),
                )
                for row in self.rows
            ),
            segments=tuple(self.segments),
            spreads=tuple(self.spreads),
            items=tuple(self.items),
            sources=tuple(self.sources),
            ablation=tuple(self.ablation),
            reliability=tuple(self.reliability),
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """The (user, wanted item) pairs of a view as columns [P], and how far each item came."""

    owner: Ints
    """Position of the user among those judged, ascending."""
    row: Ints
    """Catalog row; beyond the catalog for an item that the bundle does not know."""
    proposed: Bools
    """[S, P]: by each source of the scene."""
    candidate: Bools
    served: Bools


def slates(pipeline: Pipeline, scene: Scene, log: Log, users: Sequence[int], cut_ms: int) -> Ints:
    """Catalog rows int64 [U, LIMIT] that the engine answers with, -1 where a slate ends early."""
    return _answers(pipeline, scene, log, users, cut_ms)[0]


def _answers(
    pipeline: Pipeline, scene: Scene, log: Log, users: Sequence[int], cut_ms: int
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """The slates, and the score of every place."""
    served = dict(pipeline.scenes)
    pipeline.use({"evaluated": scene})
    answers = np.full((len(users), LIMIT), -1, np.int64)
    scores = np.full((len(users), LIMIT), np.nan)
    try:
        for start in range(0, len(users), BATCH):
            chunk = users[start : start + BATCH]
            queries = [Query(str(user), user=log.users[user], scene="evaluated", limit=LIMIT) for user in chunk]
            for place, slate in enumerate(pipeline.run(queries, log.states(cut_ms, WINDOW, chunk), cut_ms), start):
                rows = pipeline.catalog.rows_of([item.item_id for item in slate.items])
                answers[place, : len(rows)] = rows.numpy()
                scores[place, : len(rows)] = [item.score for item in slate.items]
    finally:
        pipeline.use(served)
    return answers, scores


def variants(scene: Scene) -> dict[str, Scene]:
    """Every source alone, every fusion mode, and last the scene as it is served."""
    found = {
        f"source {source.name}": scene.model_copy(
            update={
                "sources": (source.model_copy(update={"k": 400}),),
                "fusion": "reciprocal_rank",
                "ranker": None,
                "diversity": 0.0,
            }
        )
        for source in scene.sources
    }
    for fusion in get_args(Fusion):
        if fusion != "learned":
            found[f"fusion {fusion}"] = scene.model_copy(update={"fusion": fusion, "ranker": None, "diversity": 0.0})
    return found | {"pipeline": scene}


def judge(
    bundle: Bundle,
    tables: Tables,
    cut_ms: int,
    days: float,
    progress: Progress,
    seed: int = 0,
) -> list[View]:
    """Scores the bundle, trained on the events before the cut, on what its users did in the `days` after.

    The leaderboard is of the users with events on both sides of the cut; who came later is a segment of its own.
    Items that the bundle does not know are misses.
    """
    log = Log.from_tables(tables)
    pipeline = Pipeline(bundle, torch.device("cpu"), BATCH)
    items = listed(tables.items, log, cut_ms)
    past = log.before(cut_ms)
    events = np.bincount(past.user, minlength=len(log.users))
    bought = past.events["type"] == EventType.PURCHASE
    bought = bought if bought.any() else np.ones(len(bought), bool)
    row = items.rows(past.events["item"][bought])
    matrix = csr_matrix(
        (np.ones(int((row >= 0).sum())), (past.user[bought][row >= 0], row[row >= 0])),
        shape=(len(log.users), len(items.key)),
    )
    catalog = Catalog(np.bincount(row[row >= 0], minlength=len(items.key)).astype(np.int64), vectors=_vectors(bundle))
    seen = items.rows(past.events["item"])
    cold = np.bincount(seen[seen >= 0], minlength=len(items.key)) < COLD
    kinds = {"popularity": _popularity(catalog.interactions, cold), "department": _departments(pipeline)}
    fitted = {}
    for name in baselines.BASELINES:
        progress(f"fitting {name} (implicit)")
        fitted[name] = baselines.fit(name, matrix, seed)

    views = []
    for view, scene_name in VIEWS.items():
        scene = bundle.manifest.scenes[scene_name]
        wanted = targets(log, items, cut_ms, int(cut_ms + days * MS_PER_DAY), scene.repeats)
        users = sorted(user for user in wanted if events[user])
        newcomers = sorted(user for user in wanted if not events[user])
        relevant, later = ([_rows_or_miss(items, wanted[user]) for user in group] for group in (users, newcomers))
        rows, first = [], []
        for name, model in fitted.items():
            progress(f"{view}: {name} (implicit)")
            found = baselines.recommend(
                model, matrix, np.array(users, np.int64), LIMIT, "all" if scene.repeats else "new"
            )
            rows.append(_row(f"implicit {name}", evaluate(found, relevant, catalog=catalog), seed))
        for name, variant in variants(scene).items():
            progress(f"{view}: {name}")
            found, score = _answers(pipeline, variant, past, users + newcomers, cut_ms)
            rows.append(_row(name, evaluate(found[: len(users)], relevant, catalog=catalog), seed))
            first.append(_row(name, evaluate(found[len(users) :], later), seed))
        best = rows[-1].scores.per_user[HEADLINE]
        leads = {row.name: paired_bootstrap(best, row.scores.per_user[HEADLINE], seed=seed) for row in rows[:-1]}
        shown = found[: len(users)]
        progress(f"{view}: candidates")
        pairs = _wanted(pipeline, scene, past, users, relevant, shown, cut_ms)
        group = np.searchsorted([least for least, _ in HISTORY], events[users], "right") - 1
        segments = segmented("history", [HISTORY[0][1]], np.zeros(len(newcomers), np.int64), first, seed)
        segments += segmented("history", [name for _, name in HISTORY], group.astype(np.int64), rows, seed)
        spreads = []
        for attribute, values, codes in _attributes([log.profiles[user] for user in users]):
            segments += segmented(attribute, values, codes, rows, seed)
            spreads.append(_spread(attribute, values, codes, best, seed))
        by_item = [
            one
            for attribute, (names, codes) in kinds.items()
            for one in item_groups(attribute, names, codes, pairs, len(users), seed)
        ]
        progress(f"{view}: ablation")
        ablation = []
        for (part, name), rest in ablated(pipeline, scene, past, users, cut_ms).items():
            left = evaluate(rest, relevant).per_user[HEADLINE]
            loss = paired_bootstrap(best, left, seed=seed)
            ablation.append(Ablated(part=part, name=name, ndcg=known_mean(left), loss=loss))
        views.append(
            View(
                view,
                rows,
                leads,
                known_mean(shares(pairs.owner, pairs.candidate, len(users))),
                len(users),
                by_source(scene, pairs, len(users)),
                segments,
                spreads,
                by_item,
                ablation,
                reliability_of(shown, score[: len(users)], relevant) if calibrated(bundle, scene) else (),
            )
        )
    return views


def result(bundle: Bundle, views: Sequence[View], cut_ms: int, days: float) -> Result:
    manifest = bundle.manifest
    return Result(
        version=manifest.version,
        created_at=manifest.created_at,
        cut_ms=cut_ms,
        days=days,
        provenance=manifest.provenance,
        losses=manifest.metrics.get("losses", {}),
        views=tuple(view.result() for view in views),
    )


def segmented(attribute: str, values: Sequence[str], codes: Ints, rows: Sequence[Row], seed: int) -> list[Segment]:
    """What the last of `rows` does for the users of each code [U] into `values`, -1 for none, and who does best else.

    Every row is of the same users in the same order.
    """
    *others, own = rows
    codes, found = codes[own.scores.users], []
    for code in np.unique(codes[codes >= 0]).tolist():
        chosen = codes == code

        def mean(row: Row, name: str, chosen: Bools = chosen) -> float:
            return known_mean(row.scores.per_user[name][chosen])

        rival = max(others, key=lambda row: mean(row, HEADLINE))
        found.append(
            Segment(
                attribute=attribute,
                value=values[code],
                users=int(chosen.sum()),
                ndcg=mean(own, HEADLINE),
                interval=bootstrap(own.scores.per_user[HEADLINE][chosen], seed=seed),
                recall=mean(own, "recall@20"),
                rival=rival.name,
                rival_ndcg=mean(rival, HEADLINE),
            )
        )
    return found


def _spread(attribute: str, values: Sequence[str], codes: Ints, per_user: npt.NDArray[np.float64], seed: int) -> Spread:
    found = gap(per_user, codes, seed=seed)
    return Spread(
        attribute=attribute,
        best=values[found.best],
        worst=values[found.worst],
        gap=found.value,
        interval=found.interval,
        by_chance=found.by_chance,
    )


def _attributes(profiles: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, list[str], Ints]]:
    """The attributes that make segments: name, values, and the code of every user, -1 where theirs is too rare."""
    for name in sorted({name for profile in profiles for name in profile}):
        texts, codes = np.unique([profile.get(name, "") for profile in profiles], return_inverse=True)
        counts = np.bincount(codes)
        large = np.flatnonzero((counts >= SEGMENT) & (texts != ""))
        if len(large) in SEGMENTS:
            place = np.full(len(texts), -1)
            place[large] = np.arange(len(large))
            yield name, texts[large].tolist(), place[codes].astype(np.int64)


def _popularity(interactions: Ints, cold: Bools) -> tuple[list[str], Ints]:
    names = ["head", "long tail", f"under {COLD} events", "not listed yet"]
    return names, np.append(np.where(cold, 2, long_tail(interactions).astype(np.int64)), 3)


def _departments(pipeline: Pipeline) -> tuple[list[str], Ints]:
    names = list(pipeline.bundle.manifest.categories)
    return names, np.append(pipeline.catalog.category[:, 0].numpy().astype(np.int64), -1)


def item_groups(
    attribute: str,
    names: Sequence[str],
    codes: Ints,
    pairs: Wanted,
    users: int,
    seed: int,
) -> list[ItemGroup]:
    """How far the wanted items of each code came; `codes` [I + 1] with that of unknown items last, -1 for none."""
    kind = codes[np.minimum(pairs.row, len(codes) - 1)]
    found = []
    for code in np.unique(kind[kind >= 0]).tolist():
        chosen = kind == code
        recall = shares(pairs.owner[chosen], pairs.served[chosen], users)
        found.append(
            ItemGroup(
                attribute=attribute,
                value=names[code],
                users=int((~np.isnan(recall)).sum()),
                pairs=int(chosen.sum()),
                recall=known_mean(recall),
                interval=bootstrap(recall, seed=seed),
                candidate_recall=known_mean(shares(pairs.owner[chosen], pairs.candidate[chosen], users)),
            )
        )
    return found


def by_source(scene: Scene, pairs: Wanted, users: int) -> list[SourceRecall]:
    """What each source of the scene adds to the candidates."""
    alone = pairs.proposed.sum(0) == 1
    return [
        SourceRecall(
            name=source.name,
            k=source.k,
            recall=known_mean(shares(pairs.owner, said, users)),
            alone=known_mean(shares(pairs.owner, said & alone, users)),
        )
        for source, said in zip(scene.sources, pairs.proposed, strict=True)
    ]


def ablated(
    pipeline: Pipeline, scene: Scene, log: Log, users: Sequence[int], cut_ms: int
) -> dict[tuple[Literal["source", "features"], str], Ints]:
    """The slates [U, LIMIT] without each source, and with each group of features set to its mean.

    The ranker stays as it is. A source that is left out proposes nothing, as when its recall fails in service, and
    its columns say so. The mean is that over the candidates of `SAMPLE` users, which any ranker has.
    """
    specs = {spec.name: spec for spec in pipeline.bundle.manifest.rankers}
    ranker = Ranker(specs[scene.ranker], pipeline.bundle, pipeline.device) if scene.ranker else None
    groups = feature_groups(ranker.features, [source.name for source in scene.sources]) if ranker else {}
    sources = scene.sources if len(scene.sources) > 1 else ()
    found: dict[tuple[Literal["source", "features"], str], Ints] = {}
    for source in sources:
        found["source", source.name] = np.full((len(users), LIMIT), -1)
    for group in groups:
        found["features", group] = np.full((len(users), LIMIT), -1)

    def batches(of: Sequence[int], asked: Scene) -> Iterator[tuple[int, Prepared]]:
        for start in range(0, len(of), BATCH):
            chunk = of[start : start + BATCH]
            queries = [Query(str(user), user=log.users[user], limit=LIMIT) for user in chunk]
            yield start, pipeline.prepare(asked, queries, log.states(cut_ms, WINDOW, chunk), cut_ms)

    def shown(prepared: Prepared, score: Tensor) -> Ints:
        position, _ = rerank(prepared.batch, prepared.candidates, score, scene, pipeline.catalog)
        rows = np.append(prepared.candidates.row.numpy(), -1)[position.numpy()]
        return np.pad(rows, ((0, 0), (0, LIMIT - rows.shape[1])), constant_values=-1)

    with torch.inference_mode():
        if ranker:
            total, count = torch.zeros(len(ranker.features), dtype=torch.float64), 0
            sampled = np.random.default_rng(0).permutation(users)[:SAMPLE].tolist()
            for _, prepared in batches(sampled, scene):
                features = pipeline.features(prepared)
                total, count = total + features.double().sum(0), count + len(features)
            mean = (total / max(count, 1)).float()
            for start, prepared in batches(users, scene):
                features = pipeline.features(prepared)
                for group, columns in groups.items():
                    neutral = features.clone()
                    neutral[:, columns] = mean[columns]
                    rows = shown(prepared, ranker.score(neutral))
                    found["features", group][start : start + len(rows)] = rows
        for number, source in enumerate(sources):
            less = scene.model_copy(update={"sources": (*scene.sources[:number], *scene.sources[number + 1 :])})
            weights = torch.tensor([one.weight for one in less.sources])
            for start, prepared in batches(users, less):
                if ranker:
                    prepared.candidates = _with_silent(prepared.candidates, number)
                    score = ranker.score(pipeline.features(prepared))
                elif weights.any():
                    score = FUSIONS[scene.fusion](prepared.candidates, weights)
                else:
                    score = torch.zeros(len(prepared.candidates.row))
                rows = shown(prepared, score)
                found["source", source.name][start : start + len(rows)] = rows
    return found


def _with_silent(candidates: Candidates, number: int) -> Candidates:
    """The candidates with one more source, at place `number`, that says nothing."""

    def inserted(columns: Tensor, value: float) -> Tensor:
        silent = torch.full((1, columns.shape[1]), value)
        return torch.cat([columns[:number], silent, columns[number:]])

    return Candidates(
        candidates.query,
        candidates.row,
        inserted(candidates.score, 0.0),
        inserted(candidates.rank, ABSENT),
        inserted(candidates.best, 0.0),
    )


_GROUPS = {"agreement": "source scores", "item": "item statistics", "affinity": "cross", "price": "cross"}


def feature_groups(features: Sequence[str], sources: Sequence[str]) -> dict[str, list[int]]:
    """By group: the columns that belong together. What has no group of its own goes by the word before its dot."""
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(features):
        first = name.partition(".")[0]
        group = "source scores" if first in sources else _GROUPS.get(first, first)
        groups.setdefault(group, []).append(column)
    return groups


def reliability_of(found: Ints, probability: npt.NDArray[np.float64], relevant: Sequence[Ints]) -> list[Bin]:
    """Of the items of the slates [U, LIMIT], from their scores."""
    hit = np.array([np.isin(slate, items) for slate, items in zip(found, relevant, strict=True)]).reshape(found.shape)
    return reliability(probability[found >= 0], hit[found >= 0].astype(np.float64))


def calibrated(bundle: Bundle, scene: Scene) -> bool:
    """Whether the scene's scores are probabilities of being wanted."""
    return not scene.diversity and any(
        spec.name == scene.ranker and spec.calibrated for spec in bundle.manifest.rankers
    )


def _row(name: str, scores: Scores, seed: int) -> Row:
    return Row(name, scores, bootstrap(scores.per_user[HEADLINE], seed=seed))


def _rows_or_miss(items: Items, keys: Ints) -> Ints:
    """Catalog rows; an item that training never saw becomes a code that no slate holds."""
    rows = items.rows(keys)
    return np.where(rows >= 0, rows, len(items.key) + np.arange(len(rows)))


def _vectors(bundle: Bundle) -> npt.NDArray[np.float32] | None:
    for source in bundle.manifest.sources:
        if isinstance(source, VectorSpec):
            vectors: npt.NDArray[np.float32] = bundle.tensors(source.vectors)["vectors"].numpy()
            return vectors
    return None


def _wanted(
    pipeline: Pipeline,
    scene: Scene,
    log: Log,
    users: Sequence[int],
    relevant: Sequence[Ints],
    shown: Ints,
    cut_ms: int,
) -> Wanted:
    """How far every wanted item came in `scene`; `shown` are its slates."""
    owner = np.repeat(np.arange(len(users)), [len(rows) for rows in relevant])
    row = np.concatenate([np.empty(0, np.int64), *relevant])
    said = np.zeros((len(scene.sources) + 1, len(row)), bool)
    width = pipeline.catalog.size + int(row.max(initial=0)) + 1
    for start in range(0, len(users), BATCH):
        chunk = users[start : start + BATCH]
        queries = [Query(str(user), limit=LIMIT) for user in chunk]
        with torch.inference_mode():
            found = pipeline.prepare(scene, queries, log.states(cut_ms, WINDOW, chunk), cut_ms).candidates
        own = slice(*np.searchsorted(owner, [start, start + len(chunk)]).tolist())
        pair = (owner[own] - start) * width + row[own]
        candidate = found.query.numpy() * width + found.row.numpy()
        for column, proposed in enumerate([*found.proposed.numpy(), np.ones(len(candidate), bool)]):
            said[column, own] = np.isin(pair, candidate[proposed])
    served = np.isin(owner * width + row, np.arange(len(users))[:, None] * width + shown, assume_unique=False)
    return Wanted(owner, row, said[:-1], said[-1], served)
