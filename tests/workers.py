"""`millirec serve` with several workers, each of which can be asked alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.live import ROOT, environment

PATIENCE_S = 60.0


def eventually(true: Callable[[], bool], what: str) -> None:
    last = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < last, what
        time.sleep(0.05)


class Service:
    def __init__(self, url: str, supervisor: int) -> None:
        self.url = url
        self._supervisor = supervisor

    def ask(self, method: str, path: str, *, timeout_s: float = PATIENCE_S, **asked: Any) -> httpx.Response:
        """Over a connection of its own: a connection stays with one worker."""
        return httpx.request(method, self.url + path, timeout=timeout_s, **asked)

    def workers(self) -> list[int]:
        """Process ids, ascending."""
        table = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
        # Python's resource tracker is a child too.
        return sorted(int(row[0]) for row in rows if int(row[1]) == self._supervisor and "spawn_main" in row[-1])

    @contextmanager
    def only(self, worker: int) -> Iterator[None]:
        """Inside, no other worker answers. The supervisor takes one that is silent for 30 s to be dead."""
        with ExitStack() as resumed:
            for other in self.workers():
                if other != worker:
                    os.kill(other, signal.SIGSTOP)
                    resumed.callback(os.kill, other, signal.SIGCONT)
            yield


@contextmanager
def serving_workers(workers: int, bundles: Path, redis_url: str, home: Path, prefix: str) -> Iterator[Service]:
    """Starts and waits until every worker answers; must end well when told to."""
    variables: dict[str, object] = {"MILLIREC_BUNDLES": bundles, "MILLIREC_REDIS_URL": redis_url, "MILLIREC_HOME": home}
    # Nothing is left out because the machine is busy.
    patient = {"MILLIREC_REDIS_TIMEOUT_MS": "10000", "MILLIREC_DEADLINE_MS": "10000"}
    variables |= {"MILLIREC_REDIS_PREFIX": prefix, **patient}
    output = home / "stderr"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0", "--workers", str(workers)],
            env=environment(**{name: str(value) for name, value in variables.items()}),
            cwd=ROOT,
            stderr=log,
        )
    line = "millirec: serving on "
    try:
        eventually(lambda: line in output.read_text() or process.poll() is not None, "no line that says where")
        assert process.poll() is None, output.read_text()
        url = output.read_text().partition(line)[2].split()[0]
        service = Service(url, process.pid)
        # The socket takes connections before the first worker does: this waits.
        assert service.ask("GET", "/health/ready").status_code == 200
        everyone = f"}} {workers}.0\n"
        eventually(
            lambda: any(
                row.startswith("millirec_bundle_workers{") and row.endswith(everyone)
                for row in service.ask("GET", "/metrics").text.splitlines(keepends=True)
            ),
            "not every worker serves",
        )
        yield service
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 0, output.read_text()
    assert "Traceback" not in output.read_text()
