"""The compiled stages against the tensor operations that a GPU runs, and against plain Python."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bundle import open_bundle
from app.engine import Query, Where, kernels
from app.engine.pipeline import Pipeline
from tests.test_pipeline import HISTORIES, QUERIES, user_of
from tests.tiny import NOW_MS, publish_tiny

FLOATS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(width=32, allow_nan=False))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Pipeline]]:
    root = tmp_path_factory.mktemp("bundles")
    path = root / publish_tiny(root).version
    compiled, tensors = (Pipeline(open_bundle(path), torch.device("cpu"), 8, compiled=form) for form in (True, False))
    yield compiled, tensors


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["home", "buy_again", "detail", "wider"]),
    st.lists(st.tuples(QUERIES, HISTORIES), min_size=1, max_size=8),
)
def test_both_forms_find_the_same_candidates_and_features(
    forms: tuple[Pipeline, Pipeline], name: str, asked: list[tuple[Query, list[tuple[str, int]]]]
) -> None:
    queries, users = [query for query, _ in asked], [user_of(history) for _, history in asked]
    found = []
    for pipeline in forms:
        with torch.inference_mode():
            prepared = pipeline.prepare(pipeline.scenes[name], queries, users, NOW_MS)
            candidates, features = prepared.candidates, pipeline.features(prepared)
        order = (candidates.query * pipeline.catalog.size + candidates.row).argsort()
        assert (candidates.query.diff() >= 0).all()
        found.append((candidates.query[order], candidates.row[order], features[order], candidates.best))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_scratch_is_at_rest_between_batches(forms: tuple[Pipeline, Pipeline]) -> None:
    compiled = forms[0]
    user = user_of([("a1", 3), ("b2", 14), ("a1", 14)])  # type: ignore[list-item]
    where = Where(category=("A",), exclude=("a3",))
    compiled.run([Query("1", scene="detail", anchors=("b1",), where=where), Query("2")], [user] * 2, NOW_MS)
    scratch = compiled._scratch
    assert not scratch.total.any() and (scratch.index == -1).all()  # type: ignore[union-attr]


@given(st.lists(st.lists(FLOATS, max_size=40), min_size=1, max_size=4), st.integers(1, 50))
def test_best_first_is_a_stable_sort(scores: list[list[float]], k: int) -> None:
    query = np.repeat(np.arange(len(scores)), [len(own) for own in scores])
    flat = np.array([score for own in scores for score in own], np.float32)
    positions, best = kernels.best_first(query, flat, len(scores), k)
    begin = 0
    for own, row, values in zip(scores, positions, best, strict=True):
        expected = begin + np.argsort(-flat[begin : begin + len(own)], kind="stable")[:k]
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == -1).all()
        assert values[: len(expected)].tolist() == flat[expected].tolist()
        begin += len(own)


def test_selection_among_thousands_of_ties() -> None:
    score = np.r_[np.ones(5000, np.float32), np.float32(2)]
    positions, _ = kernels.best_first(np.zeros(5001, np.int64), score, 1, 3)
    assert positions[0].tolist() == [5000, 0, 1]


@given(
    st.sets(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 50), max_size=40),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 50), max_size=20),
    st.integers(1, 8),
)
def test_find_is_a_lookup_however_keys_lie(known: set[int], wanted: list[int], leading: int) -> None:
    keys = np.array(sorted(known), np.int64)
    runs = [(key + 2**63) >> (64 - leading) for key in sorted(known)]
    first = np.searchsorted(runs, np.arange(2**leading + 1)).astype(np.int32)
    asked = np.array([*wanted, *known], np.int64)
    place = {key: row for row, key in enumerate(sorted(known))}
    found = kernels.find(keys, first, 64 - leading, asked)
    assert found.tolist() == [place.get(key, -1) for key in asked.tolist()]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
def test_standardised_rounds_as_torch_does(values: list[float]) -> None:
    features = np.array(values, np.float32)[:, None]
    mean, scale, clip = (np.array([value], np.float32) for value in (1.5, 0.25, 4.0))
    bits = kernels.standardised(features, mean, scale, clip, len(values) + 2)
    expected = ((torch.from_numpy(features) - 1.5) * 0.25).clamp(-4, 4).bfloat16()
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16)[:-2], expected)
    assert not bits[-2:].any()
