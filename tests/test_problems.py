"""Whatever goes wrong, the answer is a problem document that says what the caller can know."""

import logging
from typing import Annotated

import httpx
import pytest
from fastapi import FastAPI, Query
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app.problems import FieldError, Problem, install
from tests.live import serving


class Order(BaseModel):
    lines: list[int]


def app() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.get("/problem")
    async def problem() -> None:
        raise Problem(503, "Come back later.", headers={"Retry-After": "7"})

    @app.get("/titled")
    async def titled() -> None:
        raise Problem(409, "Two of them.", [FieldError(field="name", message="is taken")], title="Taken")

    @app.get("/http")
    async def http() -> None:
        raise HTTPException(402, "Pay first.", headers={"X-Price": "3"})

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("password is hunter2")

    @app.put("/problem")
    async def put_problem() -> None: ...

    @app.post("/order")
    async def order(order: Order, count: Annotated[int, Query(ge=1)] = 1) -> None: ...

    return app


def document(response: httpx.Response) -> dict[str, object]:
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = response.json()
    assert set(body) == {"type", "title", "status", "detail", "errors"}
    assert body["status"] == response.status_code
    return body


def test_a_problem_is_told_with_its_headers() -> None:
    with serving(app()) as client:
        response = client.get("/problem")
        assert response.headers["retry-after"] == "7"
        body = document(response)
        assert body == {
            "type": "about:blank",
            "title": "Service Unavailable",
            "status": 503,
            "detail": "Come back later.",
            "errors": [],
        }
        body = document(client.get("/titled"))
        assert (body["title"], body["errors"]) == ("Taken", [{"field": "name", "message": "is taken"}])


def test_errors_of_the_framework_are_problems_too() -> None:
    with serving(app()) as client:
        missing = client.get("/nowhere")
        assert missing.status_code == 404
        document(missing)
        wrong_method = client.delete("/problem")
        assert wrong_method.headers["allow"] == "GET, PUT"
        assert document(wrong_method)["title"] == "Method Not Allowed"
        paid = client.get("/http")
        assert paid.headers["x-price"] == "3"
        assert document(paid)["detail"] == "Pay first."


def test_bad_input_names_the_field_and_does_not_repeat_the_value() -> None:
    with serving(app()) as client:
        response = client.post("/order", params={"count": 0}, json={"lines": [1, "secret"]})
        assert response.status_code == 422
        errors = document(response)["errors"]
        assert isinstance(errors, list)
        assert {error["field"] for error in errors} == {"count", "lines.1"}
        assert "secret" not in response.text
        truncated = client.post("/order", content=b'{"lines": [1', headers={"Content-Type": "application/json"})
        assert truncated.status_code == 422
        document(truncated)


def test_an_unexpected_error_is_logged_and_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving(app()) as client, caplog.at_level(logging.ERROR):
        response = client.get("/crash")
        assert response.status_code == 500
        document(response)
        assert "hunter2" not in response.text
        assert "RuntimeError" not in response.text
    assert "hunter2" in caplog.text
