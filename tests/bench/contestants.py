"""The processes of a benchmark: started on a core of their own, asked how they are, and ended."""

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

READY_S = 120.0
_MEMORY = re.compile(r"^(Rss|Pss|Anonymous): +(\d+) kB$", re.MULTILINE)
_QUANTITY = re.compile(r"^(millirec_[a-z_]+) (\S+)$", re.MULTILINE)


class ContestantDied(Exception):
    """A server ended or never became ready; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    pid: int
    port: int
    cold_start_s: float
    """From the start of the process to the first ready answer."""

    def get(self, path: str) -> bytes:
        """The body of a 200; raises `OSError` for anything else."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{path}: {error!r}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"{path}: status {answer.status}: {body[:200]!r}")
        return body

    def metrics(self) -> dict[str, float]:
        """The metrics without labels, by name."""
        return {name: float(value) for name, value in _QUANTITY.findall(self.get("/metrics").decode())}

    def cpu_s(self) -> float:
        """Time that the process has spent on a processor."""
        # The name in parentheses may hold spaces.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory (`Rss`) and how much of it is its own, not pages of mapped files (`Anonymous`).

        In the proportional memory (`Pss`) each page is divided among the processes that share it.
        """
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return {name: int(kib) * 1024 for name, kib in _MEMORY.findall(rollup)}


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Whatever starts meanwhile may use only `core`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    name: str, module: Sequence[str], port: int, core: int, environment: Mapping[str, str], log: Path
) -> Iterator[Contestant]:
    """`python -m module...` on one core, from its being ready until the end of the block."""
    # One compute thread is what every contestant is given; without this BLAS would start one a core of the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
    with log.open("wb") as output, on_core(core):
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *module], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        contestant = Contestant(name, process.pid, port, 0.0)
        while not contestant.cold_start_s:
            try:
                # The port may listen, and this wait, long before there is somebody to answer.
                contestant.get("/health/ready")
                contestant = replace(contestant, cold_start_s=time.perf_counter() - began)
            except OSError as error:
                if process.poll() is not None or time.perf_counter() - began > READY_S:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise ContestantDied(f"{name} is not ready: {error}; its log ends:\n{tail}") from error
                time.sleep(0.02)
        yield contestant
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
