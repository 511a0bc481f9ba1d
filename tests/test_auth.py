"""Keys open what their scopes say, and nothing else is open."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Route

from app.auth import SCOPES, is_loopback, scope_of
from app.main import create_app
from app.settings import Scope, Settings
from tests.engines import ConstantEngine
from tests.live import serving

KEYS = {scope: f"key-with-the-scope-{scope}" for scope in Scope}
REQUESTS = {
    Scope.RECOMMEND: ("GET", "/recommend", 200),
    Scope.EVENTS: ("POST", "/events", 400),
    Scope.USERS: ("PUT", "/users/u", 422),
    Scope.METRICS: ("GET", "/metrics", 200),
    Scope.ADMIN: ("GET", "/admin/scenes", 200),
}


@pytest.fixture
def app(valkey_url: str, tmp_path: Path) -> FastAPI:
    keys = {key: frozenset({scope}) for scope, key in KEYS.items()}
    return create_app(Settings(redis_url=valkey_url, home=tmp_path, api_keys=keys), ConstantEngine())


@pytest.fixture
def client(app: FastAPI) -> Iterator[httpx.Client]:
    with serving(app) as client:
        yield client


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_a_key_opens_what_its_scope_names(client: httpx.Client, header: str) -> None:
    for needed, (method, path, status) in REQUESTS.items():
        for scope, key in KEYS.items():
            value = f"Bearer {key}" if header == "Authorization" else key
            response = client.request(method, path, headers={header: value})
            assert response.status_code == (status if scope is needed else 403), (path, scope)
            if scope is not needed:
                assert needed in response.json()["detail"]
                assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "key-with-the-scope-of-nobody"},
        {"X-API-Key": KEYS[Scope.RECOMMEND][:-1]},
        {"X-API-Key": KEYS[Scope.RECOMMEND].upper()},
        {"Authorization": KEYS[Scope.RECOMMEND]},
        {"Authorization": f"Basic {KEYS[Scope.RECOMMEND]}"},
        {"Authorization": "Bearer"},
    ],
)
def test_no_known_key_no_answer(client: httpx.Client, headers: dict[str, str]) -> None:
    for method, path, _ in [*REQUESTS.values(), ("GET", "/nowhere", 404), ("GET", "//recommend", 404)]:
        response = client.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"


def test_health_and_documentation_need_no_key(client: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready", "/openapi.json", "/docs"):
        assert client.get(path).status_code == 200, path


def test_what_is_not_named_needs_the_widest_scope(client: httpx.Client) -> None:
    assert scope_of("/nowhere") is scope_of("/") is scope_of("") is scope_of("//events") is Scope.ADMIN
    assert client.get("/nowhere", headers={"X-API-Key": KEYS[Scope.ADMIN]}).status_code == 404


def test_every_route_is_named(app: FastAPI) -> None:
    first = {route.path.split("/")[1] for route in app.routes if isinstance(route, Route)}
    assert first == set(SCOPES)


def test_the_document_says_which_scope_opens_a_route(app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        scope = scope_of(path)
        for operation in operations.values():
            assert operation.get("security") == ([{"bearer": [scope]}, {"key": [scope]}] if scope else None), path


def test_without_keys_everything_is_open(valkey_url: str, tmp_path: Path) -> None:
    app = create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())
    with serving(app) as client:
        for method, path, status in REQUESTS.values():
            assert client.request(method, path).status_code == status
    assert all("security" not in each for paths in app.openapi()["paths"].values() for each in paths.values())


@given(st.ip_addresses())
def test_loopback_is_what_no_other_machine_reaches(address: object) -> None:
    assert is_loopback(str(address)) == (str(address).startswith("127.") or str(address) == "::1")


def test_names_are_not_loopback() -> None:
    assert is_loopback("localhost")
    assert is_loopback("127.255.0.1")
    assert not is_loopback("example.org")
    assert not is_loopback("localhost.example.org")
    assert not is_loopback("")
    assert not is_loopback("0.0.0.0")
