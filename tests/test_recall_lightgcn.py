import numpy as np
import pytest

from models.recall import lightgcn
from tests.test_recall_mf import two_components
from tests.test_recall_spectral import bought, scores


def test_a_checkerboard_is_told_apart() -> None:
    past = bought([(u, i) for u in range(40) for i in range(10) if u % 2 == i % 2 and u // 2 % 5 != i // 2], 10)
    found = scores([[0, 2], [1, 3]], lightgcn.fit(past, width=8, history=4))
    assert found[0, 0::2].min() > found[0, 1::2].max()
    assert found[1, 1::2].min() > found[1, 0::2].max()


def test_nothing_of_another_component_ranks_above_the_own() -> None:
    found = scores([[0, 5], [12, 20, 30]], lightgcn.fit(two_components(), width=4, history=4))
    assert found[0, :12].min() > found[0, 12:].max()
    assert found[1, 12:].min() > found[1, :12].max()


def test_training_improves_on_its_start() -> None:
    losses = lightgcn.fit(two_components(), width=8).losses
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 1)]])
def test_nothing_to_learn_from_still_gives_vectors(pairs: list[tuple[int, int]]) -> None:
    fitted = lightgcn.fit(bought(pairs, 3), history=2)
    assert len(fitted.items) == 3
    assert np.isfinite(scores([[], [0], [1, 2]], fitted)).all()
    assert not scores([[]], fitted).any()


def test_a_seed_gives_the_same_vectors() -> None:
    one, again, other = (lightgcn.fit(two_components(), width=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.items, again.items)
    assert one.losses == again.losses
    assert not np.array_equal(one.items, other.items)
