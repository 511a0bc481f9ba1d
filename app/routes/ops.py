"""What operators and their machines ask: is it up, is it ready, how is it doing."""

from typing import Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from app.routes import state_of
from app.telemetry import exposition

router = APIRouter(tags=["operations"])


class Liveness(BaseModel):
    status: Literal["live"] = "live"


class Readiness(BaseModel):
    status: Literal["ready", "degraded", "unready"]
    bundle: str | None = Field(description="Version of the live bundle; without one nothing can be answered.")
    scenes: list[str]
    store: Literal["reachable", "unreachable"] = Field(description="Unreachable: answers do without user state.")
    spooled: int = Field(description="Events on local disk until the store is back.")


@router.get("/health/live", summary="Whether the process is up")
async def live() -> Liveness:
    return Liveness()


@router.get("/health/ready", summary="Whether recommendations can be asked for", responses={503: {"model": Readiness}})
async def ready(request: Request, response: Response) -> Readiness:
    state = state_of(request)
    engine = state["engine"]
    reachable = await state["store"].ping()
    if not engine.ready:
        response.status_code = 503
    return Readiness(
        status="unready" if not engine.ready else "ready" if reachable else "degraded",
        bundle=engine.bundle,
        scenes=list(engine.scenes),
        store="reachable" if reachable else "unreachable",
        spooled=state["spool"].rows,
    )


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
def metrics() -> Response:
    return Response(exposition(), media_type=CONTENT_TYPE_LATEST)
