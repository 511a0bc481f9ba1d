from pathlib import Path

from app.main import create_app
from app.settings import Settings
from tests.engines import ConstantEngine
from tests.live import serving


def test_ready_means_that_answers_come(valkey_url: str, tmp_path: Path) -> None:
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        response = client.get("/health/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "bundle": ConstantEngine.bundle,
        "scenes": ["home", "detail"],
        "store": "reachable",
        "spooled": 0,
    }


def test_without_a_bundle_it_lives_but_is_not_ready(valkey_url: str, tmp_path: Path) -> None:
    engine = ConstantEngine()
    engine.ready, engine.bundle, engine.scenes = False, None, {}
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), engine)) as client:
        assert client.get("/health/live").status_code == 200
        response = client.get("/health/ready")
    assert response.status_code == 503
    assert (response.json()["status"], response.json()["bundle"]) == ("unready", None)


def test_without_redis_it_is_degraded_and_says_what_waits(tmp_path: Path) -> None:
    with serving(create_app(Settings(redis_url="redis://127.0.0.1:1", home=tmp_path), ConstantEngine())) as client:
        event = {"type": "view_item", "user_id": "u", "item_id": "a"}
        assert client.post("/events", json=event).json()["spooled"] == 1
        response = client.get("/health/ready")
    assert response.status_code == 200
    assert response.json()["status"] == "degraded"
    assert response.json()["store"] == "unreachable"
    assert response.json()["spooled"] == 1


def test_metrics_are_by_route_and_status_and_never_by_what_was_sent(valkey_url: str, tmp_path: Path) -> None:
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        client.get("/recommend?user_id=hunter2")
        client.get("/recommend?limit=0")
        client.get("/hunter2")
        client.put("/users/hunter2", json={})
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for labels in (
        'method="GET",route="/recommend",status="200"',
        'method="GET",route="/recommend",status="422"',
        'method="PUT",route="/users/{user_id}",status="422"',
        'method="",route="unmatched",status="404"',
    ):
        assert f"millirec_request_duration_seconds_count{{{labels}}}" in response.text
    assert f'millirec_bundle_workers{{version="{ConstantEngine.bundle}"}} 1.0' in response.text
    assert "hunter2" not in response.text.lower()
