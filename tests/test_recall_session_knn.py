import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions
from models.recall.session_knn import Baskets, fit

MINUTE_MS = 60_000

Event = tuple[int, int, float, EventType]


def interactions(events: list[Event], n_items: int) -> Interactions:
    """Of (user, row, minute, type), in any order."""
    ordered = sorted(events, key=lambda one: (one[0], one[2]))
    user, row, minute, kind = (np.array([one[column] for one in ordered]) for column in range(4))
    ts_ms = (minute * MINUTE_MS).astype(np.int64)
    return Interactions(user.astype(np.int32), row.astype(np.int32), ts_ms, kind.astype(np.uint8), n_items)


def viewed(*pairs: tuple[int, int], minute: float = 0.0) -> list[Event]:
    return [(user, row, minute, EventType.VIEW_ITEM) for user, row in pairs]


def score(table: Baskets, anchors: dict[int, float], nearest: int = 200) -> npt.NDArray[np.float64]:
    """float64 [n]: what the service computes, as the docstring of `Baskets` has it."""
    likeness, scores = np.zeros(len(table.items)), np.zeros(len(table.of_item))
    for item, weight in anchors.items():
        real = table.of_item[item] >= 0
        likeness[table.of_item[item][real]] += weight * table.of_weights[item][real]
    for basket in np.argsort(-likeness, kind="stable")[:nearest]:
        real = table.items[basket] >= 0
        scores[table.items[basket][real]] += likeness[basket] * table.weights[basket][real]
    return scores


def test_items_of_one_group_lead_to_their_group_alone() -> None:
    table = fit(interactions(viewed(*((u, i) for u in range(12) for i in range(10) if u % 2 == i % 2)), 10))
    for item in range(10):
        assert np.flatnonzero(score(table, {item: 1.0})).tolist() == list(range(item % 2, 10, 2))


def test_the_basket_that_shares_more_comes_first() -> None:
    table = fit(interactions(viewed((0, 0), (0, 1), (0, 2), (1, 0), (1, 3), (1, 4)), 5))
    scores = score(table, {0: 1.0, 1: 1.0})
    assert scores[2] > scores[3] > 0
    assert score(table, {0: 1.0, 1: 1.0}, nearest=1)[3] == 0


def test_a_pause_ends_a_session_and_without_one_a_user_is_a_basket() -> None:
    events = viewed((0, 0)) + viewed((0, 1), minute=30) + viewed((0, 2), minute=61)
    sessions, users = fit(interactions(events, 3)), fit(interactions(events, 3), idle_minutes=None)
    assert sessions.items.tolist() == [[2, -1], [1, 0]], "the latest basket comes first"
    assert users.items.tolist() == [[2, 1, 0]]


def test_rare_items_tell_more_and_what_is_bought_more_than_what_is_viewed() -> None:
    common = viewed(*((u, 0) for u in range(9)), *((u, 8) for u in range(2, 9)))
    table = fit(interactions([*common, *viewed((0, 1), (0, 2)), (1, 3, 0, EventType.PURCHASE)], 9))
    scores = score(table, {0: 1.0})
    assert scores[3] > scores[2] and scores[1] > 0
    assert score(table, {0: 1.0, 1: 1.0})[2] > score(table, {0: 2.0})[2]


def test_limits_keep_the_latest_baskets_and_the_weightiest_items() -> None:
    events = [event for day in range(6) for event in viewed((day, 0), (day, 1 + day), minute=day * 1440.0)]
    events.append((0, 7, 1.0, EventType.PURCHASE))
    table = fit(interactions(events, 8), baskets_of_item=2, items_of_basket=1)
    assert table.of_item[0].tolist() == [0, 1]
    assert (np.diff(table.of_weights[0]) < 0).all()
    # Items 1 and 7 still lead to the first user's basket, of which the purchase is left.
    assert table.of_item[1].tolist() == table.of_item[7].tolist() == [len(table.items) - 1, -1]
    assert table.items[-1].tolist() == [7]


def test_baskets_that_nothing_leads_to_are_left_out() -> None:
    table = fit(interactions([event for u in range(5) for event in viewed((u, 0), minute=u)], 1), baskets_of_item=3)
    assert table.of_item.tolist() == [[0, 1, 2]]
    assert len(table.items) == len(table.weights) == 3


@pytest.mark.parametrize("events", [[], [(0, 1, 0, EventType.HIDE)]])
@pytest.mark.parametrize("idle_minutes", [30.0, None])
def test_nothing_to_learn_from_gives_no_baskets(events: list[Event], idle_minutes: float | None) -> None:
    table = fit(interactions(events, 3), idle_minutes=idle_minutes)
    assert (table.of_item == -1).all() and len(table.of_item) == 3
    assert len(table.items) == 0
    assert not score(table, {0: 1.0}).any()


def test_one_item_leads_to_itself() -> None:
    assert score(fit(interactions(viewed((0, 0)), 1)), {0: 1.0})[0] > 0


KINDS = st.sampled_from([EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.DISLIKE])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 40_000), KINDS), max_size=60),
    st.dictionaries(st.integers(0, 7), st.floats(0.1, 2.0), max_size=4),
)
def test_equals_the_formula_written_out(events: list[Event], anchors: dict[int, float]) -> None:
    wanted = np.zeros((6, 8))
    latest = max((minute for _, _, minute, kind in events if STRENGTH[kind]), default=0)
    for user, row, minute, kind in events:
        decay = 0.5 ** ((latest - minute) * MINUTE_MS / DAY_MS / 120)
        wanted[user, row] = max(wanted[user, row], STRENGTH[kind] * decay)
    count, size = np.maximum((wanted > 0).sum(0), 1), np.maximum((wanted > 0).sum(1), 1)
    wanted /= count**0.25
    query = np.array([anchors.get(row, 0.0) for row in range(8)])
    expected = (wanted @ query / np.sqrt(size)) @ wanted
    table = fit(interactions(events, 8), idle_minutes=None)
    np.testing.assert_allclose(score(table, anchors), expected, rtol=1e-5, atol=1e-7)
    assert (np.diff(table.weights, axis=1) <= 0).all(), "best first"


@pytest.mark.slow
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_foresees_the_next_click_of_retailrocket_sessions() -> None:
    folder = Path(os.environ["MILLIREC_DATASETS"], "sessions_retailrocket")
    sessions = pl.read_parquet(folder / "train_sessions.parquet")["items"]
    length = sessions.list.len().to_numpy()
    user = np.repeat(np.arange(len(length), dtype=np.int32), length)
    row = sessions.explode().to_numpy().astype(np.int32)
    # The sessions are in the order of time and have no times; they are of four months.
    ts_ms = user.astype(np.int64) * (131 * DAY_MS // len(length))
    past = Interactions(user, row, ts_ms, np.full(len(row), EventType.VIEW_ITEM, np.uint8), int(row.max()) + 1)
    table = fit(past)
    test = pl.read_parquet(folder / "test.parquet")[::5]
    ranks = []
    for prefix, label in test.iter_rows():
        anchors: dict[int, float] = {}
        for age, item in enumerate(reversed(prefix)):
            anchors[item] = anchors.get(item, 0.0) + 0.72**age
        scores = score(table, anchors)
        best = np.argsort(-scores, kind="stable")[:20]
        ranks.append(np.flatnonzero(best[scores[best] > 0] == label))
    assert np.mean([len(rank) > 0 for rank in ranks]) > 0.57
    assert np.mean([1 / (rank[0] + 1) if len(rank) else 0 for rank in ranks]) > 0.28
