"""The compiled stages against the tensor operations that a GPU runs, and against plain Python."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bundle import open_bundle
from app.engine import Query, Where, kernels
from app.engine.pipeline import Pipeline
from app.engine.ranking import forest
from app.state.events import MS_PER_DAY, EventType, UserState
from tests.test_pipeline import ALL, HISTORIES, QUERIES, user_of
from tests.tiny import NOW_MS, publish_tiny

Node = float | tuple[int, float, "Node", "Node"]
"""Of a tree: a value, or feature, limit, and what is up to the limit and above it."""

LIMITS = st.sampled_from([-np.inf, -1.5, 0.0, 1e-30, 0.1, 2.0, np.inf]).map(lambda limit: float(np.float32(limit)))
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
    forms: tuple[Pipeline, Pipeline], name: str, asked: list[tuple[Query, list[tuple[str, EventType]]]]
) -> None:
    # All at one time: without decay every sum is exact in whatever order, so that ties are ties in both forms.
    users = [user_of(history, apart_ms=0) for _, history in asked]
    assert_same(forms, name, [query for query, _ in asked], users)


@pytest.mark.parametrize("name", ["home", "buy_again", "detail", "wider"])
def test_both_forms_let_events_fade_alike(forms: tuple[Pipeline, Pipeline], name: str) -> None:
    rng = np.random.default_rng(5)
    kinds = [EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE]
    histories = [[(str(rng.choice(ALL)), kinds[int(rng.integers(0, 3))]) for _ in range(n)] for n in range(0, 40, 5)]
    users = [user_of(history, apart_ms=int(rng.uniform(0, MS_PER_DAY))) for history in histories]
    assert_same(forms, name, [Query(str(index), anchors=("b1",)[: index % 2]) for index in range(len(users))], users)


def assert_same(
    forms: tuple[Pipeline, Pipeline], name: str, queries: Sequence[Query], users: Sequence[UserState]
) -> None:
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


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 60) | st.integers(61, 700))
@settings(max_examples=50, deadline=None)
def test_nearest_is_the_exact_order(seed: int, items: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, users = (torch.randn(size, 16, generator=generator) for size in (items, 3))
    vectors = vectors.half()
    k = min(k, items)
    rough = (vectors.bfloat16() @ users.bfloat16().t()).view(torch.uint16)
    rows, best = kernels.nearest(rough.numpy(), users.numpy(), vectors.view(torch.uint16).numpy(), k)
    exact = users @ vectors.float().t()
    np.testing.assert_allclose(best, exact.topk(k).values, atol=1e-4)
    np.testing.assert_allclose(best, np.take_along_axis(exact.numpy(), rows, 1), atol=1e-4)
    assert all(len(set(line)) == k for line in rows.tolist())


def test_nothing_is_near_to_a_user_of_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, users = torch.randn(500, 16, generator=generator).half(), torch.randn(3, 16, generator=generator)
    users[1] = 0
    rough = (vectors.bfloat16() @ users.bfloat16().t()).view(torch.uint16)
    rows, _ = kernels.nearest(rough.numpy(), users.numpy(), vectors.view(torch.uint16).numpy(), 20)
    assert [(line >= 0).all() for line in rows] == [True, False, True]
    assert (rows[1] == -1).all()


@pytest.mark.parametrize(
    "high",
    [
        pytest.param(np.arange(0, 4096, 256), id="all in one block"),
        pytest.param(np.arange(30), id="few are positive"),
        pytest.param(np.arange(0), id="none is positive"),
    ],
)
def test_nearest_wherever_the_best_lie(high: npt.NDArray[np.int64]) -> None:
    score = -np.linspace(1, 2, 4096, dtype=np.float16)
    score[high] = np.linspace(2, 1, len(high), dtype=np.float16)
    vectors, users = torch.from_numpy(score)[:, None], torch.ones(1, 1)
    rough = (vectors.bfloat16() @ users.bfloat16().t()).view(torch.uint16)
    rows, best = kernels.nearest(rough.numpy(), users.numpy(), vectors.view(torch.uint16).numpy(), 20)
    assert best[0].tolist() == np.sort(score.astype(np.float32))[::-1][:20].tolist()
    assert best[0].tolist() == score[rows[0]].tolist()


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


@st.composite
def trees(draw: st.DrawFn) -> tuple[Node, int]:
    """A tree and the number of its leaves."""

    def grow(leaves: int) -> Node:
        if leaves == 1:
            return draw(st.floats(-1, 1, width=32))
        left = draw(st.integers(1, leaves - 1))
        return draw(st.integers(0, 2)), draw(LIMITS), grow(left), grow(leaves - left)

    leaves = draw(st.integers(1, 31) | st.just(31))
    return grow(leaves), leaves


@settings(max_examples=100, deadline=None)
@given(
    st.lists(trees(), min_size=1, max_size=4),
    st.lists(st.lists(LIMITS | st.just(float("nan")), min_size=3, max_size=3), max_size=9),
    st.sampled_from([1, kernels.LANES]),
)
def test_a_forest_sums_the_leaves_that_a_walk_ends_in(
    grown: list[tuple[Node, int]], rows: list[list[float]], times: int
) -> None:
    features = np.array(rows * times, np.float32).reshape(-1, 3)
    width = max(2, *(leaves for _, leaves in grown))
    feature, threshold = np.zeros((len(grown), width - 1), np.int32), np.full((len(grown), width - 1), np.inf)
    kept, value = np.full((len(grown), width - 1), -1, np.int32), np.zeros((len(grown), width), np.float32)
    for tree, (node, _) in enumerate(grown):
        for place, (column, limit, first, last) in enumerate(conditions := flat(node, value[tree])):
            feature[tree, place], threshold[tree, place] = column, limit
            kept[tree, place] = ~sum(1 << leaf for leaf in range(first, last))
        assert len(conditions) < width
    columns = feature, threshold.astype(np.float32), kept, value
    expected = [
        sum(walked(node, row) for node, _ in grown) for row in np.nan_to_num(features, posinf=np.inf, neginf=-np.inf)
    ]
    found = kernels.forest(features, *columns[:2], kept.view(np.uint32), value)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(forest(torch.from_numpy(features), *map(torch.from_numpy, columns)), found, atol=1e-6)


def flat(root: Node, values: npt.NDArray[np.float32]) -> list[tuple[int, float, int, int]]:
    """Conditions (feature, limit, first leaf to the left, one behind the last), filling in the leaves' values."""
    conditions, leaf = [], 0

    def visit(node: Node) -> None:
        nonlocal leaf
        if isinstance(node, float):
            values[leaf] = node
            leaf += 1
            return
        column, limit, left, right = node
        first = leaf
        visit(left)
        conditions.append((column, limit, first, leaf))
        visit(right)

    visit(root)
    return conditions


def walked(node: Node, row: npt.NDArray[np.float32]) -> float:
    while not isinstance(node, float):
        column, limit, left, right = node
        node = left if row[column] <= limit else right
    return node
