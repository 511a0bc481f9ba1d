import numpy as np
import numpy.typing as npt
import pytest

from app.state.events import EventType
from models.recall import Interactions, Vectors, spectral
from models.recall.ease import user_items

DAY_MS = 86_400_000


def bought(pairs: list[tuple[int, int]], n_items: int) -> Interactions:
    """Of (user, row), all at once."""
    user, row = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    kind = np.full(len(user), EventType.PURCHASE, np.uint8)
    return Interactions(user, row, np.full(len(user), DAY_MS), kind, n_items)


def random(seed: int, users: int = 30, n_items: int = 12) -> Interactions:
    wanted = np.random.default_rng(seed).random((users, n_items)) < 0.3
    return bought([(int(u), int(i)) for u, i in np.argwhere(wanted)], n_items)


def scores(rows: list[list[int]], vectors: Vectors) -> npt.NDArray[np.float32]:
    """Of histories bought now."""
    past = bought([(user, row) for user, of_user in enumerate(rows) for row in of_user], len(vectors.items))
    users = vectors.users(past, np.arange(len(rows), dtype=np.int32), DAY_MS)
    found: npt.NDArray[np.float32] = users @ vectors.items.T
    return found


def test_a_checkerboard_is_told_apart() -> None:
    past = bought([(u, i) for u in range(12) for i in range(10) if u % 2 == i % 2 and u != i], 10)
    found = scores([[0, 2], [1, 3]], spectral.fit(past, width=2, history=4))
    assert found[0, 0::2].min() > 0.1 > 1e-4 > np.abs(found[0, 1::2]).max()
    assert found[1, 1::2].min() > 0.1 > 1e-4 > np.abs(found[1, 0::2]).max()


def test_as_published_equals_the_formula_written_out() -> None:
    past = random(0)
    x = user_items(past, 0, None).toarray().astype(float)
    of_user, of_item = x.sum(1).clip(1), x.sum(0).clip(1)
    _, _, right = np.linalg.svd(x / np.sqrt(of_user[:, None] * of_item))
    low = right[:4].T @ right[:4] * np.sqrt(of_item) / np.sqrt(of_item)[:, None]
    fitted = spectral.fit(past, width=4, of_user=0.5, of_item=0.5, entry=0.5, leave=0.5, cutoff=0.0, history=3)
    assert fitted.inputs is not None
    np.testing.assert_allclose(fitted.inputs @ fitted.items.T, low, atol=1e-5)
    users = low[[1, 5]].sum(0)
    found = scores([[1, 5]], fitted)[0]
    np.testing.assert_allclose(found / np.linalg.norm(found), users / np.linalg.norm(users), atol=1e-5)


def test_weak_vectors_are_cut_off_however_wide_the_catalog_allows() -> None:
    past = bought([(u, i) for u in range(12) for i in range(10) if u % 2 == i % 2], 10)
    assert spectral.fit(past, width=8).items.shape == (10, 2)


def test_all_triples_give_the_matrix_back() -> None:
    past = random(1)
    matrix = spectral.damped(user_items(past, 0, None), 0.25, 0.5)
    values, right = spectral.leading(matrix, 12, np.random.default_rng(0))
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose((right * values**2) @ right.T, (matrix.T @ matrix).toarray(), atol=1e-5)


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 1)]])
def test_nothing_to_learn_from_still_gives_vectors(pairs: list[tuple[int, int]]) -> None:
    fitted = spectral.fit(bought(pairs, 3), history=2)
    assert len(fitted.items) == 3
    assert np.isfinite(scores([[], [0], [1, 2]], fitted)).all()
    assert not scores([[]], fitted).any()


def test_the_same_input_gives_the_same_vectors() -> None:
    one, other = (spectral.fit(random(2), width=5) for _ in range(2))
    np.testing.assert_array_equal(one.items, other.items)
