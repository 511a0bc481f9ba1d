"""Fusion formulas against numbers worked out by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.bundle import MANIFEST, open_bundle
from app.engine import Query
from app.engine.merge import ABSENT, Candidates
from app.engine.pipeline import Pipeline
from app.engine.ranking import FUSIONS
from app.state.events import EventType
from models.metrics import evaluate
from models.ranking import Examples, ndcg
from tests.damage import manifest
from tests.test_pipeline import user_of
from tests.tiny import NOW_MS, publish_tiny

Proposals = Sequence[Sequence[Mapping[str, float]]]
"""By query and source: item -> score, best first."""


def candidates_of(queries: Proposals) -> tuple[Candidates, list[tuple[int, str]]]:
    """Candidates as a merge would leave them, and which (query, item) each is; row n is the nth item in sight."""
    pairs = [
        (query, item) for query, sources in enumerate(queries) for item in dict.fromkeys(i for s in sources for i in s)
    ]
    rows = {item: row for row, item in enumerate(dict.fromkeys(item for _, item in pairs))}
    sources = range(len(queries[0]))
    ranks = [
        [list(queries[q][s]).index(item) if item in queries[q][s] else ABSENT for q, item in pairs] for s in sources
    ]
    candidates = Candidates(
        torch.tensor([query for query, _ in pairs], dtype=torch.int64),
        torch.tensor([rows[item] for _, item in pairs], dtype=torch.int64),
        torch.tensor([[queries[q][s].get(item, 0.0) for q, item in pairs] for s in sources]),
        torch.tensor(ranks, dtype=torch.float32),
        torch.tensor([[max(queries[q][s].values(), default=0.0) for q in range(len(queries))] for s in sources]),
    )
    return candidates, pairs


def fused(name: str, queries: Proposals, weights: Sequence[float]) -> dict[tuple[int, str], float]:
    candidates, pairs = candidates_of(queries)
    return dict(zip(pairs, FUSIONS[name](candidates, torch.tensor(weights)).tolist(), strict=True))


ONE = [[{"a": 9.0, "b": 5.0, "c": 1.0}, {"c": 0.8, "a": 0.4}, {}]]


def test_reciprocal_rank() -> None:
    assert fused("reciprocal_rank", ONE, [1.0, 2.0, 1.0]) == pytest.approx(
        {(0, "a"): 1 / 61 + 2 / 62, (0, "b"): 1 / 62, (0, "c"): 1 / 63 + 2 / 61}, rel=1e-6
    )


def test_voting() -> None:
    # Votes, and a tie-break of the mean reciprocal rank in units of the smallest vote that counts.
    assert fused("voting", ONE, [1.0, 2.0, 0.0]) == pytest.approx(
        {
            (0, "a"): 3 + (1 / 61 + 2 / 62) / 3,
            (0, "b"): 1 + (1 / 62) / 3,
            (0, "c"): 3 + (1 / 63 + 2 / 61) / 3,
        },
        rel=1e-6,
    )


def test_weighted() -> None:
    # Within the query, the first source gives 1, 0.5, 0 and the second 0 to `a` and 1 to `c`.
    assert fused("weighted", ONE, [1.0, 2.0, 1.0]) == pytest.approx(
        {(0, "a"): 1 / 4, (0, "b"): 0.5 / 4, (0, "c"): 2 / 4}, rel=1e-6
    )


def test_weighted_is_scaled_within_each_query() -> None:
    queries = [[{"a": 9.0, "b": 1.0}], [{"b": -1.0, "c": -2.0, "a": -5.0}], [{"a": 7.0}]]
    assert fused("weighted", queries, [3.0]) == pytest.approx(
        {(0, "a"): 1, (0, "b"): 0, (1, "b"): 1, (1, "c"): 0.75, (1, "a"): 0, (2, "a"): 1}, rel=1e-6
    )


def test_cascade() -> None:
    last = 3 * ABSENT
    assert fused(
        "cascade", [[{"a": 1.0, "b": 0.5}, {"c": 9.0, "a": 8.0}, {"d": 1.0}]], [1.0, 1.0, 1.0]
    ) == pytest.approx(
        {
            (0, "a"): 1,
            (0, "b"): 1 - 1 / last,
            (0, "c"): 1 - ABSENT / last,
            (0, "d"): 1 - 2 * ABSENT / last,
        },
        rel=1e-6,
    )


PROPOSALS = st.lists(
    st.lists(
        st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-5, 5, width=32), max_size=8).map(
            lambda scores: dict(sorted(scores.items(), key=lambda entry: -entry[1]))
        ),
        min_size=3,
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)
WEIGHTS = st.lists(st.sampled_from([0.125, 1.0, 2.0, 100.0]), min_size=3, max_size=3)


@given(PROPOSALS, WEIGHTS)
def test_no_tie_break_is_worth_a_vote(queries: Proposals, weights: list[float]) -> None:
    scores = fused("voting", queries, weights)
    for (query, item), score in scores.items():
        votes = sum(weight for weight, source in zip(weights, queries[query], strict=True) if item in source)
        # float32 knows about seven digits
        assert votes < score * (1 + 1e-6) and score < votes + min(weights) / 2


@given(PROPOSALS, WEIGHTS)
def test_the_cascade_takes_one_source_after_the_other(queries: Proposals, weights: list[float]) -> None:
    scores = fused("cascade", queries, weights)
    for query, sources in enumerate(queries):
        expected = list(dict.fromkeys(item for source in sources for item in source))
        assert sorted(expected, key=lambda item: -scores[query, item]) == expected


@pytest.mark.parametrize("name", FUSIONS)
@given(PROPOSALS, WEIGHTS)
def test_scores_are_numbers_and_do_not_depend_on_the_batch(name: str, queries: Proposals, weights: list[float]) -> None:
    together = fused(name, queries, weights)
    assert all(0 <= score < float("inf") for score in together.values())
    for query, sources in enumerate(queries):
        alone = fused(name, [sources], weights)
        assert {(query, item): score for (_, item), score in alone.items()} == {
            pair: score for pair, score in together.items() if pair[0] == query
        }


@pytest.mark.parametrize("name", FUSIONS)
def test_an_item_that_no_source_proposes_comes_last(name: str) -> None:
    """As a backfilled one, which stands behind the others in the batch."""
    candidates, _ = candidates_of(ONE)
    ranks, scores = candidates.rank.clone(), candidates.score.clone()
    ranks[:, 1], scores[:, 1] = ABSENT, 0.0
    found = FUSIONS[name](
        Candidates(candidates.query, candidates.row, scores, ranks, candidates.best), torch.tensor([1.0, 2.0, 1.0])
    ).tolist()
    assert found[1] == pytest.approx(0.0)
    assert min(found) == found[1]


def test_a_calibrated_ranker_shows_probabilities_in_the_same_order(tmp_path: Path) -> None:
    folder = tmp_path / publish_tiny(tmp_path).version
    slates = []
    for calibrated in (False, True):
        rankers = json.loads((folder / MANIFEST).read_text())["rankers"]
        manifest(folder, rankers=[ranker | {"calibrated": calibrated} for ranker in rankers])
        pipeline = Pipeline(open_bundle(folder), torch.device("cpu"), 8)
        users = [user_of([("a1", EventType.VIEW_ITEM), ("b2", EventType.PURCHASE)])]
        slates += pipeline.run([Query("1", scene="home")], users, NOW_MS)
    odds, shown = slates
    assert [item.item_id for item in shown.items] == [item.item_id for item in odds.items]
    scores = torch.tensor([item.score for item in odds.items])
    assert torch.tensor([item.score for item in shown.items]).tolist() == scores.sigmoid().tolist()


def test_ndcg_of_examples_is_that_of_slates() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([5, 40, 21])
    query = torch.from_numpy(np.repeat(np.arange(3), counts))
    label = torch.from_numpy((rng.random(66) < 0.3).astype(np.float32))
    label[:2] = 1.0
    score = torch.from_numpy(rng.random(66).astype(np.float32))
    examples = Examples(score[:, None], query, label)
    found = ndcg(examples, torch.tensor([2, 0, 1]), score)
    for value, one in zip(found.tolist(), (2, 0, 1), strict=True):
        mine = np.flatnonzero(query.numpy() == one)
        order = mine[np.argsort(-score[mine].numpy())][:20]
        slate = np.full(20, -1)
        slate[: len(order)] = order
        expected = evaluate(slate[None], [mine[label[mine].numpy() > 0]], ks=(20,))["ndcg@20"]
        assert value == pytest.approx(expected, rel=1e-5)
