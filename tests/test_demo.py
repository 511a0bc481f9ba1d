"""`millirec demo` as a newcomer with files of their own meets it."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.data.simulator import simulate
from tests.live import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the lines that the demo prints need curl"),
]


@contextmanager
def demo(home: Path, ending: signal.Signals, *arguments: str) -> Iterator[tuple[list[str], str]]:
    """The curl lines that the demo prints, and what it said before; it must end well on `ending`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = home / "stderr"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "demo", "--port", str(port), *arguments],
            env=environment(
                MILLIREC_HOME=str(home), MILLIREC_REDIS_TIMEOUT_MS="10000", MILLIREC_DEADLINE_MS="10000", COLUMNS="200"
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(said.read_text())
        yield [line for line in lines if line.startswith("curl ")], said.read_text()
    finally:
        process.send_signal(ending)
        process.communicate(timeout=30)
    assert process.returncode == 0, said.read_text()
    assert "Traceback" not in said.read_text()


def answers(lines: list[str]) -> list[dict[str, Any]]:
    printed = [subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout for line in lines]
    return [json.loads(answer) for answer in printed]


def check(lines: list[str]) -> str:
    """Does what the lines invite to do; returns the version of the bundle."""
    before, told, after, detail, ready = answers(lines)
    # Who starts the demo again at once, as this test does, says the same thing twice.
    assert (told["accepted"] + told["duplicates"], told["rejected"], told["spooled"]) == (1, [], 0)
    for slate in (before, after, detail):
        assert slate["degraded"] == []
        assert len(slate["items"]) == 5
        assert all(item["attributes"]["title"] for item in slate["items"])
    assert told["duplicates"] or after["items"] != before["items"]
    assert detail["scene"] == "detail"
    assert ready["status"] == "ready"
    assert ready["bundle"] == before["bundle"]
    return str(ready["bundle"])


def test_demo_of_a_shops_own_files(tmp_path: Path) -> None:
    tables = simulate(items=120, users=60, events=2_500, days=12)
    tables.events.drop("position").write_csv(tmp_path / "events.csv")
    tables.items.drop("attributes").write_csv(tmp_path / "items.csv")
    files = ["--events", str(tmp_path / "events.csv"), "--items", str(tmp_path / "items.csv")]
    with demo(tmp_path, signal.SIGINT, *files) as (lines, said):
        version = check(lines)
        assert "2,500" in said
        assert "candidates for home" in said
    (tmp_path / "stderr").unlink()
    with demo(tmp_path, signal.SIGTERM, *files) as (lines, said):
        assert check(lines) == version
        assert "using what stands" in said
        assert "candidates for home" not in said
