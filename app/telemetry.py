"""Metrics for Prometheus and logs for people and machines."""

import logging
import os
import sys
from pathlib import Path
from time import perf_counter

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# One file per process in this folder carries the numbers of all workers to whichever is asked.
# prometheus_client reads the variable once, when it is first imported.
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

REQUEST_SECONDS = Histogram(
    "millirec_request_duration_seconds", "Time to answer a request.", ["route", "method", "status"], buckets=_SECONDS
)
BATCH_QUERIES = Histogram("millirec_batch_queries", "Queries computed together.", buckets=_QUERIES)
QUEUE_SECONDS = Histogram("millirec_queue_seconds", "How long the oldest query of a batch waited.", buckets=_SECONDS)
STATE_SECONDS = Histogram("millirec_state_seconds", "How long reading the states of a batch took.", buckets=_SECONDS)
COMPUTE_SECONDS = Histogram("millirec_compute_seconds", "How long computing a batch took.", buckets=_SECONDS)
DEGRADED = Counter("millirec_degraded_total", "Answers that left out a stage.", ["stage"])
EVENTS = Counter("millirec_events_total", "Events by type and what became of them.", ["type", "outcome"])
SPOOL_ROWS = Gauge("millirec_spool_rows", "Events kept until Redis is back.", multiprocess_mode="mostrecent")
IMPRESSIONS_DROPPED = Counter("millirec_impressions_dropped_total", "Slates that the impression log missed.")
BUNDLE_WORKERS = Gauge("millirec_bundle_workers", "Workers serving a bundle.", ["version"], multiprocess_mode="livesum")


def observe_batch(size: int, waited_s: float, state_s: float, compute_s: float) -> None:
    BATCH_QUERIES.observe(size)
    QUEUE_SECONDS.observe(waited_s)
    STATE_SECONDS.observe(state_s)
    COMPUTE_SECONDS.observe(compute_s)


class RequestMetrics:
    """Times every request; outermost, so that it sees what the others answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._children: dict[tuple[str, str, int], Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = perf_counter()
        status = 500

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        finally:
            # Labels come from routes, never from what a client sent: their number stays small.
            route = scope.get("route")
            key = (route.path, scope["method"], status) if route else ("unmatched", "", status)
            child = self._children.get(key)
            if child is None:
                child = self._children[key] = REQUEST_SECONDS.labels(*key)
            child.observe(perf_counter() - began)


def exposition() -> bytes:
    """All metrics of all workers in the text format of Prometheus."""
    if MULTIPROC_DIR not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Removes what workers that no longer run would go on contributing to gauges."""
    if (folder := os.environ.get(MULTIPROC_DIR)) is None:
        return
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if not _runs(int(pid)):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def configure_logging() -> None:
    """Every log line of this process goes to stderr: in colour to a terminal, as one JSON object elsewhere."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    terminal = sys.stderr.isatty()
    rendering: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if terminal
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    stderr = logging.StreamHandler()
    stderr.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[stderr], level=logging.INFO, force=True)
