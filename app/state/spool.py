"""The durable outbox: events accepted while Redis is away, on local disk until Redis has them."""

import asyncio
import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import structlog

from app.state.link import StateUnavailable
from app.state.store import Entry, Store
from app.telemetry import SPOOL_ROWS

log = structlog.get_logger()

_BUSY_S = 5.0
_PAUSE_S = 1.0
_PAGE_ROWS = 500
_PAGE_BYTES = 1 << 20

T = TypeVar("T")


class SpoolFull(Exception):
    """Nothing more can be kept on this disk; the message says why."""


class Spool:
    """One file shared by all workers of a machine; forwards to `store` between entering and leaving the context.

    A row is removed only after Redis has answered for it. A crash in between sends it again, which its event id
    makes harmless.
    """

    def __init__(self, path: Path, store: Store, *, max_bytes: int = 1 << 30) -> None:
        self._path = path
        self._store = store
        self._max_bytes = max_bytes
        self.rows = 0
        """How many events wait, as of a second ago."""

    async def __aenter__(self) -> Self:
        # SQLite blocks, and its connection stays with the thread that opened it.
        self._thread = ThreadPoolExecutor(1, "spool")
        try:
            await self._run(self._open)
        except BaseException:
            self._thread.shutdown()
            raise
        self._task = asyncio.create_task(self._forward())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._run(self._close)
        self._thread.shutdown()

    async def append(self, entries: Sequence[Entry]) -> list[bool | None]:
        """Per entry: True if Redis has it now, False if Redis had it before, None if it is on disk.

        Raises `SpoolFull` when some could be kept nowhere; whoever sends them all again does no harm.
        """
        try:
            taken = await self._store.append(entries)
        except StateUnavailable:
            taken = [None] * len(entries)
        if left := [entry for entry, new in zip(entries, taken, strict=True) if new is None]:
            try:
                await self._run(partial(self._insert, left))
            except sqlite3.Error as error:
                raise SpoolFull(str(error)) from error
        return taken

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _forward(self) -> None:
        while True:
            try:
                await self._run(self._count)
                with self._turn() as mine:
                    if mine:
                        await self._drain()
            except StateUnavailable:
                pass
            # Whatever it was, ending here would leave accepted events where they are for good.
            except Exception as error:
                log.error("spool not forwarded", reason=repr(error))
            await asyncio.sleep(_PAUSE_S)

    async def _drain(self) -> None:
        after = 0
        while page := await self._run(partial(self._page, after)):
            taken = await self._store.append([entry for _, entry in page])
            done = [(seq,) for (seq, _), new in zip(page, taken, strict=True) if new is not None]
            await self._run(partial(self._remove, done))
            after = page[-1][0]
            if len(done) < len(page):
                log.warning("redis refused spooled events", refused=len(page) - len(done))
                await asyncio.sleep(_PAUSE_S)

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """True for one worker at a time; the others would only send the same rows again."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened, _locked(self._path.parent):
            self._lock = opened.enter_context(self._path.with_name(self._path.name + ".lock").open("w"))
            self._db = opened.enter_context(closing(sqlite3.connect(self._path, _BUSY_S, isolation_level=None)))
            self._db.execute("PRAGMA journal_mode = WAL")
            # NORMAL would sync at checkpoints only, and a power cut take events that were accepted before it.
            self._db.execute("PRAGMA synchronous = FULL")
            (page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
            self._db.execute(f"PRAGMA max_page_count = {self._max_bytes // page_bytes}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS spool (seq INTEGER PRIMARY KEY AUTOINCREMENT,"
                " subject TEXT, event_id TEXT, near TEXT, payload BLOB, records BLOB)"
            )
            self._count()
            self._close = opened.pop_all().close

    def _insert(self, entries: Sequence[Entry]) -> None:
        rows = [(of, event_id, json.dumps(near), payload, records) for of, event_id, near, payload, records in entries]
        with self._transaction():
            self._db.executemany(
                "INSERT INTO spool (subject, event_id, near, payload, records) VALUES (?, ?, ?, ?, ?)", rows
            )
        self._count()

    def _page(self, after: int) -> list[tuple[int, Entry]]:
        page, size_bytes = [], 0
        rows = self._db.execute("SELECT * FROM spool WHERE seq > ? ORDER BY seq LIMIT ?", (after, _PAGE_ROWS))
        for seq, subject, event_id, near, payload, records in rows:
            page.append((seq, Entry(subject, event_id, tuple(json.loads(near)), payload, records)))
            size_bytes += len(payload) + len(records)
            if size_bytes >= _PAGE_BYTES:
                break
        rows.close()
        return page

    def _remove(self, seqs: list[tuple[int]]) -> None:
        with self._transaction():
            self._db.executemany("DELETE FROM spool WHERE seq = ?", seqs)
        self._count()

    def _count(self) -> None:
        # Rows leave in order, so this is their number; counting them would read the whole file.
        newest, oldest = self._db.execute(
            "SELECT (SELECT max(seq) FROM spool), (SELECT min(seq) FROM spool)"
        ).fetchone()
        self.rows = 0 if newest is None else newest - oldest + 1
        SPOOL_ROWS.set(self.rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk has rolled it back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. SQLite does not wait for others, but fails, while a file is changed to WAL."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
