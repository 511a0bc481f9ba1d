import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.telemetry import MULTIPROC_DIR, forget_dead_workers
from tests.live import ROOT

LOGGING = """
import logging
import structlog
from app.telemetry import configure_logging
configure_logging()
structlog.get_logger().warning("first", reason="why")
logging.getLogger("uvicorn.error").info("second %s", "part")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("uvicorn.error").exception("third")
"""


def test_every_log_line_is_one_json_object() -> None:
    logged = subprocess.run(
        [sys.executable, "-c", LOGGING], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert logged.stdout == ""
    first, second, third = map(json.loads, logged.stderr.splitlines())
    assert (first["event"], first["level"], first["reason"]) == ("first", "warning", "why")
    assert (second["event"], second["logger"], second["level"]) == ("second part", "uvicorn.error", "info")
    assert third["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert all(line["timestamp"].endswith("Z") for line in (first, second, third))


def test_gauges_forget_workers_that_no_longer_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        names = [f"{kind}_{pid}.db" for kind in ("gauge_livesum", "counter") for pid in (running.pid, ended.pid)]
        for name in names:
            (tmp_path / name).touch()
        monkeypatch.setenv(MULTIPROC_DIR, str(tmp_path))
        forget_dead_workers()
        running.communicate(b"\n")
    # What a counter has counted stays counted.
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {f"gauge_livesum_{ended.pid}.db"}
