import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import (
    ALIASES,
    BOUGHT,
    EVENT,
    EXCLUDES,
    EXCLUSION,
    FOLDED,
    HIDDEN,
    Events,
    EventType,
    UserState,
    content_id,
    event_key,
    exclusions_of,
    fold,
    item_key,
    join,
    packed,
    records,
)

LINES = st.lists(
    st.tuples(st.text(min_size=1), st.integers(-5, 100_000), st.none() | st.floats(width=32, allow_nan=False)),
    max_size=4,
)


def event(ts: int, key: int, item: int = 1, kind: EventType = EventType.VIEW_ITEM) -> tuple[object, ...]:
    return ts, key, item, math.nan, 1, kind, 0


def events(*rows: tuple[object, ...]) -> Events:
    return np.array(list(rows), EVENT)


# Few times and few items: ties and repeats are what goes wrong.
HISTORIES = st.lists(
    st.builds(
        event,
        st.integers(0, 5),
        st.integers(0, 2**64 - 1),
        st.integers(-3, 3),
        st.sampled_from(EventType),
    ),
    max_size=12,
    unique_by=lambda row: row[1],
).map(lambda rows: events(*rows))


def same(a: UserState, b: UserState) -> bool:
    return (
        a.events.tobytes() == b.events.tobytes()
        and set(a.exclusions.tolist()) == set(b.exclusions.tolist())
        and len(a.exclusions) == len(b.exclusions)
        and a.profile == b.profile
    )


def test_stored_numbers_never_change() -> None:
    assert {kind.name: int(kind) for kind in EventType} == {
        "OTHER": 0,
        "VIEW_ITEM_LIST": 1,
        "SELECT_ITEM": 2,
        "VIEW_ITEM": 3,
        "ADD_TO_CART": 4,
        "REMOVE_FROM_CART": 5,
        "ADD_TO_WISHLIST": 6,
        "BEGIN_CHECKOUT": 7,
        "PURCHASE": 8,
        "REFUND": 9,
        "SEARCH": 10,
        "RATE": 11,
        "LIKE": 12,
        "DISLIKE": 13,
        "HIDE": 14,
    }
    assert (EVENT.itemsize, EXCLUSION.itemsize, HIDDEN, BOUGHT) == (32, 9, 1, 2)
    assert item_key("sku-1") == -1840803191160002099
    assert event_key("event-1", 2) == 15781190332639184894
    assert content_id("view_item", "u", None, 1_700_000_000_000, [("sku-1", 1, None)]) == "2cc80c5a56218362e2947081"


def test_every_type_is_its_own_alias() -> None:
    assert all(ALIASES[kind.name.lower()] is kind for kind in EventType if kind)


@given(st.text(min_size=1), st.sampled_from(EventType), st.integers(0, 2**42), LINES)
def test_records_hold_what_was_given(
    event_id: str, kind: EventType, ts_ms: int, lines: list[tuple[str, int, float | None]]
) -> None:
    made = records(event_id, kind, ts_ms, lines)
    assert made.tobytes() == packed(event_id, kind, ts_ms, lines)
    assert len(made) == len(lines)
    for i, (item_id, quantity, value) in enumerate(lines):
        row = made[i]
        assert (row["ts"], row["type"], row["unused"]) == (ts_ms, kind, 0)
        assert (row["event"], row["item"]) == (event_key(event_id, i), item_key(item_id))
        assert row["quantity"] == min(max(quantity, 0), 65_535)
        assert math.isnan(row["value"]) if value is None else row["value"] == value


def test_content_id_tells_any_difference() -> None:
    content = ("view_item", "u", "s", 1, [("a", 1, 2.0)], "")
    others = [
        ("like", "u", "s", 1, [("a", 1, 2.0)], ""),
        ("view_item", None, "s", 1, [("a", 1, 2.0)], ""),
        ("view_item", "u", None, 1, [("a", 1, 2.0)], ""),
        ("view_item", "u", "s", None, [("a", 1, 2.0)], ""),
        ("view_item", "u", "s", 1, [("a", 2, 2.0)], ""),
        ("view_item", "u", "s", 1, [("a", 1, None)], ""),
        ("view_item", "u", "s", 1, [("a", 1, 2.0), ("a", 1, 2.0)], ""),
        ("view_item", "u", "s", 1, [("a", 1, 2.0)], "q"),
    ]
    assert len({content_id(*each) for each in [content, *others]}) == 1 + len(others)
    assert content_id(*content) == content_id("view_item", "u", "s", 1, [("a", np.int64(1), np.float32(2.0))], "")


@given(HISTORIES, st.integers(1, 6), st.data())
def test_fold_is_a_function_of_the_set(history: Events, window: int, data: st.DataObject) -> None:
    shuffled = history[data.draw(st.permutations(range(len(history))))]
    state = UserState()
    at = 0
    while at < len(shuffled):
        # Whatever was sent before may be sent again while it is in the window; a duplicate that has left it is older.
        size = data.draw(st.integers(1, len(shuffled) - at))
        again = data.draw(st.integers(0, at))
        state = fold(state, np.concatenate([shuffled[again:at], shuffled[at : at + size]]), window)
        at += size
    assert same(state, fold(UserState(), history, window))


@given(HISTORIES, st.integers(1, 6))
def test_fold_keeps_the_last_events_and_every_exclusion(history: Events, window: int) -> None:
    state = fold(UserState(), history, window)
    kept = sorted((row for row in history.tolist() if row[5] in FOLDED), key=lambda row: (row[0], row[1]))
    assert [row[:3] for row in state.events.tolist()] == [row[:3] for row in kept[-window:]]
    assert set(state.exclusions.tolist()) == {(row[2], EXCLUDES[row[5]]) for row in kept if row[5] in EXCLUDES}


@pytest.mark.parametrize(("kind", "exclusion"), [(k, EXCLUDES.get(k)) for k in EventType])
def test_exclusions_of_each_type(kind: EventType, exclusion: int | None) -> None:
    twice = events(event(1, 1, 7, kind), event(2, 2, 7, kind))
    assert exclusions_of(twice).tolist() == ([] if exclusion is None else [(7, exclusion)])


@given(HISTORIES, st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 6))
def test_join_equals_one_history(history: Events, of_user: list[bool], window: int) -> None:
    mine = np.array(of_user[: len(history)], bool)
    # Some events are in both, as after linking a session to a user.
    shared = mine | (history["item"] > 0)
    user = fold(UserState(profile={"country": "FR", "age": "30"}), history[shared], window)
    session = fold(UserState(profile={"country": "DE", "device": "phone"}), history[~mine], window)
    both = fold(UserState(profile={"country": "FR", "age": "30", "device": "phone"}), history, window)
    assert same(join((user, session), window), both)
    assert same(join((), window), UserState())
