from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from app.engine.program import load_program, save_program
from models.recall import Interactions, Vectors, mf
from models.recall.ease import user_items
from tests.test_recall_spectral import DAY_MS, bought, scores

Fit = Callable[..., Vectors]
both = pytest.mark.parametrize("fit", [mf.fit_als, mf.fit_bpr])


def two_components() -> Interactions:
    """Of 12 items and 28, of which each user has most."""
    rng = np.random.default_rng(0)
    pairs = [(u, int(i)) for u in range(30) for i in rng.choice(12, 8, replace=False)]
    return bought(pairs + [(u, int(i)) for u in range(30, 100) for i in 12 + rng.choice(28, 18, replace=False)], 40)


@both
def test_a_checkerboard_is_told_apart(fit: Fit) -> None:
    past = bought([(u, i) for u in range(40) for i in range(10) if u % 2 == i % 2 and u // 2 % 5 != i // 2], 10)
    found = scores([[0, 2], [1, 3]], fit(past, width=8, history=4))
    assert found[0, 0::2].min() > found[0, 1::2].max()
    assert found[1, 1::2].min() > found[1, 0::2].max()


@both
def test_nothing_of_another_component_ranks_above_the_own(fit: Fit) -> None:
    found = scores([[0, 5], [12, 20, 30]], fit(two_components(), width=4, history=4))
    assert found[0, :12].min() > found[0, 12:].max()
    assert found[1, 12:].min() > found[1, :12].max()


def test_least_squares_end_where_neither_side_can_improve() -> None:
    wanted = np.random.default_rng(0).random((30, 9)) < 0.3
    past = bought([(int(u), int(i)) for u, i in np.argwhere(wanted)], 9)
    fitted = mf.fit_als(past, width=3, unobserved=0.05, ridge=0.1, iterations=200, history=9)
    with torch.inference_mode():
        x = user_items(past, DAY_MS, None).toarray()
        histories = [list(np.flatnonzero(line)) for line in x]
        found = scores(histories, fitted)
        users = np.linalg.lstsq(fitted.items.astype(float), found.T.astype(float), rcond=None)[0].T
    of_item = x.sum(0) + 0.05 * len(x)
    for item in range(9):
        normal = (users * (x[:, [item]] + 0.05)).T @ users + 0.1 * of_item[item] * np.eye(3)
        np.testing.assert_allclose(np.linalg.solve(normal, users.T @ x[:, item]), fitted.items[item], atol=2e-3)


@both
@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 1)]])
def test_nothing_to_learn_from_still_gives_vectors(fit: Fit, pairs: list[tuple[int, int]]) -> None:
    fitted = fit(bought(pairs, 3), width=4, history=2)
    assert len(fitted.items) == 3
    assert np.isfinite(scores([[], [0], [1, 2]], fitted)).all()
    assert not scores([[]], fitted).any()


@both
def test_a_seed_gives_the_same_vectors(fit: Fit) -> None:
    one, again, other = (fit(two_components(), width=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.items, again.items)
    assert one.losses == again.losses
    assert not np.array_equal(one.items, other.items)


@pytest.mark.parametrize("size", [1, 2, 33])
def test_the_exported_encoder_is_the_encoder(size: int, tmp_path: Path) -> None:
    fitted = mf.fit_als(two_components(), width=5, history=4)
    assert fitted.encoder is not None
    save_program(fitted.export(), tmp_path / "encoder.pt2")
    given = (
        torch.randn(size, 4, 5),
        torch.randint(0, 15, (size, 4)),
        torch.rand(size, 4) * 1e6,
        torch.zeros(size, 1, dtype=torch.int64),
    )
    loaded = load_program(tmp_path / "encoder.pt2", torch.device("cpu"))
    torch.testing.assert_close(loaded(*given), fitted.encoder(*given))


def test_pairwise_losses_fall() -> None:
    losses = mf.fit_bpr(two_components(), width=8).losses
    # Not by much: the better it gets, the harder are the negatives.
    assert losses[-1][0] < 0.95 * losses[0][0]


def test_no_item_of_a_user_is_a_negative_of_theirs() -> None:
    given = sp.csr_matrix(([1.0, 1.0], ([0, 1], [2, 4])), shape=(2, 5))
    drawn = np.array([[2, 3, 4], [2, 3, 4]])
    found = mf._among(drawn, given, np.array([0, 1]), np.array([3, 0]))
    assert found.tolist() == [[True, True, False], [False, False, True]]


def test_halves_hide_some_of_each_user_and_lose_nothing() -> None:
    matrix = user_items(two_components(), DAY_MS, None)
    whole = np.zeros(matrix.shape)
    lines = 0
    for given, line, target in mf.halves(matrix, 32, np.random.default_rng(0)):
        both_parts = given.toarray()
        assert (both_parts.sum(1) > 0).all()
        assert (both_parts[line, target] == 0).all()
        both_parts[line, target] += 1
        whole[lines : lines + len(both_parts)] = both_parts
        lines += len(both_parts)
        assert set(line.tolist()) == set(range(len(both_parts)))
    assert lines == len(matrix.toarray())
    np.testing.assert_array_equal(np.sort(whole @ np.arange(40)), np.sort(matrix.toarray() @ np.arange(40)))


def test_a_matrix_is_the_same_as_a_tensor() -> None:
    matrix = sp.csr_matrix(np.random.default_rng(0).integers(0, 3, (7, 5)).astype(np.float32))
    table = torch.arange(10.0).view(5, 2)
    torch.testing.assert_close(mf.on(matrix, table.device) @ table, mf.product(matrix, table))
    turned = torch.arange(14.0).view(7, 2)
    torch.testing.assert_close(mf.on(matrix.T, table.device) @ turned, mf.product(matrix.T, turned))
