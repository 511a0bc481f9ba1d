import numpy as np
import pytest
from scipy.sparse import csr_matrix

from models.baselines import BASELINES, View, fit, recommend
from models.metrics import evaluate


def checkerboard(n: int) -> csr_matrix:
    """Even users have the even items, odd users the odd ones, but for one of them each: the one on the diagonal."""
    board = (np.add.outer(np.arange(n), np.arange(n)) % 2 == 0).astype(np.float32)
    np.fill_diagonal(board, 0)
    return csr_matrix(board)


@pytest.mark.parametrize("name", BASELINES)
def test_new_finds_the_square_left_out(name: str) -> None:
    board = checkerboard(30)
    users = np.array([4, 0, 17, 29])
    slates = recommend(fit(name, board), board, users, 3, "new")
    assert slates.dtype == np.int64
    assert slates[:, 0].tolist() == users.tolist()


@pytest.mark.parametrize("name", BASELINES)
def test_new_never_repeats_and_all_does(name: str) -> None:
    board = checkerboard(30)
    users = np.arange(30)
    model = fit(name, board)
    liked = [board[user].indices.astype(np.int64) for user in users]
    hits: dict[View, float] = {}
    for view in ("new", "all"):
        slates = recommend(model, board, users, 14, view)
        hits[view] = evaluate(slates, liked, [14])["precision@14"]
    assert hits["new"] == 0
    assert hits["all"] > 0.9


@pytest.mark.parametrize("view", ["new", "all"])
@pytest.mark.parametrize("name", BASELINES)
def test_what_is_missing_is_padded(name: str, view: View) -> None:
    board = checkerboard(6)
    slates = recommend(fit(name, board), board, np.arange(6), 40, view)
    assert slates.shape == (6, 40)
    for user, slate in enumerate(slates.tolist()):
        listed = [item for item in slate if item != -1]
        assert slate == listed + [-1] * (40 - len(listed))
        assert len(set(listed)) == len(listed) <= 6
        if view == "new":
            assert not set(listed) & set(board[user].indices.tolist())


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_repeats(name: str) -> None:
    rng = np.random.default_rng(0)
    dense = csr_matrix((rng.random((40, 25)) < 0.2).astype(np.float32))
    once, again = (recommend(fit(name, dense, seed=3), dense, np.arange(40), 10, "new") for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_a_user_without_history_still_gets_a_slate() -> None:
    board = checkerboard(8).multiply(np.arange(8)[:, None] != 3).tocsr()
    slates = recommend(fit("ALS", board), board, np.array([3]), 5, "new")
    assert len(set(slates[0].tolist())) == 5
