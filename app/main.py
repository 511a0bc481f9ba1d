"""The application: what it opens, what it mounts, what it says of itself."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import Gauge
from pydantic.json_schema import models_json_schema

from app import problems
from app.auth import Authentication, scope_of
from app.engine.local import LocalEngine
from app.impressions import Impressions
from app.problems import MEDIA_TYPE, ProblemDocument
from app.routes import ServedEngine, State, admin, events, ops, recommend, users
from app.settings import Settings
from app.state.spool import Spool
from app.state.store import Store
from app.telemetry import BUNDLE_WORKERS, RequestMetrics, configure_logging, forget_dead_workers, observe_batch


def create_app(settings: Settings, engine: ServedEngine | None = None) -> FastAPI:
    """The service as `settings` say; it opens and closes everything in its lifespan, but not an `engine` passed in."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        if settings.redis_url is None:
            raise ValueError("MILLIREC_REDIS_URL is not set")
        async with AsyncExitStack() as opened:
            store = await opened.enter_async_context(
                Store(
                    settings.redis_url,
                    prefix=settings.redis_prefix,
                    timeout_ms=settings.redis_timeout_ms,
                    window=settings.state_window,
                    dedupe_window_s=settings.dedupe_window_s,
                    impressions_maxlen=settings.impressions_maxlen,
                )
            )
            spool = await opened.enter_async_context(
                Spool(settings.spool_path, store, max_bytes=settings.spool_max_bytes)
            )
            if (serving := engine) is None:
                serving = await opened.enter_async_context(_local_engine(settings, store))
            impressions = await opened.enter_async_context(Impressions(store))
            await opened.enter_async_context(_following(serving))
            yield State(settings=settings, store=store, spool=spool, engine=serving, impressions=impressions)

    app = FastAPI(
        title="Millirec",
        summary="What should this shopper see now?",
        version=version("millirec"),
        lifespan=lifespan,
        # Prometheus has the metrics; traces go wherever OpenTelemetry's own variables say.
        telemetry={"metrics": False},
    )
    problems.install(app)
    if settings.api_keys:
        app.add_middleware(Authentication, keys=settings.api_keys)
    app.add_middleware(RequestMetrics)
    # The hot route first, for routes are matched in this order; and not by `include_router`, which matches each route
    # twice: 7 of the 45 us that answering `/recommend` costs without the engine.
    for module in (recommend, events, users, ops, admin):
        app.router.routes.extend(module.router.routes)
    app.openapi = _documentation(app, settings)  # type: ignore[method-assign]
    return app


def app_from_env() -> FastAPI:
    """What uvicorn calls in each worker."""
    configure_logging()
    forget_dead_workers()
    return create_app(Settings())


@asynccontextmanager
async def _local_engine(settings: Settings, store: Store) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(
        settings.bundles,
        store,
        device=settings.device,
        threads=settings.threads,
        window=settings.state_window,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        poll_s=settings.bundle_poll_s,
        observe=lambda timing: observe_batch(timing.size, timing.waited_s, timing.state_s, timing.compute_s),
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.aclose()


@asynccontextmanager
async def _following(engine: ServedEngine) -> AsyncIterator[None]:
    """Does what each new bundle asks for."""
    counted: Gauge | None = None

    async def follow() -> None:
        nonlocal counted
        live = None
        while True:
            if engine.bundle != live:
                live = engine.bundle
                if counted:
                    counted.dec()
                counted = BUNDLE_WORKERS.labels(live) if live else None
                if counted:
                    counted.inc()
                # What came with a bundle stays as long as it serves; looking through all of it for garbage would stop
                # every request for a quarter of a second.
                gc.collect()
                gc.freeze()
            await asyncio.sleep(1)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if counted:
            counted.dec()


def _documentation(app: FastAPI, settings: Settings) -> Callable[[], dict[str, Any]]:
    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            openapi = get_openapi(title=app.title, summary=app.summary, version=app.version, routes=app.routes)
            components = openapi["components"]
            # FastAPI describes its own validation errors, which here are problems like all others.
            for unused in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(unused, None)
            _, problem = models_json_schema(
                [(ProblemDocument, "serialization")], ref_template="#/components/schemas/{model}"
            )
            components["schemas"] |= problem["$defs"]
            components["responses"] = {
                "Problem": {
                    "description": "What went wrong",
                    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
                }
            }
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            for path, operations in openapi["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = {"$ref": "#/components/responses/Problem"}
                    if settings.api_keys and (scope := scope_of(path)):
                        operation["security"] = [{"bearer": [scope]}, {"key": [scope]}]
            app.openapi_schema = openapi
        return app.openapi_schema

    return document
