import io
import math
from collections.abc import Sequence

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, P, Qrel, R, ScoredDoc, Success, nDCG
from rich.console import Console

from models.metrics import (
    Catalog,
    Interval,
    Row,
    bootstrap,
    evaluate,
    gap,
    gini,
    markdown,
    paired_bootstrap,
    shares,
    table,
)

REFERENCE = {"precision": P, "recall": R, "ndcg": nDCG, "hr": Success, "mrr": RR}


def ints(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, np.int64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """Slates of up to 12 slots, short ones and empty ones among them, and relevant items, some not on any slate."""
    users, width = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    item = st.sampled_from([*range(20), -7, 2**62, -(2**63)])
    slates = np.full((users, width), -1, np.int64)
    for row in slates:
        listed = draw(st.lists(item, max_size=width, unique=True))
        row[: len(listed)] = listed
    relevant = [np.array(draw(st.lists(st.one_of(item, st.integers(100, 110)), max_size=15)), np.int64) for _ in slates]
    return slates, relevant


@settings(deadline=None)
@given(cases())
def test_agrees_with_ir_measures(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    slates, relevant = case
    ks = sorted({1, (slates.shape[1] + 1) // 2, slates.shape[1]})
    scores = evaluate(slates, relevant, ks)
    assert scores.users.tolist() == [user for user, items in enumerate(relevant) if len(items)]
    qrels = [Qrel(str(user), str(item), 1) for user, items in enumerate(relevant) for item in set(items.tolist())]
    run = [
        ScoredDoc(str(user), str(item), -rank)
        for user, row in enumerate(slates.tolist())
        for rank, item in enumerate(row)
        if item != -1
    ]
    measures = {f"{name}@{k}": measure @ k for name, measure in REFERENCE.items() for k in ks}
    theirs = {
        (str(metric.measure), metric.query_id): metric.value
        for metric in ir_measures.iter_calc(list(measures.values()), qrels, run)
    }
    for name, measure in measures.items():
        for user, value in zip(scores.users.tolist(), scores.per_user[name].tolist(), strict=True):
            # The reference leaves out users with nothing listed; they count as misses.
            assert value == pytest.approx(theirs.get((str(measure), str(user)), 0.0)), name


@settings(deadline=None)
@given(cases())
def test_f1_is_the_harmonic_mean(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    scores = evaluate(*case, ks=[1])
    precision, recall = scores.per_user["precision@1"], scores.per_user["recall@1"]
    for p, r, f1 in zip(precision.tolist(), recall.tolist(), scores.per_user["f1@1"].tolist(), strict=True):
        assert f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)


def test_values_by_hand() -> None:
    scores = evaluate(ints([5, 3, 8, -1], [1, 2, 3, 4]), [ints([3, 8, 900])[0], ints([])[0]], [2, 4])
    assert scores.users.tolist() == [0]
    assert scores["precision@2"] == 1 / 2
    assert scores["precision@4"] == 2 / 4
    assert scores["recall@4"] == 2 / 3
    assert scores["mrr@4"] == 1 / 2
    gain, ideal = 1 / math.log2(3) + 1 / 2, 1 + 1 / math.log2(3) + 1 / 2
    assert scores["ndcg@4"] == pytest.approx(gain / ideal)


@settings(deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9), st.sets(st.integers(0, 8), min_size=1, max_size=8))
def test_auc_counts_ordered_pairs_and_expects_the_rest(order: list[int], known: int, wanted: set[int]) -> None:
    slate = np.full((1, 10), -1, np.int64)
    slate[0, :known] = order[:known]
    catalog = Catalog(np.ones(9, np.int64))
    auc = evaluate(slate, [np.array(sorted(wanted))], [10], catalog)["auc@10"]
    place = {item: min(rank, known) for rank, item in enumerate(order)}
    pairs = [(place[good], place[bad]) for good in wanted for bad in set(order) - wanted]
    expected = sum((good < bad) + 0.5 * (good == bad) for good, bad in pairs) / len(pairs)
    assert auc == pytest.approx(expected)


def test_auc_is_unknown_when_everything_is_relevant() -> None:
    catalog = Catalog(np.ones(2, np.int64))
    assert math.isnan(evaluate(ints([0, 1]), [ints([0, 1])[0]], [2], catalog)["auc@2"])


def test_list_quality_by_hand() -> None:
    interactions = np.array([70, 10, 10, 8, 2, 0])
    vectors = np.array([[1, 0], [0, 2], [3, 0], [0, 0], [-1, 0], [1, 1]], np.float32)
    slates = ints([0, 1, 2, -1], [3, 4, 5, 0], [4, -1, -1, -1], [-1, -1, -1, -1])
    scores = evaluate(slates, [np.array([0])] * 4, [3], Catalog(interactions, vectors, np.array([1, 1, 2, 2, 2, 2])))
    information = -np.log2(np.array([70, 10, 10, 8, 2, 1]) / 100)
    assert scores.per_user["novelty@3"][:3] == pytest.approx(
        [information[:3].mean(), information[3:].mean(), information[4]]
    )
    # The head is items 0 and 1: exactly 80 of 100.
    assert scores.per_user["long_tail@3"][:3] == pytest.approx([1 / 3, 1, 1])
    assert scores.per_user["diversity@3"][:2] == pytest.approx([1 - 1 / 3, 1 + math.sqrt(0.5) / 3])
    assert math.isnan(scores.per_user["diversity@3"][2])
    assert all(math.isnan(scores.per_user[name][3]) for name in ("novelty@3", "long_tail@3", "diversity@3"))
    assert scores["diversity@3"] == pytest.approx((2 / 3 + 1 + math.sqrt(0.5) / 3) / 2)
    assert scores["coverage@3"] == 1.0

    scores = evaluate(slates, [np.array([0])] * 4, [3], Catalog(interactions, categories=np.array([1, 1, 2, 2, 2, 2])))
    assert scores.per_user["diversity@3"][:2] == pytest.approx([2 / 3, 0])
    assert evaluate(slates[:1], [np.array([0])], [2], Catalog(interactions))["coverage@2"] == 2 / 6


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_the_head_is_the_smallest_that_reaches_four_fifths(interactions: list[int]) -> None:
    every = np.arange(len(interactions))
    catalog = Catalog(np.array(interactions))
    tail = evaluate(every[:, None], [np.array([0])] * len(every), [1], catalog).per_user["long_tail@1"]
    head = [count for count, outside in zip(interactions, tail.tolist(), strict=True) if not outside]
    assert 5 * sum(head) >= 4 * sum(interactions)
    assert not head or 5 * (sum(head) - min(head)) < 4 * sum(interactions)
    assert all(
        count <= min(head) for count, outside in zip(interactions, tail.tolist(), strict=True) if head and outside
    )


@pytest.mark.parametrize(
    ("slates", "relevant", "ks", "says"),
    [
        (ints([1, 2]), [], [2], "1 slates for 0 users"),
        (ints([1, 2]), [np.array([1])], [3], "do not fit slates of 2"),
        (ints([1, 2]), [np.array([1])], [0], "do not fit"),
        (ints([1, 1]), [np.array([1])], [2], "twice"),
        (ints([1, -1]), [np.array([-1])], [2], "empty slot"),
    ],
)
def test_refuses(slates: np.ndarray, relevant: list[np.ndarray], ks: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(slates, relevant, ks)


def test_nobody_to_score() -> None:
    scores = evaluate(ints([0, 1]), [ints([])[0]], [2], Catalog(np.array([1, 0])))
    assert math.isnan(scores["ndcg@2"])
    assert scores["coverage@2"] == 0
    assert all(math.isnan(end) for end in bootstrap(scores.per_user["ndcg@2"]))


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = bootstrap(rng.exponential(size=100), n=200, seed=seed)
        covered += low <= 1.0 <= high
    assert 175 <= covered <= 199


def test_bootstrap_leaves_out_the_unknown_and_repeats_by_seed() -> None:
    values = np.random.default_rng(0).normal(size=50)
    with_holes = np.insert(values, [3, 20], np.nan)
    assert bootstrap(with_holes, seed=5) == bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) != bootstrap(values, seed=6)


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    worse = rng.uniform(size=300)
    better = worse + 0.01 + rng.normal(scale=0.02, size=300)
    assert bootstrap(better).low < bootstrap(worse).high
    low, high = paired_bootstrap(better, worse)
    assert 0 < low < 0.01 < high < 0.02
    assert paired_bootstrap(worse, worse) == Interval(0.0, 0.0)
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(better, worse[1:])


def test_gini_by_hand() -> None:
    assert gini(np.array([3, 3, 3, 3])) == 0
    assert gini(np.array([0, 7, 0, 0])) == pytest.approx(3 / 4)
    # Pairwise differences: 2 (1 + 2 + 1) over 2 * 3 * 6.
    assert gini(np.array([3, 1, 2])) == pytest.approx(8 / 36)
    assert math.isnan(gini(np.zeros(3)))
    catalog = Catalog(np.ones(3, np.int64))
    assert evaluate(ints([0, 1], [0, -1]), [np.array([0])] * 2, [2], catalog)["gini@2"] == pytest.approx(
        gini(np.array([2, 1, 0]))
    )


def test_shares_are_by_user() -> None:
    found = shares(np.array([0, 0, 2, 2, 2, 2]), np.array([True, False, True, True, True, False]), 4)
    assert found.tolist()[::2] == [1 / 2, 3 / 4]
    assert np.isnan(found[1::2]).all()


def test_gap_between_the_best_and_the_worst_segment() -> None:
    rng = np.random.default_rng(0)
    segment = np.repeat([4, 1, 7, -1], 100)
    values = np.repeat([0.5, 0.3, 0.4, 9.0], 100) + rng.normal(scale=0.05, size=400)
    values[50] = np.nan
    found = gap(values, segment)
    assert (found.best, found.worst) == (4, 1)
    assert found.value == pytest.approx(np.nanmean(values[:100]) - values[100:200].mean())
    assert found.interval.low < found.value < found.interval.high
    assert found.interval.low > 0.15 > found.by_chance > 0
    # Where nothing sets the segments apart, there is a gap all the same, and chance explains it.
    alike = [gap(rng.normal(size=300), segment[:300], n=100, seed=seed) for seed in range(60)]
    assert sum(one.value > one.by_chance for one in alike) <= 9
    with pytest.raises(ValueError, match="two segments"):
        gap(values, np.zeros(400, np.int64))


def test_reports() -> None:
    good = evaluate(ints([1, 2]), [np.array([1])], [2])
    poor = evaluate(ints([2, 1]), [np.array([1])], [2])
    rows = [Row("good", good, Interval(0.9, 1.0)), Row("poor", poor, None)]
    assert markdown(rows, ["ndcg@2", "recall@2", "auc@2"]) == (
        "|  | ndcg@2 | 95 % | recall@2 | auc@2 |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| good | **1.0000** | 0.9000 .. 1.0000 | **1.0000** | - |\n"
        "| poor | 0.6309 | - | **1.0000** | - |\n"
    )
    output = io.StringIO()
    Console(file=output, width=100, color_system=None).print(table(rows, ["ndcg@2", "recall@2"]))
    text = output.getvalue()
    assert [word in text for word in ("good", "poor", "0.6309", "0.9000 .. 1.0000", "[bold]")] == [True] * 4 + [False]
