import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.recall import Interactions
from models.recall.moments import TARGETS, Moments, held_out

HOUR_MS = 3_600_000
SIZE = 6


def sets(users: int = 4) -> Interactions:
    """Users who bought six items at once, a millisecond apart."""
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(users, dtype=np.int32), SIZE)
    row = np.concatenate([rng.permutation(20)[:SIZE] for _ in range(users)]).astype(np.int32)
    kind = np.full(len(user), EventType.PURCHASE, np.uint8)
    return Interactions(user, row, np.tile(np.arange(SIZE, dtype=np.int64), users), kind, 20)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 5), st.sampled_from([3, 8, 14])),
        min_size=1,
        max_size=40,
    )
)
def test_history_lies_before_the_targets_and_is_of_the_same_user(events: list[tuple[int, int, int, int]]) -> None:
    ordered = sorted(events, key=lambda event: (event[0], event[2]))
    user, row, hour, kind = (np.array([event[column] for event in ordered]) for column in range(4))
    logged = Interactions(
        user.astype(np.int32), row.astype(np.int32), hour * HOUR_MS, kind.astype(np.uint8), n_items=10
    )
    moments = Moments(logged, history=4, sets=False)
    everything = torch.arange(len(moments.now))
    past, kinds, ages_s = moments.before(everything)
    wanted, strength = moments.after(everything)
    assert ((wanted >= 0).any(1)).all(), "every moment has something to foresee"
    for index in range(len(moments.now)):
        of_user, now_ms = int(moments.user[index]), int(moments.ts_ms[index])
        mine = [event for event in ordered if event[0] == of_user]
        before = [event for event in mine if event[2] * HOUR_MS < now_ms][-4:]
        after = [event for event in mine if event[2] * HOUR_MS >= now_ms][:TARGETS]
        real = past[index] >= 0
        assert past[index][real].tolist() == [event[1] for event in before]
        assert kinds[index][real].tolist() == [event[3] for event in before]
        assert ages_s[index][real].tolist() == [(now_ms - event[2] * HOUR_MS) / 1000 for event in before]
        assert not kinds[index][~real].any()
        targets = wanted[index][wanted[index] >= 0].tolist()
        assert sorted(targets) == sorted({event[1] for event in after if event[3] != EventType.HIDE})
        assert (strength[index][wanted[index] >= 0] > 0).all()


def test_a_set_is_told_from_all_of_it_and_to_be_tested_its_end_from_the_rest() -> None:
    past = sets().where(np.s_[:SIZE])
    every = torch.tensor([0])
    history, kinds, ages_s = (column[0].tolist() for column in Moments(past, 8, sets=True).before(every))
    assert history == [-1, -1, *past.row]
    assert kinds == [0, 0] + [EventType.PURCHASE] * 6
    assert ages_s == pytest.approx([0.0, 0.0, 0.005, 0.004, 0.003, 0.002, 0.001, 0.0])
    rows, strength = (column[0].tolist() for column in Moments(past, 8, sets=True).after(every))
    assert rows == sorted(past.row) and strength == [2.0] * 6
    tested = Moments(past, 8, sets=True, tested=True)
    assert tested.before(every)[0][0].tolist() == [-1] * 4 + past.row[:4].tolist()
    rows, strength = (column[0].tolist() for column in tested.after(every))
    assert rows == sorted(past.row), "what is known is no negative"
    assert {row for row, wanted in zip(rows, strength, strict=True) if wanted} == set(past.row[4:].tolist())


def test_lines_within_a_second_are_one_basket() -> None:
    past = sets()._replace(ts_ms=np.tile(np.array([0, 999, 1998, 2998, 2999, 5000]), 4))
    assert Moments(past.where(np.s_[:SIZE]), 8, sets=False).now.tolist() == [0, 3, 5]


def test_of_a_held_out_set_only_the_end_is_not_learned() -> None:
    past = sets()
    past.ts_ms[past.user == 2] = 86_400_000 * np.arange(6)
    held = held_out(past, (past.user == 1) | (past.user == 2))
    assert np.flatnonzero(held).tolist() == [10, 11, *range(12, 18)], "who has an order is held out whole"
