"""Real servers for tests."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.types import ASGIApp

ROOT = Path(__file__).parent.parent


@contextmanager
def serving(app: ASGIApp) -> Iterator[httpx.Client]:
    """A client of `app`, served over HTTP as `millirec serve` would."""
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", lifespan="on", log_config=None, access_log=False, server_header=False
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the app did not start"
                time.sleep(0.005)
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def environment(**variables: str) -> dict[str, str]:
    """This process's, with these MILLIREC_* variables and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILLIREC_")}
    return inherited | variables
