"""A shop of twenty-five products, each bought by one customer less than the one before, judged by hand."""

from collections.abc import Mapping
from math import log2

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from app.bundle import Bundle, publish
from app.engine.pipeline import Pipeline
from app.scenes import Scene, SceneSource
from app.state.events import item_key
from models.catalog import listed
from models.data import Tables, canonical
from models.data.log import Log
from models.data.times import DAY_MS, instant_ms
from models.evaluate import (
    View,
    Wanted,
    _attributes,
    ablated,
    by_source,
    calibrated,
    feature_groups,
    item_groups,
    judge,
    reliability_of,
    result,
    segmented,
    slates,
    variants,
)
from models.metrics import Row, evaluate
from models.result import Result
from models.train import targets
from tests.quick import write_quick
from tests.tiny import NOW_MS

SIZE = 25
CUT_MS = instant_ms("2026-03-01")
ITEMS = [f"p{number:02}" for number in range(SIZE)]
LATER = [("c24", "p00"), ("c24", "p02"), ("c23", "p24"), ("c23", "unheard of"), ("c00", "p03"), ("newcomer", "p01")]
"""What customers buy after the cut. Customer c24 had bought p00; c23 p00 and p01; c00 everything."""


@pytest.fixture(scope="module")
def shop() -> Tables:
    before = [
        (f"c{customer:02}", item, CUT_MS - DAY_MS * (1 + number) - customer)
        for number, item in enumerate(ITEMS)
        for customer in range(SIZE - number)
    ]
    after = [(user, item, CUT_MS + DAY_MS + place) for place, (user, item) in enumerate(LATER)]
    too_late = [("c24", "p05", CUT_MS + 5 * DAY_MS)]
    events = pl.DataFrame(before + after + too_late, ["user_id", "item_id", "timestamp"], orient="row")
    events = events.with_columns(type=pl.lit("purchase"))
    return canonical(events, source="by hand", now_ms=CUT_MS + 30 * DAY_MS)


