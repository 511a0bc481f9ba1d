import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.catalog import listed
from models.data import online_retail
from models.data.log import Log
from models.data.times import instant_ms
from models.recall import STRENGTH, Interactions, Neighbours, item_cf

DAY_MS = 86_400_000

Interaction = tuple[int, int, int, EventType]


def fit(interactions: list[Interaction], n_items: int, **options: Any) -> Neighbours:
    """Of (user, row, day, type), in any order."""
    ordered = sorted(interactions, key=lambda one: (one[0], one[2]))
    user, row, day, kind = (np.array([one[column] for one in ordered], np.int64) for column in range(4))
    past = Interactions(user.astype(np.int32), row.astype(np.int32), day * DAY_MS, kind.astype(np.uint8), n_items)
    return item_cf.fit(past, **{"k": 5} | options)


def bought(*pairs: tuple[int, int], day: int = 0) -> list[Interaction]:
    return [(user, row, day, EventType.PURCHASE) for user, row in pairs]


def test_items_of_one_group_are_neighbours_and_of_two_groups_are_not() -> None:
    near = fit(bought(*((u, i) for u in range(12) for i in range(10) if u % 2 == i % 2 and u != i)), 10, k=6)
    for item, others in enumerate(near.rows):
        assert sorted(others) == sorted([i for i in range(10) if i % 2 == item % 2 and i != item] + [-1, -1])
        assert (near.weights[item][others < 0] == 0).all()
    np.testing.assert_allclose(near.weights.sum(1), 1.0, rtol=1e-5)


def test_what_was_bought_together_lately_is_nearer() -> None:
    near = fit(bought((0, 0), (0, 1), (1, 2), day=0) + bought((1, 0), (2, 0), (2, 2), (3, 1), day=90), 3)
    assert near.rows[0].tolist()[:2] == [2, 1]


def test_an_item_that_everybody_buys_is_no_sign_of_likeness() -> None:
    pairs = [(u, 2) for u in range(30)] + [(u, i) for u in range(6) for i in (0, 1)]
    assert fit(bought(*pairs), 3, damping=0.5).rows[0, 0] == 1


# Two items each: 0 has three users, 1 and 2 have two, 3 has one; g is 2 for every user that two items share.
FOUR = bought((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2), (3, 2), (3, 3))


@pytest.mark.parametrize(
    ("likeness", "damping", "expected"),
    [
        ("cosine", 0.5, [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0], [(1 / 3) ** 0.5, 0, 0, 1], [0, 0, 1, 0]]),
        ("jaccard", 0.5, [[0, 2 / 3, 1 / 4, 0], [2 / 3, 0, 0, 0], [1 / 4, 0, 0, 1 / 2], [0, 0, 1 / 2, 0]]),
        ("conditional", 1.0, [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0], [1 / 2, 0, 0, 1 / 2], [0, 0, 1, 0]]),
        ("conditional", 0.5, [[0, 1 / 3, 1 / 6, 0], [6**-0.5, 0, 0, 0], [24**-0.5, 0, 0, 8**-0.5], [0, 0, 1 / 2, 0]]),
    ],
)
def test_likenesses_known_beforehand(likeness: str, damping: float, expected: list[list[float]]) -> None:
    dense = _dense(fit(FOUR, 4, likeness=likeness, damping=damping, shrink=0.0))
    rows = np.array(expected)
    if likeness == "cosine":
        rows /= rows.sum(1, keepdims=True)
    np.testing.assert_allclose(dense, rows, rtol=1e-5)


@pytest.mark.parametrize("likeness", ["cosine", "jaccard", "conditional"])
def test_shrinking_trusts_what_few_did_less(likeness: str) -> None:
    # Item 1 has all of its one user in common with 0, item 2 four of its five.
    pairs = [(0, 0), (0, 1), *((u, i) for u in range(1, 5) for i in (0, 2)), (5, 2), (5, 3)]
    trusting, wary = (_dense(fit(bought(*pairs), 4, likeness=likeness, shrink=s)) for s in (0.0, 3.0))
    assert wary[1, 0] / wary[2, 0] < trusting[1, 0] / trusting[2, 0]


