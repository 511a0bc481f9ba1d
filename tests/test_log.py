"""The log holds what the service would hold."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.state.events import ALIASES, EVENT, Events, EventType, UserState, fold, item_key, records
from models.data import Report, Tables, canonical
from models.data.log import Log, event_records, item_keys
from models.data.tables import EVENTS

NOW_MS = 1_700_000_000_000

# Few users, items and times, so that ties, repeats and orders of several lines come about.
ROWS = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["a", "b", "ü", "d"]),
        "item_id": st.sampled_from(["1", "2", "3", "item é"]),
        "type": st.sampled_from([kind.name.lower() for kind in EventType] + ["zap"]),
        "timestamp": st.integers(NOW_MS - 5, NOW_MS),
        "value": st.none() | st.floats(0.01, 1e6),
        "quantity": st.integers(1, 100_000),
        "event_id": st.sampled_from([None, "x", "y", "z", "é"]),
    }
)
HISTORIES = st.lists(ROWS, min_size=1, max_size=40)


def tables_of(rows: list[dict[str, object]]) -> Tables:
    usable = {"user_id": "a", "item_id": "1", "type": "like", "timestamp": NOW_MS - 3}
    users = pl.DataFrame({"user_id": ["a", "silent"], "country": ["UK", "FR"]})
    frame = pl.DataFrame([*rows, usable], schema=EVENTS)
    return canonical(frame, users=users, source="test", now_ms=NOW_MS)


def by_hand(tables: Tables) -> dict[str, list[Events]]:
    """What POST /events makes of each event, by user."""
    made: dict[str, list[Events]] = {}
    for (event_id, user), lines in tables.events.group_by("event_id", "user_id", maintain_order=True):
        kind = ALIASES.get(lines["type"][0], EventType.OTHER)
        content = list(lines.select("item_id", "quantity", "value").iter_rows())
        made.setdefault(str(user), []).append(records(str(event_id), kind, lines["timestamp"][0], content))
    return made


@settings(deadline=None, max_examples=40)
@given(HISTORIES)
def test_records_are_those_of_the_service(rows: list[dict[str, object]]) -> None:
    tables = tables_of(rows)
    service = np.concatenate([record for made in by_hand(tables).values() for record in made])
    offline = event_records(tables.events)
    assert np.sort(offline, order="event").tobytes() == np.sort(service, order="event").tobytes()
    assert offline["ts"].tolist() == tables.events["timestamp"].to_list()


@settings(deadline=None, max_examples=60)
@given(HISTORIES, st.integers(NOW_MS - 6, NOW_MS + 1), st.integers(1, 6), st.lists(st.integers(0, 20), max_size=6))
def test_states_are_what_fold_makes(rows: list[dict[str, object]], cut_ms: int, window: int, picks: list[int]) -> None:
    tables = tables_of(rows)
    log, made = Log.from_tables(tables), by_hand(tables)
    chosen = [pick % len(log.users) for pick in picks]
    for users, states in (
        (range(len(log.users)), log.states(cut_ms, window)),
        (chosen, log.states(cut_ms, window, chosen)),
    ):
        for row, state in zip(users, states, strict=True):
            history = np.concatenate([np.empty(0, EVENT), *made.get(log.users[row], [])])
            folded = fold(UserState(), history[history["ts"] < cut_ms], window)
            assert state.events.tobytes() == folded.events.tobytes()
            assert state.exclusions.tolist() == folded.exclusions.tolist()
            assert state.profile == ({"country": "UK"} if log.users[row] == "a" else state.profile)


@settings(deadline=None, max_examples=20)
@given(HISTORIES, st.integers(NOW_MS - 6, NOW_MS + 1))
def test_parts_of_a_log_add_up(rows: list[dict[str, object]], cut_ms: int) -> None:
    log = Log.from_tables(tables_of(rows))
    train, test = log.split(cut_ms, test_days=1)
    assert train.users == test.users == log.users
    assert (train.events["ts"] < cut_ms).all()
    assert (test.events["ts"] >= cut_ms).all()
    assert len(train.events) + len(test.events) == len(log.events)
    for part in (log, train, test):
        starts = part.starts()
        assert (starts[0], starts[-1], len(starts)) == (0, len(part.events), len(part.users) + 1)
        for row in range(len(part.users)):
            mine = slice(starts[row], starts[row + 1])
            assert (part.user[mine] == row).all()
            order = list(zip(part.events["ts"][mine], part.events["event"][mine], strict=True))
            assert order == sorted(order)


def test_test_window_ends() -> None:
    times = [0, 1, 86_400_000, 86_400_001]
    log = Log(["u"], [{}], np.zeros(4, np.int32), np.array([(ts, ts, 0, 0, 1, 3, 0) for ts in times], EVENT))
    train, test = log.split(1, test_days=1)
    assert train.events["ts"].tolist() == [0]
    assert test.events["ts"].tolist() == [1, 86_400_000]


def test_profiles_are_the_users_attributes() -> None:
    log = Log.from_tables(tables_of([]))
    assert dict(zip(log.users, log.profiles, strict=True)) == {"a": {"country": "UK"}, "silent": {"country": "FR"}}
    silent = log.states(NOW_MS, 3)[log.users.index("silent")]
    assert (len(silent.events), len(silent.exclusions), silent.profile) == (0, 0, {"country": "FR"})


def test_item_keys_keep_the_order() -> None:
    ids = ["b", "a", "b", "ü"]
    assert item_keys(pl.Series(ids)).tolist() == [item_key(item) for item in ids]


def test_event_of_a_user_who_is_not_there_is_an_error() -> None:
    tables = tables_of([])
    nobody = tables.users.filter(pl.col("user_id") == "silent")
    with pytest.raises(pl.exceptions.InvalidOperationError):
        Log.from_tables(Tables(tables.events, tables.items, nobody, Report("test", {}, {})))
    assert json.loads(nobody["attributes"][0]) == {"country": "FR"}