@pytest.fixture(scope="module")
def bundle(shop: Tables, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bundles")
    return publish(root, lambda folder, version: write_quick(folder, version, shop, CUT_MS))


@pytest.fixture(scope="module")
def views(bundle: Bundle, shop: Tables) -> Mapping[str, View]:
    return {view.name: view for view in judge(bundle, shop, CUT_MS, 3, lambda step: None)}


def gain(*ranks: int) -> float:
    return sum(1 / log2(rank + 1) for rank in ranks)


def test_new_view_by_hand(views: Mapping[str, View]) -> None:
    view = views["new"]
    scores = next(row.scores for row in view.rows if row.name == "source popular")
    # Of c24 the second that is not bought; of c23 one below the slate's end and one unknown; c00 has nothing new.
    assert view.users == 2
    assert sorted(scores.per_user["ndcg@20"]) == pytest.approx([0, gain(2)])
    assert sorted(scores.per_user["recall@20"]) == [0, 1]
    assert scores["mrr@10"] == pytest.approx(1 / 2 / 2)
    assert view.candidate_recall == pytest.approx((1 + 1 / 2) / 2)


def test_all_view_by_hand(views: Mapping[str, View]) -> None:
    view = views["all"]
    scores = next(row.scores for row in view.rows if row.name == "source popular")
    assert view.users == 3
    expected = [gain(1, 3) / gain(1, 2), 0.0, gain(4)]
    assert sorted(scores.per_user["ndcg@20"]) == pytest.approx(sorted(expected))
    assert scores["precision@10"] == pytest.approx((2 + 0 + 1) / 10 / 3)
    assert scores["coverage@20"] == pytest.approx(20 / SIZE)
    assert view.candidate_recall == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_there_is_a_row_for_each_source_fusion_and_baseline(views: Mapping[str, View]) -> None:
    for view in views.values():
        names = [row.name for row in view.rows]
        assert names[-1] == "pipeline"
        assert {"source history", "source item_cf", "source popular", "implicit ALS", "fusion cascade"} < set(names)
        assert view.leads.keys() == set(names[:-1])
        assert all(low <= high for low, high in view.leads.values())


def test_new_view_neither_shows_nor_counts_what_was_bought(bundle: Bundle, shop: Tables) -> None:
    log = Log.from_tables(shop)
    past = log.before(CUT_MS)
    pipeline = Pipeline(bundle, torch.device("cpu"), 8)
    everybody = list(range(len(log.users)))
    had = {user: set(past.events["item"][past.user == user].tolist()) for user in everybody}
    home, again = bundle.manifest.scenes["home"], bundle.manifest.scenes["buy_again"]
    for scene in variants(home).values():
        for user, rows in enumerate(slates(pipeline, scene, past, everybody, CUT_MS)):
            shown = [item_key(item) for item in pipeline.catalog.ids(rows[rows >= 0].tolist())]
            assert len(shown) == min(20, SIZE - len(had[user]))
            assert not had[user] & set(shown)
    shown_again = slates(pipeline, again, past, everybody, CUT_MS)
    assert (shown_again >= 0).all()
    assert pipeline.scenes == bundle.manifest.scenes

    items = listed(shop.items, log, CUT_MS)
    assert item_key("unheard of") not in items.key
    new = targets(log, items, CUT_MS, CUT_MS + 3 * DAY_MS, repeats=False)
    every = targets(log, items, CUT_MS, CUT_MS + 3 * DAY_MS, repeats=True)

    def named(found: Mapping[int, npt.NDArray[np.int64]]) -> dict[str, set[int]]:
        return {log.users[user]: set(keys.tolist()) for user, keys in found.items()}

    bought = {user: {item_key(item) for name, item in LATER if name == user} for user, _ in LATER}
    assert named(every) == bought
    assert named(new) == {
        "c24": {item_key("p02")},
        "c23": {item_key("p24"), item_key("unheard of")},
        "newcomer": {item_key("p01")},
    }
    assert targets(log, items, CUT_MS + 10 * DAY_MS, CUT_MS + 20 * DAY_MS, repeats=True) == {}


def test_newcomers_are_a_segment_of_their_own(views: Mapping[str, View]) -> None:
    (newcomer,) = [one for one in views["new"].segments if one.value == "no event"]
    # p01 is the second most popular item, and nothing else is known of them.
    assert (newcomer.users, newcomer.ndcg, newcomer.recall) == (1, pytest.approx(gain(2)), 1.0)
    assert newcomer.rival_ndcg is not None
    assert newcomer.rival_ndcg >= gain(2)
    found = {one.value: one.users for one in views["all"].segments}
    # c24 had one event, c23 two, c00 one for each of the 25 items.
    assert found == {"1 or 2 events": 2, "10 events or more": 1, "no event": 1}


def test_items_by_popularity_by_hand(views: Mapping[str, View]) -> None:
    groups = {one.value: one for one in views["all"].items}
    assert groups.keys() == {"head", "under 3 events", "not listed yet"}
    # p00, p02 and p03 have 80 % of the purchases with others; p24 was bought once, and nobody is shown it.
    assert (groups["head"].pairs, groups["head"].users, groups["head"].recall) == (3, 2, 1.0)
    assert (groups["under 3 events"].recall, groups["under 3 events"].candidate_recall) == (0.0, 1.0)
    assert (groups["not listed yet"].pairs, groups["not listed yet"].candidate_recall) == (1, 0.0)


def test_candidate_recall_of_each_source_by_hand(views: Mapping[str, View]) -> None:
    found = {one.name: one for one in views["all"].sources}
    assert found["popular"].recall == pytest.approx(views["all"].candidate_recall)
    # Their own history is p00 for c24, p00 and p01 for c23, everything for c00.
    assert found["history"].recall == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["history"].alone == 0


def test_figures_of_pairs_by_hand() -> None:
    pairs = Wanted(
        owner=np.array([0, 0, 0, 2]),
        row=np.array([0, 1, 7, 1]),
        proposed=np.array([[1, 0, 0, 1], [1, 1, 0, 0]], bool),
        candidate=np.array([1, 1, 0, 1], bool),
        served=np.array([1, 0, 0, 1], bool),
    )
    groups = item_groups("department", ["A", "B"], np.array([0, 1, 1, -1]), pairs, 3, seed=0)
    assert [(one.value, one.users, one.pairs, one.recall, one.candidate_recall) for one in groups] == [
        ("A", 1, 1, 1.0, 1.0),
        ("B", 2, 2, 0.5, 1.0),
    ]
    scene = Scene(sources=(SceneSource(name="x", k=5), SceneSource(name="y")))
    assert [(one.name, one.k, one.recall, one.alone) for one in by_source(scene, pairs, 3)] == [
        ("x", 5, pytest.approx((1 / 3 + 1) / 2), pytest.approx(1 / 2)),
        ("y", 100, pytest.approx((2 / 3 + 0) / 2), pytest.approx((1 / 3 + 0) / 2)),
    ]


def test_segments_name_the_best_of_the_others() -> None:
    relevant = [np.array([1])] * 4
    # Three rankers: one that always hits, one that hits the first two users, and ours that hits the last.
    hits = {"always": [1, 1, 1, 1], "first": [1, 1, 0, 0], "ours": [0, 0, 0, 1]}
    shown = np.full((4, 20), -1)

    def row(name: str) -> Row:
        slots = shown.copy()
        slots[:, 0] = np.where(hits[name], 1, 2)
        return Row(name, evaluate(slots, relevant, (20,)), None)

    rows = [row(name) for name in hits]
    one, other = segmented("region", ["north", "south"], np.array([0, 0, -1, 1]), rows, seed=0)
    assert (one.value, one.users, one.ndcg, one.rival, one.rival_ndcg) == ("north", 2, 0.0, "always", 1.0)
    assert (other.value, other.users, other.ndcg, other.rival) == ("south", 1, 1.0, "always")


def test_attributes_that_make_segments() -> None:
    profiles = [{"region": "north" if n % 2 else "south", "id": str(n), "lonely": "yes"} for n in range(50)]
    profiles += [{"region": "sea"}] * 19 + [{}] * 30
    ((name, values, codes),) = _attributes(profiles)
    assert (name, values) == ("region", ["north", "south"])
    assert np.bincount(codes + 1).tolist() == [49, 25, 25]


def test_feature_groups_hold_every_column_once() -> None:
    names = (
        "x.score x.share agreement item.views item.age user.events own.views affinity.brand price.gap odd.one".split()
    )
    groups = feature_groups(names, ["x"])
    assert groups == {
        "source scores": [0, 1, 2],
        "item statistics": [3, 4],
        "user": [5],
        "own": [6],
        "cross": [7, 8],
        "odd": [9],
    }


@pytest.fixture(scope="module")
def visitors() -> Log:
    """Three shoppers of the tiny shop, and one who only comes later."""
    rows = [("u1", "a3", 3), ("u1", "a4", 2), ("u2", "b7", 2), ("u3", "a0", 1), ("u4", "a0", -1)]
    events = pl.DataFrame(
        [(user, item, NOW_MS - hours * 3_600_000) for user, item, hours in rows],
        ["user_id", "item_id", "timestamp"],
        orient="row",
    ).with_columns(type=pl.lit("view_item"))
    return Log.from_tables(canonical(events, source="by hand", now_ms=NOW_MS + DAY_MS))


@pytest.mark.parametrize("fusion", ["reciprocal_rank", "voting", "weighted", "cascade"])
def test_leaving_a_source_out_of_a_fusion_is_the_scene_without_it(tiny: Bundle, visitors: Log, fusion: str) -> None:
    pipeline = Pipeline(tiny, torch.device("cpu"), 32)
    scene = tiny.manifest.scenes[fusion]
    found = ablated(pipeline, scene, visitors, [0, 1, 2, 3], NOW_MS)
    assert found.keys() == {("source", source.name) for source in scene.sources}
    for source in scene.sources:
        less = scene.model_copy(update={"sources": tuple(one for one in scene.sources if one is not source)})
        expected = slates(pipeline, less, visitors, [0, 1, 2, 3], NOW_MS)
        assert np.array_equal(found["source", source.name], expected)


def test_ablation_of_a_learned_fusion(tiny: Bundle, visitors: Log) -> None:
    pipeline = Pipeline(tiny, torch.device("cpu"), 32)
    scene = tiny.manifest.scenes["home"]
    users = [0, 1, 2, 3]
    found = ablated(pipeline, scene, visitors, users, NOW_MS)
    full = slates(pipeline, scene, visitors, users, NOW_MS)
    # The ranker of the tiny bundle adds up what the sources say, and looks at nothing else.
    for group in ("item statistics", "user", "own", "cross"):
        assert np.array_equal(found["features", group], full)
    assert not np.array_equal(found["features", "source scores"], full)
    # Of a shopper without a past neither the history nor its neighbours say anything: they are not missed.
    for source in ("history", "item_cf"):
        assert np.array_equal(found["source", source][3], full[3])
    assert not np.array_equal(found["source", "history"][:3], full[:3])


def test_reliability_of_the_served(tiny: Bundle, views: Mapping[str, View]) -> None:
    found = np.array([[4, 5, -1], [6, -1, -1]])
    probability = np.array([[0.75, 0.5, np.nan], [0.25, np.nan, np.nan]])
    bins = reliability_of(found, probability, [np.array([4, 9]), np.array([7])])
    assert bins == [(1, pytest.approx(0.25), 0.0), (1, 0.5, 0.0), (1, pytest.approx(0.75), 1.0)]
    # The scores of these rankers are no probabilities, and none is taken for one.
    assert not calibrated(tiny, tiny.manifest.scenes["home"])
    assert not views["new"].reliability


def test_ablation_leaves_its_loss_in_the_view(views: Mapping[str, View]) -> None:
    view = views["new"]
    assert [one.name for one in view.ablation] == ["history", "item_cf", "popular"]
    best = view.rows[-1].scores["ndcg@20"]
    for one in view.ablation:
        assert one.ndcg is not None
        low, high = one.loss
        assert low is not None and high is not None
        assert low - 1e-9 <= best - one.ndcg <= high + 1e-9


def test_the_result_is_a_document_that_reads_back(bundle: Bundle, views: Mapping[str, View]) -> None:
    found = result(bundle, list(views.values()), CUT_MS, 3)
    assert Result.model_validate_json(found.model_dump_json()) == found
    assert found.version == bundle.version
    line = found.views[0].leaderboard[-1]
    assert line.name == "pipeline"
    assert line.metrics["ndcg@20"] == pytest.approx(views["new"].rows[-1].scores["ndcg@20"])
    assert line.lead is None
    assert found.views[0].leaderboard[0].lead == views["new"].leads["implicit ItemKNN"]
