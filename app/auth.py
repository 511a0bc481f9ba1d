"""API keys with scopes."""

import hashlib
from collections.abc import Mapping
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from app.problems import Problem
from app.settings import Scope

# By the first segment of the path; None needs no key. What is not named needs the widest scope, so
# that a forgotten line locks a route and never opens it.
SCOPES: Mapping[str, Scope | None] = {
    "admin": Scope.ADMIN,
    "docs": None,
    "events": Scope.EVENTS,
    "health": None,
    "metrics": Scope.METRICS,
    "openapi.json": None,
    "recommend": Scope.RECOMMEND,
    "redoc": None,
    "users": Scope.USERS,
}


def scope_of(path: str) -> Scope | None:
    return SCOPES.get(path.split("/", 2)[1] if path.startswith("/") else "", Scope.ADMIN)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Authentication:
    """Lets a request pass whose key has the scope of its path: `Authorization: Bearer <key>` or `X-API-Key: <key>`."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, frozenset[Scope]]) -> None:
        self._app = app
        # Looking up a digest takes the same time however much of a key was guessed right.
        self._scopes = {_digest(key.encode()): scopes for key, scopes in keys.items()}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._refusal(scope)):
            await problem.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: ASGIScope) -> Problem | None:
        needed = scope_of(scope["path"])
        if needed is None:
            return None
        key = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            elif name == b"x-api-key":
                key = value
        scopes = self._scopes.get(_digest(key))
        if scopes is None:
            return Problem(401, "A known API key is required.", headers={"WWW-Authenticate": "Bearer"})
        if needed not in scopes:
            return Problem(403, f"This API key lacks the scope {needed}.")
        return None
