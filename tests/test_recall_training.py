"""The loop that everything learned in epochs is trained by."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from typer.testing import CliRunner

from app.__main__ import cli
from app.bundle import Bundle, current, open_bundle
from models.data import DataError, Tables
from models.data.simulator import simulate
from models.recall import (
    Interactions,
    Vectors,
    gru4rec,
    lightgcn,
    mf,
    sasrec,
    sequences,
    streaming,
    training,
    two_tower,
)
from models.recall.training import Board, Run
from models.train import train
from tests.sequences import HISTORY, circle, small_steps


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    with small_steps():
        # Epochs that end in the midst of a pass.
        monkeypatch.setattr(sequences, "FEWEST_STEPS", 5)
        monkeypatch.setattr(sequences, "MOST_STEPS", 5)
        monkeypatch.setattr(sasrec, "EPOCHS", 5)
        monkeypatch.setattr(gru4rec, "EPOCHS", 5)
        monkeypatch.setattr(two_tower, "MOST_EPOCHS", 5)
        monkeypatch.setattr(two_tower, "EPOCH", 500)
        yield


Fit = Callable[..., Vectors]


def towers(past: Interactions, *, seed: int = 0, run: Run = Run()) -> Vectors:
    content = np.random.default_rng(0).normal(size=(past.n_items, 8)).astype(np.float32)
    return two_tower.fit(past, features=content, profiles=[{}] * 200, history=HISTORY, seed=seed, run=run)


def attention(past: Interactions, *, seed: int = 0, run: Run = Run()) -> Vectors:
    return sasrec.fit(past, history=HISTORY, seed=seed, run=run)


def recurrence(past: Interactions, *, seed: int = 0, run: Run = Run()) -> Vectors:
    return gru4rec.fit(past, history=HISTORY, seed=seed, run=run)


def graph(past: Interactions, *, seed: int = 0, run: Run = Run()) -> Vectors:
    return lightgcn.fit(past, seed=seed, run=run)


def pairwise(past: Interactions, *, seed: int = 0, run: Run = Run()) -> Vectors:
    return mf.fit_bpr(past, epochs=5, seed=seed, run=run)


learned = pytest.mark.parametrize("fit", [attention, recurrence, towers, graph, pairwise])


class Killed(Exception):
    pass


def killed_after(epochs: int) -> Callable[[int, float, float], None]:
    def on_epoch(epoch: int, train: float, valid: float) -> None:
        if epoch + 1 == epochs:
            raise Killed

    return on_epoch


def same(one: Vectors, other: Vectors) -> bool:
    states = [vectors.encoder.state_dict() if vectors.encoder else {} for vectors in (one, other)]
    return (
        np.array_equal(one.items, other.items)
        and np.array_equal(one.losses, other.losses, equal_nan=True)
        and (one.inputs is None or np.array_equal(one.inputs, other.inputs))
        and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    )


@learned
@pytest.mark.parametrize(("epochs", "part"), [(1, 2**21), (2, 2**21), (2, 600), (4, 600)])
def test_what_was_killed_goes_on_as_if_nothing_had_happened(
    fit: Fit, epochs: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PART", part)
    run = Run(checkpoints=tmp_path, name="window-1/it")
    with pytest.raises(Killed):
        fit(circle(200), run=run.of("", killed_after(epochs)))
    assert [file.name for file in run.standing()] == ["it.checkpoint"]
    told: list[tuple[int, float, float]] = []
    resumed, whole = fit(circle(200), run=run.of("", lambda *epoch: told.append(epoch))), fit(circle(200))
    assert len(whole.losses) > epochs
    assert same(resumed, whole)
    np.testing.assert_equal(told, [(epoch, *losses) for epoch, losses in enumerate(whole.losses)])


@learned
def test_what_was_finished_is_not_learned_again(fit: Fit, tmp_path: Path) -> None:
    run = Run(checkpoints=tmp_path, name="it")
    whole = fit(circle(200), run=run)
    (file,) = run.standing()
    written = file.stat().st_mtime_ns
    assert same(fit(circle(200), run=run), whole)
    assert file.stat().st_mtime_ns == written


@learned
def test_a_checkpoint_of_something_else_is_refused(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(checkpoints=tmp_path, name="it")
    fit(circle(200), run=run)
    with pytest.raises(DataError, match=r"it\.checkpoint is of other data: nothing goes on from it"):
        fit(circle(199), run=run)
    with pytest.raises(DataError, match="is of other parameters"):
        fit(circle(200), run=run, seed=1)
    monkeypatch.setattr(training, "_code", lambda: "another version")
    with pytest.raises(DataError, match="is of other data and code"):
        fit(circle(199), run=run)


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_damaged_checkpoint_is_refused(size: int, tmp_path: Path) -> None:
    run = Run(checkpoints=tmp_path, name="it")
    attention(circle(200), run=run)
    (file,) = run.standing()
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=r"it\.checkpoint: cannot be read: .+"):
        attention(circle(200), run=run)


def test_where_nothing_can_be_written_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/it\.checkpoint: cannot be written: "):
        attention(circle(200), run=Run(checkpoints=tmp_path / "file", name="it"))
    with pytest.raises(DataError, match="file: File exists"):
        Board(tmp_path / "file")


class Counter(nn.Module):
    """A number that every step adds 1 to."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))


