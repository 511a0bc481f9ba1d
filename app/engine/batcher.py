"""Greedy micro-batching: whatever has arrived when the engine is free is the next batch. There is no timer."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from app.engine import Overloaded, Query, Slate

TURNS = 2
"""Of the event loop: from a socket that can be read to a query that waits here."""

Answer = Callable[[Sequence[Query]], Awaitable[Sequence[Slate | Exception]]]


class Batcher:
    """Collects concurrent queries into batches for one `answer` at a time; every caller gets its own answer."""

    def __init__(
        self,
        answer: Answer,
        max_batch: int,
        max_waiting: int,
        observe: Callable[[int, float], None] = lambda size, waited_s: None,
    ) -> None:
        """`observe(size, waited_s)` is told of each batch and how long its oldest query waited."""
        self._answer = answer
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._observe = observe
        self._waiting: deque[tuple[Query, asyncio.Future[Slate], float]] = deque()
        self._arrived = asyncio.Event()

    async def submit(self, query: Query) -> Slate:
        """Raises `Overloaded` when `max_waiting` queries wait already, and whatever `answer` says of this query."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded
        future: asyncio.Future[Slate] = asyncio.get_running_loop().create_future()
        entry = (query, future, time.monotonic())
        self._waiting.append(entry)
        self._arrived.set()
        try:
            return await future
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(entry)
            raise

    async def run(self) -> None:
        """Answers until cancelled; what still waits then is cancelled too."""
        try:
            while True:
                await self._arrived.wait()
                await self._gather()
                await self._next()
        finally:
            for _, future, _ in self._waiting:
                future.cancel()

    async def _gather(self) -> None:
        """Lets those in that have arrived, but whom the loop did not come to while it computed: half a batch costs a
        query more than a whole one."""
        turns = 0
        while turns < TURNS and (before := len(self._waiting)) < self._max_batch:
            await asyncio.sleep(0)
            turns = 0 if len(self._waiting) > before else turns + 1

    async def _next(self) -> None:
        batch: list[tuple[Query, asyncio.Future[Slate], float]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            # A client that went away a moment ago takes no place.
            if not entry[1].done():
                batch.append(entry)
        if not self._waiting:
            self._arrived.clear()
        if not batch:
            return
        self._observe(len(batch), time.monotonic() - batch[0][2])
        try:
            answers: Sequence[Slate | Exception] = await self._answer([query for query, _, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} queries")
        except Exception as error:
            answers = [error] * len(batch)
        except BaseException:
            for _, future, _ in batch:
                future.cancel()
            raise
        for (_, future, _), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
