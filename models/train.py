"""Training: a shop's history in, a published bundle out.

The order is leak-free: for several past cuts the sources are fitted on what came before the cut, the
engine itself proposes candidates and computes their features as of the cut, and the ranker learns from
what shoppers did in the window after it. Only then are the sources fitted again, on everything.
"""

import hashlib
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from app.bundle import Bundle, Draft, publish, seal
from app.engine import Query
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.engine.recorded import record
from app.scenes import Scene
from app.state.events import MS_PER_DAY, EventType
from models.catalog import Items
from models.data import DataError, Tables
from models.data.log import Log
from models.ranking import RANKERS, Examples, Ranker, ndcg, split, stack, weights
from models.recall import content
from models.recall.training import Run
from models.sources import STANDARD, WINDOW, Fitted, Progress, fit

BATCH = 32
LEARNED = ("home", "buy_again")
"""Scenes that get a ranker of their own: what a page may show decides what is worth learning for it."""
RECORDED = 20
POPULARITY = {"item.purchases": 1.0, "item.views": 1e-3}
"""The features that a ranker has to be better than; views tell apart what nobody bought."""
ENOUGH = 30
"""Users kept aside from whom one may tell that it is not."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a history is cut: `cuts_ms` ascending, each followed by a label window of `label_days`."""

    cuts_ms: tuple[int, ...]
    end_ms: int
    label_days: float

    @classmethod
    def of(cls, log: Log, windows: int, label_days: float | None) -> "Plan":
        """The last `windows` label windows that leave at least two fifths of the history before the first."""
        first, end = int(log.events["ts"].min()), int(log.events["ts"].max()) + 1
        span_days = (end - first) / MS_PER_DAY
        if span_days < 1:
            raise DataError(
                f"events: column timestamp: all lie within {24 * span_days:.1f} hours; less than a day is too short to"
                " learn from what came later"
            )
        days = label_days or min(30.0, span_days / 8)
        cuts = [int(end - days * step * MS_PER_DAY) for step in range(1, windows + 1)]
        kept = [cut for cut in cuts if cut - first >= 0.4 * (end - first)]
        return cls(tuple(sorted(kept or cuts[:1])), end, days)


@dataclass(slots=True)
class Trained:
    """What training learned besides the bundle."""

    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    candidate_recall: dict[str, float] = field(default_factory=dict)
    """By scene: the share of the wanted items that the sources proposed, over the training windows."""
    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    """By scene: NDCG@20 of what the sources proposed to the users that the ranker did not learn from, in its order and
    in that of popularity."""
    missing: list[str] = field(default_factory=list)
    """What was asked for and could not be had of this history, a line each."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a scene's candidates taught."""

    weights: Mapping[str, float]
    """By source, for the fusions that are not learned."""
    ranker: Ranker


def wanted(log: Log, start_ms: int, end_ms: int) -> Log:
    """The events of a window that say what shoppers wanted: purchases, or whatever there is where nothing is bought."""
    window = log.between(start_ms, end_ms)
    bought = window.events["type"] == EventType.PURCHASE
    if (log.events["type"] == EventType.PURCHASE).any():
        return window.where(bought)
    return window.where(
        ~np.isin(window.events["type"], (EventType.HIDE, EventType.DISLIKE, EventType.REMOVE_FROM_CART))
    )


def targets(log: Log, items: Items, cut_ms: int, end_ms: int, repeats: bool) -> dict[int, npt.NDArray[np.int64]]:
    """By user: the distinct item keys wanted in the window; without `repeats`, those never bought before the cut."""
    window = wanted(log, cut_ms, end_ms)
    user, key = window.user.astype(np.int64), window.events["item"]
    if not repeats:
        past = log.before(cut_ms)
        bought = past.events["type"] == EventType.PURCHASE
        before = {*zip(past.user[bought].tolist(), past.events["item"][bought].tolist(), strict=True)}
        fresh = np.array([pair not in before for pair in zip(user.tolist(), key.tolist(), strict=True)], bool)
        user, key = user[fresh], key[fresh]
    found: dict[int, npt.NDArray[np.int64]] = {}
    order = np.argsort(user, kind="stable")
    users, starts = np.unique(user[order], return_index=True)
    for one, keys in zip(users.tolist(), np.split(key[order], starts)[1:], strict=True):
        found[one] = np.unique(keys)
    return found


def examples(
    pipeline: Pipeline,
    scene: Scene,
    log: Log,
    wanted_by: Mapping[int, npt.NDArray[np.int64]],
    items: Items,
    cut_ms: int,
) -> tuple[Examples, float]:
    """The candidates of every user with their features as of the cut and their labels, and the candidate recall."""
    users = sorted(wanted_by)
    names = feature_names([source.name for source in scene.sources], pipeline.bundle.manifest.statistics)
    parts, found, total = [], 0.0, 0
    for start in range(0, len(users), BATCH):
        chunk = users[start : start + BATCH]
        states = log.states(cut_ms, WINDOW, chunk)
        queries = [Query(str(user), user=log.users[user], scene="") for user in chunk]
        with torch.inference_mode():
            prepared = pipeline.prepare(scene, queries, states, cut_ms)
            features = pipeline.features(prepared).clone()
        candidates = prepared.candidates
        label = torch.zeros(len(candidates.row))
        for index, user in enumerate(chunk):
            mine = (candidates.query == index).nonzero().squeeze(1)
            hit = np.isin(items.key[candidates.row[mine].numpy()], wanted_by[user])
            label[mine] = torch.from_numpy(hit.astype(np.float32))
            found, total = found + hit.sum() / len(wanted_by[user]), total + 1
        parts.append(Examples(features, candidates.query.clone(), label, names=names))
    return stack(parts), found / max(total, 1)


def train(
    tables: Tables,
    root: Path,
    *,
    seed: int = 0,
    windows: int = 3,
    label_days: float | None = None,
    cut_ms: int | None = None,
    most_users: int = 3000,
    models: Sequence[str] = STANDARD,
    ranker: str = "mlp",
    progress: Progress = lambda step: None,
    run: Run = Run(),
    activate: bool = True,
) -> tuple[Bundle, Trained]:
    """Trains on the events before `cut_ms` (default: all) and publishes the bundle in `root`.

    `models` are names of `models.sources.MODELS`, `ranker` is one of `models.ranking.RANKERS`. The checkpoints of
    `run` are removed once the bundle is published. Raises `DataError` when the history cannot teach anything.
    """
    begun = time.monotonic()
    torch.manual_seed(seed)
    whole, catalog = Log.from_tables(tables), tables.items
    # Where nobody else holds it, the table of events is gone from here on.
    del tables
    log = whole if cut_ms is None else whole.before(cut_ms)
    if not len(log.events):
        raise DataError("no events to learn from")
    plan = Plan.of(log, windows, label_days)
    end_ms = cut_ms or plan.end_ms
    trained = Trained()
    learned: dict[str, list[Examples]] = {name: [] for name in LEARNED}
    recall: dict[str, list[float]] = {name: [] for name in LEARNED}
    shared: dict[str, list[str]] = {}
    rng = np.random.default_rng(seed)
    for number, cut in enumerate(plan.cuts_ms, 1):
        note = _prefixed(progress, f"window {number}/{len(plan.cuts_ms)}: ")
        with tempfile.TemporaryDirectory() as folder:
            fitted = fit(Path(folder), catalog, whole, cut, seed, note, models=models, run=run.of(f"window-{number}"))
            pipeline = Pipeline(seal(fitted.draft, "window"), torch.device("cpu"), BATCH)
            for name in LEARNED:
                # What one window lacks, such as a network for want of events, no ranker can learn to use.
                given = [source.name for source in fitted.draft.scenes[name].sources]
                shared[name] = [source for source in given if source in shared.get(name, given)]
                scene = drawing_on(fitted.draft.scenes[name], shared[name])
                until = int(cut + plan.label_days * MS_PER_DAY)
                wanted_by = targets(log, fitted.items, cut, until, scene.repeats)
                chosen = rng.permutation(sorted(wanted_by))[:most_users].tolist()
                note(f"candidates for {name}, {len(chosen)} shoppers")
                if chosen and scene.sources:
                    part, share = examples(
                        pipeline, scene, log, {user: wanted_by[user] for user in chosen}, fitted.items, cut
                    )
                    learned[name].append(part)
                    recall[name].append(share)

    found: dict[str, Learned] = {}
    for name in LEARNED:
        trained.candidate_recall[name] = float(np.mean(recall[name])) if recall[name] else 0.0
        losses: list[tuple[float, float]] = []

        def on_epoch(epoch: int, train_loss: float, valid_loss: float, name: str = name, losses: Any = losses) -> None:
            losses.append((train_loss, valid_loss))
            progress(f"ranker {name}, epoch {epoch}: loss {train_loss:.3f}, validation {valid_loss:.3f}")

        if not learned[name]:
            trained.missing.append(f"no ranker for {name}: nobody wanted anything in the training windows")
        else:
            ranking = run.of(f"ranker-{name}", on_epoch)
            begun_ranker = time.monotonic()
            together = stack(learned[name])
            try:
                fitted_ranker = RANKERS[ranker](together, seed=seed, on_epoch=ranking.tell)
                trained.validation[name] = validated(fitted_ranker, together, seed)
                found[name] = Learned(weights.fit(together, shared[name], seed=seed), fitted_ranker)
            except ValueError as error:
                trained.missing.append(f"no ranker for {name}: {error}")
            trained.seconds[f"ranker {name}"] = round(time.monotonic() - begun_ranker, 1)
            ranking.scalar("seconds", 0, trained.seconds[f"ranker {name}"])
            trained.losses[f"ranker {name}"] = losses
    learned.clear()
    for name, on in trained.validation.items():
        if on["ndcg@20"] <= on["popularity"] and on["users"] >= ENOUGH:
            raise DataError(
                f"what was learned for {name} ranks no better than popularity, NDCG@20 {on['ndcg@20']:.4f} against"
                f" {on['popularity']:.4f} on {on['users']:.0f} users kept aside: nothing is published"
            )

    def write(folder: Path, version: str) -> Bundle:
        note = _prefixed(progress, "final fit: ")
        fitted = fit(folder, catalog, whole, end_ms, seed, note, models=models, run=run.of("final"))
        trained.losses.update(fitted.losses)
        trained.seconds.update(fitted.seconds)
        trained.missing.extend(f"no source of {name}: this history does not allow it" for name in fitted.silent)
        trained.missing.extend(with_learned(fitted.draft, found))
        progress("recorded queries")
        _with_recorded(fitted, log, end_ms, seed)
        fitted.draft.metrics = {
            "candidate_recall": trained.candidate_recall,
            "validation": trained.validation,
            "missing": trained.missing,
            "losses": trained.losses,
        }
        fitted.draft.provenance = {
            "events": len(log.events),
            "users": len(log.users),
            "data_sha256": fingerprint(log),
            "cut_ms": end_ms,
            "seed": seed,
            "parameters": {
                "models": models,
                "modalities": [name for name in content.MODALITIES if name in catalog.columns],
                "ranker": ranker,
                "windows": windows,
                "label_days": plan.label_days,
                "most_users": most_users,
            },
            "plan": asdict(plan),
            "code": code_version(),
            "seconds": trained.seconds | {"total": round(time.monotonic() - begun, 1)},
        }
        return seal(fitted.draft, version)

    bundle = publish(root, write, activate_it=activate)
    for checkpoint in run.standing():
        checkpoint.unlink()
    return bundle, trained