def counted(qualities: list[float], **limits: float) -> tuple[int, training.Losses]:
    """Two steps an epoch, judged by the given qualities; the number kept, and the losses."""
    model, seen = Counter(), iter(qualities)
    losses = training.train(
        model,
        [torch.optim.SGD(model.parameters(), lr=1.0)],
        lambda epoch: range(2),
        lambda batch: -model.number,
        (lambda: (float(model.number), next(seen))) if qualities else None,
        np.random.default_rng(0),
        run=Run(),
        checkpoint=None,
        **{"epochs": 6, "patience": 2, **limits},  # type: ignore[arg-type]
    )
    return int(model.number), losses


@pytest.mark.parametrize(
    ("qualities", "limits", "kept", "epochs"),
    [
        ([1, 2, 3, 4, 5, 6], {}, 12, 6),
        ([1, 3, 2, 2, 9], {}, 4, 4),
        ([1, 3, 2, 4, 3, 3], {}, 8, 6),
        ([1, 3, 2, 4, 3, 3], {"patience": 1}, 4, 3),
        ([1, 1.05, 1.2, 1.2, 1.2], {"margin": 0.1}, 6, 5),
        ([], {"patience": 1}, 12, 6),
    ],
)
def test_the_best_epoch_is_kept(qualities: list[float], limits: dict[str, float], kept: int, epochs: int) -> None:
    number, losses = counted(qualities, **limits)
    assert (number, len(losses)) == (kept, epochs)
    assert [taught for taught, _ in losses] == [-2.0 * epoch - 0.5 for epoch in range(epochs)]
    assert [tested for _, tested in losses] == (
        [2.0 * epoch + 2 for epoch in range(epochs)] if qualities else pytest.approx([math.nan] * 6, nan_ok=True)
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_told(tmp_path: Path) -> None:
    board = Board(tmp_path)
    fitted = attention(circle(200), run=Run(board=board).of("window-1").of("sasrec"))
    board.close()
    found = scalars(tmp_path)
    assert found.keys() == {"window-1/sasrec/training loss", "window-1/sasrec/validation loss"}
    for column, told in enumerate(found.values()):
        assert told == [(epoch, pytest.approx(pair[column])) for epoch, pair in enumerate(fitted.losses)]


@pytest.fixture(scope="module")
def shop() -> Tables:
    return simulate(items=60, users=80, events=2_500, days=20)


def files_of(bundle: Bundle) -> dict[str, str]:
    # Exported programs hold the time of writing.
    return {name: spec.sha256 for name, spec in bundle.manifest.files.items() if not name.endswith(".pt2")}


@pytest.mark.slow
def test_a_whole_training_goes_on_where_it_was(shop: Tables, tmp_path: Path) -> None:
    models, run = ("two_tower", "sasrec", "popularity"), Run(checkpoints=tmp_path / "kept")

    def stop(step: str) -> None:
        if step.startswith("final fit: sasrec, epoch 1"):
            raise Killed

    with pytest.raises(Killed):
        train(shop, tmp_path / "bundles", windows=1, models=models, run=run, progress=stop)
    kept = [str(file.relative_to(tmp_path)) for file in run.standing()]
    assert kept == [f"kept/{part}/{name}.checkpoint" for part in ("final", "window-1") for name in models[1::-1]]
    resumed, _ = train(shop, tmp_path / "bundles", windows=1, models=models, run=run)
    assert run.standing() == []
    whole, _ = train(shop, tmp_path / "bundles", windows=1, models=models)
    assert files_of(resumed) == files_of(whole)
    assert resumed.manifest.metrics == whole.manifest.metrics


@pytest.mark.slow
def test_nothing_is_resumed_silently(shop: Tables, tmp_path: Path) -> None:
    shop.events.write_parquet(tmp_path / "events.parquet")
    named = ["--events", str(tmp_path / "events.parquet"), "--bundles", str(tmp_path / "bundles"), "--device", "cpu"]
    named += ["--windows", "1", "--models", "sasrec,popularity"]
    kept, board = tmp_path / "kept", tmp_path / "board"

    def said(*options: str) -> str:
        ended = CliRunner().invoke(cli, ["train", *named, *options])
        assert ended.exit_code in (0, 2), ended.exception
        return ended.stderr.splitlines()[-1]

    assert said("--resume") == "millirec: --resume goes on from the folder of --checkpoints, and none is named"
    (kept / "final").mkdir(parents=True)
    (kept / "final" / "sasrec.checkpoint").write_bytes(b"")
    with_kept = ("--checkpoints", str(kept))
    assert said(*with_kept) == (f"millirec: {kept} holds checkpoints: go on from them with --resume, or remove them")
    assert said(*with_kept, "--resume").startswith(f"millirec: {kept}/final/sasrec.checkpoint: cannot be read: ")
    (kept / "final" / "sasrec.checkpoint").unlink()
    said(*with_kept, "--resume", "--tensorboard", str(board))
    bundle = open_bundle(tmp_path / "bundles" / str(current(tmp_path / "bundles")))
    found, losses = scalars(board), bundle.manifest.metrics["losses"]
    for tag, name in {"final/sasrec": "sasrec", "ranker-home": "ranker home"}.items():
        assert found[f"{tag}/training loss"] == [(n, pytest.approx(pair[0])) for n, pair in enumerate(losses[name])]
        assert found[f"{tag}/validation loss"] == [(n, pytest.approx(pair[1])) for n, pair in enumerate(losses[name])]
    assert {
        f"{part}/{name}/seconds" for part in ("window-1", "final") for name in ("sasrec", "popularity")
    } < found.keys()
