"""Load over HTTP/1.1 keep-alive, offered by one core and measured honestly.

Open loop: request i is *meant* to start at `i / rate_per_s`, whatever the server does, and its latency
counts from that moment. A server that stalls for a second is charged for every request that should
have started in that second (Tene, "How not to measure latency": coordinated omission).
Closed loop: each connection asks again as soon as it is answered; that finds the throughput at saturation.
"""

import asyncio
import ctypes
import gc
import multiprocessing
import os
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import numpy as np
import uvloop

Check = Callable[[bytes], str | None]
"""Names what is wrong with a body, or None."""

GRACE_S = 5.0
"""How long after the last intended start an answer is still waited for."""

_RECONNECT_S = 0.02
_TICK_S = 1e-4


@dataclass(frozen=True, slots=True)
class Load:
    host: str
    port: int
    requests: Sequence[bytes]
    """Whole HTTP messages, see `get` and `post`; used in turn, again from the first when there are too few."""
    duration_s: float
    connections: int = 64
    rate_per_s: float | None = None
    """Arrivals of the open loop; None is the closed loop."""
    limit: int | None = None
    """At most this many requests, for those that must not be sent twice."""
    status: int = 200
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Report:
    offered_per_s: float | None
    answered: int
    """Good answers; latencies are of these."""
    elapsed_s: float
    """From the first intended start to the last answer."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    body_bytes: float
    """Mean length of a good answer's body."""
    client_busy: float
    """Share of its core that the client used; near 1 the figures are the client's, not the server's."""
    failures: Mapping[str, int]
    """Requests without a good answer, by reason."""

    @property
    def achieved_per_s(self) -> float:
        return self.answered / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


def get(path: str, host: str = "127.0.0.1") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n\r\n".encode()


def post(path: str, body: bytes, host: str = "127.0.0.1") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def on_core(core: int, load: Load) -> Report:
    """`run` in a process of its own that may use only `core`."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=os.sched_setaffinity, initargs=(0, {core})
    ) as process:
        return process.submit(run, load).result()


def run(load: Load) -> Report:
    """`offer` on an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(offer(load))


async def offer(load: Load) -> Report:
    """Returns when all is answered, at the latest `GRACE_S` after the last intended start.

    Raises `OSError` when the server does not listen.
    """
    loop = asyncio.get_running_loop()
    client = _Client(load, loop)
    await asyncio.gather(*(client.connect() for _ in range(load.connections)))
    # A collection would stop the clock's reader for milliseconds and be booked on the server.
    gc.collect()
    gc.disable()
    busy = time.process_time()
    client.start()
    tick = _Timer(max(_TICK_S, 1 / load.rate_per_s)) if load.rate_per_s else None
    if tick:
        loop.add_reader(tick.fd, client.tick, tick)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(client.done), load.duration_s + GRACE_S)
        busy = (time.process_time() - busy) / (time.perf_counter() - client.began)
    finally:
        gc.enable()
        if tick:
            loop.remove_reader(tick.fd)
            tick.close()
        await client.close()
    return client.report(busy)


class _Timer:
    """A periodic timer of the kernel as a readable file: the event loop's own timers tick in whole milliseconds."""

    def __init__(self, period_s: float) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        seconds, nanoseconds = divmod(round(period_s * 1e9), 1_000_000_000)
        period = (ctypes.c_long * 4)(seconds, nanoseconds, seconds, nanoseconds)  # struct itimerspec
        if self.fd < 0 or libc.timerfd_settime(self.fd, 0, period, None):
            raise OSError(ctypes.get_errno(), "timerfd")

    def close(self) -> None:
        os.close(self.fd)


