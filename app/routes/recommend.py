"""`GET /recommend`: what the house is built for."""

import math
import random
from collections.abc import Mapping
from time import monotonic

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.engine import Overloaded, Query, Slate, UnknownScene, Where
from app.parameters import openapi_parameters, parse
from app.problems import FieldError, Problem
from app.routes import DirectRoute, state_of
from app.schemas import Recommendation, RecommendParameters
from app.telemetry import DEGRADED

router = APIRouter(route_class=DirectRoute, tags=["recommend"])


@router.get(
    "/recommend",
    summary="What this shopper should see now",
    response_model=Recommendation,
    openapi_extra={"parameters": openapi_parameters(RecommendParameters)},
)
async def recommend(request: Request) -> Response:
    began = monotonic()
    state = state_of(request)
    parameters = parse(request.scope["query_string"], RecommendParameters)
    query = _query(parameters, deadline=began + state["settings"].deadline_ms / 1000)
    try:
        slate = await state["engine"].recommend(query)
    except Overloaded as overloaded:
        retry_after_s = math.ceil(overloaded.retry_after_s)
        raise Problem(503, "Too many requests are waiting.", headers={"Retry-After": str(retry_after_s)}) from None
    except UnknownScene as unknown:
        known = ", ".join(unknown.known)
        raise Problem.of_fields([FieldError(field="scene", message=f"Input should be one of: {known}")]) from None
    for stage in slate.degraded:
        DEGRADED.labels(stage).inc()
    state["impressions"].put(query, slate)
    return Response(
        render(slate, took_ms=round((monotonic() - began) * 1000, 3)),
        headers={"X-Request-Id": slate.request_id},
        media_type="application/json",
    )


def _query(parameters: RecommendParameters, deadline: float) -> Query:
    where = Where(
        category=parameters.category,
        brand=parameters.brand,
        price_min=parameters.price_min,
        price_max=parameters.price_max,
        in_stock=parameters.in_stock,
        exclude=parameters.exclude,
    )
    return Query(
        # Nobody may do anything with it that they could not do without: no need for the kernel's randomness.
        request_id=f"{random.getrandbits(128):032x}",
        user=parameters.user_id,
        session=parameters.session_id,
        scene=parameters.scene,
        limit=parameters.limit,
        anchors=parameters.item_id,
        where=where,
        fields=parameters.fields,
        explain=parameters.explain,
        deadline=deadline,
    )


def render(slate: Slate, took_ms: float) -> bytes:
    """The `Recommendation` of a slate as JSON."""
    return orjson.dumps(
        {
            "request_id": slate.request_id,
            "scene": slate.scene,
            "items": [
                {"item_id": item_id, "score": score, "position": position, "sources": sources}
                if reason is None and attributes is None
                else _detailed(item_id, score, position, sources, reason, attributes)
                for position, (item_id, score, sources, reason, attributes) in enumerate(slate.items, 1)
            ],
            "bundle": slate.bundle,
            "variant": slate.variant,
            "degraded": slate.degraded,
            "took_ms": took_ms,
        }
    )


def _detailed(
    item_id: str,
    score: float,
    position: int,
    sources: tuple[str, ...],
    reason: str | None,
    attributes: Mapping[str, object] | None,
) -> dict[str, object]:
    rendered: dict[str, object] = {"item_id": item_id, "score": score, "position": position, "sources": sources}
    if reason is not None:
        rendered["reason"] = reason
    if attributes is not None:
        rendered["attributes"] = dict(attributes)
    return rendered
