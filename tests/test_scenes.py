"""What operators may change of a scene."""

import pytest
from pydantic import ValidationError

from app.scenes import Scene, SceneChange, SceneError, SceneSource, changed

SCENE = Scene(
    sources=(SceneSource(name="ease", k=80, weight=0.7), SceneSource(name="popular", k=40)),
    fusion="learned",
    ranker="home",
    repeats=True,
)


def change(**fields: object) -> SceneChange:
    return SceneChange.model_validate(fields)


def test_only_what_is_named_changes() -> None:
    assert changed(SCENE, change()) == SCENE
    found = changed(SCENE, change(fusion="weighted", sources={"popular": {"weight": 0}, "ease": {"k": 5}}))
    assert found == Scene(
        sources=(SceneSource(name="ease", k=5, weight=0.7), SceneSource(name="popular", k=40, weight=0)),
        fusion="weighted",
        ranker="home",
        repeats=True,
    )


def test_a_source_that_is_not_there_is_passed_over() -> None:
    assert changed(SCENE, change(sources={"gone": {"weight": 2}})) == SCENE


@pytest.mark.parametrize(
    ("scene", "fields", "field"),
    [
        (SCENE.model_copy(update={"fusion": "voting", "ranker": None}), {"fusion": "learned"}, "fusion"),
        (SCENE, {"sources": {"ease": {"weight": 0}, "popular": {"weight": 0}}}, "sources"),
    ],
)
def test_what_no_scene_can_be_is_refused(scene: Scene, fields: dict[str, object], field: str) -> None:
    with pytest.raises(SceneError) as raised:
        changed(scene, change(**fields))
    assert raised.value.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "magic"},
        {"ranker": "other"},
        {"sources": {"ease": {"weight": -1}}},
        {"sources": {"ease": {"weight": float("inf")}}},
        {"sources": {"ease": {"k": 0}}},
        {"sources": {"ease": {"k": 1001}}},
        {"sources": {"ease": {"name": "x"}}},
    ],
)
def test_a_change_is_validated(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        change(**fields)
