"""What every route builds on."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypedDict, cast

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.engine import Engine
from app.impressions import Impressions
from app.scenes import Scene
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
    def scenes(self) -> Mapping[str, Scene]:
        """As they are served."""
        ...

    @property
    def bundled_scenes(self) -> Mapping[str, Scene]:
        """As they came with the bundle."""
        ...


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

    FastAPI solves no dependency, reads no parameter and opens no exit stack for it.
    """

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **rest: Any) -> None:
        super().__init__(path, endpoint, **rest)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = app
