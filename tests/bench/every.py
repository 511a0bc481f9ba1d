"""`python -m tests.bench --every`: what every source that there is costs, against four and against the main ones.

A shop, simulated or of real invoices, whose models are all fitted, the networks for one epoch: what a request costs
does not depend on what they learned. One service has all three sets of sources as scenes, as such a shop would have
them, and they take turns under load.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch

from app.bundle import Bundle, Draft, publish, seal
from app.engine import Query
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.engine.recorded import record
from app.state.events import UserState
from models.catalog import STATISTICS
from models.data import online_retail
from models.data.log import Log
from models.data.simulator import simulate
from models.ranking import mlp
from models.ranking.networks import Network
from models.recall import gru4rec, sasrec, two_tower
from models.sources import MODELS, fit, scenes
from tests.bench import load
from tests.bench.checks import Complete
from tests.bench.load import Load
from tests.bench.measure import CONNECTIONS, LIMIT, Cores, Pace, contestant_of, in_a_process, ingest, valkey

EVENTS_OF_USER = 50
ASKING = 2_000
"""Users."""
FEWER = {
    "four": ["history", "item_cf", "two_tower", "content"],
    "main": [
        "history",
        "ease",
        "discovery",
        "item_cf",
        "session",
        "two_tower",
        "content",
        "trending",
        "popular",
        "new",
    ],
}
"""Sources by scene: one of each kind that knows the user, and a shop's main ones."""
EVERY = "home"
SCENES = (*FEWER, EVERY)


@dataclass(frozen=True, slots=True)
class Compared:
    """By scene."""

    items: int
    sources: dict[str, int]
    candidates: dict[str, float]
    per_s: dict[str, list[float]]
    """Throughput at saturation of every round."""
    failed: int

    def ratio(self, fewer: str) -> float:
        """Every source against those of the scene `fewer`."""
        return float(median(one / other for one, other in zip(self.per_s[EVERY], self.per_s[fewer], strict=True)))


def compare(
    folder: Path, items: int, retail: Path | None, cores: Cores, pace: Pace, progress: Callable[[str], None]
) -> Compared:
    """The caller keeps to the client's core, and so does Valkey with it. See `shop`."""
    progress("fitting every model")
    made = in_a_process(shop, folder, items, retail)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millirec-bench-")))
        redis_url = valkey(stack)
        serve = ("app", "serve", "--port")
        service = stack.enter_context(contestant_of("every", serve, folder, redis_url, work, cores.server))
        progress("events")
        ingest(service, made.events, cores)
        requests = {
            name: [load.get(f"/recommend?user_id={user}&scene={name}&limit={LIMIT}") for user in made.users]
            for name in SCENES
        }
        found: dict[str, list[float]] = {name: [] for name in SCENES}
        failed = 0
        for turn in range(pace.rounds + 1):
            for name in SCENES:
                progress(f"{name}, {turn} of {pace.rounds}")
                check = Complete(LIMIT)
                plan = Load("127.0.0.1", service.port, requests[name], pace.saturated_s, CONNECTIONS, check=check)
                report = load.on_core(cores.client, plan)
                failed += report.failed
                # The first turn warms up.
                if turn:
                    found[name].append(report.achieved_per_s)
    return Compared(made.items, made.sources, made.candidates, found, failed)


@dataclass(frozen=True, slots=True)
class Shop:
    items: int
    users: list[str]
    events: list[dict[str, Any]]
    """Of these users, in time order, as `POST /events` takes them."""
    sources: dict[str, int]
    candidates: dict[str, float]
    """Mean of a request."""


def shop(root: Path, items: int, retail: Path | None = None) -> Shop:
    """Publishes a bundle with every source in `root`: of the Online Retail invoices `retail`, or of so many simulated
    items.
    """
    torch.set_num_threads(1)
    tables = online_retail(retail) if retail else simulate(items=items, users=items, events=EVENTS_OF_USER * items)
    latest: Any = tables.events["timestamp"].max()
    shift = time.time_ns() // 1_000_000 - 60_000 - latest
    tables = replace(
        tables,
        events=tables.events.with_columns(pl.col("timestamp") + shift),
        items=tables.items.with_columns(pl.col("created_at") + shift),
    )
    log = Log.from_tables(tables)
    now_ms = latest + shift + 1
    there = np.unique(log.user)
    numbers = np.random.default_rng(0).choice(there, min(ASKING, len(there)), replace=False)
    sasrec.EPOCHS = gru4rec.EPOCHS = two_tower.MOST_EPOCHS = 1
    candidates: dict[str, float] = {}

    def write(folder: Path, version: str) -> Bundle:
        fitted = fit(folder, tables.items, log, now_ms, 0, lambda step: None, models=tuple(MODELS))
        add_scenes(fitted.draft)
        pipeline = Pipeline(seal(fitted.draft, version), torch.device("cpu"), 32)
        for name in SCENES:
            found = 0
            for number in numbers[:200].tolist():
                with torch.inference_mode():
                    states = log.states(now_ms, 256, [number])
                    prepared = pipeline.prepare(pipeline.scenes[name], [Query("", scene=name)], states, now_ms)
                    found += len(prepared.candidates.row)
            candidates[name] = found / len(numbers[:200])
        queries = [Query(name, scene=name) for name in SCENES]
        nobody = [UserState()] * len(queries)
        fitted.draft.recorded = record(pipeline, queries, nobody, now_ms, folder / "recorded.json")
        return seal(fitted.draft, version)

    bundle = publish(root, write)
    users = [log.users[number] for number in numbers.tolist()]
    columns = pl.col("type", "user_id", "item_id", "timestamp")
    events = tables.events.filter(pl.col("user_id").is_in(users)).sort("timestamp").select(columns)
    return Shop(
        bundle.manifest.items,
        users,
        [event | {"event_id": str(number)} for number, event in enumerate(events.iter_rows(named=True))],
        {name: len(bundle.manifest.scenes[name].sources) for name in SCENES},
        candidates,
    )


def add_scenes(draft: Draft) -> None:
    """All with learned rankers of the real architecture."""
    every = draft.scenes[EVERY]
    fewer = {scene: scenes(names)[EVERY].sources for scene, names in FEWER.items()}
    draft.scenes = {}
    for name, sources in (fewer | {EVERY: every.sources}).items():
        features = feature_names([source.name for source in sources], STATISTICS)
        ranker = Network(mlp.hidden(len(features)), torch.zeros(len(features)), torch.ones(len(features)))
        ranker.eval().export(name, features, draft)
        draft.scenes[name] = every.model_copy(update={"sources": sources, "fusion": "learned", "ranker": name})
