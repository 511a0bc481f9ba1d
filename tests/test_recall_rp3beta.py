import numpy as np
import pytest

from app.state.events import EventType
from models.recall import Interactions, rp3beta

DAY_MS = 86_400_000


def bought(pairs: list[tuple[int, int]], n_items: int) -> Interactions:
    """Of (user, row), all at once."""
    user, row = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    kind = np.full(len(user), EventType.PURCHASE, np.uint8)
    return Interactions(user, row, np.full(len(user), DAY_MS), kind, n_items)


def test_items_of_one_group_are_neighbours_and_of_two_groups_are_not() -> None:
    near = rp3beta.fit(bought([(u, i) for u in range(12) for i in range(10) if u % 2 == i % 2 and u != i], 10), k=6)
    for item, others in enumerate(near.rows):
        assert sorted(others) == sorted([i for i in range(10) if i % 2 == item % 2 and i != item] + [-1, -1])
        assert (near.weights[item][others < 0] == 0).all()


def test_equals_the_formula_written_out() -> None:
    wanted = np.random.default_rng(0).random((30, 8)) < 0.3
    near = rp3beta.fit(bought([(int(u), int(i)) for u, i in np.argwhere(wanted)], 8), k=8, alpha=0.6, beta=0.4)
    x, of_user, of_item = wanted.astype(float), wanted.sum(1).clip(1), wanted.sum(0).clip(1)
    expected = (x / of_user[:, None] ** 0.6).T @ x / (of_item[:, None] ** 0.6 * of_item[None, :] ** 0.4)
    np.fill_diagonal(expected, 0.0)
    found = np.zeros((8, 8))
    row, place = np.nonzero(near.rows >= 0)
    found[row, near.rows[row, place]] = near.weights[row, place]
    np.testing.assert_allclose(found, expected / expected.max(), atol=1e-6)
    assert (np.diff(near.weights, axis=1) <= 0).all(), "best first"


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 1)]])
def test_nothing_to_learn_from_gives_an_empty_table(pairs: list[tuple[int, int]]) -> None:
    near = rp3beta.fit(bought(pairs, 3), k=5)
    assert near.rows.shape == near.weights.shape == (3, 5)
    assert (near.rows == -1).all() and not near.weights.any()
