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
from app.state.events import item_key
from models.catalog import listed
from models.data import Tables, canonical
from models.data.log import Log
from models.data.times import DAY_MS, instant_ms
from models.evaluate import View, judge, slates, variants
from models.train import targets
from tests.quick import write_quick

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
