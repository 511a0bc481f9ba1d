from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.bundle import SCENES, scene_changes
from app.main import create_app
from app.scenes import SceneChange, SourceChange
from app.settings import Settings
from tests.engines import ConstantEngine
from tests.live import serving


@pytest.fixture
def client(valkey_url: str, tmp_path: Path) -> Iterator[httpx.Client]:
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        yield client


def test_scenes_are_shown(client: httpx.Client) -> None:
    shown = client.get("/admin/scenes").json()
    assert set(shown) == {"home", "detail"}
    assert shown["home"]["sources"] == [
        {"name": "popular", "k": 100, "weight": 1.0},
        {"name": "item_cf", "k": 50, "weight": 1.0},
    ]


def test_a_change_is_kept_until_it_is_taken_back(client: httpx.Client, tmp_path: Path) -> None:
    for scene, weight in (("home", 0.5), ("detail", 2), ("home", 0.25)):
        response = client.put(
            f"/admin/scenes/{scene}", json={"fusion": "weighted", "sources": {"item_cf": {"weight": weight}}}
        )
        assert response.status_code == 200
        assert response.json()["fusion"] == "weighted"
        assert {"name": "item_cf", "k": 50 if scene == "home" else 100, "weight": weight} in response.json()["sources"]
    kept = scene_changes(tmp_path / "bundles")
    assert kept == {
        "home": SceneChange(fusion="weighted", sources={"item_cf": SourceChange(weight=0.25)}),
        "detail": SceneChange(fusion="weighted", sources={"item_cf": SourceChange(weight=2)}),
    }
    for _ in range(2):
        assert client.delete("/admin/scenes/home").status_code == 204
        assert set(scene_changes(tmp_path / "bundles")) == {"detail"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"fusion": "magic"}, "fusion"),
        ({"fusion": "learned"}, "fusion"),
        ({"sources": {"oracle": {"weight": 1}}}, "sources.oracle"),
        ({"sources": {"item_cf": {"weight": -1}}}, "sources.item_cf.weight"),
        ({"sources": {"item_cf": {"k": 0}}}, "sources.item_cf.k"),
        ({"sources": {"item_cf": {"weight": 0}, "popular": {"weight": 0}}}, "sources"),
        ({"weights": {}}, "weights"),
    ],
)
def test_a_change_that_cannot_be_names_the_field(
    client: httpx.Client, tmp_path: Path, body: dict[str, object], field: str
) -> None:
    response = client.put("/admin/scenes/home", json=body)
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["errors"]] == [field]
    assert not (tmp_path / "bundles" / SCENES).exists()


def test_an_unknown_scene_is_not_found(client: httpx.Client) -> None:
    for response in (client.put("/admin/scenes/attic", json={}), client.delete("/admin/scenes/attic")):
        assert response.status_code == 404
        assert "home, detail" in response.json()["detail"]


def test_a_file_that_says_something_else_is_not_written_over(client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / SCENES).write_text('{"home": {"fusion": "magic"}}')
    response = client.put("/admin/scenes/home", json={})
    assert response.status_code == 503
    assert "SCENES.json: home.fusion: Input should be" in response.json()["detail"]
    assert (tmp_path / "bundles" / SCENES).read_text() == '{"home": {"fusion": "magic"}}'
