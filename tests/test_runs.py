"""The list of bundles, and two of them side by side."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from app.bundle import MANIFEST, Bundle, activate
from models.runs import figures, flat, runs
from tests import damage

ONE, OTHER = "20260101T000000-a", "20260102T000000-b"


@pytest.fixture
def root(tiny: Bundle, tmp_path: Path) -> Path:
    """Two bundles that differ in data, a parameter and a metric; the older one is served."""
    for number, version in enumerate((ONE, OTHER)):
        damage.copy(tiny, tmp_path / version, version)
        damage.manifest(
            tmp_path / version,
            metrics={
                "candidate_recall": {"home": 0.31234567 + 0.1 * number},
                "losses": {"ranker home": [[3.0, 2.5], [2.0, 2.25], [1.0, 9.0]]},
            },
            provenance={
                "data_sha256": "ab"[number] * 64,
                "events": 12345,
                "users": 67,
                "seed": 0,
                "parameters": {"ease": {"l2": 100 + number}, "item_cf": {"k": 32}},
                "code": "0.1.0 [bold]",
                "seconds": {"total": 12.5},
            },
        )
    activate(tmp_path, ONE)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> Sequence[str]:
    runs(list(arguments[1:]) or None, Path(arguments[0]))
    return capsys.readouterr().out.splitlines()


def test_the_list_has_what_the_manifests_say(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, newest, _, oldest, more = shown(capsys, str(root))
    oldest += more
    assert head.split() == "version created data events users items seconds code metrics".split()
    assert OTHER in newest
    assert oldest.split()[:2] == ["*", ONE]
    for word in (
        "a" * 12,
        "12,345",
        "67",
        "40",
        "12.5",
        "0.1.0 [bold]",
        "candidate_recall.home 0.3123",
        "loss.ranker home 2.25",
    ):
        assert word in oldest, word
    assert "*" not in newest
    assert "a" * 13 not in oldest


def test_an_unreadable_bundle_is_listed_as_such(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / OTHER / MANIFEST).write_text("{")
    _, newest, *rest = shown(capsys, str(root))
    assert OTHER in newest
    assert "does not read" in newest
    (oldest,) = [line for line in rest if ONE in line]
    assert "12,345" in oldest


def test_a_bundle_that_records_nothing_is_listed(
    tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage.copy(tiny, tmp_path / ONE, ONE)
    _, only = shown(capsys, str(tmp_path))
    created = tiny.manifest.created_at[:16].split("T")
    assert only.split() == [ONE, *created, "-", "-", "-", "40", "-", "-", "-"]


def test_two_are_compared_and_their_differences_marked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, str(root), ONE, OTHER)
    cells = {" ".join(line.split()) for line in lines}
    assert "≠ parameters: ease.l2 100 101" in cells
    assert "≠ metrics: candidate_recall.home 0.3123 0.4123" in cells
    assert f"≠ data: data_sha256 {'a' * 64} {'b' * 64}" in cells
    assert "data: events 12345 12345" in cells
    assert "metrics: loss.ranker home 2.25 2.25" in cells
    # Parameters that agree are only counted.
    assert not [line for line in cells if "item_cf.k" in line]
    assert [line for line in cells if line.startswith("parameters: ") and line.endswith("alike")]
    assert len([line for line in cells if line.startswith("≠")]) == 3


def test_a_source_that_only_one_has_is_a_difference(
    root: Path, capsys: pytest.CaptureFixture[str], tiny: Bundle
) -> None:
    kept = [source.model_dump(mode="json") for source in tiny.manifest.sources[1:]]
    damage.manifest(root / OTHER, sources=kept)
    cells = {" ".join(line.split()) for line in shown(capsys, str(root), ONE, OTHER)}
    assert "≠ parameters: sources.history.table history.safetensors -" in cells


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((ONE,), "two versions"), ((ONE, "20990101T000000-z"), "no bundle '20990101T000000-z'")],
)
def test_a_wrong_pair_is_refused_in_one_line(root: Path, arguments: Sequence[str], says: str) -> None:
    command = typer.Typer()
    command.command()(runs)
    ended = CliRunner().invoke(command, [*arguments, "--bundles", str(root)], env={"COLUMNS": "400"})
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert says in line


def test_an_empty_root_is_refused(tmp_path: Path) -> None:
    command = typer.Typer()
    command.command()(runs)
    ended = CliRunner().invoke(command, ["--bundles", str(tmp_path)])
    assert ended.exit_code == 2
    assert "no bundle in" in ended.stderr


def test_leaves_have_dotted_names() -> None:
    value = {"a": {"b": 1, "c": [1, 2]}, "d": [{"name": "x", "k": 2}, {"k": 3}], "e": {}, "f": "text", "g": None}
    assert dict(flat(value)) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "d.x.name": "x",
        "d.x.k": "2",
        "d.1.k": "3",
        "e": "{}",
        "f": "text",
        "g": "null",
    }
    assert list(flat({})) == []


def test_of_losses_the_best_on_validation_is_shown() -> None:
    losses = {"a": [[1, 0.5], [1, 0.25], [1, 0.75]], "none": []}
    assert figures({"losses": losses, "x": {"y": 0.123456}}) == {"x": {"y": 0.1235}, "loss": {"a": 0.25}}
    assert figures({}) == {}
