"""Errors as `application/problem+json` (RFC 9457)."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    field: str
    message: str


class ProblemDocument(BaseModel):
    """What every error response carries."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field(default_factory=list)


class Problem(Exception):
    """An error the caller is told about. Whatever route or middleware raises it, the answer is the same document."""

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Iterable[FieldError] = (),
        *,
        title: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.document = ProblemDocument(
            title=title or HTTPStatus(status).phrase, status=status, detail=detail, errors=list(errors)
        )
        self.headers = headers

    @classmethod
    def of_fields(cls, errors: Iterable[FieldError]) -> "Problem":
        """422 naming every field in `errors`."""
        errors = tuple(errors)
        return cls(422, "; ".join(f"{error.field}: {error.message}" for error in errors), errors)

    def response(self) -> Response:
        return Response(self.document.model_dump_json(), self.document.status, self.headers, MEDIA_TYPE)


def field_errors(errors: Iterable[Mapping[str, Any]], *, skip: int = 0) -> list[FieldError]:
    """Pydantic's errors without the values that caused them; the first `skip` parts of each location are left out."""
    return [
        FieldError(field=".".join(str(part) for part in error["loc"][skip:]) or "body", message=error["msg"])
        for error in errors
    ]


def install(app: FastAPI) -> None:
    """Makes every error of `app` a problem document."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _problem(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, Problem)
    return exc.response()


async def _invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    # Every location begins with where the field was: query, path, body.
    return Problem.of_fields(field_errors(exc.errors(), skip=1)).response()


async def _http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    headers = dict(exc.headers or {})
    if exc.status_code == 405:
        # Starlette names the methods of the first route of this path; all its routes make up the resource.
        routes = (route for route in request.app.routes if isinstance(route, Route) and route.methods)
        same_path = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
        headers["Allow"] = ", ".join(sorted({method for route in same_path for method in route.methods or ()}))
    return Problem(exc.status_code, exc.detail, headers=headers).response()


async def _unexpected(_: Request, exc: Exception) -> Response:
    # Starlette raises `exc` again after this answer, and the server logs it.
    return Problem(500, "The request failed through no fault of its own; the reason is in the log.").response()