class _Client:
    def __init__(self, load: Load, loop: asyncio.AbstractEventLoop) -> None:
        self.load = load
        self.loop = loop
        self.count = load.limit or 2**62
        if load.rate_per_s:
            self.count = min(self.count, int(load.rate_per_s * load.duration_s))
        self.done: asyncio.Future[None] = loop.create_future()
        self.all_closed: asyncio.Future[None] = loop.create_future()
        # In turn rather than last in first out: no connection rests so long that the server closes it.
        self.idle: deque[_Connection] = deque()
        self.open: set[_Connection] = set()
        self.sent = self.in_flight = self.bytes = 0
        self.began = self.ended = 0.0
        self.closing = False
        self.latencies = array("d")
        self.failures: Counter[str] = Counter()
        self.reconnecting: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        await self.loop.create_connection(lambda: _Connection(self), self.load.host, self.load.port)

    def start(self) -> None:
        self.began = self.ended = time.perf_counter()
        self.loop.call_at(self.loop.time() + self.load.duration_s, self.send_due)
        self.send_due()

    def tick(self, timer: _Timer) -> None:
        os.read(timer.fd, 8)
        self.send_due()

    def send_due(self) -> None:
        if not self.began or self.closing:
            return
        rate, now = self.load.rate_per_s, time.perf_counter()
        while self.idle and self.sent < self.count:
            if rate is None:
                intended = now
                if now - self.began >= self.load.duration_s:
                    self.count = self.sent
                    break
            else:
                intended = self.began + self.sent / rate
                if intended > now:
                    break
            request = self.load.requests[self.sent % len(self.load.requests)]
            self.sent += 1
            self.in_flight += 1
            self.idle.popleft().send(request, intended)
        if not self.in_flight and self.sent >= self.count and not self.done.done():
            self.done.set_result(None)

    def answered(self, intended: float, status: int, body: bytes) -> None:
        now = time.perf_counter()
        self.in_flight -= 1
        wrong = None if status == self.load.status else f"status {status}"
        wrong = wrong or (None if body else "empty body") or (self.load.check and self.load.check(body))
        if wrong:
            self.failures[wrong] += 1
        else:
            self.latencies.append(now - intended)
            self.bytes += len(body)
            self.ended = now

    def failed(self, reason: str) -> None:
        self.in_flight -= 1
        self.failures[reason] += 1

    def lost(self) -> None:
        task = self.loop.create_task(self.reconnect())
        self.reconnecting.add(task)
        task.add_done_callback(self.reconnecting.discard)
        self.send_due()

    async def reconnect(self) -> None:
        while not self.closing:
            with suppress(OSError):
                await self.connect()
                return self.send_due()
            await asyncio.sleep(_RECONNECT_S)

    async def close(self) -> None:
        self.closing = True
        await asyncio.gather(*self.reconnecting)
        for connection in tuple(self.open):
            connection.transport.abort()
        if self.open:
            await self.all_closed

    def report(self, busy: float) -> Report:
        failures = dict(self.failures)
        silent = (self.count if self.load.rate_per_s else self.sent) - len(self.latencies) - self.failures.total()
        if silent:
            failures["no answer"] = silent
        latencies = np.frombuffer(self.latencies) if self.latencies else np.full(1, np.nan)
        p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99), method="inverted_cdf") * 1e3
        answered = len(self.latencies)
        return Report(
            offered_per_s=self.load.rate_per_s,
            answered=answered,
            elapsed_s=self.ended - self.began,
            p50_ms=float(p50),
            p90_ms=float(p90),
            p99_ms=float(p99),
            max_ms=float(latencies.max() * 1e3),
            body_bytes=self.bytes / max(answered, 1),
            client_busy=busy,
            failures=failures,
        )


class _Connection(asyncio.Protocol):
    """One request at a time; reads answers that carry a Content-Length."""

    __slots__ = ("buffer", "client", "intended", "transport")

    transport: asyncio.Transport

    def __init__(self, client: _Client) -> None:
        self.client = client
        self.buffer = b""
        self.intended: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.client.closing:
            self.transport.abort()
            return
        self.client.open.add(self)
        self.client.idle.append(self)

    def send(self, request: bytes, intended: float) -> None:
        self.intended = intended
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            return
        head = data[:end].lower() + b"\r\n"
        at = head.find(b"\r\ncontent-length:")
        if at < 0 or self.intended is None:
            self.transport.abort()
            return
        if len(data) < end + 4 + int(head[at + 17 : head.index(b"\r\n", at + 17)]):
            self.buffer = data
            return
        intended, self.intended, self.buffer = self.intended, None, b""
        self.client.answered(intended, int(head[9:12]), data[end + 4 :])
        if b"\r\nconnection: close\r\n" in head:
            self.transport.close()
        else:
            self.client.idle.append(self)
        self.client.send_due()

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.open.discard(self)
        if self.client.closing:
            if not self.client.open and not self.client.all_closed.done():
                self.client.all_closed.set_result(None)
            return
        if self.intended is not None:
            self.client.failed("connection lost")
        else:
            with suppress(ValueError):
                self.client.idle.remove(self)
        self.client.lost()
