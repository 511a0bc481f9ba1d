import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from app.embedded import EmbeddedError, embedded_valkey
from tests.live import ROOT

LEFT_BEHIND = """
import os, sys, time
from pathlib import Path
import redis
from app.embedded import embedded_valkey
with embedded_valkey(Path(sys.argv[1])) as url:
    redis.Redis.from_url(url).set("kept", "yes")
    time.sleep(1.1)
    os.kill(os.getpid(), 9)
"""


def test_what_was_written_is_there_next_time(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
    assert not Path(url.removeprefix("unix://")).exists()
    with embedded_valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"


def test_one_home_has_one_server(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        with pytest.raises(EmbeddedError, match="MILLIREC_HOME"), embedded_valkey(tmp_path):
            pass
        with redis.Redis.from_url(url) as client:
            assert client.ping()


def test_the_server_of_a_killed_service_is_replaced(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", LEFT_BEHIND, str(tmp_path)], cwd=ROOT, timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    with redis.Redis(unix_socket_path=str(tmp_path / "valkey" / "valkey.sock")) as orphan:
        left = int(orphan.info()["process_id"])
    with embedded_valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"
        assert client.info()["process_id"] != left


def test_ctrl_c_in_the_terminal_does_not_stop_it_before_the_service(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
        os.kill(int(client.info()["process_id"]), signal.SIGINT)
        time.sleep(0.3)  # Valkey looks at its signals ten times a second.
        assert client.ping()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_nobody_else_on_the_machine_can_connect(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path):
        assert (tmp_path / "valkey" / "valkey.sock").stat().st_mode & 0o077 == 0


def test_a_home_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="too long"), embedded_valkey(tmp_path / ("x" * 100)):
        pass
