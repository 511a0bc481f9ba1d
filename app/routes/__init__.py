"""What every route builds on."""

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypedDict, cast

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from app.engine import Engine
from app.impressions import Impressions
from app.settings import Settings
from app.state.spool import Spool
from app.state.store import Store


class ServedEngine(Engine, Protocol):
    @property
    def ready(self) -> bool: ...

    @property
    def bundle(self) -> str | None:
        """Version of the live bundle."""
        ...

    @property
    def scenes(self) -> tuple[str, ...]: ...


class State(TypedDict):
    """What the lifespan opened."""

    settings: Settings
    store: Store
    spool: Spool
    engine: ServedEngine
    impressions: Impressions


def state_of(request: Request) -> State:
    # FastAPI does not take `Request[State]`, starlette's own way to say this.
    return cast(State, request.scope["state"])


class DirectRoute(APIRoute):
    """A route whose function gets the request and gives the response; documented like any other, at half the cost.

    FastAPI solves no dependency and reads no parameter for it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint
