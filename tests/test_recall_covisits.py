import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions, Neighbours, covisits
from models.recall.session_knn import MS_PER_MINUTE

VIEW, BUY = EventType.VIEW_ITEM, EventType.PURCHASE

Event = tuple[int, int, float, EventType]


def fit(events: list[Event], n_items: int, k: int = 5) -> Neighbours:
    """Of (user, row, minute, type), in any order."""
    ordered = sorted(events, key=lambda one: (one[0], one[2]))
    user, row, minute, kind = (np.array([one[column] for one in ordered]) for column in range(4))
    ts_ms = (minute * MS_PER_MINUTE).astype(np.int64)
    past = Interactions(user.astype(np.int32), row.astype(np.int32), ts_ms, kind.astype(np.uint8), n_items)
    return covisits.fit(past, k=k)


def test_items_of_one_group_are_neighbours_and_of_two_groups_are_not() -> None:
    near = fit([(u, i, 0, VIEW) for u in range(12) for i in range(10) if u % 2 == i % 2], 10, k=6)
    for item, others in enumerate(near.rows):
        assert sorted(others) == sorted([i for i in range(10) if i % 2 == item % 2 and i != item] + [-1, -1])
    np.testing.assert_allclose(near.weights.sum(1), 1.0, rtol=1e-5)


def test_the_closer_in_time_the_nearer_either_way() -> None:
    near = fit([(0, 1, 0, VIEW), (0, 0, 1, VIEW), (0, 2, 4, VIEW)], 3)
    assert near.rows[0].tolist()[:2] == [1, 2]
    assert near.rows[2].tolist()[:2] == [0, 1]


def test_a_pause_separates_and_so_does_another_user() -> None:
    assert (fit([(0, 0, 0, VIEW), (0, 1, 31, VIEW), (1, 2, 31, VIEW)], 3).rows == -1).all()
    assert fit([(0, 0, 0, VIEW), (0, 1, 30, VIEW)], 2).rows[0, 0] == 1


def test_types_count_by_strength_and_dislikes_do_not() -> None:
    near = fit([(0, 0, 0, VIEW), (0, 1, 0, VIEW), (1, 0, 0, VIEW), (1, 2, 0, BUY), (1, 3, 0, EventType.DISLIKE)], 4)
    assert near.rows[0].tolist() == [2, 1, -1, -1, -1]


def test_what_went_together_lately_is_nearer() -> None:
    now = 300 * 1440.0
    near = fit([(0, 0, 0, VIEW), (0, 1, 0, VIEW), (1, 0, now, VIEW), (1, 2, now, VIEW)], 3)
    assert near.rows[0].tolist()[:2] == [2, 1]


def test_a_session_counts_a_pair_once_however_often_it_goes_back_and_forth() -> None:
    robot = [(0, step % 2, step / 60, VIEW) for step in range(1_000)]
    people = [(user, item, 5, VIEW) for user in (1, 2) for item in (0, 2)]
    assert fit(robot + people, 3).rows[0].tolist()[:2] == [2, 1]


@pytest.mark.parametrize("events", [[], [(0, 1, 0, EventType.HIDE)], [(0, 1, 0, BUY)], [(0, 1, 0, VIEW)] * 3])
def test_nothing_to_learn_from_gives_an_empty_table(events: list[Event]) -> None:
    near = fit(events, 3)
    assert near.rows.shape == near.weights.shape == (3, 5)
    assert (near.rows == -1).all() and not near.weights.any()


KINDS = st.sampled_from([VIEW, BUY, EventType.DISLIKE])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 200), KINDS), max_size=40),
    st.sampled_from([1, 7, covisits.AT_A_TIME]),
)
def test_equals_the_formula_written_out(events: list[Event], at_a_time: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covisits, "AT_A_TIME", at_a_time)
        near = fit(events, 8, k=8)
    wanted = sorted((event for event in events if STRENGTH[event[3]]), key=lambda one: (one[0], one[2]))
    latest = max((minute for _, _, minute, _ in wanted), default=0)
    visits, session = np.zeros((8, 8)), np.zeros((8, 8))
    for a, (user, row, minute, kind) in enumerate(wanted):
        if a == 0 or wanted[a - 1][0] != user or minute - wanted[a - 1][2] > 30:
            visits, session, begin = visits + session, np.zeros((8, 8)), a
        for _, other, earlier, kind_ in wanted[max(begin, a - covisits.LAGS) : a]:
            if other != row:
                age = 2 * latest - minute - earlier
                strength = (STRENGTH[kind] * STRENGTH[kind_] * 0.5 ** (age * MS_PER_MINUTE / DAY_MS / 120)) ** 0.5
                weight = strength * 0.5 ** ((minute - earlier) / 2)
                session[row, other] = session[other, row] = max(session[row, other], weight)
    visits += session
    total = visits.sum(1)
    if total.any():
        total += total.sum() / (total > 0).sum()
        visits /= total[:, None] ** 0.8 * total[None, :] ** 0.2
        visits /= np.maximum(visits.sum(1, keepdims=True), 1e-300)
    dense = np.zeros((8, 8))
    for row, (others, weights) in enumerate(zip(*near, strict=True)):
        dense[row, others[others >= 0]] = weights[others >= 0]
    np.testing.assert_allclose(dense, visits, atol=1e-5)
    assert (np.diff(near.weights, axis=1) <= 0).all(), "best first"
