"""`GET /recommend` over HTTP: what is asked reaches the engine, what it answers reaches the caller."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from app.engine import Overloaded, Slate, SlateItem, UnknownScene, Where
from app.main import create_app
from app.routes.recommend import render
from app.schemas import Recommendation
from app.settings import Settings
from tests.engines import ConstantEngine
from tests.live import serving
from tests.tiny import item_ids, publish_tiny


@contextmanager
def asking(engine: ConstantEngine, valkey_url: str, home: Path) -> Iterator[httpx.Client]:
    with serving(create_app(Settings(redis_url=valkey_url, home=home, deadline_ms=150), engine)) as client:
        yield client


def test_the_whole_query_reaches_the_engine(valkey_url: str, tmp_path: Path) -> None:
    engine = ConstantEngine()
    with asking(engine, valkey_url, tmp_path) as client:
        before = time.monotonic()
        asked: dict[str, Any] = {
            "user_id": "Zoë & co",
            "session_id": "s/1",
            "scene": "detail",
            "limit": 7,
            "item_id": ["85123A", "22423"],
            "category": ["Home > Lamps"],
            "brand": ["acme", "bolt"],
            "price_min": 1.5,
            "price_max": 30,
            "in_stock": True,
            "exclude": ["x,y", "z"],
            "fields": ["title,price", "brand"],
            "explain": 1,
        }
        assert client.get("/recommend", params=asked).status_code == 200
        after = time.monotonic()
        assert client.get("/recommend").status_code == 200
    query, stranger = engine.asked
    assert (query.user, query.session, query.scene, query.limit) == ("Zoë & co", "s/1", "detail", 7)
    assert query.anchors == ("85123A", "22423")
    assert query.where == Where(("Home > Lamps",), ("acme", "bolt"), 1.5, 30.0, True, ("x,y", "z"))
    assert query.fields == ("title", "price", "brand")
    assert query.explain
    assert before + 0.15 <= query.deadline <= after + 0.15
    assert (stranger.user, stranger.session, stranger.scene, stranger.limit) == (None, None, "home", 20)
    assert not stranger.where
    assert query.request_id != stranger.request_id


def test_the_whole_slate_reaches_the_caller(valkey_url: str, tmp_path: Path) -> None:
    items = (
        SlateItem("é", 0.75, ("history", "popular"), "you bought it", {"title": "Lamp", "price": 3.5}),
        SlateItem("b", 0.5, ("popular",)),
    )
    with asking(ConstantEngine(*items, degraded=("rank",)), valkey_url, tmp_path) as client:
        response = client.get("/recommend")
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == body.pop("request_id")
    assert body.pop("took_ms") > 0
    assert body == {
        "scene": "home",
        "items": [
            {
                "item_id": "é",
                "score": 0.75,
                "position": 1,
                "sources": ["history", "popular"],
                "reason": "you bought it",
                "attributes": {"title": "Lamp", "price": 3.5},
            },
            {"item_id": "b", "score": 0.5, "position": 2, "sources": ["popular"]},
        ],
        "bundle": ConstantEngine.bundle,
        "variant": None,
        "degraded": ["rank"],
    }


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ITEMS = st.builds(
    SlateItem,
    item_id=TEXT,
    score=st.floats(allow_nan=False, allow_infinity=False),
    sources=st.lists(TEXT, max_size=3).map(tuple),
    reason=st.none() | TEXT,
    attributes=st.none() | st.dictionaries(TEXT, st.none() | TEXT | st.integers(-(2**53), 2**53) | st.lists(TEXT)),
)
SLATES = st.builds(
    Slate,
    request_id=TEXT,
    scene=TEXT,
    items=st.lists(ITEMS, max_size=5).map(tuple),
    bundle=TEXT,
    variant=st.none() | TEXT,
    degraded=st.lists(TEXT, max_size=2).map(tuple),
)


@given(SLATES)
def test_every_slate_is_written_as_documented(slate: Slate) -> None:
    written = render(slate, took_ms=1.25)
    read = Recommendation.model_validate_json(written, strict=True)
    assert json.loads(read.model_dump_json(exclude_unset=True)) == json.loads(written)
    assert (read.request_id, read.scene, read.bundle, read.variant, read.took_ms) == (
        slate.request_id,
        slate.scene,
        slate.bundle,
        slate.variant,
        1.25,
    )
    assert tuple(read.degraded) == slate.degraded
    assert [item.position for item in read.items] == list(range(1, len(slate.items) + 1))
    for item, of in zip(read.items, slate.items, strict=True):
        assert (item.item_id, item.score, tuple(item.sources)) == (of.item_id, of.score, of.sources)
        assert (item.reason, item.attributes) == (of.reason, of.attributes)


def test_what_cannot_be_is_a_problem_and_reaches_no_engine(valkey_url: str, tmp_path: Path) -> None:
    engine = ConstantEngine()
    with asking(engine, valkey_url, tmp_path) as client:
        for query_string, field in {
            "limit=0": "limit",
            "user_id=" + "a" * 257: "user_id",
            "user_id=%ff": "user_id",
            "unheard_of=1": "unheard_of",
            "price_min=nan": "price_min",
            "price_min=2&price_max=1": "price_max",
        }.items():
            response = client.get(f"/recommend?{query_string}")
            assert response.status_code == 422, query_string
            assert response.headers["content-type"] == "application/problem+json"
            assert [error["field"] for error in response.json()["errors"]] == [field]
        assert client.post("/recommend").status_code == 405
    assert not engine.asked


def test_an_unknown_scene_is_answered_with_the_known_ones(valkey_url: str, tmp_path: Path) -> None:
    with asking(ConstantEngine(fault=UnknownScene("x", ("home", "cart"))), valkey_url, tmp_path) as client:
        response = client.get("/recommend", params={"scene": "x"})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["field"] == "scene"
    assert "home, cart" in error["message"]


def test_an_overloaded_engine_says_when_to_come_back(valkey_url: str, tmp_path: Path) -> None:
    with asking(ConstantEngine(fault=Overloaded(1.2)), valkey_url, tmp_path) as client:
        response = client.get("/recommend")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["title"] == "Service Unavailable"


def test_a_degraded_answer_is_counted_by_stage(valkey_url: str, tmp_path: Path) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("millirec_degraded_total", {"stage": "recall:towers"}) or 0

    before = counted()
    with asking(ConstantEngine(degraded=("state", "recall:towers")), valkey_url, tmp_path) as client:
        client.get("/recommend")
        client.get("/recommend")
    assert counted() == before + 2


def test_what_was_shown_is_remembered_under_the_request_id(
    valkey: redis.Redis, valkey_url: str, tmp_path: Path
) -> None:
    with asking(ConstantEngine(SlateItem("a", 1.0, ()), SlateItem("b", 0.5, ())), valkey_url, tmp_path) as client:
        shown = client.get("/recommend", params={"user_id": "u"}).json()["request_id"]
        # Leaving writes what still waits.
    impressions: Any = valkey.xrange("millirec:impressions")
    ((_, impression),) = impressions
    assert impression[b"request_id"].decode() == shown
    assert json.loads(impression[b"items"]) == ["a", "b"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    publish_tiny(root)
    return root


def test_real_slates_for_anybody(valkey_url: str, tmp_path: Path, bundles: Path) -> None:
    settings = Settings(redis_url=valkey_url, home=tmp_path, bundles=bundles)
    with serving(create_app(settings)) as client:
        for asked in ({}, {"user_id": "new"}, {"session_id": "new"}, {"scene": "detail", "item_id": "no-such-item"}):
            response = client.get("/recommend", params={"limit": 5, **asked})
            assert response.status_code == 200
            body = response.json()
            assert len(body["items"]) == 5
            assert body["degraded"] == []
        nowhere = client.get("/recommend", params={"category": "no such category"})
        assert (nowhere.status_code, nowhere.json()["items"]) == (200, [])
        few = client.get("/recommend", params={"brand": "acme", "price_max": 3, "fields": "price", "explain": True})
        assert {item["item_id"] for item in few.json()["items"]} == {"a0", "a1", "a2"}
        assert {item["attributes"]["price"] for item in few.json()["items"]} == {1, 2, 3}
        unknown = client.get("/recommend", params={"scene": "nowhere"})
        assert unknown.status_code == 422
        assert "home" in unknown.json()["detail"]


def test_an_event_changes_the_very_next_answer(valkey_url: str, tmp_path: Path, bundles: Path) -> None:
    settings = Settings(redis_url=valkey_url, home=tmp_path, bundles=bundles)
    with serving(create_app(settings)) as client:
        first = client.get("/recommend", params={"user_id": "u"}).json()["items"][0]["item_id"]
        event = {"type": "hide", "user_id": "u", "item_id": first}
        assert client.post("/events", json=event).json()["accepted"] == 1
        assert first not in [item["item_id"] for item in client.get("/recommend?user_id=u").json()["items"]]


def test_without_redis_the_answer_comes_all_the_same(tmp_path: Path, bundles: Path) -> None:
    settings = Settings(redis_url="redis://127.0.0.1:1", home=tmp_path, bundles=bundles)
    with serving(create_app(settings)) as client:
        response = client.get("/recommend", params={"user_id": "u"})
    assert response.status_code == 200
    assert response.json()["degraded"] == ["state"]
    assert {item["item_id"] for item in response.json()["items"]} <= set(item_ids())
