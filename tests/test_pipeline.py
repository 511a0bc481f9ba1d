"""The pipeline on a bundle known by heart: properties that hold for any users and any queries."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from app.bundle import BundleError, open_bundle
from app.engine import Query, Slate, Where
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.state.events import EventType, UserState, fold
from tests.tiny import GROUP, NOW_MS, STATISTICS, item_ids, publish_tiny, state

ALL = item_ids()
PRICE = {item: 1.0 + int(item[1:]) for item in ALL}


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "tensors"])
def pipeline(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("bundles")
    version = publish_tiny(root).version
    yield Pipeline(open_bundle(root / version), torch.device("cpu"), 8, compiled=request.param)


def ids(slate: Slate) -> list[str]:
    return [item.item_id for item in slate.items]


def one(pipeline: Pipeline, query: Query, user: UserState | None = None) -> Slate:
    return pipeline.run([query], [user or UserState()], NOW_MS)[0]


KINDS = st.sampled_from(
    [EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE, EventType.HIDE, EventType.RATE]
)
HISTORIES = st.lists(st.tuples(st.sampled_from([*ALL, "unknown-1", "unknown-2"]), KINDS), max_size=60)
WHERES = st.builds(
    Where,
    category=st.sampled_from([(), ("A",), ("A > A1",), ("B", "A > A2"), ("no such",)]),
    brand=st.sampled_from([(), ("acme",), ("bolt", "acme")]),
    price_min=st.sampled_from([None, 3.0, 15.0]),
    price_max=st.sampled_from([None, 6.0, 18.0]),
    exclude=st.lists(st.sampled_from(ALL), max_size=5).map(tuple),
)
SCENES = (
    "home",
    "buy_again",
    "detail",
    "reciprocal_rank",
    "voting",
    "weighted",
    "cascade",
    "wider",
    "diverse",
    "explore",
)
QUERIES = st.builds(
    Query,
    request_id=st.text("0123456789abcdef", min_size=8, max_size=8),
    scene=st.sampled_from(SCENES),
    limit=st.integers(1, 50),
    anchors=st.lists(st.sampled_from([*ALL, "unknown-3"]), max_size=3).map(tuple),
    where=WHERES,
)


def user_of(history: list[tuple[str, EventType]], apart_ms: int = 1000) -> UserState:
    user = UserState()
    for place, (item, kind) in enumerate(history):
        user = fold(user, state(item, kind=kind, end_ms=NOW_MS - apart_ms * place).events, 64)
    return user


@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(QUERIES, HISTORIES), min_size=1, max_size=12))
def test_slates_keep_their_promises(pipeline: Pipeline, asked: list[tuple[Query, list[tuple[str, EventType]]]]) -> None:
    users = [user_of(history) for _, history in asked]
    slates = pipeline.run([query for query, _ in asked], users, NOW_MS)
    for (query, history), slate in zip(asked, slates, strict=True):
        shown = ids(slate)
        assert slate.request_id == query.request_id
        assert slate.scene == query.scene
        assert slate.bundle == pipeline.bundle.version
        assert not slate.degraded
        assert len(shown) == len(set(shown))
        hidden = {item for item, kind in history if kind is EventType.HIDE}
        bought = {item for item, kind in history if kind is EventType.PURCHASE}
        gone = (
            hidden | set(query.anchors) | set(query.where.exclude) | (set() if query.scene == "buy_again" else bought)
        )
        where = query.where
        allowed = {
            item
            for item in ALL
            if item not in gone
            and (not where.category or any(_category(item).startswith(name) for name in where.category))
            and (not where.brand or ("acme" if item[0] == "a" else "bolt") in where.brand)
            and (where.price_min is None or PRICE[item] >= where.price_min)
            and (where.price_max is None or PRICE[item] <= where.price_max)
        }
        assert set(shown) <= allowed
        assert len(shown) == min(query.limit, len(allowed)), "short although eligible items exist"
        scores = [item.score for item in slate.items]
        assert scores == sorted(scores, reverse=True)


def _category(item: str) -> str:
    return "B" if item[0] == "b" else f"A > A{1 + int(item[1:]) % 2}"


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(QUERIES, HISTORIES), min_size=2, max_size=12))
def test_a_slate_does_not_depend_on_its_batch(
    pipeline: Pipeline, asked: list[tuple[Query, list[tuple[str, EventType]]]]
) -> None:
    users = [user_of(history) for _, history in asked]
    together = pipeline.run([query for query, _ in asked], users, NOW_MS)
    for (query, _), user, slate in zip(asked, users, together, strict=True):
        alone = one(pipeline, query, user)
        assert [item.score for item in alone.items] == pytest.approx([item.score for item in slate.items], abs=1e-4)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(HISTORIES, min_size=1, max_size=8))
def test_features_are_the_same_to_the_bit_in_any_batch(
    pipeline: Pipeline, histories: list[list[tuple[str, EventType]]]
) -> None:
    scene = pipeline.scenes["home"]
    users = [user_of(history) for history in histories]
    names = feature_names([source.name for source in scene.sources], STATISTICS)
    # The dot product of a vector source is a matrix product, whose order of summation is BLAS's business.
    exact = [not name.startswith("towers.") and name != "agreement" for name in names]
    prepared = pipeline.prepare(scene, [Query("together")] * len(users), users, NOW_MS)
    together = pipeline.features(prepared)[:, exact]
    rows, queries = prepared.candidates.row.clone(), prepared.candidates.query.clone()
    for index, user in enumerate(users):
        prepared = pipeline.prepare(scene, [Query("alone")], [user], NOW_MS)
        alone = pipeline.features(prepared)[:, exact]
        mine = {int(row): together[place] for place, row in enumerate(rows) if queries[place] == index}
        for place, row in enumerate(prepared.candidates.row.tolist()):
            if row in mine:
                assert torch.equal(alone[place], mine[row])


def test_a_view_turns_the_slate(pipeline: Pipeline) -> None:
    before = ids(one(pipeline, Query("q", limit=10)))
    after = ids(one(pipeline, Query("q", limit=10), state("b7")))
    assert before != after
    assert sum(item[0] == "b" for item in after) > sum(item[0] == "b" for item in before)


def test_the_page_decides_where_the_scene_says_so(pipeline: Pipeline) -> None:
    user = state("a1", "a2", "a3")
    on_page = ids(one(pipeline, Query("q", scene="detail", anchors=("b1",), limit=4), user))
    elsewhere = ids(one(pipeline, Query("q", scene="detail", limit=4), user))
    assert on_page[0][0] == "b"
    assert {item[0] for item in elsewhere} == {"a"}


def test_a_narrow_filter_finds_what_no_source_proposed(pipeline: Pipeline) -> None:
    slate = one(pipeline, Query("q", limit=20, where=Where(price_min=19.0)))
    assert set(ids(slate)) == {"a18", "a19", "b18", "b19"}


def test_an_empty_slice_is_an_empty_slate(pipeline: Pipeline) -> None:
    assert one(pipeline, Query("q", where=Where(category=("nothing",)))).items == ()


def test_late_queries_get_the_lists(pipeline: Pipeline) -> None:
    slate = pipeline.run([Query("q", limit=3)], [state("b7")], NOW_MS, late=True)[0]
    assert slate.degraded == ("deadline",)
    assert ids(slate) == ["a0", "b0", "a1"]


def test_a_broken_source_is_left_out_and_named(pipeline: Pipeline) -> None:
    class Broken:
        name = "item_cf"

        def recall(self, batch: object, k: int, context: bool) -> None:
            raise RuntimeError("boom")

    whole = pipeline.sources["item_cf"]
    pipeline.sources["item_cf"] = Broken()  # type: ignore[assignment]
    try:
        slate = one(pipeline, Query("q"), state("a1"))
    finally:
        pipeline.sources["item_cf"] = whole
    assert slate.degraded == ("recall:item_cf",)
    assert len(slate.items) == 20
    assert not any("item_cf" in item.sources for item in slate.items)


def test_an_item_names_those_who_proposed_it_however_many_there_are(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, user = Query("q", scene="voting", limit=30), state("a1", "b7")
    at_once = one(pipeline, query, user)
    assert len(at_once.items[0].sources) > 2 and len({item.sources for item in at_once.items}) > 3
    monkeypatch.setattr("app.engine.pipeline.TOGETHER", 2)
    assert one(pipeline, query, user) == at_once


def test_diversity_mixes_categories(pipeline: Pipeline) -> None:
    user = state("b1", "b2", "b3")
    plain = ids(one(pipeline, Query("q", scene="reciprocal_rank", limit=10), user))
    mixed = ids(one(pipeline, Query("q", scene="diverse", limit=10), user))
    assert len({_category(item) for item in mixed}) > len({_category(item) for item in plain})


def test_exploration_swaps_the_last_place_and_is_repeatable(pipeline: Pipeline) -> None:
    base = ids(one(pipeline, Query("q", scene="reciprocal_rank", limit=5)))
    found = set()
    for number in range(10):
        query = Query(f"q{number}", scene="explore", limit=5)
        explored = ids(one(pipeline, query))
        assert explored == ids(one(pipeline, query))
        assert explored[:4] == base[:4]
        found.add(explored[4])
    assert len(found) > 1
    assert base[4] not in found


def test_explanations_and_fields(pipeline: Pipeline) -> None:
    slate = one(pipeline, Query("q", scene="detail", anchors=("b3",), explain=True, fields=("title", "nope")))
    assert slate.items[0].reason == "Goes with Item b3"
    assert slate.items[0].attributes == {"title": f"Item {slate.items[0].item_id}"}
    again = one(pipeline, Query("q", scene="buy_again", explain=True), state("a4", kind=EventType.PURCHASE))
    assert {item.item_id: item.reason for item in again.items}["a4"] == "You bought this before"


def test_the_cascade_keeps_the_order_of_its_sources(pipeline: Pipeline) -> None:
    slate = one(pipeline, Query("q", scene="cascade", limit=30), state("a1", "a2"))
    first = [item.sources[0] for item in slate.items if item.sources]
    order = [source.name for source in pipeline.scenes["cascade"].sources]
    assert [order.index(name) for name in first] == sorted(order.index(name) for name in first)


def test_votes_count_first(pipeline: Pipeline) -> None:
    slate = one(pipeline, Query("q", scene="voting", limit=30), state("a1"))
    votes = [len(item.sources) for item in slate.items]
    assert votes == sorted(votes, reverse=True)


def test_a_ranker_that_does_not_fit_a_scene_is_refused(pipeline: Pipeline) -> None:
    home = pipeline.scenes["home"]
    with pytest.raises(BundleError, match="does not fit scene 'home'"):
        pipeline.use({"home": home.model_copy(update={"sources": home.sources[:2]})})
    assert pipeline.scenes["home"] == home


def test_events_beyond_the_window_and_of_the_future_do_no_harm(pipeline: Pipeline) -> None:
    long = state(*["a1", "b2"] * 200, end_ms=NOW_MS + 3_600_000)
    assert len(one(pipeline, Query("q"), long).items) == 20


def test_every_item_once_hidden(pipeline: Pipeline) -> None:
    assert one(pipeline, Query("q"), state(*ALL, kind=EventType.HIDE)).items == ()


def test_merge_is_a_union(pipeline: Pipeline) -> None:
    scene = pipeline.scenes["reciprocal_rank"]
    users = [state("a1", "b2"), UserState()]
    prepared = pipeline.prepare(scene, [Query("1", limit=1), Query("2", limit=1)], users, NOW_MS)
    merged = set(zip(prepared.candidates.query.tolist(), prepared.candidates.row.tolist(), strict=True))
    assert len(merged) == len(prepared.candidates.row)
    expected = set()
    for source in scene.sources:
        found = pipeline.sources[source.name].recall(prepared.batch, source.k, False)
        near = found.rank < source.k
        expected |= set(zip(found.query[near].tolist(), found.row[near].tolist(), strict=True))
    assert merged == expected
    assert np.all(np.diff(prepared.candidates.query.numpy()) >= 0)


def test_neighbour_scores_are_the_weighted_sum(pipeline: Pipeline) -> None:
    """Against a plain loop over anchors and table rows."""
    user = state("a1", "a2", "a1", kind=EventType.ADD_TO_CART)
    prepared = pipeline.prepare(pipeline.scenes["home"], [Query("q")], [user], NOW_MS)
    source = pipeline.sources["item_cf"]
    recalled = source.recall(prepared.batch, 15, False)
    expected: dict[int, float] = {}
    for event in user.events:
        anchor = int(pipeline.catalog.rows(np.array([event["item"]]))[0])
        weight = 2.0 * 0.5 ** ((NOW_MS - event["ts"]) / 86_400_000 / 30)
        for near, value in zip(source.table.rows[anchor].tolist(), source.table.weights[anchor].tolist(), strict=True):
            expected[near] = expected.get(near, 0.0) + weight * value
    found = dict(zip(recalled.row.tolist(), recalled.score.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert GROUP > len(found) > 0


def test_basket_scores_are_sums_over_the_likest_baskets(pipeline: Pipeline) -> None:
    """Against plain loops over anchors, baskets and what is in them."""
    user = state("a1", "a2", "b3", "a1")
    prepared = pipeline.prepare(pipeline.scenes["wider"], [Query("1"), Query("2")], [state(), user], NOW_MS)
    recalled = pipeline.sources["sessions"].recall(prepared.batch, 15, False)
    table = pipeline.bundle.tensors("sessions.safetensors")
    likeness = torch.zeros(len(table["items"]))
    for later, event in enumerate(user.events[::-1]):
        anchor = int(pipeline.catalog.rows(np.array([event["item"]]))[0])
        weight = 0.5 ** ((NOW_MS - event["ts"]) / 86_400_000 / 30 + later / 3)
        for basket, value in zip(table["of_item"][anchor].tolist(), table["of_weights"][anchor].tolist(), strict=True):
            likeness[basket] += weight * value * (basket >= 0)
    expected = torch.zeros(pipeline.catalog.size)
    for basket in likeness.argsort(descending=True, stable=True)[:4].tolist():
        expected.index_add_(0, table["items"][basket], table["weights"][basket].float() * likeness[basket])
    assert (recalled.query == 1).all()
    assert recalled.rank.tolist() == list(range(len(recalled.row)))
    assert len(recalled.row) == int((expected > 0).sum()) > 6
    torch.testing.assert_close(recalled.score, expected[recalled.row], rtol=1e-4, atol=1e-6)


def test_lists_by_segment_go_by_profile(pipeline: Pipeline) -> None:
    profiles = [{}, {"country": "FR"}, {"country": "FR", "age": "30"}, {"a": "DE", "country": "DE"}, {"country": "IT"}]
    users = [state(profile=profile) for profile in profiles]
    prepared = pipeline.prepare(pipeline.scenes["wider"], [Query(str(i)) for i in range(5)], users, NOW_MS)
    found = pipeline.sources["segments"].recall(prepared.batch, 4, False)
    shown = [found.row[found.query == index].tolist() for index in range(5)]
    assert shown[0] == shown[4] == [0, 1, 2, 3]
    assert shown[1] == shown[2] != shown[3]
    assert {shown[1][0], shown[3][0]} == {10, 20}
    assert found.rank.tolist() == [0, 1, 2, 3] * 5
