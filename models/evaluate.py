"""Evaluation through the very engine that serves: held-out histories in, slates out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix

from app.bundle import Bundle, VectorSpec
from app.engine import Query
from app.engine.pipeline import Pipeline
from app.scenes import Fusion, Scene
from app.state.events import MS_PER_DAY, EventType
from models import baselines
from models.catalog import Items, listed
from models.data import Tables
from models.data.log import Log
from models.metrics import Catalog, Interval, Row, Scores, bootstrap, evaluate, paired_bootstrap
from models.sources import WINDOW, Progress
from models.train import BATCH, targets

LIMIT = 20
HEADLINE = "ndcg@20"
VIEWS = {"new": "home", "all": "buy_again"}
"""The two views of a shop where people buy again, and the scenes that serve them."""


@dataclass(frozen=True, slots=True)
class View:
    """One view's leaderboard, and how sure the pipeline's lead is."""

    name: str
    rows: Sequence[Row]
    leads: Mapping[str, Interval]
    """By row name: the paired bootstrap interval of the pipeline's NDCG@20 less the row's."""
    candidate_recall: float
    users: int


def slates(pipeline: Pipeline, scene: Scene, log: Log, users: Sequence[int], cut_ms: int) -> npt.NDArray[np.int64]:
    """Catalog rows int64 [U, LIMIT] that the engine answers with, -1 where a slate ends early."""
    served = dict(pipeline.scenes)
    pipeline.use({"evaluated": scene})
    answers = np.full((len(users), LIMIT), -1, np.int64)
    try:
        for start in range(0, len(users), BATCH):
            chunk = users[start : start + BATCH]
            queries = [Query(str(user), user=log.users[user], scene="evaluated", limit=LIMIT) for user in chunk]
            for place, slate in enumerate(pipeline.run(queries, log.states(cut_ms, WINDOW, chunk), cut_ms), start):
                rows = pipeline.catalog.rows_of([item.item_id for item in slate.items])
                answers[place, : len(rows)] = rows.numpy()
    finally:
        pipeline.use(served)
    return answers


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


def judge(bundle: Bundle, tables: Tables, cut_ms: int, days: float, progress: Progress, seed: int = 0) -> list[View]:
    """Scores the bundle, trained on the events before the cut, on what its users did in the `days` after.

    Users are those with events on both sides of the cut; items that the bundle does not know are misses.
    """
    log = Log.from_tables(tables)
    pipeline = Pipeline(bundle, torch.device("cpu"), BATCH)
    items = listed(tables.items, log, cut_ms)
    past = log.before(cut_ms)
    known = np.unique(past.user)
    bought = past.events["type"] == EventType.PURCHASE
    bought = bought if bought.any() else np.ones(len(bought), bool)
    row = items.rows(past.events["item"][bought])
    matrix = csr_matrix(
        (np.ones(int((row >= 0).sum())), (past.user[bought][row >= 0], row[row >= 0])),
        shape=(len(log.users), len(items.key)),
    )
    catalog = Catalog(np.bincount(row[row >= 0], minlength=len(items.key)).astype(np.int64), vectors=_vectors(bundle))
    fitted = {}
    for name in baselines.BASELINES:
        progress(f"fitting {name} (implicit)")
        fitted[name] = baselines.fit(name, matrix, seed)

    views = []
    for view, scene_name in VIEWS.items():
        scene = bundle.manifest.scenes[scene_name]
        wanted = targets(log, items, cut_ms, int(cut_ms + days * MS_PER_DAY), scene.repeats)
        users = sorted(set(wanted) & set(known.tolist()))
        relevant = [_rows_or_miss(items, wanted[user]) for user in users]
        rows = []
        for name, model in fitted.items():
            progress(f"{view}: {name} (implicit)")
            found = baselines.recommend(model, matrix, np.array(users), LIMIT, "all" if scene.repeats else "new")
            rows.append(_row(f"implicit {name}", evaluate(found, relevant, catalog=catalog), seed))
        for name, variant in variants(scene).items():
            progress(f"{view}: {name}")
            found = slates(pipeline, variant, past, users, cut_ms)
            rows.append(_row(name, evaluate(found, relevant, catalog=catalog), seed))
        best = rows[-1].scores.per_user[HEADLINE]
        leads = {row.name: paired_bootstrap(best, row.scores.per_user[HEADLINE], seed=seed) for row in rows[:-1]}
        share = _candidate_recall(pipeline, scene, past, users, relevant, cut_ms)
        views.append(View(view, rows, leads, share, len(users)))
    return views


def _row(name: str, scores: Scores, seed: int) -> Row:
    return Row(name, scores, bootstrap(scores.per_user[HEADLINE], seed=seed))


def _rows_or_miss(items: Items, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Catalog rows; an item that training never saw becomes a code that no slate holds."""
    rows = items.rows(keys)
    return np.where(rows >= 0, rows, len(items.key) + np.arange(len(rows)))


def _vectors(bundle: Bundle) -> npt.NDArray[np.float32] | None:
    for source in bundle.manifest.sources:
        if isinstance(source, VectorSpec):
            vectors: npt.NDArray[np.float32] = bundle.tensors(source.vectors)["vectors"].numpy()
            return vectors
    return None


def _candidate_recall(
    pipeline: Pipeline,
    scene: Scene,
    log: Log,
    users: Sequence[int],
    relevant: Sequence[npt.NDArray[np.int64]],
    cut_ms: int,
) -> float:
    """The mean share of relevant items that any source proposed: the ceiling of every ranking of them."""
    shares = []
    for start in range(0, len(users), BATCH):
        chunk = users[start : start + BATCH]
        queries = [Query(str(user), limit=LIMIT) for user in chunk]
        with torch.inference_mode():
            found = pipeline.prepare(scene, queries, log.states(cut_ms, WINDOW, chunk), cut_ms).candidates
        for index in range(len(chunk)):
            rows = found.row[found.query == index].numpy()
            shares.append(float(np.isin(relevant[start + index], rows).mean()))
    return float(np.mean(shares)) if shares else 0.0