def test_types_count_by_strength_and_dislikes_do_not() -> None:
    views: list[Interaction] = [(1, 0, 0, EventType.PURCHASE), (1, 2, 0, EventType.VIEW_ITEM)]
    hidden: list[Interaction] = [(2, 0, 0, EventType.PURCHASE), (2, 3, 0, EventType.HIDE)]
    near = fit(bought((0, 0), (0, 1)) + views + hidden, 4, shrink=2.0)
    assert near.rows[0].tolist() == [1, 2, -1, -1, -1]


def test_only_the_latest_items_of_a_long_history_count() -> None:
    length = item_cf.LONGEST
    history = [(0, row, row, EventType.PURCHASE) for row in range(length + 1)]
    near = fit(history, length + 1)
    assert (near.rows[0] == -1).all()
    assert (near.rows[1:, 0] >= 1).all()


@pytest.mark.parametrize("interactions", [[], [(0, 1, 0, EventType.HIDE)], [(0, 1, 0, EventType.PURCHASE)]])
def test_nothing_to_learn_from_gives_an_empty_table(interactions: list[Interaction]) -> None:
    near = fit(interactions, 3)
    assert near.rows.shape == near.weights.shape == (3, 5)
    assert (near.rows == -1).all() and not near.weights.any()


KINDS = st.sampled_from([EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.DISLIKE])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 60), KINDS), max_size=60))
def test_equals_the_formula_written_out(interactions: list[Interaction]) -> None:
    near = fit(interactions, 8, k=8)
    wanted = np.zeros((6, 8))
    latest = max((day for _, _, day, kind in interactions if STRENGTH[kind]), default=0)
    for user, row, day, kind in interactions:
        wanted[user, row] = max(wanted[user, row], STRENGTH[kind] * 0.5 ** ((latest - day) / 30))
    wanted /= np.sqrt(np.maximum((wanted > 0).sum(1, keepdims=True), 1))
    gram = wanted.T @ wanted
    own = np.diag(gram)
    mean = own[own > 0].mean() if own.any() else 1.0
    expected = gram / (own[:, None] ** 0.7 * own[None, :] ** 0.3 + 0.3 * mean)
    np.fill_diagonal(expected, 0)
    expected /= np.maximum(expected.sum(1, keepdims=True), 1e-300)
    np.testing.assert_allclose(_dense(near), expected, atol=1e-5)
    assert (np.diff(near.weights, axis=1) <= 0).all(), "best first"


def _dense(near: Neighbours) -> npt.NDArray[np.float32]:
    real = near.rows >= 0
    table = sp.csr_matrix((near.weights[real], (np.nonzero(real)[0], near.rows[real])), shape=(len(near.rows),) * 2)
    dense: npt.NDArray[np.float32] = table.toarray()
    return dense


@pytest.mark.slow
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_beats_itemknn_on_online_retail() -> None:
    tables = online_retail(Path(os.environ["MILLIREC_DATASETS"], "online_retail", "online_retail.csv.gz"))
    log, cut_ms = Log.from_tables(tables), instant_ms("2011-11-09")
    items, (past, future) = listed(tables.items, log, cut_ms), log.split(cut_ms, 30)

    def pairs(part: Log) -> sp.csr_matrix:
        row = items.rows(part.events["item"])
        kept = (part.events["type"] == EventType.PURCHASE) & (row >= 0)
        shape = (len(log.users), len(items.key))
        return (sp.csr_matrix((np.ones(kept.sum()), (part.user[kept], row[kept])), shape=shape) > 0).astype(np.float32)

    row = items.rows(past.events["item"])
    near = item_cf.fit(
        Interactions(past.user, row.astype(np.int32), past.events["ts"], past.events["type"], len(items.key))
    )
    history, wanted = pairs(past), pairs(future)
    users = np.flatnonzero((np.diff(history.indptr) > 0) & (np.diff(wanted.indptr) > 0))
    seen, relevant = history[users].toarray() > 0, wanted[users].toarray() > 0
    scores = history[users] @ _dense(near)
    assert _ndcg(np.where(seen, -1.0, scores), relevant & ~seen) > 0.110
    assert _ndcg(scores, relevant) > 0.240


def _ndcg(scores: npt.NDArray[np.float32], relevant: npt.NDArray[np.bool_]) -> float:
    gain = 1 / np.log2(np.arange(2, 22))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    count = relevant.sum(1)
    ideal = np.append(0, np.cumsum(gain))[np.minimum(count, 20)]
    found = (np.take_along_axis(relevant, best, 1) * gain).sum(1)
    return float((found[count > 0] / ideal[count > 0]).mean())
