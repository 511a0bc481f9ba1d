"""The command line as a user meets it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.bundle import current
from app.settings import Settings
from tests.live import ROOT, environment
from tests.tiny import publish_tiny

KEY = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    publish_tiny(root)
    return root


def refusal(*arguments: str, **variables: str) -> str:
    """The one line that this command ends with."""
    ended = CliRunner().invoke(cli, arguments, env=variables)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("millirec: ")
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_serving_beyond_loopback_needs_keys(tmp_path: Path, host: str) -> None:
    assert "MILLIREC_API_KEYS" in refusal("serve", "--host", host, MILLIREC_HOME=str(tmp_path))


def test_serving_needs_a_bundle(tmp_path: Path) -> None:
    line = refusal("serve", "--port", "0", MILLIREC_HOME=str(tmp_path))
    assert str(tmp_path / "bundles") in line
    assert "millirec train" in line


def test_a_changed_bundle_is_not_served(tmp_path: Path, bundles: Path) -> None:
    shutil.copytree(bundles, tmp_path, dirs_exist_ok=True)
    (catalog,) = tmp_path.glob("*/catalog.safetensors")
    with catalog.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    line = refusal("serve", "--port", "0", MILLIREC_BUNDLES=str(tmp_path))
    assert "catalog.safetensors" in line
    assert "SHA-256" in line


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("serve", "--port", str(port))
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MILLIREC_MAX_BATCH", "hunter2"),
        ("MILLIREC_API_KEYS", '{"hunter2": ["recommend"]}'),
        ("MILLIREC_API_KEYS", f'{{"{KEY}hunter2": ["everything"]}}'),
        ("MILLIREC_API_KEYS", "hunter2"),
        ("MILLIREC_REDIS_URL", "hunter2"),
    ],
)
def test_a_setting_without_sense_is_named_and_not_shown(variable: str, value: str) -> None:
    line = refusal("serve", **{variable: value})
    assert variable.removeprefix("MILLIREC_").lower() in line.lower()
    assert "hunter2" not in line


def test_settings_shows_every_setting_but_no_secret() -> None:
    secrets = {"MILLIREC_REDIS_URL": "redis://:hunter2@localhost", "MILLIREC_API_KEYS": f'{{"{KEY}": ["admin"]}}'}
    shown = CliRunner().invoke(cli, ["settings"], env={"MILLIREC_DEADLINE_MS": "77", "COLUMNS": "200"} | secrets).stdout
    for name in Settings.model_fields:
        assert f"MILLIREC_{name.upper()}" in shown
    assert "77" in shown
    assert "hunter2" not in shown
    assert KEY not in shown


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds one command that works and one that does not."""
    (tmp_path / "shop.py").write_text(
        "import typer\n"
        "def greet(name: str, loud: bool = False) -> None:\n"
        "    '''Greet somebody.'''\n"
        "    typer.echo(f'HELLO {name}' if loud else f'hello {name}')\n"
    )
    (tmp_path / "torn.py").write_text("import no_such_package\n")
    installed = tmp_path / "shop-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[millirec.commands]\ngreet = shop:greet\ntear = torn:tear\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plugins")
def test_installed_packages_add_commands() -> None:
    run = CliRunner().invoke
    assert run(cli, ["greet", "Ada", "--loud"]).stdout == "HELLO Ada\n"
    assert "Greet somebody." in run(cli, ["greet", "--help"]).stdout
    unknown = run(cli, ["great"])
    assert unknown.exit_code == 2
    assert "great" in unknown.stderr


@pytest.mark.usefixtures("plugins")
def test_a_broken_package_costs_its_own_command_only() -> None:
    assert "no_such_package" in refusal("tear", "--any", "thing")
    listed = CliRunner().invoke(cli, ["--help"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in ("serve", "settings", "greet", "tear"))
    assert "Cannot be loaded" in listed.stdout


@contextmanager
def served(*arguments: str, **variables: str) -> Iterator[tuple[httpx.Client, "subprocess.Popen[str]"]]:
    """A client of `millirec serve`, which must end well when it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
        env=environment(**variables),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    log: list[str] = []
    try:
        for line in process.stderr:
            log.append(line)
            if line.startswith("millirec: serving on "):
                break
        else:
            pytest.fail("".join(log))
        url = httpx.URL(log[-1].split()[-1]).copy_with(host="127.0.0.1")
        # The socket takes connections before the first worker does: this waits.
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/health/ready").status_code == 200
            yield client, process
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in "".join(log) + rest


@pytest.mark.slow
def test_serving_from_two_workers_and_again_from_one(tmp_path: Path, bundles: Path) -> None:
    variables = {"MILLIREC_HOME": str(tmp_path), "MILLIREC_BUNDLES": str(bundles)}
    valkey = tmp_path / "valkey" / "valkey.sock"
    with served("--workers", "2", **variables) as (client, _):
        assert client.get("/health/ready").json()["store"] == "reachable"
        assert valkey.exists()
        hide = {"type": "hide", "user_id": "u", "item_id": "a0"}
        assert client.post("/events", json=hide).json()["accepted"] == 1
        # A connection stays with one worker, and either worker takes some of these.
        for _ in range(20):
            response = httpx.get(f"{client.base_url}/recommend", params={"user_id": "u", "limit": 40})
            assert "a0" not in [item["item_id"] for item in response.json()["items"]]
        both = f'millirec_bundle_workers{{version="{current(bundles)}"}} 2.0'
        deadline = time.monotonic() + 30
        while both not in (metrics := client.get("/metrics").text) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert both in metrics
        answered = 'millirec_request_duration_seconds_count{method="GET",route="/recommend",status="200"} 20.0'
        assert answered in metrics
    assert not valkey.exists()

    variables["MILLIREC_API_KEYS"] = f'{{"{KEY}": ["recommend"]}}'
    with served("--host", "0.0.0.0", **variables) as (client, process):
        assert client.get("/recommend").status_code == 401
        response = client.get("/recommend", params={"user_id": "u", "limit": 40}, headers={"X-API-Key": KEY})
        assert "a0" not in [item["item_id"] for item in response.json()["items"]]
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert not valkey.exists()
