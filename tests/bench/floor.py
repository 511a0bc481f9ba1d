"""The floor: what FastAPI and this app's middleware cost, and nothing else.

`GET /floor` is an ordinary FastAPI route of this very app that returns one constant slate. `GET /direct` does
the same the way the app's own hot route does: past FastAPI's dependencies, through the app's serialiser. Neither
reads a parameter, a state or a model, and both are matched first.

    python -m tests.bench.floor SLATE_JSON PORT
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import orjson
import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from app.engine import Query, Slate, SlateItem
from app.main import create_app
from app.routes import DirectRoute
from app.routes.recommend import render
from app.scenes import Scene
from app.schemas import Recommendation
from app.settings import Settings


class Constant:
    """An engine with one answer."""

    ready = True
    scenes: Mapping[str, Scene] = {}
    bundled_scenes = scenes

    def __init__(self, slate: Slate) -> None:
        self.slate = slate
        self.bundle = slate.bundle

    async def recommend(self, query: Query) -> Slate:
        return self.slate


def slate_of(answer: bytes) -> Slate:
    """The slate in an answer of `GET /recommend`."""
    read = orjson.loads(answer)
    items = tuple(SlateItem(item["item_id"], item["score"], tuple(item["sources"])) for item in read["items"])
    return Slate(read["request_id"], read["scene"], items, read["bundle"])


def floor_app(answer: bytes, settings: Settings) -> FastAPI:
    slate = slate_of(answer)
    router = APIRouter(route_class=DirectRoute)

    @router.get("/direct")
    async def direct(_: Request) -> Response:
        return Response(
            render(slate, took_ms=1.234), headers={"X-Request-Id": slate.request_id}, media_type="application/json"
        )

    app = create_app(settings, Constant(slate))
    constant = Recommendation.model_validate_json(answer)

    # Of the same size: FastAPI would write out the fields that were not asked for.
    @app.get("/floor", response_model_exclude_unset=True)
    async def floor() -> Recommendation:
        return constant

    app.router.routes[:0] = [*router.routes, app.router.routes.pop()]
    return app


if __name__ == "__main__":
    uvicorn.run(
        floor_app(Path(sys.argv[1]).read_bytes(), Settings()),
        port=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        server_header=False,
        log_level="warning",
    )
