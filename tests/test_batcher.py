import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine import Overloaded, Query, Slate
from app.engine.batcher import TURNS, Answer, Batcher

SETTLED = 3 + TURNS
"""Turns of the loop in which a query that came alone is in work."""


def slate(query: Query) -> Slate:
    return Slate(query.request_id, query.scene, (), "v1")


async def running(batcher: Batcher, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.create_task(batcher.run())
    try:
        async with asyncio.timeout(30):
            await body()
        assert not loop.done()
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Boom(Exception):
    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(*ids)
        self.ids = ids


CALLERS = st.lists(
    st.tuples(
        st.integers(0, 6),  # arrives after so many turns of the loop
        st.none() | st.integers(0, 6),  # goes away after so many more
        st.sampled_from(["answered", "answered", "answered", "refused", "poison"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(CALLERS, st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 7))
def test_every_caller_gets_its_own_answer(
    callers: list[tuple[int, int | None, str]], pauses: list[int], max_batch: int
) -> None:
    batches: list[list[str]] = []
    observed: list[int] = []
    waiting: list[str] = []
    gone: set[str] = set()

    async def answer(queries: Sequence[Query]) -> Sequence[Slate | Exception]:
        ids = [query.request_id for query in queries]
        # Greedy, in the order of arrival, and nobody who went away takes a place.
        assert ids == [name for name in waiting if name not in gone][:max_batch]
        waiting[:] = waiting[max(map(waiting.index, ids)) + 1 :]
        batches.append(ids)
        await ticks(pauses[len(batches) % len(pauses)])
        if any(query.scene == "poison" for query in queries):
            raise Boom(ids)
        return [LookupError(query.request_id) if query.scene == "refused" else slate(query) for query in queries]

    batcher = Batcher(answer, max_batch, 1_000, lambda size, waited_s: observed.append(size))

    async def call(name: str, arrives: int, scene: str) -> Slate:
        await ticks(arrives)
        waiting.append(name)
        return await batcher.submit(Query(name, scene=scene))

    async def leave(name: str, task: "asyncio.Task[Slate]", after: int) -> None:
        await ticks(after)
        if task.cancel():
            gone.add(name)

    async def body() -> None:
        tasks = {f"{n}": asyncio.create_task(call(f"{n}", at, scene)) for n, (at, _, scene) in enumerate(callers)}
        leaving = [
            asyncio.create_task(leave(f"{n}", tasks[f"{n}"], at + after))
            for n, (at, after, _) in enumerate(callers)
            if after is not None
        ]
        await asyncio.gather(*leaving)
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        poison = {f"{n}" for n, (_, _, scene) in enumerate(callers) if scene == "poison"}
        batch_of = {name: batch for batch in batches for name in batch}
        assert len(batch_of) == sum(map(len, batches)), "nobody is asked about twice"
        for number, (_, _, scene) in enumerate(callers):
            name = f"{number}"
            result = results[name]
            if name in gone:
                assert isinstance(result, asyncio.CancelledError)
            elif poison & set(batch_of[name]):
                assert isinstance(result, Boom)
                assert result.ids == batch_of[name]
            elif scene == "refused":
                assert isinstance(result, LookupError)
                assert result.args == (name,)
            else:
                assert isinstance(result, Slate)
                assert result.request_id == name
        assert all(0 < len(batch) <= max_batch for batch in batches)
        assert observed == [len(batch) for batch in batches]

    asyncio.run(running(batcher, body))


class Gate:
    """An answer that waits to be let through."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.batches: list[list[str]] = []

    async def __call__(self, queries: Sequence[Query]) -> Sequence[Slate | Exception]:
        self.batches.append([query.request_id for query in queries])
        await self.open.wait()
        return [slate(query) for query in queries]


def test_the_waiting_room_is_for_those_who_wait() -> None:
    async def run() -> None:
        gate = Gate()
        batcher = Batcher(gate, 2, 3)

        async def body() -> None:
            def submit(name: str) -> "asyncio.Task[Slate]":
                return asyncio.create_task(batcher.submit(Query(name)))

            first = submit("first")
            await ticks(SETTLED)
            assert gate.batches == [["first"]], "a query in work does not wait"
            crowd = [submit(f"{n}") for n in range(5)]
            await ticks(SETTLED)
            for task in crowd[3:]:
                with pytest.raises(Overloaded) as refused:
                    await task
                assert refused.value.retry_after_s > 0
            crowd[0].cancel()
            crowd[2].cancel()
            await ticks(SETTLED)
            later = [submit("a"), submit("b")]
            await ticks(SETTLED)
            with pytest.raises(Overloaded):
                await submit("c")
            gate.open.set()
            answers = await asyncio.gather(first, crowd[1], *later)
            assert [answer.request_id for answer in answers] == ["first", "1", "a", "b"]
            assert gate.batches == [["first"], ["1", "a"], ["b"]]

        await running(batcher, body)

    asyncio.run(run())


def test_whoever_has_arrived_goes_along() -> None:
    async def run() -> None:
        gate = Gate()
        gate.open.set()
        batcher = Batcher(gate, 4, 8)

        async def arrive(name: str, turns: int) -> None:
            await ticks(turns)
            await batcher.submit(Query(name))

        async def body() -> None:
            # One a turn, as a loop comes to its sockets; the last finds a full batch.
            await asyncio.gather(*(arrive(f"{n}", n) for n in range(5)))
            assert gate.batches == [["0", "1", "2", "3"], ["4"]]

        await running(batcher, body)

    asyncio.run(run())


def test_one_who_leaves_while_the_answer_is_made_harms_nobody() -> None:
    async def run() -> None:
        gate = Gate()
        batcher = Batcher(gate, 8, 8)

        async def body() -> None:
            tasks = [asyncio.create_task(batcher.submit(Query(f"{n}"))) for n in range(3)]
            await ticks(SETTLED)
            assert gate.batches == [["0", "1", "2"]]
            tasks[1].cancel()
            gate.open.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[1], asyncio.CancelledError)
            assert [result.request_id for result in results[::2] if isinstance(result, Slate)] == ["0", "2"]
            assert (await batcher.submit(Query("next"))).request_id == "next"

        await running(batcher, body)

    asyncio.run(run())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_answers_is_nobodys_answer(count: int) -> None:
    async def answer(queries: Sequence[Query]) -> Sequence[Slate | Exception]:
        return [slate(query) for query in queries] if len(queries) == 1 else [slate(queries[0])] * count

    async def run() -> None:
        batcher = Batcher(answer, 8, 8)

        async def body() -> None:
            results = await asyncio.gather(*(batcher.submit(Query(f"{n}")) for n in range(2)), return_exceptions=True)
            assert [str(result) for result in results] == [f"{count} answers to 2 queries"] * 2
            assert (await batcher.submit(Query("next"))).request_id == "next"

        await running(batcher, body)

    asyncio.run(run())


def test_there_is_no_timer() -> None:
    timers: list[object] = []

    class Loop(asyncio.SelectorEventLoop):
        def call_at(self, *args: Any, **named: Any) -> asyncio.TimerHandle:  # type: ignore[override]
            timers.append(args)
            return super().call_at(*args, **named)

    async def answer(queries: Sequence[Query]) -> Sequence[Slate | Exception]:
        return [slate(query) for query in queries]

    async def run() -> None:
        batcher = Batcher(answer, 32, 32)
        loop = asyncio.create_task(batcher.run())
        await ticks(SETTLED)
        for name in ("first", "second"):
            task = asyncio.create_task(batcher.submit(Query(name)))
            await ticks(SETTLED + 2)
            assert task.done(), "a single query was made to wait"
            assert task.result().request_id == name
        assert timers == []
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("in_work", [False, True])
def test_whoever_waits_when_it_ends_is_told(in_work: bool) -> None:
    async def run() -> None:
        gate = Gate()
        answer: Answer = gate
        batcher = Batcher(answer, 1, 8)
        loop = asyncio.create_task(batcher.run())
        tasks = [asyncio.create_task(batcher.submit(Query(f"{n}"))) for n in range(3)]
        await ticks(SETTLED if in_work else 1)
        assert len(gate.batches) == in_work
        loop.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(run())
