"""What holds for both models of sequences."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from app.bundle import Bundle, BundleError, Draft, VectorSpec, seal
from app.engine import Query
from app.engine.pipeline import Pipeline
from app.engine.program import load_program, save_program
from app.engine.recall import VectorSource
from app.scenes import Scene, SceneSource
from app.state.events import EventType, UserState
from models.recall import STRENGTH, Interactions, Vectors, gru4rec, sasrec, sequences
from models.recall.sequences import Stretches
from models.recall.training import Run
from models.sources import _vectors
from tests import damage
from tests.sequences import DAY_MS, HISTORY, ITEMS, bought, circle, inputs, scores, small_steps
from tests.tiny import NOW_MS, state, write_tiny

models = pytest.mark.parametrize("model", [sasrec, gru4rec])


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_steps():
        yield


@pytest.fixture(scope="module", params=[sasrec, gru4rec])
def fitted(request: pytest.FixtureRequest) -> Vectors:
    found: Vectors = request.param.fit(circle(), history=HISTORY)
    return found


def test_the_next_item_of_the_rule_comes_first(fitted: Vectors) -> None:
    for length in (1, 3, HISTORY):
        best = scores([[(last - length + 1 + i) % ITEMS for i in range(length)] for last in range(ITEMS)], fitted)
        assert best.argmax(1).tolist() == [(last + 1) % ITEMS for last in range(ITEMS)]


@models
def test_untrained_it_does_not_know_the_rule(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "EPOCHS", 1)
    monkeypatch.setattr(model, "LEARNING_RATE", 1e-9)
    best = scores([[last] for last in range(ITEMS)], model.fit(circle(), history=HISTORY)).argmax(1)
    assert (best == (np.arange(ITEMS) + 1) % ITEMS).mean() < 0.5


@models
def test_what_lies_behind_the_last_item_counts(model: ModuleType) -> None:
    rng = np.random.default_rng(0)
    first, last = rng.integers(0, 4, 3000), rng.integers(4, 8, 3000)
    fitted = model.fit(bought([[a, b, a + 8] for a, b in zip(first, last, strict=True)], 12), history=HISTORY)
    best = scores([[a, b] for a in range(4) for b in range(4, 8)], fitted).argmax(1)
    assert best.tolist() == [a + 8 for a in range(4) for _ in range(4, 8)]


@models
def test_a_stranger_gets_what_others_begin_with(model: ModuleType) -> None:
    fitted = model.fit(bought([[0, 1 + user % 5] for user in range(1200)], ITEMS), history=HISTORY)
    assert scores([[]], fitted)[0].argmax() == 0


@models
def test_an_item_nobody_bought_comes_where_its_like_does(model: ModuleType) -> None:
    # The last is made like item 4.
    features = np.eye(ITEMS, dtype=np.float32)[[*range(ITEMS), 4]]
    past = circle()._replace(n_items=ITEMS + 1)
    fitted = model.fit(past, features=features, history=HISTORY)
    found = scores([[1, 2, 3], [6, 7, 8]], fitted)
    assert set(np.argsort(-found[0])[:2]) == {4, ITEMS} and found[1, ITEMS] < found[1].max() - 1
    unknown = model.fit(past, history=HISTORY)
    assert scores([[1, 2, 3]], unknown)[0].argsort()[-2:].tolist() != [ITEMS, 4], "its content is what is known of it"


def test_training_sees_after_every_event_what_serving_would(fitted: Vectors) -> None:
    encoder, rows = fitted.encoder, [5, 1, 2, 9]
    assert isinstance(encoder, sequences.Encoder)
    with torch.inference_mode():
        history, kinds, ages_s, _ = inputs([rows], fitted)
        states = encoder.states(history, kinds, ages_s - 86_400.0 * (kinds > 0))
        for length in range(4):
            before = encoder(*inputs([rows[:length]], fitted))
            torch.testing.assert_close(states[:, HISTORY - 5 + length], before, atol=1e-4, rtol=1e-4)


def test_padding_tells_nothing(fitted: Vectors) -> None:
    with torch.inference_mode():
        expected = fitted.encoder(*inputs([[1, 2, 3]], fitted, width=3))
        torch.testing.assert_close(fitted.encoder(*inputs([[1, 2, 3]], fitted)), expected)


def test_vectors_have_the_promised_shape_and_length(fitted: Vectors) -> None:
    width = sasrec.WIDTH if isinstance(fitted.encoder, sasrec.Encoder) else gru4rec.WIDTH
    assert fitted.items.shape == (ITEMS, width) and fitted.items.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(fitted.items, axis=1), 1.0, atol=1e-5)
    with torch.inference_mode():
        users = fitted.encoder(*inputs([[], [1], [2, 3, 1]], fitted))
    torch.testing.assert_close(users.norm(dim=1), torch.full((3,), 1 / sequences.TEMPERATURE))


def test_the_exported_encoder_is_the_encoder(fitted: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt2"
    save_program(fitted.export(), path)
    program = load_program(path, torch.device("cpu"))
    for size in (1, 2, 33):
        given_ = inputs([[index % ITEMS, (index * 7) % ITEMS][: index % 3] for index in range(size)], fitted)
        with torch.inference_mode():
            torch.testing.assert_close(program(*given_), fitted.encoder(*given_))


@models
def test_a_seed_gives_the_same_network_and_the_same_report(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "EPOCHS", 3)
    past, seen = circle(60), []
    once, again, other = (
        model.fit(past, history=HISTORY, seed=seed, run=Run(on_epoch=lambda *epoch: seen.append(epoch)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once.items, again.items)
    for name, value in once.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value)
    assert not np.array_equal(other.items, once.items)
    assert once.losses == again.losses
    assert seen[: len(once.losses)] == [(epoch, *losses) for epoch, losses in enumerate(once.losses)]
    assert once.losses[-1][0] < once.losses[0][0]


@models
@pytest.mark.parametrize("past", [bought([], 5), bought([[3]], 5), bought([[0, 0, 0]], 1), bought([[1, 2], [4]], 5)])
def test_too_little_to_learn_from_still_gives_vectors(
    model: ModuleType, past: Interactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "EPOCHS", 2)
    fitted = model.fit(past, history=HISTORY)
    assert fitted.items.shape == (past.n_items, model.WIDTH)
    assert np.isfinite(scores([[], [0], [0] * 9], fitted)).all()


@pytest.mark.parametrize("kind", [EventType.VIEW_ITEM_LIST, EventType.HIDE])
def test_what_nobody_wants_teaches_nothing(kind: EventType) -> None:
    past = circle(20)
    past.kind[:] = kind
    assert sasrec.fit(past, history=HISTORY).losses == ()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 50), st.sampled_from([3, 8, 14])),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 5),
)
def test_every_wanted_event_is_foretold_once(events: list[tuple[int, int, int, int]], length: int) -> None:
    ordered = sorted(events, key=lambda event: (event[0], event[2]))
    user, row, day, kind = (np.array([event[column] for event in ordered]) for column in range(4))
    past = Interactions(user.astype(np.int32), row.astype(np.int32), day * DAY_MS, kind.astype(np.uint8), 10)
    stretches = Stretches(past, length)
    everything = np.arange(len(stretches.user))
    foretold = np.zeros(len(ordered))
    for index in everything:
        start, end = int(stretches.start[index]), int(stretches.end[index])
        first = start == 0 or user[start - 1] != user[start]
        assert 1 <= end - start <= length and len(set(user[start:end])) == 1
        rows, kinds, ages_s, weight = (column[0] for column in stretches.read(everything[index : index + 1]))
        assert len(rows) == len(kinds) == len(ages_s) == len(weight) + 1 == end - start + 1
        assert rows.tolist() == ([-1] if first else [row[start - 1]]) + row[start:end].tolist()
        assert kinds.tolist() == ([0] if first else [kind[start - 1]]) + kind[start:end].tolist()
        assert ages_s[1:].tolist() == ((day[end - 1] - day[start:end]) * 86_400).tolist()
        foretold[start:end] += weight.numpy()
    np.testing.assert_allclose(foretold, STRENGTH[kind])
    if len(everything):
        rows, kinds, _, weight = stretches.read(everything)
        assert float(weight.sum()) == pytest.approx(STRENGTH[kind].sum()), "padding is not foretold"
        assert ((kinds > 0) == (rows >= 0)).all() and (rows[:, -1] >= 0).all()
        assert sorted(np.concatenate(stretches.batches(np.random.default_rng(0)))) == everything.tolist()
        assert stretches.targets().tolist() == np.bincount(row[foretold > 0], minlength=10).tolist()


class Latest(nn.Module):
    """What is read of the last item, and a 1 if there is one; column by column, as a solver would leave it."""

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        found = torch.cat([history[:, -1], (kinds[:, -1:] > 0).float() + ages_s[:, -1:] + profile], 1)
        return found.t().contiguous().t()


def bundle_that_reads_other_vectors(folder: Path, name: str) -> Bundle:
    """The catalog of the tiny bundle and one source: items are read by three numbers and scored by four."""
    whole = write_tiny(folder, name).manifest
    rng = np.random.default_rng(0)
    scored, read = (rng.normal(size=(whole.items, width)).astype(np.float32) for width in (4, 3))
    draft = Draft(folder, whole.items, whole.window, whole.statistics, whole.categories, whole.brands, [], [], {})
    _vectors(draft, "latest", Vectors(scored, Latest(), history=5, inputs=read), bought([[0, 1]], whole.items), seed=0)
    draft.scenes = {"home": Scene(sources=(SceneSource(name="latest", k=15),))}
    return seal(draft, name)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "tensors"])
def test_the_engine_reads_what_the_encoder_was_trained_on(tmp_path: Path, compiled: bool) -> None:
    bundle = bundle_that_reads_other_vectors(tmp_path, "bundle")
    pipeline = Pipeline(bundle, torch.device("cpu"), 8, compiled=compiled)
    users = [state("a3", "b7", end_ms=NOW_MS), UserState(), state("b2", end_ms=NOW_MS)]
    batch = pipeline.prepare(pipeline.scenes["home"], [Query("q")] * 3, users, NOW_MS).batch
    source = pipeline.sources["latest"]
    assert isinstance(source, VectorSource)
    found = source.recall(batch, 5, False)
    read, scored = (bundle.tensors(f"latest{part}.safetensors")["vectors"].float() for part in ("_inputs", ""))
    last = pipeline.catalog.rows(np.array([user.events["item"][-1] for user in (users[0], users[2])]))
    expected = torch.zeros(3, 4)
    expected[[0, 2], :3], expected[[0, 2], 3] = read[torch.from_numpy(last)], 1.0
    torch.testing.assert_close(batch.user_vectors["latest"], expected)
    torch.testing.assert_close(
        source.score(batch, found.query, found.row), (expected @ scored.T)[found.query, found.row]
    )
    torch.testing.assert_close(found.score, source.score(batch, found.query, found.row), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda read: read[1:], "latest_inputs.safetensors has 39 vectors for 40 items"),
        (lambda read: read.float(), r"latest_inputs.safetensors is of torch.float32 \[40, 3\], not float16"),
        (lambda read: read[:, 0], r"latest_inputs.safetensors is of torch.float16 \[40\], not float16"),
        (lambda read: read[:, :2], r"users of 'latest' are 3 wide, latest.safetensors \[40, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    bundle = bundle_that_reads_other_vectors(tmp_path, "bundle")
    spec = bundle.manifest.sources[0]
    assert isinstance(spec, VectorSpec)
    damage.tensors(tmp_path, "latest_inputs.safetensors", lambda found: {"vectors": change(found["vectors"])})
    with pytest.raises(BundleError, match=message):
        VectorSource(spec, bundle, torch.device("cpu"))


def test_inputs_without_a_checksum_are_refused(tmp_path: Path) -> None:
    bundle = bundle_that_reads_other_vectors(tmp_path, "bundle")
    (tmp_path / "latest_inputs.safetensors").unlink()
    draft = Draft(tmp_path, 40, 64, (), (), (), list(bundle.manifest.sources), [], {})
    with pytest.raises(BundleError, match=r"latest_inputs\.safetensors has no checksum"):
        seal(draft, "bundle")
