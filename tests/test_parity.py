"""Features that the service computes from Redis are those that training computes from the same events, bit for bit."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from app.bundle import publish
from app.engine import Query
from app.engine.pipeline import Pipeline
from app.main import create_app
from app.settings import Settings
from app.state.events import UserState
from app.state.store import Store
from models.data import Tables, retailrocket
from models.data.log import Log
from models.data.simulator import simulate
from models.replay import Sent, batches, payloads, send
from models.sources import WINDOW
from tests.live import serving
from tests.quick import write_quick

USERS = 1_000


Features = dict[str, tuple[list[int], Tensor]]
"""By user: the catalog rows of their candidates and float32 [M, F]."""


def features(
    pipeline: Pipeline, scene: str, users: Sequence[str], states: Sequence[UserState], now_ms: int, size: int
) -> Features:
    found: Features = {}
    for start in range(0, len(users), size):
        chunk = users[start : start + size]
        queries = [Query(user, user=user, scene=scene) for user in chunk]
        with torch.inference_mode():
            prepared = pipeline.prepare(pipeline.scenes[scene], queries, states[start : start + size], now_ms)
            computed = pipeline.features(prepared)
        for index, user in enumerate(chunk):
            mine = prepared.candidates.query == index
            found[user] = prepared.candidates.row[mine].tolist(), computed[mine].clone()
    return found


def read(url: str, users: Sequence[str]) -> list[UserState]:
    async def states() -> list[UserState]:
        async with Store(url, window=WINDOW, timeout_ms=10_000) as store:
            return [
                state
                for start in range(0, len(users), 64)
                for state in await store.read([(user, None) for user in users[start : start + 64]])
            ]

    return asyncio.run(states())


def put_profiles(client: httpx.Client, log: Log) -> None:
    for user, profile in zip(log.users, log.profiles, strict=True):
        if profile:
            client.put(f"/users/{quote(user, safe='')}", json={"attributes": profile}).raise_for_status()


def in_halves(tables: Tables) -> Iterator[tuple[int, list[list[dict[str, object]]]]]:
    """The history in two parts, each with the moment at which it has just been sent."""
    times = tables.events["timestamp"].to_numpy()
    middle_ms = int(times[len(times) // 2])
    events = payloads(tables.events)
    whole = list(events)
    early = sum(event["timestamp"] < middle_ms for event in whole)
    sent = iter(whole)
    yield middle_ms, list(batches(islice(sent, early), 0))
    yield int(times[-1]) + 1, list(batches(sent, 0))


def check_parity(tables: Tables, folder: Path, url: str, cut_ms: int) -> None:
    bundle = publish(folder / "bundles", lambda path, version: write_quick(path, version, tables, cut_ms))
    log = Log.from_tables(tables)
    chosen = np.random.default_rng(0).permutation(len(log.users))[:USERS]
    users = [log.users[row] for row in chosen]
    with serving(create_app(Settings(redis_url=url, home=folder))) as client:
        pipeline = Pipeline(bundle, torch.device("cpu"), 64)
        put_profiles(client, log)
        for now_ms, part in in_halves(tables):
            sent = Sent()
            for batch in part:
                send(client, batch, sent)
            assert sent.accepted == sum(map(len, part))
            online, offline = read(url, users), log.states(now_ms, WINDOW, chosen)
            for there, here in zip(online, offline, strict=True):
                assert there.events.tobytes() == here.events.tobytes()
                assert sorted(there.exclusions.tolist()) == sorted(here.exclusions.tolist())
                assert there.profile == here.profile
            assert max(len(state.events) for state in offline) > 20
            order = np.random.default_rng(1).permutation(len(users))
            shuffled, moved = [users[i] for i in order], [online[i] for i in order]
            for scene in pipeline.scenes:
                trained = features(pipeline, scene, users, offline, now_ms, 32)
                assert min(len(rows) for rows, _ in trained.values()) >= 20
                for served in (
                    features(pipeline, scene, users, online, now_ms, 32),
                    features(pipeline, scene, shuffled, moved, now_ms, 7),
                ):
                    for user, (rows, values) in trained.items():
                        assert served[user][0] == rows
                        assert torch.equal(served[user][1], values)
                        assert not values.isnan().any()


def test_simulated_history(tmp_path: Path, valkey_url: str) -> None:
    tables = simulate(items=400, users=300, events=12_000, days=30)
    times = tables.events["timestamp"].to_numpy()
    check_parity(tables, tmp_path, valkey_url, int(np.quantile(times, 0.4)))


@pytest.mark.slow
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_retailrocket_buyers(tmp_path: Path, valkey_url: str) -> None:
    tables = retailrocket(Path(os.environ["MILLIREC_DATASETS"], "retailrocket_buyers", "events.parquet"))
    times = tables.events["timestamp"].to_numpy()
    check_parity(tables, tmp_path, valkey_url, int(np.quantile(times, 0.9)))
