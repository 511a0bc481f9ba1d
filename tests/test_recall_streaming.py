"""Histories that are learned from in parts."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.recall import Interactions, gru4rec, sasrec, streaming, two_tower
from models.recall.item_cf import user_items
from models.recall.streaming import forever, spilled
from tests.sequences import HISTORY, ITEMS, circle, scores, small_steps


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PART", 8)


@pytest.mark.usefixtures("small_parts")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_everything_chosen_is_in_one_part_and_all_of_a_user_in_the_same(events: list[tuple[int, bool]]) -> None:
    user = np.sort(np.array([one for one, _ in events], np.int32))
    chosen = np.array([taken for _, taken in events], bool)
    number = np.arange(len(user))
    past = Interactions(user, number.astype(np.int32), number * 10, (number % 200).astype(np.uint8), 60)
    with spilled(past, chosen, seed=3) as parts:
        found = [parts[index] for index in range(len(parts))]
    assert len(found) == max(1, -(-int(chosen.sum()) // 8))
    assert sorted(row for part in found for row in part.row.tolist()) == number[chosen].tolist()
    owners = [set(part.user.tolist()) for part in found]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for part in found:
        assert part.row.tolist() == sorted(part.row.tolist())
        for column, whole in zip(part[:4], past[:4], strict=True):
            assert column.dtype == whole.dtype
            assert column.tolist() == whole[part.row].tolist()


@pytest.mark.parametrize("taken", [1, 4, 5, 9, 10, 23, 40])
def test_passes_see_everything_and_go_on_where_they_were(taken: int) -> None:
    past = Interactions(*(np.arange(12, dtype=kind) for kind in (np.int32, np.int32, np.int64, np.uint8)), n_items=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "PART", 6)
        with spilled(past, np.ones(12, bool), seed=0) as parts:

            def begun(rng: np.random.Generator, position: dict[str, Any]) -> Any:
                return forever(parts, lambda index: rng.permutation(5).tolist(), rng, position)

            rng, position = np.random.default_rng(7), dict[str, Any]()
            passes, seen = begun(rng, position), []
            for _ in range(taken):
                seen.append((*next(passes), rng.random()))
            state, saved = rng.bit_generator.state, json.dumps(position)
            rest = [(*next(passes), rng.random()) for _ in range(30)]
            again = np.random.default_rng()
            again.bit_generator.state = state
            resumed = begun(again, json.loads(saved))
            assert [(*next(resumed), again.random()) for _ in range(30)] == rest
            whole = [(part, batch) for part, batch, _ in seen + rest]
            assert sorted(whole[:10]) == [(part, batch) for part in range(2) for batch in range(5)]
            assert sorted(whole[10:20]) == sorted(whole[:10]) and whole[10:20] != whole[:10]


@pytest.mark.parametrize("model", [sasrec, gru4rec])
def test_the_rule_is_learned_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PART", 1500)
    with small_steps():
        fitted = model.fit(circle(), history=HISTORY)
    best = scores([[last] for last in range(ITEMS)], fitted)
    assert best.argmax(1).tolist() == [(last + 1) % ITEMS for last in range(ITEMS)]


def like(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    product: npt.NDArray[np.float32] = vectors @ vectors.T
    return product


def test_the_start_of_the_towers_is_the_same_in_parts() -> None:
    past = circle(90, 7)
    past = past._replace(row=np.random.default_rng(0).integers(0, ITEMS, len(past.row)).astype(np.int32))
    matrix = user_items(past, two_tower.HALF_LIFE_DAYS)
    whole, parts = (
        two_tower._spectral(rows, 64, np.random.default_rng(0))
        for rows in ([matrix], [matrix[:20], matrix[20:], matrix[:0]])
    )
    np.testing.assert_allclose(like(parts), like(whole), atol=1e-4)
