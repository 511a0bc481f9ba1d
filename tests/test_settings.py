from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Scope, Settings

KEY = "0123456789abcdef"


def test_defaults_stand_together() -> None:
    settings = Settings()
    assert settings.home == Path.home() / ".millirec"
    assert settings.bundles.parent == settings.spool_path.parent == settings.home
    assert settings.redis_url is None
    assert not settings.api_keys


def test_variables_set_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLIREC_HOME", str(tmp_path))
    monkeypatch.setenv("MILLIREC_DEADLINE_MS", "75")
    monkeypatch.setenv("MILLIREC_REDIS_URL", "")
    monkeypatch.setenv("MILLIREC_API_KEYS", f'{{"{KEY}": ["recommend", "metrics"]}}')
    settings = Settings()
    assert settings.bundles == tmp_path / "bundles"
    assert settings.deadline_ms == 75
    assert settings.redis_url is None
    assert settings.api_keys == {KEY: {Scope.RECOMMEND, Scope.METRICS}}


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLIREC_HOME", "~/shop")
    monkeypatch.setenv("MILLIREC_BUNDLES", "here")
    settings = Settings()
    assert settings.home == Path.home() / "shop"
    assert settings.bundles == Path.cwd() / "here"


def test_nothing_can_be_changed_afterwards() -> None:
    settings = Settings(api_keys={KEY: frozenset({Scope.ADMIN})})
    with pytest.raises(ValidationError, match="frozen"):
        settings.deadline_ms = 1
    with pytest.raises(TypeError):
        settings.api_keys["another key, longer than 16"] = frozenset()  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_url", "http://localhost"),
        ("device", "abacus"),
        ("max_batch", "0"),
        ("dedupe_window_s", "0"),
        ("deadline_ms", "soon"),
        ("bundle_poll_s", "0"),
        ("spool_max_bytes", "-1"),
        ("api_keys", "secret"),
        ("api_keys", '{"short": ["recommend"]}'),
        ("api_keys", f'{{"{KEY}": ["everything"]}}'),
    ],
)
def test_a_value_without_sense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"MILLIREC_{name.upper()}", value)
    with pytest.raises(Exception, match=name):
        Settings()


def test_secrets_are_not_shown() -> None:
    shown = repr(Settings(redis_url="redis://:hunter2@localhost/0", api_keys={KEY: frozenset({Scope.ADMIN})}))
    assert "hunter2" not in shown
    assert KEY not in shown


def test_every_setting_says_what_it_sets_and_in_which_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if field.annotation is float or name.endswith(("timeout", "deadline", "window_s", "bytes")):
            assert name.rpartition("_")[2] in {"s", "ms", "bytes"}, name