@torch.no_grad()
def validated(ranker: Ranker, learned: Examples, seed: int) -> dict[str, float]:
    """NDCG@20 of the ranker and of popularity over the tenth of the queries that it was not fitted to."""
    held = split(learned, torch.Generator().manual_seed(seed)).held
    popular = torch.zeros(len(learned.label))
    for name, weight in POPULARITY.items():
        popular += weight * learned.features[:, learned.names.index(name)]
    return {
        "ndcg@20": float(ndcg(learned, held, ranker(learned.features)).mean()),
        "popularity": float(ndcg(learned, held, popular).mean()),
        "users": float(len(held)),
    }


def drawing_on(scene: Scene, sources: Collection[str]) -> Scene:
    """The scene with no other sources than these."""
    return scene.model_copy(update={"sources": tuple(one for one in scene.sources if one.name in sources)})


def with_learned(draft: Draft, learned: Mapping[str, Learned]) -> list[str]:
    """Gives each scene the ranker and the weights of its name, and no source that these do not know.

    Returns a line for each scene that must do without, for one of the sources is not in the draft.
    """
    missing = []
    for name, of_scene in learned.items():
        scene = drawing_on(draft.scenes[name], of_scene.weights)
        names = [source.name for source in scene.sources]
        if lost := of_scene.weights.keys() - set(names):
            missing.append(f"no ranker for {name}: it learned with {', '.join(sorted(lost))}")
            continue
        of_scene.ranker.export(name, feature_names(names, draft.statistics), draft)
        sources = tuple(one.model_copy(update={"weight": of_scene.weights[one.name]}) for one in scene.sources)
        draft.scenes[name] = scene.model_copy(update={"sources": sources, "fusion": "learned", "ranker": name})
    return missing


def _with_recorded(fitted: Fitted, log: Log, now_ms: int, seed: int) -> None:
    """Records what a few shoppers, and one nobody knows, get from this bundle in every scene."""
    draft = fitted.draft
    pipeline = Pipeline(seal(draft, "recording"), torch.device("cpu"), BATCH)
    active = np.unique(log.user)
    users = np.random.default_rng(seed).permutation(active)[:RECORDED].tolist()
    states = log.states(now_ms, WINDOW, users)
    item = fitted.items.frame["item_id"][0]
    queries = [
        Query(f"{scene}-{user}", scene=scene, anchors=(item,) if draft.scenes[scene].context else ())
        for scene in draft.scenes
        for user in users
    ]
    draft.recorded = record(pipeline, queries, states * len(draft.scenes), now_ms, draft.path / "recorded.json")


def fingerprint(log: Log) -> str:
    """SHA-256 over the events in their canonical order."""
    digest = hashlib.sha256(np.ascontiguousarray(log.events).tobytes())
    digest.update(np.ascontiguousarray(log.user).tobytes())
    return digest.hexdigest()


def code_version() -> str:
    """The installed version, with the commit where the code runs from a checkout."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return " ".join(filter(None, [installed("millirec"), commit]))


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda step: progress(prefix + step)
