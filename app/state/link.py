"""Connections to Redis or Valkey, for many commands in one write.

redis-py connects, authenticates, encrypts, parses and reconnects. Only its `Pipeline` is left out: every `/recommend`
waits for the states of its batch, and a pipeline costs more than twice as much of the processor as this.
"""

import asyncio
from contextlib import suppress
from typing import Any, Self

import hiredis
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import RedisError, ResponseError

_CONNECTIONS = 8
"""At most, and opened when needed."""
_CONNECT_S = 1.0
"""For one connection to open, and for all to close."""


class StateUnavailable(Exception):
    """Redis did not do what was asked: not connected, too late, or it refused."""


def pack(*command: str | bytes | int) -> bytes:
    """One command as Redis reads it."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


class Link:
    """Connects on entering the context and whenever a call finds no connection; being unable to is no error.

    `url` is what `redis.asyncio.ConnectionPool.from_url` takes.
    """

    def __init__(self, url: str) -> None:
        # RESP2 has no pushes, which nobody here would read. `call` has a timeout for all that redis-py does.
        self._pool = ConnectionPool.from_url(
            url, max_connections=_CONNECTIONS, protocol=2, socket_timeout=None, socket_connect_timeout=_CONNECT_S
        )
        # The last one used first, so that no more are opened than are needed at a time.
        self._idle = asyncio.LifoQueue[Connection]()
        for _ in range(self._pool.max_connections):
            self._idle.put_nowait(self._pool.make_connection())  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        with suppress(StateUnavailable):
            await self.call(pack("PING"), 1, _CONNECT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        connections = [await self._idle.get() for _ in range(self._pool.max_connections)]
        await asyncio.gather(*(connection.disconnect() for connection in connections), return_exceptions=True)

    async def call(self, commands: bytes, replies: int, timeout_s: float) -> list[Any]:
        """The replies to packed `commands` in order, an error among them as an exception instance.

        Raises `StateUnavailable` after `timeout_s`, connecting included, and at once when there is no connecting.
        """
        if not replies:
            return []
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._idle.get()
                try:
                    await self._pool.ensure_connection(connection)
                    await connection.send_packed_command([commands])
                    return [await _reply(connection) for _ in range(replies)]
                except BaseException:
                    # Or the replies still to come would go to the next call.
                    await connection.disconnect(nowait=True)
                    raise
                finally:
                    self._idle.put_nowait(connection)
        except TimeoutError as error:
            raise StateUnavailable(f"no answer from Redis in {timeout_s * 1000:.0f} ms") from error
        # RuntimeError is uvloop's for writing to a connection that was reset while idle.
        except (RedisError, OSError, RuntimeError) as error:
            raise StateUnavailable(str(error)) from error


async def _reply(connection: Connection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error
