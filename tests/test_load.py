import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.load import Load, Report, get, offer, on_core, post

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the load generator uses timerfd and CPU affinity")

EARLY_MS = 1
"""An event loop that counts in milliseconds may wake a sleeper so much too soon."""

Answer = Callable[[bytes], Awaitable[bytes | None]]
"""From a request's path and body to the whole answer; None closes the connection instead."""


def ok(body: bytes = b"{}", status: int = 200, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[int]:
    """A server of known behaviour; yields its port."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                if (reply := await answer(head.split(b" ")[1] + body)) is None:
                    break
                writer.write(reply)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            await task


def measure(answer: Answer, **changes: object) -> Report:
    """What the load generator says of a server that behaves like `answer`."""

    async def both() -> Report:
        async with serving(answer) as port:
            arguments = {"host": "127.0.0.1", "port": port, "requests": [get("/")], "duration_s": 0.3} | changes
            return await offer(Load(**arguments))  # type: ignore[arg-type]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(both())


def test_open_loop_charges_a_stall_to_every_request_that_it_delayed() -> None:
    seen = 0

    async def stall_once(_: bytes) -> bytes:
        nonlocal seen
        seen += 1
        if seen == 1:
            await asyncio.sleep(0.2)
        return ok()

    report = measure(stall_once, rate_per_s=200, duration_s=0.4, connections=1)
    # 40 of the 80 were meant to start during the 200 ms stall; a client that waits politely would see one slow answer.
    assert report.answered == 80
    assert not report.failures
    assert report.max_ms >= 200 - EARLY_MS
    assert report.p90_ms >= 160 - EARLY_MS


def test_open_loop_latency_includes_the_queue_of_an_overloaded_server() -> None:
    turn = asyncio.Lock()

    async def one_at_a_time(_: bytes) -> bytes:
        async with turn:
            await asyncio.sleep(0.01)
        return ok()

    report = measure(one_at_a_time, rate_per_s=200, connections=4)
    # 60 requests at 9 ms each are done after 540 ms at the earliest; the last was due at 295 ms.
    assert report.answered == 60
    assert report.max_ms >= 540 - 295
    assert report.achieved_per_s <= 60 / 0.54


def test_open_loop_keeps_its_rate_when_the_server_is_slow_but_parallel() -> None:
    async def slow(_: bytes) -> bytes:
        await asyncio.sleep(0.1)
        return ok()

    report = measure(slow, rate_per_s=100, connections=64)
    assert report.answered == 30
    assert report.p50_ms >= 100 - EARLY_MS
    assert report.elapsed_s * 1000 >= 290 + 100 - EARLY_MS


def test_closed_loop_has_at_most_one_request_in_flight_per_connection() -> None:
    now = most = 0

    async def count(_: bytes) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1
        return ok()

    report = measure(count, connections=3)
    assert most == 3
    assert report.answered > 3
    assert report.p50_ms >= 5 - EARLY_MS
    assert report.offered_per_s is None


def test_limit_sends_each_request_once_and_in_order() -> None:
    seen: list[bytes] = []

    async def remember(request: bytes) -> bytes:
        seen.append(request)
        return ok(status=202)

    requests = [post("/e", b"%d" % i) for i in range(50)]
    report = measure(remember, requests=requests, limit=50, status=202, connections=1, duration_s=5)
    assert seen == [b"/e%d" % i for i in range(50)]
    assert (report.answered, report.failures) == (50, {})


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.sampled_from(["good", "empty", "wrong", "error", "drop", "goodbye", "no length"]), min_size=1, max_size=40
    )
)
def test_every_request_is_answered_or_a_failure_with_its_reason(kinds: list[str]) -> None:
    replies = {
        "/good": ok(b"{}"),
        "/empty": ok(b""),
        "/wrong": ok(b"bad"),
        "/error": ok(status=503),
        "/drop": None,
        "/goodbye": ok(b"{}", extra="Connection: close\r\n"),
        "/no-length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    }
    reasons = {"empty": "empty body", "wrong": "bad", "error": "status 503"}
    reasons |= {"drop": "connection lost", "no length": "connection lost"}

    async def reply(request: bytes) -> bytes | None:
        return replies[request.decode()]

    report = measure(
        reply,
        requests=[get("/" + kind.replace(" ", "-")) for kind in kinds],
        rate_per_s=1000,
        duration_s=len(kinds) / 1000,
        connections=4,
        check=lambda body: "bad" if body == b"bad" else None,
    )
    expected: dict[str, int] = {}
    for kind in kinds:
        if kind in reasons:
            expected[reasons[kind]] = expected.get(reasons[kind], 0) + 1
    assert report.failures == expected
    assert report.answered == len(kinds) - report.failed


def test_quantiles_are_observed_latencies() -> None:
    delays_s = np.arange(20) / 200

    async def delay(request: bytes) -> bytes:
        await asyncio.sleep(delays_s[int(request[1:])])
        return ok()

    requests = [get(f"/{i}") for i in range(20)]
    report = measure(delay, requests=requests, rate_per_s=200, duration_s=0.1, connections=20)
    assert 45 - EARLY_MS <= report.p50_ms <= report.p90_ms <= report.p99_ms == report.max_ms
    assert report.p90_ms >= 85 - EARLY_MS
    assert report.max_ms >= 95 - EARLY_MS
    assert report.body_bytes == 2


def not_on_the_last_core(body: bytes) -> str | None:
    return None if os.sched_getaffinity(0) == {int(body)} else "on another core"


def test_runs_on_the_core_it_was_given_and_says_when_nobody_listens() -> None:
    core = max(os.sched_getaffinity(0))

    def answer_one(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(ok(b"%d" % core))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        load = Load("127.0.0.1", listener.getsockname()[1], [get("/")], 5, connections=1, limit=1)
        thread = threading.Thread(target=answer_one, args=(listener,))
        thread.start()
        report = on_core(core, replace(load, check=not_on_the_last_core))
        thread.join()
    assert (report.answered, report.failures) == (1, {})
    with pytest.raises(OSError, match="refused"):
        on_core(core, load)
