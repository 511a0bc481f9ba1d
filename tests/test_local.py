import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.bundle import CURRENT, SCENES, Bundle, BundleError, activate, change_scene, publish
from app.engine import Query, Slate, UnknownScene
from app.engine.local import LocalEngine, Timing
from app.scenes import SceneChange
from app.state.events import EventType, records
from app.state.store import Entry, Store, subject
from tests.damage import INSIDE, ON_DISK, copy, damaged, manifest
from tests.tiny import NOW_MS, item_ids, now_ms, publish_tiny

NAMES = itertools.count()
POLL_S = 0.01


@pytest.fixture
def root(tiny: Bundle, tmp_path: Path) -> Path:
    publish_copy(tmp_path, tiny)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_z(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish_tiny(tmp_path_factory.mktemp("z"), prefix="z")


def publish_copy(root: Path, bundle: Bundle) -> Bundle:
    return publish(root, lambda folder, version: copy(bundle, folder, version))


@asynccontextmanager
async def serving(root: Path, url: str, prefix: str = "millirec:", **options: Any) -> AsyncIterator[LocalEngine]:
    async with Store(url, prefix=prefix, timeout_ms=options.pop("timeout_ms", 5_000)) as store:
        engine = LocalEngine(root, store, device="cpu", **{"poll_s": POLL_S, **options})
        await engine.start()
        try:
            async with asyncio.timeout(60):
                yield engine
        finally:
            await engine.aclose()


def entry(user: str | None, session: str | None, kind: EventType, item: str, ts_ms: int) -> Entry:
    name = f"e{next(NAMES)}"
    made = records(name, kind, ts_ms, [(item, 1, None)]).tobytes()
    return Entry(subject(user, session), name, (), b"{}", made)


def ids(slate: Slate) -> list[str]:
    return [item.item_id for item in slate.items]


def serves(engine: LocalEngine, version: str) -> bool:
    return engine.bundle == version


def longer(seen: Sequence[str], count: int) -> bool:
    return len(seen) > count


def refused(logs: Sequence[Mapping[str, Any]]) -> bool:
    return any(line["event"] == "bundle refused" for line in logs)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 (other tasks and the engine's own poll decide)
        await asyncio.sleep(POLL_S / 2)


def test_what_nobody_knows_is_no_error(root: Path, valkey_url: str) -> None:
    timings: list[Timing] = []

    async def run() -> None:
        async with serving(root, valkey_url, observe=timings.append) as engine:
            assert engine.ready
            assert "home" in engine.scenes
            queries = [
                Query("nobody"),
                Query("user", user="unknown"),
                Query("session", session="unknown"),
                Query("both", user="unknown", session="unknown"),
                Query("item", scene="detail", anchors=("unknown",)),
            ]
            slates = await asyncio.gather(*map(engine.recommend, queries))
            for query, slate in zip(queries, slates, strict=True):
                assert (slate.request_id, slate.scene, slate.degraded) == (query.request_id, query.scene, ())
                assert len(set(ids(slate))) == 20
                assert slate.bundle == engine.bundle

    asyncio.run(run())
    assert sum(timing.size for timing in timings) == 5
    assert all(min(timing.waited_s, timing.state_s, timing.compute_s) >= 0 for timing in timings)


def test_an_unknown_scene_is_the_fault_of_one_query_only(root: Path, valkey_url: str) -> None:
    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            queries = [Query("1"), Query("2", scene="attic"), Query("3", scene="detail")]
            one, two, three = await asyncio.gather(*map(engine.recommend, queries), return_exceptions=True)
            assert isinstance(one, Slate) and isinstance(three, Slate)
            assert (one.request_id, three.request_id) == ("1", "3")
            assert isinstance(two, UnknownScene)
            assert two.known == tuple(engine.scenes)

    asyncio.run(run())


def test_a_late_query_is_answered_in_a_hurry_and_others_are_not(root: Path, valkey_url: str) -> None:
    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            now = time.monotonic()
            late, soon = await asyncio.gather(
                engine.recommend(Query("late", deadline=now - 1)), engine.recommend(Query("soon", deadline=now + 60))
            )
            assert (late.degraded, soon.degraded) == (("deadline",), ())
            assert len(ids(late)) == len(ids(soon)) == 20

    asyncio.run(run())


def test_without_redis_the_slate_still_comes(root: Path, valkey: redis.Redis, valkey_url: str) -> None:
    pid = valkey.info("server")["process_id"]

    async def run() -> None:
        async with serving(root, valkey_url, timeout_ms=100) as engine, Store(valkey_url) as store:
            await store.append([entry("ann", None, EventType.VIEW_ITEM, "b7", now_ms())])
            query = Query("q", user="ann", session="s")
            known = await engine.recommend(query)
            os.kill(pid, signal.SIGSTOP)
            try:
                slates = await asyncio.gather(*[engine.recommend(query) for _ in range(5)])
                hurried = await engine.recommend(replace(query, deadline=time.monotonic() - 1))
            finally:
                os.kill(pid, signal.SIGCONT)
            stranger = await engine.recommend(Query("q"))
            for slate in slates:
                assert slate.degraded == ("state",)
                assert ids(slate) == ids(stranger) != ids(known)
            assert hurried.degraded == ("state", "deadline")
            assert len(ids(hurried)) == len(ids(stranger)) == 20
            again = await engine.recommend(query)
            assert (ids(again), again.degraded) == (ids(known), ())

    asyncio.run(run())


def test_starts_without_redis(root: Path) -> None:
    async def run() -> None:
        async with serving(root, "redis://127.0.0.1:1") as engine:
            slate = await engine.recommend(Query("q", user="ann"))
            assert slate.degraded == ("state",)
            assert len(ids(slate)) == 20

    asyncio.run(run())


DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", None]),
        st.sampled_from([EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.HIDE]),
        st.sampled_from(["a1", "a2", "a19", "b3", "b7", "b18", "b19", "unknown"]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DEEDS)
def test_the_next_slate_on_another_worker_knows_what_was_just_done(
    root: Path, valkey_url: str, deeds: list[tuple[str | None, EventType, str]]
) -> None:
    prefix = f"ryw{next(NAMES)}:"

    async def run() -> None:
        async with serving(root, valkey_url, prefix) as engine, Store(valkey_url, prefix=prefix) as store:
            begin_ms = now_ms() - 60_000
            for place, (user, kind, item) in enumerate(deeds):
                session = None if user else "s"
                # Twice, as a client that retries would.
                sent = entry(user, session, kind, item, begin_ms + place)
                assert await store.append([sent]) == [True]
                assert await store.append([sent]) == [False]
                theirs = [(kind, item) for of, kind, item in deeds[: place + 1] if of == user]
                hidden = {item for kind, item in theirs if kind is EventType.HIDE}
                bought = {item for kind, item in theirs if kind is EventType.PURCHASE}
                done = {item for kind, item in theirs if kind is not EventType.HIDE} - {"unknown"}
                queries = [Query(scene, user, session, scene, limit=40) for scene in ("buy_again", "home")]
                again, home = await asyncio.gather(*map(engine.recommend, queries))
                assert set(ids(again)) == set(item_ids()) - hidden
                assert set(ids(home)) == set(item_ids()) - hidden - bought
                own = {item.item_id for item in again.items if "history" in item.sources}
                assert own == done - hidden

    asyncio.run(run())


def test_a_view_turns_the_slate_and_another_users_stays(root: Path, valkey_url: str) -> None:
    async def run() -> None:
        async with serving(root, valkey_url) as engine, Store(valkey_url) as store:
            before = await engine.recommend(Query("q", user="ann", limit=10))
            for place in range(3):
                await store.append([entry("ann", None, EventType.VIEW_ITEM, f"b{place + 5}", now_ms())])
            ann, bob = await asyncio.gather(*[engine.recommend(Query("q", user=u, limit=10)) for u in ("ann", "bob")])
            assert ids(bob) == ids(before)
            assert sum(item[0] == "b" for item in ids(ann)) > sum(item[0] == "b" for item in ids(before))

    asyncio.run(run())


def test_a_swap_under_load_fails_nobody_and_mixes_nothing(
    root: Path, valkey_url: str, tiny: Bundle, tiny_z: Bundle
) -> None:
    prefix_of = {publish_copy(root, bundle).version: name for bundle, name in ((tiny_z, "z"), (tiny, ""))}
    items = {version: set(item_ids(name)) for version, name in prefix_of.items()}

    async def run() -> None:
        async with serving(root, valkey_url, max_batch=4) as engine, Store(valkey_url) as store:
            for place, item in enumerate(["a1", "b2", "za3", "zb4"]):
                await store.append([entry("ann", None, EventType.VIEW_ITEM, item, now_ms() - place)])
            seen: list[str] = []
            stop = False

            async def caller(number: int) -> None:
                scene = ("home", "detail", "cascade", "explore")[number % 4]
                while not stop:
                    slate = await engine.recommend(Query(f"{number}", user="ann", scene=scene))
                    assert set(ids(slate)) <= items[slate.bundle]
                    assert len(ids(slate)) == 20
                    assert slate.degraded == ()
                    seen.append(slate.bundle)

            async with asyncio.TaskGroup() as callers:
                for number in range(12):
                    callers.create_task(caller(number))
                for version in [*prefix_of] * 3:
                    activate(root, version)
                    await until(partial(serves, engine, version))
                    # What is asked from now on is answered by the new one.
                    asked = await engine.recommend(Query("after", user="ann"))
                    assert asked.bundle == version
                    await until(partial(longer, seen, len(seen) + 25))
                stop = True
            changes = [after for before, after in itertools.pairwise(seen) if before != after]
            assert len(changes) == 6 - (seen[0] == next(iter(prefix_of))), "no slate of a bundle after its swap"

    asyncio.run(run())


def test_damaged_bundles_are_refused_while_the_old_one_serves_on(
    root: Path, valkey_url: str, tiny: Bundle, tiny_z: Bundle
) -> None:
    cases = {f"20990101T0000{n:02}-00000000": case for n, case in enumerate([*ON_DISK.values(), *INSIDE.values()])}

    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            good = engine.bundle
            for version, (damage, reason) in cases.items():
                damaged(tiny, root, version, damage)
                with capture_logs() as logs:
                    (root / CURRENT).write_text(version)
                    await until(partial(refused, logs))
                    slate = await engine.recommend(Query("q"))
                (line,) = [line for line in logs if line["event"] == "bundle refused"]
                assert (line["version"], line["serving"]) == (version, good)
                assert reason_of(line["reason"], reason)
                assert slate.bundle == engine.bundle == good
                assert len(ids(slate)) == 20
            better = publish_copy(root, tiny_z)
            await until(lambda: engine.bundle == better.version)
            assert {item[0] for item in ids(await engine.recommend(Query("q")))} == {"z"}

    asyncio.run(run())


def reason_of(text: str, pattern: str) -> bool:
    with pytest.raises(BundleError, match=pattern):
        raise BundleError(text)
    return True


def test_an_unreadable_pointer_does_not_end_the_watch(root: Path, valkey_url: str, tiny_z: Bundle) -> None:
    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            good = engine.bundle
            for unreadable in (b"\xff\xfe", b"no-such-version", b"", b"../" + root.name.encode(), b"\0"):
                (root / CURRENT).write_bytes(unreadable)
                await asyncio.sleep(5 * POLL_S)
                assert engine.bundle == good
            (root / CURRENT).unlink()
            await asyncio.sleep(5 * POLL_S)
            (root / CURRENT).mkdir()
            await asyncio.sleep(5 * POLL_S)
            (root / CURRENT).rmdir()
            better = publish_copy(root, tiny_z)
            await until(lambda: engine.bundle == better.version)

    asyncio.run(run())


def test_without_a_bundle_it_does_not_start(tiny: Bundle, tmp_path: Path, valkey_url: str) -> None:
    async def start(root: Path, **options: Any) -> None:
        async with serving(root, valkey_url, **options):
            pass

    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="no bundle in"):
            asyncio.run(start(root))
    publish_copy(tmp_path, tiny)
    with pytest.raises(BundleError, match="last 64 events of a user, this service keeps 63"):
        asyncio.run(start(tmp_path, window=63))
    version = "20990101T000000-00000000"
    damaged(tiny, tmp_path, version, lambda folder: manifest(folder, format=2))
    activate(tmp_path, version)
    with pytest.raises(BundleError, match="format version 2"):
        asyncio.run(start(tmp_path))


def test_the_clock_is_the_one_it_was_given(root: Path, valkey_url: str) -> None:
    async def run() -> None:
        async with Store(valkey_url) as store:
            await store.append([entry("ann", None, EventType.VIEW_ITEM, "b7", NOW_MS)])
        scores = []
        for days in (0, 30):
            async with serving(root, valkey_url, clock_ms=partial(int, NOW_MS + days * 86_400_000)) as engine:
                slate = await engine.recommend(Query("q", user="ann", scene="buy_again"))
                scores.append(next(item.score for item in slate.items if item.item_id == "b7"))
        assert scores[0] > scores[1]

    asyncio.run(run())


def scene_of(root: Path, **fields: object) -> None:
    change_scene(root, "home", SceneChange.model_validate(fields))


def test_a_changed_scene_outlives_bundles_and_restarts(
    root: Path, tiny: Bundle, tiny_z: Bundle, valkey_url: str
) -> None:
    only_popular = {name: {"k": 1, "weight": 0} for name in ("history", "item_cf", "towers")}

    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            bundled = ids(await engine.recommend(Query("q")))
            learned = engine.bundled_scenes["home"]
            scene_of(root, fusion="cascade", sources={"popular": {"k": 40}})
            await until(lambda: engine.scenes["home"].fusion == "cascade")
            scene_of(root, fusion="weighted", sources=only_popular)
            await until(lambda: engine.scenes["home"].fusion == "weighted")
            assert engine.scenes["home"].sources[3] == learned.sources[3]
            popular = ids(await engine.recommend(Query("q")))
            assert popular[:4] == ["a0", "b0", "a1", "b1"] != bundled[:4]
            assert ids(await engine.recommend(Query("q", scene="buy_again"))) == bundled

            other = publish_copy(root, tiny_z)
            await until(partial(serves, engine, other.version))
            assert engine.scenes["home"].fusion == "weighted"
            assert ids(await engine.recommend(Query("q")))[:2] == ["za0", "zb0"]
        async with serving(root, valkey_url) as engine:
            assert ids(await engine.recommend(Query("q")))[:2] == ["za0", "zb0"]
            change_scene(root, "home", None)
            await until(lambda: engine.scenes == engine.bundled_scenes)

    asyncio.run(run())


def test_a_change_that_cannot_be_leaves_the_scene_as_it_is(root: Path, valkey_url: str) -> None:
    async def run() -> None:
        async with serving(root, valkey_url) as engine:
            with capture_logs() as logs:
                change_scene(root, "detail", SceneChange(fusion="learned"))
                change_scene(root, "attic", SceneChange(fusion="voting"))
                scene_of(root, fusion="voting")
                await until(lambda: engine.scenes["home"].fusion == "voting")
                assert engine.scenes["detail"] == engine.bundled_scenes["detail"]
                (root / SCENES).write_text("{")
                await until(lambda: any(line["event"] == "scene changes refused" for line in logs))
                await asyncio.sleep(5 * POLL_S)
            assert engine.scenes["home"].fusion == "voting"
            assert sum(line["event"] == "scene changes refused" for line in logs) == 1
            assert {line["scene"] for line in logs if line["event"] == "scene change refused"} == {"detail"}
            assert (await engine.recommend(Query("q"))).degraded == ()

    asyncio.run(run())
