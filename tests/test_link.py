import asyncio
import os
import signal
import socket
import struct
from collections.abc import Callable, Coroutine

import pytest
import redis
import uvloop

from app.state.link import Link, StateUnavailable, pack

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


def finish(work: Coroutine[None, None, None], new_loop: NewLoop) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        # Long enough for anything but a call that never ends.
        runner.run(asyncio.wait_for(work, 60))


async def echoes(link: Link, name: str, count: int, timeout_s: float) -> bool:
    """Whether the right replies came; False for none in time."""
    words = [f"{name}-{i}".encode() for i in range(count)]
    try:
        replies = await link.call(b"".join(pack("ECHO", word) for word in words), count, timeout_s)
    except StateUnavailable:
        return False
    assert replies == words
    return True


@LOOPS
def test_replies_that_come_too_late_reach_nobody(valkey: redis.Redis, valkey_url: str, new_loop: NewLoop) -> None:
    pid = valkey.info("server")["process_id"]

    async def run() -> None:
        async with Link(valkey_url) as link:
            assert all(await asyncio.gather(*(echoes(link, f"before {i}", i % 9, 30) for i in range(40))))
            os.kill(pid, signal.SIGSTOP)
            try:
                patient = [asyncio.create_task(echoes(link, f"patient {i}", 3, 30)) for i in range(3)]
                # Some of them wait for a connection all their time.
                assert not any(await asyncio.gather(*(echoes(link, f"hasty {i}", 2, 0.02) for i in range(40))))
                cancelled = asyncio.create_task(echoes(link, "cancelled", 2, 30))
                await asyncio.sleep(0.02)
                cancelled.cancel()
                # These ask before the late replies come.
                patient += [asyncio.create_task(echoes(link, f"patient {i}", 3, 30)) for i in range(3, 20)]
                await asyncio.sleep(0.02)
            finally:
                os.kill(pid, signal.SIGCONT)
            assert all(await asyncio.gather(*patient))
            assert all(await asyncio.gather(*(echoes(link, f"after {i}", i % 9, 30) for i in range(40))))
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    finish(run(), new_loop)


def test_an_error_is_one_of_the_replies(valkey_url: str) -> None:
    async def run() -> None:
        async with Link(valkey_url) as link:
            commands = [pack("SET", "a", "1"), pack("NONSENSE"), pack("LPUSH", "a", "2"), pack("GET", "a")]
            done, unknown, refused, value = await link.call(b"".join(commands), 4, 30)
            assert (done, value) == (b"OK", b"1")
            assert "NONSENSE" in str(unknown) and "WRONGTYPE" in str(refused)
            assert await link.call(b"", 0, 30) == []

    finish(run(), asyncio.new_event_loop)


@LOOPS
def test_the_first_call_after_the_server_hung_up_succeeds(
    valkey: redis.Redis, valkey_url: str, new_loop: NewLoop
) -> None:
    async def run() -> None:
        async with Link(valkey_url) as link:
            assert all(await asyncio.gather(*(echoes(link, f"{i}", 1, 30) for i in range(5))))
            valkey.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.1)
            assert all(await asyncio.gather(*(echoes(link, f"{i}", 1, 30) for i in range(5))))

    finish(run(), new_loop)


@LOOPS
def test_a_peer_that_is_silent_or_resets_or_refuses(new_loop: NewLoop) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as peer:
            peer.setblocking(False)
            async with Link(f"redis://127.0.0.1:{peer.getsockname()[1]}") as link:
                assert not await echoes(link, "silent", 1, 0.05)
                # Entering the context has tried as well.
                for _ in range(2):
                    (await loop.sock_accept(peer))[0].close()

                asked = asyncio.create_task(echoes(link, "answered", 1, 30))
                accepted, _ = await loop.sock_accept(peer)
                # The greeting of redis-py, two commands, and ours.
                while b"answered" not in await loop.sock_recv(accepted, 4096):
                    await loop.sock_sendall(accepted, b"+OK\r\n+OK\r\n")
                await loop.sock_sendall(accepted, b"$10\r\nanswered-0\r\n")
                assert await asked
                # Zero linger makes of closing a reset.
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                accepted.close()
                await asyncio.sleep(0.1)
                with pytest.raises(StateUnavailable):
                    await link.call(pack("PING"), 1, 30)
                peer.close()
                with pytest.raises(StateUnavailable, match="connecting"):
                    await link.call(pack("PING"), 1, 30)

    finish(run(), new_loop)
