from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.recall import STRENGTH, Interactions, Neighbours, ease

DAY_MS = 86_400_000
NOW_MS = 100 * DAY_MS

Interaction = tuple[int, int, int, EventType]


def logged(interactions: list[Interaction], n_items: int) -> Interactions:
    """Of (user, row, day, type), in any order."""
    ordered = sorted(interactions, key=lambda one: (one[0], one[2]))
    user, row, day, kind = (np.array([one[column] for one in ordered], np.int64) for column in range(4))
    return Interactions(user.astype(np.int32), row.astype(np.int32), day * DAY_MS, kind.astype(np.uint8), n_items)


def fit(past: Interactions, **options: Any) -> Neighbours:
    near = ease.fit(past, now_ms=NOW_MS, **options)
    assert near is not None
    return near


def dense(near: Neighbours) -> npt.NDArray[np.float32]:
    real = near.rows >= 0
    table = sp.csr_matrix((near.weights[real], (np.nonzero(real)[0], near.rows[real])), shape=(len(near.rows),) * 2)
    weights: npt.NDArray[np.float32] = table.toarray()
    return weights


def formula(x: npt.NDArray[np.float64], ridge: float) -> npt.NDArray[np.float64]:
    inverse = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    weights: npt.NDArray[np.float64] = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def test_items_of_one_group_are_neighbours_and_of_two_groups_are_not() -> None:
    pairs = [(u, i) for u in range(12) for i in range(10) if u % 2 == i % 2 and u != i]
    near = fit(logged([(u, i, 99, EventType.PURCHASE) for u, i in pairs], 10), k=6, ridge=1.0)
    for item, others in enumerate(near.rows):
        assert sorted(others) == sorted([i for i in range(10) if i % 2 == item % 2 and i != item] + [-1, -1])
        assert (near.weights[item][others < 0] == 0).all()


@pytest.mark.parametrize("n_items", [7, 8, 9, 30])
def test_equals_the_formula_over_several_blocks(n_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "BLOCK", 8)
    x = np.random.default_rng(0).random((40, n_items)) < 0.3
    past = logged([(int(u), int(i), 0, EventType.PURCHASE) for u, i in np.argwhere(x)], n_items)
    near = fit(past, half_life_days=None, ridge=5.0, signed=True)
    np.testing.assert_allclose(dense(near), formula(x.astype(float), 5.0), atol=2e-6)


KINDS = st.sampled_from([EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.DISLIKE])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 60), KINDS), max_size=60),
    st.sampled_from([None, 20.0]),
    st.booleans(),
)
def test_equals_the_formula_written_out(
    interactions: list[Interaction], half_life_days: float | None, signed: bool
) -> None:
    near = fit(logged(interactions, 8), half_life_days=half_life_days, ridge=0.5, signed=signed)
    x = np.zeros((6, 8))
    for user, row, day, kind in interactions:
        age_days = 0 if half_life_days is None else 100 - day
        x[user, row] += STRENGTH[kind] / 2 * 0.5 ** (age_days / (half_life_days or 1))
    expected = formula(np.minimum(x, 1.0), 0.5)
    np.testing.assert_allclose(dense(near), expected if signed else np.maximum(expected, 0.0), atol=2e-6)
    assert (np.diff(np.abs(near.weights), axis=1) <= 0).all(), "best first"


def test_signed_tables_keep_what_speaks_against_an_item() -> None:
    # All have 0, and either 1 or 2.
    past = logged([(u, i, 99, EventType.PURCHASE) for u in range(12) for i in (0, 1 + u % 2)], 3)
    signed = fit(past, ridge=1.0, signed=True)
    assert signed.rows[1].tolist() == [0, 2, -1] and signed.weights[1, 1] < 0
    assert fit(past, ridge=1.0).rows[1].tolist() == [0, -1, -1]


@pytest.mark.parametrize("interactions", [[], [(0, 1, 0, EventType.HIDE)], [(0, 1, 0, EventType.PURCHASE)]])
@pytest.mark.parametrize("n_items", [2, 3])
def test_nothing_to_learn_from_gives_an_empty_table(interactions: list[Interaction], n_items: int) -> None:
    near = fit(logged(interactions, n_items))
    assert near.rows.shape == near.weights.shape == (n_items, n_items)
    assert (near.rows == -1).all() and not near.weights.any()


def test_a_single_item_has_no_neighbours() -> None:
    assert fit(logged([(0, 0, 0, EventType.PURCHASE)], 1)).rows.tolist() == [[-1]]


def test_a_catalog_beyond_the_memory_is_left_out_before_anything_is_allocated() -> None:
    past = logged([(0, 0, 0, EventType.PURCHASE)], 10_000_000)
    assert ease.fit(past, now_ms=NOW_MS) is None
    assert ease.fit(past._replace(n_items=3_000), now_ms=NOW_MS, memory_gb=0.01) is None


@pytest.mark.parametrize("ridge", [0.0, -1.0])
def test_a_ridge_that_is_not_above_zero_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge"):
        fit(logged([(0, 0, 0, EventType.PURCHASE)], 2), ridge=ridge)


def test_the_same_input_gives_the_same_table() -> None:
    rng = np.random.default_rng(1)
    past = logged([(int(u), int(i), 90, EventType.PURCHASE) for u, i in rng.integers(0, 30, (300, 2))], 30)
    for one, other in zip(fit(past), fit(past), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_smallest_numbers_are_not_lost_afterwards() -> None:
    fit(logged([(0, 0, 99, EventType.PURCHASE), (0, 1, 99, EventType.PURCHASE)], 2))
    assert float(torch.tensor(2e-39) / 2) > 0
