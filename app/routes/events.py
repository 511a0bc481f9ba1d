"""`POST /events`: what a shopper did, to be known in the very next answer."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from time import time_ns
from typing import Any

from fastapi import APIRouter
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app.problems import FieldError, Problem, field_errors
from app.routes import DirectRoute, state_of
from app.schemas import Event, EventsAnswer, RejectedEvent
from app.state.events import ALIASES, FOLDED, EventType, content_id, packed
from app.state.spool import SpoolFull
from app.state.store import Entry, subject
from app.telemetry import EVENTS

router = APIRouter(route_class=DirectRoute, tags=["events"])

MAX_EVENTS = 1000
"""In one call."""

_SLICE = 100
"""So many at once; a thousand would hold up every recommendation for 20 ms, here and in Redis."""
_RETRY_AFTER_S = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_OLDEST_MS = (datetime(1990, 1, 1, tzinfo=UTC) - _EPOCH) // _MS
_AHEAD_MS = 5 * 60 * 1000
_ECHO_MS = 30_000
"""Two events of equal content, without ids and timestamps, are one that was sent again if they come within this time,
two if they come more than twice this time apart."""

# Enum attributes are slow, and these are needed for each event.
_KINDS = {alias: (kind, kind.name.lower(), kind in FOLDED) for alias, kind in ALIASES.items()}
_ITEMLESS = frozenset({EventType.VIEW_ITEM_LIST, EventType.BEGIN_CHECKOUT, EventType.SEARCH, EventType.OTHER})


class _Rejected(Exception):
    def __init__(self, field: str, error: str) -> None:
        super().__init__(field, error)
        self.field = field
        self.error = error


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    # References inside an operation point into the whole document, where these models are not.
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    return schema


def _request_body() -> dict[str, Any]:
    schema = TypeAdapter(Event).json_schema()
    event = _inlined(schema, schema["$defs"])
    many = {"type": "array", "items": event, "maxItems": MAX_EVENTS}
    wrapped = {"type": "object", "properties": {"events": many}, "required": ["events"]}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"anyOf": [event, many, wrapped]}},
            "application/x-ndjson": {"schema": {"type": "string", "description": "One event a line."}},
        },
    }


@router.post(
    "/events",
    status_code=202,
    summary="What shoppers did",
    response_model=EventsAnswer,
    openapi_extra={"requestBody": _request_body()},
)
async def post_events(request: Request) -> Response:
    state = state_of(request)
    body = await _body(request, state["settings"].events_max_bytes)
    ndjson = "ndjson" in request.headers.get("content-type", "")
    numbered = list(enumerate(_read(body, ndjson)))
    now_ms = time_ns() // 1_000_000
    answer = EventsAnswer(accepted=0, duplicates=0, rejected=[], spooled=0)
    for at in range(0, len(numbered), _SLICE):
        entries, kinds, rejected = _entries(numbered[at : at + _SLICE], now_ms)
        try:
            taken = await state["spool"].append(entries)
        except SpoolFull as full:
            headers = {"Retry-After": str(_RETRY_AFTER_S)}
            raise Problem(503, f"No more events can be kept: {full}.", headers=headers) from None
        for (kind, new), count in Counter(zip(kinds, taken, strict=True)).items():
            EVENTS.labels(kind, "spooled" if new is None else "accepted" if new else "duplicate").inc(count)
        if rejected:
            EVENTS.labels("unknown", "rejected").inc(len(rejected))
        duplicates = taken.count(False)
        answer.accepted += len(taken) - duplicates
        answer.duplicates += duplicates
        answer.rejected += rejected
        answer.spooled += taken.count(None)
    return Response(answer.model_dump_json(), 202, media_type="application/json")


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise Problem(413, f"The body has more than {max_bytes} bytes; send the events in several calls.")
    except ClientDisconnect:
        raise Problem(400, "The body ended early.") from None
    return bytes(body)


def _read(body: bytes, ndjson: bool) -> list[Any]:
    """The events as they came; a line of NDJSON that cannot be read as the exception that says why."""
    if not ndjson:
        try:
            read = from_json(body)
        except ValueError as error:
            first, _, others = body.strip().partition(b"\n")
            if not others or not isinstance(_line(first), dict):
                raise Problem(400, f"The body is not JSON: {error}.") from None
            ndjson = True
    if ndjson:
        lines = [line for line in body.split(b"\n") if line.strip()]
        read = [_line(line) for line in lines[: MAX_EVENTS + 1]]
        if all(isinstance(event, ValueError) for event in read):
            raise Problem(400, f"The body is not NDJSON: {read[0] if read else 'it is empty'}.")
    if isinstance(read, dict):
        read = read["events"] if "events" in read and "type" not in read else [read]
    if not isinstance(read, list):
        message = 'Input should be an event, an array of events, {"events": [...]} or NDJSON'
        raise Problem(400, "The body holds no events.", [FieldError(field="body", message=message)])
    if len(read) > MAX_EVENTS:
        raise Problem(413, f"The body has more than {MAX_EVENTS} events; send them in several calls.")
    return read


def _line(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError as error:
        return error


def _entries(events: Sequence[tuple[int, Any]], now_ms: int) -> tuple[list[Entry], list[str], list[RejectedEvent]]:
    """What to store, the type of each of those for the metrics, and what to refuse."""
    entries, kinds, rejected = [], [], []
    for index, raw in events:
        try:
            if isinstance(raw, ValueError):
                raise _Rejected("body", str(raw))
            kind, entry = _entry(Event.model_validate(raw), now_ms)
        except ValidationError as invalid:
            first = field_errors(invalid.errors(include_url=False, include_context=False, include_input=False))[0]
            rejected.append(RejectedEvent(index=index, field=first.field, error=first.message))
        except _Rejected as refused:
            rejected.append(RejectedEvent(index=index, field=refused.field, error=refused.error))
        else:
            entries.append(entry)
            kinds.append(kind)
    return entries, kinds, rejected


def _entry(event: Event, now_ms: int) -> tuple[str, Entry]:
    # An unknown type is as the caller wrote it in the log, but one in the metrics: there are as many as callers like.
    kind, metric, folded = _KINDS.get(event.type.lower(), (EventType.OTHER, "other", False))
    name = event.type if kind is EventType.OTHER else metric
    if event.user_id is None and event.session_id is None:
        raise _Rejected("user_id", "user_id or session_id is required")
    lines = _lines(event, kind)
    if not lines and kind not in _ITEMLESS:
        raise _Rejected("item_id", f"item_id or items is required for {name}")
    if event.timestamp is None:
        ts_ms = now_ms
    else:
        ts_ms = (event.timestamp - _EPOCH) // _MS
        if ts_ms > now_ms + _AHEAD_MS:
            raise _Rejected("timestamp", "more than 5 minutes in the future")
        if ts_ms < _OLDEST_MS:
            raise _Rejected("timestamp", "before 1990")
    event_id = event.event_id
    near: tuple[str, ...] = ()
    if event_id is None:
        event_id, near = _derived_id(event, name, lines, None if event.timestamp is None else ts_ms, now_ms)
    stored = {field: value for field, value in event.__dict__.items() if value is not None}
    stored |= {"type": name, "event_id": event_id, "timestamp": ts_ms}
    entry = Entry(
        subject=subject(event.user_id, event.session_id),
        event_id=event_id,
        near=near,
        payload=to_json(stored, inf_nan_mode="null"),
        records=packed(event_id, kind, ts_ms, lines) if folded else b"",
    )
    return metric, entry


def _lines(event: Event, kind: EventType) -> list[tuple[str, int, float | None]]:
    if kind is EventType.RATE and event.value is None:
        raise _Rejected("value", "value is required for rate")
    if not event.items:
        return [] if event.item_id is None else [(event.item_id, 1, event.value)]
    if event.item_id is not None:
        raise _Rejected("items", "item_id and items exclude each other")
    if kind is EventType.RATE:
        return [(line.item_id, line.quantity, event.value) for line in event.items]
    return [(line.item_id, line.quantity, line.price) for line in event.items]


def _derived_id(
    event: Event, name: str, lines: list[tuple[str, int, float | None]], ts_ms: int | None, now_ms: int
) -> tuple[str, tuple[str, ...]]:
    """An id from the content, and the ids under which the same content may have come a moment ago."""
    total = None if lines else event.value
    rest = (event.currency, event.request_id, event.position, event.scene, event.query, event.context, total)
    extra = "" if all(value is None for value in rest) else to_json(rest, inf_nan_mode="null").decode()
    content = content_id(name, event.user_id, event.session_id, ts_ms, lines, extra)
    if ts_ms is not None:
        return content, ()
    moment = now_ms // _ECHO_MS
    return f"{content}-{moment}", (f"{content}-{moment - 1}", f"{content}-{moment + 1}")
