import gzip
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.recall import STRENGTH, Interactions, Neighbours, transitions

DAY_MS = 86_400_000

Interaction = tuple[int, int, int, EventType]


def logged(interactions: list[Interaction], n_items: int) -> Interactions:
    """Of (user, row, day, type), in any order."""
    ordered = sorted(interactions, key=lambda one: (one[0], one[2]))
    user, row, day, kind = (np.array([one[column] for one in ordered], np.int64) for column in range(4))
    return Interactions(user.astype(np.int32), row.astype(np.int32), day * DAY_MS, kind.astype(np.uint8), n_items)


def bought(*sequences: list[int], day: int = 0) -> list[Interaction]:
    """One user each, an item a day from `day` on."""
    return [
        (user, row, day + place, EventType.PURCHASE)
        for user, sequence in enumerate(sequences)
        for place, row in enumerate(sequence)
    ]


def test_the_next_item_comes_first_then_the_next_but_one() -> None:
    circle = [[(start + place) % 8 for place in range(6)] for start in range(8)]
    near = transitions.fit(logged(bought(*circle), 8), k=3)
    for item, others in enumerate(near.rows):
        assert others.tolist() == [(item + 1) % 8, (item + 2) % 8, (item + 3) % 8]


def test_the_way_back_counts_less() -> None:
    near = transitions.fit(logged(bought([0, 1, 2], [2, 1, 0], [0, 1]), 3), k=2, step_decay=0.5)
    assert near.rows[0].tolist() == [1, 2]
    assert near.weights[0, 0] > near.weights[1].max(), "more went from 0 to 1 than back"
    assert not transitions.fit(logged(bought([0, 1]), 2), k=1, backward=0.0).weights[1].any()


def test_events_of_equal_times_follow_in_their_order() -> None:
    sequences = bought([0, 1, 2, 3], [3, 1, 0])
    ordered = [(user, row, 0, kind) for user, row, _, kind in sequences]
    for a, b in zip(transitions.fit(logged(sequences, 4)), transitions.fit(logged(ordered, 4)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.1)


def test_what_lies_far_apart_or_in_another_history_is_no_transition() -> None:
    near = transitions.fit(logged(bought([0, 1, 2, 3], [4, 5]), 6), k=6, steps=2)
    assert set(near.rows[0]) == {-1, 1, 2}
    assert set(near.rows[3]) == {-1, 1, 2}
    assert set(near.rows[4]) == {-1, 5}


def test_what_people_go_on_to_lately_is_nearer() -> None:
    old, new = bought([0, 1]), [(user + 1, row, day + 90, kind) for user, row, day, kind in bought([0, 2])]
    assert transitions.fit(logged(old + new, 3), k=2).rows[0].tolist() == [2, 1]


@pytest.mark.parametrize("interactions", [[], bought([0]), bought([0], [1]), bought([2, 2, 2])])
def test_nothing_to_learn_from_gives_an_empty_table(interactions: list[Interaction]) -> None:
    near = transitions.fit(logged(interactions, 3), k=5)
    assert near.rows.shape == near.weights.shape == (3, 5)
    assert (near.rows == -1).all() and not near.weights.any()


KINDS = st.sampled_from([EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.DISLIKE])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 400), KINDS), max_size=40))
def test_equals_the_formula_written_out(interactions: list[Interaction]) -> None:
    past = logged(interactions, 6)
    near = transitions.fit(past, k=6, steps=3, step_decay=0.6, backward=0.3, half_life_days=50)
    histories = [
        [(row, ts_ms / DAY_MS, STRENGTH[kind]) for of, row, ts_ms, kind in zip(*past[:4], strict=True) if of == user]
        for user in range(4)
    ]
    histories = [[event for event in history if event[2]] for history in histories]
    latest = max((day for history in histories for _, day, _ in history), default=0)
    count = np.zeros((6, 6))
    for history in histories:
        for place, (row, day, strength) in enumerate(history):
            for step in range(1, min(3, place) + 1):
                before, _, strength_before = history[place - step]
                age = max(0.5 ** ((latest - day) / 50), 0.5**8)
                count[before, row] += (
                    strength_before * strength * 0.6 ** (step - 1) * age / np.sqrt(1 + len(history) / 30)
                )
    np.fill_diagonal(count, 0)
    count = count + 0.3 * count.T
    leaving, entering = count.sum(1), count.sum(0)
    floor = 3 * leaving[leaving > 0].mean() if count.any() else 1.0
    expected = count / np.outer((leaving + floor) ** 0.5, (entering + floor) ** 0.2)
    np.testing.assert_allclose(_dense(near), expected, rtol=1e-4, atol=1e-7)
    assert (np.diff(near.weights, axis=1) <= 0).all(), "best first"


def _dense(near: Neighbours) -> npt.NDArray[np.float32]:
    real = near.rows >= 0
    table = sp.csr_matrix((near.weights[real], (np.nonzero(real)[0], near.rows[real])), shape=(len(near.rows),) * 2)
    dense: npt.NDArray[np.float32] = table.toarray()
    return dense


@pytest.mark.slow
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_beats_actionpiece_on_beauty() -> None:
    path = Path(os.environ["MILLIREC_DATASETS"], "amazon_s3rec", "Beauty.txt.gz")
    with gzip.open(path, "rt") as file:
        sequences = [np.array(line.split()[1:], int) - 1 for line in file]
    n_items = 1 + max(sequence.max() for sequence in sequences)
    table = _dense(transitions.fit(logged(bought(*(sequence[:-2].tolist() for sequence in sequences)), n_items)))
    ranks = []
    for *past, target in sequences:
        score = 0.55 ** np.arange(len(past))[::-1] @ table[past]
        score[past] = -1
        ranks.append(int((score >= score[target]).sum()))
    rank = np.array(ranks)
    # As published of a network that generates the next item (Hou et al., ICML 2025).
    assert (rank <= 10).mean() > 0.0775
    assert np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean() > 0.0424
