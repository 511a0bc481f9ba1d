import numpy as np
import pytest

from app.engine.batch import profile_codes
from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import Interactions, lists

VIEW, CART, BUY = EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE
NOW_MS = 100 * DAY_MS

Event = tuple[int, int, float, EventType]


def interactions(events: list[Event], n_items: int) -> Interactions:
    """Of (user, row, days ago, type), in any order."""
    ordered = sorted(events, key=lambda one: (one[0], -one[2]))
    user, row, ago, kind = (np.array([one[column] for one in ordered]) for column in range(4))
    ts_ms = NOW_MS - (ago * DAY_MS).astype(np.int64)
    return Interactions(user.astype(np.int32), row.astype(np.int32), ts_ms, kind.astype(np.uint8), n_items)


def of(made: lists.Lists, group: int) -> list[int]:
    rows = made.rows[np.flatnonzero(made.groups == group)[0]]
    return rows[rows >= 0].tolist()


def test_popular_counts_each_user_once_an_item_and_type_and_forgets() -> None:
    events = [(0, 0, 0, BUY), (0, 0, 5, BUY), (0, 0, 9, BUY), (1, 1, 0, BUY), (2, 1, 10, BUY), (3, 2, 0, VIEW)]
    made = lists.popular(interactions(events, 4), now_ms=NOW_MS, half_life_days=10, k=5)
    assert made.groups.tolist() == [lists.EVERYONE]
    assert made.rows.tolist() == [[1, 0, 2, -1, -1]]
    np.testing.assert_allclose(made.scores, [[3.0, 2.0, 0.05, 0.0, 0.0]])


def test_many_views_are_less_than_a_purchase() -> None:
    events = [(user, 0, 0, VIEW) for user in range(30)] + [(0, 1, 0, BUY)]
    assert lists.popular(interactions(events, 2), now_ms=NOW_MS).rows[0, :2].tolist() == [1, 0]


def test_new_items_come_first() -> None:
    created_ms = np.array([3, 0, 7, 5]) * DAY_MS
    assert lists.new(created_ms, k=3).rows.tolist() == [[2, 3, 0]]


def test_a_category_lists_its_own_items_and_a_parent_those_of_its_children() -> None:
    events = [(user, row, 0, BUY) for row in range(5) for user in range(row + 1)]
    # Item 4 has no category; the path of item 3 runs in a circle.
    category = np.array([[0, 1, -1], [0, 2, -1], [0, 2, -1], [3, 2, 3], [-1, -1, -1], [4, -1, -1]], np.int32)
    made = lists.by_category(interactions(events, 6), category, now_ms=NOW_MS, k=3)
    assert made.groups.tolist() == [-1, 0, 1, 2, 3, 4]
    assert [of(made, group) for group in range(-1, 5)] == [[4, 3, 2], [2, 1, 0], [0], [3, 2, 1], [3], []]


def test_a_segment_lists_what_it_wants_more_than_others_do() -> None:
    profiles = [{"age_band": "18-24" if user < 200 else "65+", "region": "north"} for user in range(400)]
    # Everyone buys item 0; the young item 1, the old item 2.
    events = [(user, item, 0, BUY) for user in range(400) for item in (0, 1 if user < 200 else 2)]
    made = lists.by_segment(interactions(events, 3), profiles, now_ms=NOW_MS, k=3)
    young, north = profile_codes(profiles[0], 2)
    old = profile_codes(profiles[-1], 1)[0]
    assert made.groups[1:].tolist() == sorted([young, old, north])
    assert of(made, lists.EVERYONE) == of(made, north) == [0, 1, 2]
    assert of(made, young) == [1, 0, 2] and of(made, old) == [2, 0, 1]
    share, bought = np.array([2, 1, 1]) / 4, 2.0 * np.array([200, 200, 0])
    own = (bought + lists.PRIOR * share) / (bought.sum() + lists.PRIOR)
    np.testing.assert_allclose(made.scores[made.groups == young][0], (own**2 / share)[[1, 0, 2]], rtol=1e-5)
    np.testing.assert_allclose(made.scores[0], share, rtol=1e-5)


def test_an_attribute_of_few_users_is_no_segment() -> None:
    profiles = [{"name": f"user {user}", "plan": "free"} for user in range(lists.FEWEST_USERS)]
    made = lists.by_segment(interactions([(0, 0, 0, BUY)], 1), profiles, now_ms=NOW_MS)
    assert made.groups.tolist() == [-1, profile_codes({"plan": "free"}, 1)[0]]


@pytest.mark.parametrize("events", [[], [(0, 1, 0, EventType.HIDE)]])
def test_nothing_to_learn_from_gives_empty_lists(events: list[Event]) -> None:
    past = interactions(events, 3)
    category, profiles = np.zeros((3, 1), np.int32), [{"plan": "free"}] * 50
    for made in (
        lists.popular(past, now_ms=NOW_MS, k=4),
        lists.by_category(past, category, now_ms=NOW_MS, k=4),
        lists.by_segment(past, profiles, now_ms=NOW_MS, k=4),
    ):
        assert made.groups[0] == lists.EVERYONE
        assert made.rows.shape == made.scores.shape == (len(made.groups), 4)
        assert (made.rows == -1).all() and not made.scores.any()


def test_users_beyond_the_profiles_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"user 2.*2 profiles"):
        lists.by_segment(interactions([(2, 0, 0, BUY)], 1), [{}, {}], now_ms=NOW_MS)
