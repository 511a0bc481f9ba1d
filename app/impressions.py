"""The impression log: which slate was shown to whom, so that a later event finds its list."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Self

import structlog

from app.engine import Query, Slate
from app.state.store import Store
from app.telemetry import IMPRESSIONS_DROPPED

_WAITING = 10_000
_TOGETHER = 500
_LINGER_S = 0.05

log = structlog.get_logger()


class Impressions:
    """Writes slates in the background, many at a time; what cannot be written is counted and forgotten.

    Runs between entering and leaving the context; leaving writes what still waits.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[tuple[Query, Slate]] = deque()
        self._arrived = asyncio.Event()
        self._dropping = False

    def put(self, query: Query, slate: Slate) -> None:
        """Takes a microsecond and never fails: when too many wait, this one is dropped."""
        if len(self._waiting) >= _WAITING:
            IMPRESSIONS_DROPPED.inc()
            return
        self._waiting.append((query, slate))
        self._arrived.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        while self._waiting:
            await self._write()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            # One call for everything that comes meanwhile: a call for each slate would cost a third of answering it.
            await asyncio.sleep(_LINGER_S)
            self._arrived.clear()
            while self._waiting:
                await self._write()

    async def _write(self) -> None:
        slates = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
        try:
            await self._store.log_slates(slates)
        except Exception as error:
            IMPRESSIONS_DROPPED.inc(len(slates))
            # Once, not twenty times a second for as long as it lasts.
            if not self._dropping:
                log.warning("dropping impressions", reason=repr(error))
            self._dropping = True
        else:
            self._dropping = False
