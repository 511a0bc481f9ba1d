"""User state, the event log and the impression log in Redis.

Keys, all behind the prefix: `u:<user>` and `s:<session>`, a hash of `e` (EVENT records), `x` (EXCLUSION records) and
`p` (profile, JSON); `d:<event id>`, while a repeat is refused; the streams `log` and `impressions`.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic_core import from_json, to_json
from redis.exceptions import NoScriptError

from app.engine import Query, Slate
from app.state.events import EVENT, EXCLUDES, EXCLUSION, EventType, UserState, join
from app.state.link import Link, StateUnavailable, pack

_SCRIPT = files("app.state").joinpath("fold.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()
_KINDS = bytes(EXCLUDES.get(kind, 0) for kind in EventType)

_WRITE_S = 2.0
"""For appends: a caller waits rather here than in the spool, and a synced log on a slow disk takes its time."""
_SESSION_MS = 30 * 24 * 3600 * 1000
_PAGE = 1000

_EMPTY = UserState()


class Entry(NamedTuple):
    """One accepted event, ready to be written."""

    subject: str
    """Whose state it changes, see `subject`."""
    event_id: str
    near: tuple[str, ...]
    """Other event ids of which any, already seen, makes this one a duplicate."""
    payload: bytes
    """The event as `POST /events` would take it again, with its id and timestamp."""
    records: bytes
    """EVENT records to fold; none for an event that says nothing of the shopper."""


def subject(user: str | None, session: str | None) -> str:
    """Name of whose event it is: the user's if there is one, else the session's. One of the two must be given."""
    return f"u:{user}" if user is not None else f"s:{session}"


class Store:
    """Redis as the rest of the service sees it. Every method raises `StateUnavailable` when Redis does not answer."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "millirec:",
        timeout_ms: int = 50,
        window: int = 256,
        dedupe_window_s: int = 86_400,
        impressions_maxlen: int = 100_000,
    ) -> None:
        self._link = Link(url)
        self._prefix = prefix
        self._timeout_s = timeout_ms / 1000
        self._window = window
        self._dedupe_ms = dedupe_window_s * 1000
        self._impressions_maxlen = impressions_maxlen

    async def __aenter__(self) -> Self:
        await self._link.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._link.__aexit__(*error)

    async def ping(self) -> bool:
        """Whether Redis answers."""
        try:
            await self._call("PING")
        except StateUnavailable:
            return False
        return True

    async def read(self, subjects: Sequence[tuple[str | None, str | None]]) -> list[UserState]:
        """The state of each (user, session) in one round trip; both given, the two are joined."""
        prefix = self._prefix.encode()
        commands = []
        for user, session in subjects:
            if user is not None:
                commands.append(_read(prefix + b"u:" + user.encode()))
            if session is not None:
                commands.append(_read(prefix + b"s:" + session.encode()))
        if not commands:
            return [_EMPTY] * len(subjects)
        replies = iter(_checked(await self._link.call(b"".join(commands), len(commands), self._timeout_s)))
        states = []
        for user, session in subjects:
            of_user = self._state(next(replies)) if user is not None else _EMPTY
            of_session = self._state(next(replies)) if session is not None else _EMPTY
            if of_session is _EMPTY:
                states.append(of_user)
            elif of_user is _EMPTY:
                states.append(of_session)
            else:
                states.append(join((of_user, of_session), self._window))
        return states

    async def append(self, entries: Sequence[Entry]) -> list[bool | None]:
        """Logs and folds each entry once. Per entry: True if new, False if seen before, None if Redis refused it."""
        groups: dict[str, list[int]] = {}
        for i, entry in enumerate(entries):
            groups.setdefault(entry.subject, []).append(i)
        replies = await self._evaluate(
            [self._fold(name, [entries[i] for i in group]) for name, group in groups.items()]
        )
        taken: list[bool | None] = [None] * len(entries)
        for group, reply in zip(groups.values(), replies, strict=True):
            if isinstance(reply, bytes):
                for i, new in zip(group, reply, strict=True):
                    taken[i] = new == b"1"[0]
        return taken

    async def put_profile(self, user: str, attributes: Mapping[str, str]) -> None:
        """Replaces the user's attributes."""
        await self._call("HSET", f"{self._prefix}u:{user}", "p", to_json(attributes))

    async def forget(self, user: str) -> None:
        """Erases the user's state, and page by page whatever the event and impression logs hold of them."""
        name = subject(user, None)
        await self._call("UNLINK", self._prefix + name)
        for stream in (f"{self._prefix}log", f"{self._prefix}impressions"):
            after = b"-"
            while page := await self._call("XRANGE", stream, after, "+", "COUNT", _PAGE):
                if theirs := [at for at, (_, of, *_) in page if of == name.encode()]:
                    await self._call("XDEL", stream, *theirs)
                after = b"(" + page[-1][0]

    async def log_slates(self, slates: Sequence[tuple[Query, Slate]]) -> None:
        """Remembers who was shown what, so that a later click finds its list."""
        if not self._impressions_maxlen:
            return
        to = ("XADD", f"{self._prefix}impressions", "MAXLEN", "~", self._impressions_maxlen, "*")
        commands = []
        for query, slate in slates:
            of = "" if query.user is query.session is None else subject(query.user, query.session)
            items = to_json([item.item_id for item in slate.items])
            what = ("request_id", slate.request_id, "scene", slate.scene, "items", items)
            commands.append(pack(*to, "subject", of, *what))
        _checked(await self._link.call(b"".join(commands), len(commands), _WRITE_S))

    async def _call(self, *command: str | bytes | int) -> Any:
        return _checked(await self._link.call(pack(*command), 1, _WRITE_S))[0]

    async def _evaluate(self, commands: Sequence[bytes]) -> list[Any]:
        replies = await self._link.call(b"".join(commands), len(commands), _WRITE_S)
        # A command that found the script is a duplicate now: only those that did not may run again.
        again = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if again:
            await self._call("SCRIPT", "LOAD", _SCRIPT)
            new = await self._link.call(b"".join(commands[i] for i in again), len(again), _WRITE_S)
            for i, reply in zip(again, new, strict=True):
                replies[i] = reply
        return replies

    def _fold(self, name: str, entries: Sequence[Entry]) -> bytes:
        prefix, lifetime_ms = self._prefix, _SESSION_MS if name.startswith("s:") else 0
        keys = [f"{prefix}d:{event_id}" for entry in entries for event_id in (entry.event_id, *entry.near)]
        keys = [prefix + name, f"{prefix}log", *keys]
        arguments = (name, self._window, lifetime_ms, self._dedupe_ms, _KINDS)
        each: list[bytes | int] = []
        for entry in entries:
            each += (1 + len(entry.near), entry.payload, entry.records)
        return pack("EVALSHA", _SHA, len(keys), *keys, *arguments, *each)

    def _state(self, reply: Any) -> UserState:
        events, exclusions, profile = reply
        if events is exclusions is profile is None:
            return _EMPTY
        return UserState(
            _EMPTY.events if events is None else np.frombuffer(events, EVENT)[-self._window :],
            _EMPTY.exclusions if exclusions is None else np.frombuffer(exclusions, EXCLUSION),
            _EMPTY.profile if profile is None else from_json(profile),
        )


def _read(key: bytes) -> bytes:
    return b"*5\r\n$5\r\nHMGET\r\n$%d\r\n%b\r\n$1\r\ne\r\n$1\r\nx\r\n$1\r\np\r\n" % (len(key), key)


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise StateUnavailable(str(reply))
    return replies
