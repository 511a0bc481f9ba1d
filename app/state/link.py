"""One pipelined connection to Redis or Valkey, shared by every task of a worker.

Every `/recommend` waits for a pipeline. redis-py spends about 100 us of CPU on one and 20 us on each command in it;
here a pipeline is one write and one future, for 42 us and 3 us (one core, uvloop, 8 KiB states, hiredis in both).
"""

import asyncio
import contextlib
import ssl
from collections import deque
from typing import Any, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis
import structlog

log = structlog.get_logger()

_CONNECT_S = 1.0
_RETRY_S = (0.05, 1.0)
"""First and longest pause between two attempts to connect."""
_SILENCE_S = 1.0
"""A server that owes an answer and says nothing for so long is gone; a shorter silence may be a long script."""


class StateUnavailable(Exception):
    """Redis did not do what was asked: not connected, too late, or it refused."""


def pack(*command: str | bytes | int) -> bytes:
    """One command as Redis reads it."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


class Link:
    """Connects on entering the context, and again whenever the connection is lost; being unable to is no error.

    `url` is `redis://[user:password@]host[:port][/db]`, the same with `rediss://` and optionally
    `?ssl_ca_certs=file`, or `unix://[user:password@]/path[?db=0]`. Anything else raises `ValueError`.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        known = {"redis": (), "rediss": ("ssl_ca_certs",), "unix": ("db",)}.get(parts.scheme)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if known is None or not options.keys() <= set(known):
            raise ValueError(
                "a Redis URL is redis://host:port/db, rediss://host:port/db?ssl_ca_certs=file or unix:///path?db=0"
            )
        self._path = unquote(parts.path) if parts.scheme == "unix" else None
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 6379
        self._tls = None
        if parts.scheme == "rediss":
            self._tls = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        db = options.get("db", "0") if self._path is not None else parts.path.strip("/") or "0"
        greeting: list[tuple[str, ...]] = [("SELECT", str(int(db))), ("PING",)]
        if parts.password:
            user = (unquote(parts.username),) if parts.username else ()
            greeting.insert(0, ("AUTH", *user, unquote(parts.password)))
        self._greeting = b"".join(pack(*command) for command in greeting), len(greeting)
        self._wire: _Wire | None = None

    async def __aenter__(self) -> Self:
        tried = asyncio.Event()
        self._task = asyncio.create_task(self._stay_connected(tried))
        await tried.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def call(self, commands: bytes, replies: int, timeout_s: float) -> list[Any]:
        """The replies to packed `commands` in order, an error among them as an exception instance.

        Raises `StateUnavailable` after `timeout_s`, and at once when there is no connection.
        """
        if not replies:
            return []
        if self._wire is None:
            raise StateUnavailable("not connected to Redis")
        return await self._wire.call(commands, replies, timeout_s)

    async def _stay_connected(self, tried: asyncio.Event) -> None:
        pause_s, reported = _RETRY_S[0], False
        while True:
            try:
                wire = await self._connect()
            # Whatever it was, ending here would leave the worker without Redis for good.
            except Exception as error:
                if not reported:
                    log.warning("no connection to redis", reason=repr(error))
                tried.set()
                await asyncio.sleep(pause_s)
                pause_s, reported = min(2 * pause_s, _RETRY_S[1]), True
                continue
            self._wire = wire
            pause_s, reported = _RETRY_S[0], False
            tried.set()
            try:
                await wire.lost.wait()
                log.warning("connection to redis lost")
            finally:
                self._wire = None
                await wire.close()

    async def _connect(self) -> "_Wire":
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            if self._path is not None:
                _, wire = await loop.create_unix_connection(_Wire, self._path)
            else:
                _, wire = await loop.create_connection(_Wire, self._host, self._port, ssl=self._tls)
        try:
            for reply in await wire.call(*self._greeting, _CONNECT_S):
                if isinstance(reply, Exception):
                    raise StateUnavailable(str(reply))
        except BaseException:
            await wire.close()
            raise
        return wire


class _Wire(asyncio.Protocol):
    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self._reader = hiredis.Reader()
        self._pipelines: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()
        self._replies: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()

    async def call(self, commands: bytes, replies: int, timeout_s: float) -> list[Any]:
        if self.lost.is_set():
            raise StateUnavailable("connection to Redis lost")
        if not self._pipelines:
            self._heard_s = self._loop.time()
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self._pipelines.append((replies, answer))
        self._transport.write(commands)
        timer = self._loop.call_later(timeout_s, self._expire, answer, timeout_s)
        try:
            return await answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Sends what is still to be sent, as far as the server takes it."""
        self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_S):
                await self.lost.wait()
        self._transport.abort()

    def _expire(self, answer: asyncio.Future[list[Any]], timeout_s: float) -> None:
        if not answer.done():
            answer.set_exception(StateUnavailable(f"no answer from Redis in {timeout_s * 1000:.0f} ms"))
        if self._loop.time() - self._heard_s >= _SILENCE_S:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        self._reader.feed(data)
        while self._pipelines:
            expected, answer = self._pipelines[0]
            while len(self._replies) < expected:
                reply = self._reader.gets()
                if reply is False:
                    return
                self._replies.append(reply)
            self._pipelines.popleft()
            replies, self._replies = self._replies, []
            if not answer.done():
                answer.set_result(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        while self._pipelines:
            _, answer = self._pipelines.popleft()
            if not answer.done():
                answer.set_exception(StateUnavailable("connection to Redis lost"))
