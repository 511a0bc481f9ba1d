import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import Interactions, Neighbours, complements

VIEW, CART, BUY = EventType.VIEW_ITEM, EventType.ADD_TO_CART, EventType.PURCHASE

Event = tuple[int, int, float, EventType]

SHOP = pl.DataFrame(
    {
        "title": [*"Aurora phone,Nova phone,Aurora case,Nova case,Aurora charger,Pan,Aurora lid".split(","), None],
        "category": ["Tech > Phones"] * 2 + ["Tech > Cases"] * 2 + ["Tech > Power", "Home > Pans", "Home > Lids", None],
        "brand": ["Ada", "Bix", "Ada", "Bix", "Ada", "Cox", None, None],
    }
)
PHONE, OTHER_PHONE, CASE, OTHER_CASE, CHARGER, PAN, LID, UNKNOWN = range(8)


def interactions(events: list[Event], n_items: int = 8) -> Interactions:
    """Of (user, row, day, type), in any order."""
    ordered = sorted(events, key=lambda one: (one[0], one[2]))
    user, row, day, kind = (np.array([one[column] for one in ordered]) for column in range(4))
    ts_ms = (day * DAY_MS).astype(np.int64)
    return Interactions(user.astype(np.int32), row.astype(np.int32), ts_ms, kind.astype(np.uint8), n_items)


def bought(users: range, *rows: int) -> list[Event]:
    return [(user, row, 0, BUY) for user in users for row in rows]


def of(near: Neighbours, row: int) -> list[int]:
    return near.rows[row][near.rows[row] >= 0].tolist()


def test_what_is_bought_with_it_and_never_another_of_its_category() -> None:
    events = bought(range(9), PHONE, OTHER_PHONE) + bought(range(10, 14), PHONE, CASE) + bought(range(20, 22), PAN, LID)
    near = complements.fit(interactions(events), SHOP.select("category"), k=3)
    assert of(near, PHONE) == [CASE] and of(near, CASE) == [PHONE]
    assert of(near, PAN) == [LID] and of(near, LID) == [PAN]
    assert of(near, OTHER_PHONE) == []
    assert near.rows.dtype == np.int32 and near.weights.dtype == np.float32


def test_purchases_days_apart_are_less_together_and_weeks_apart_not_at_all() -> None:
    def apart(users: range, row: int, days: float) -> list[Event]:
        return [event for user in users for event in ((user, PHONE, 0, BUY), (user, row, days, BUY))]

    events = apart(range(4), CASE, 6) + apart(range(10, 13), CHARGER, 0) + apart(range(20, 29), PAN, 15)
    assert of(complements.fit(interactions(events), SHOP.select("category"), k=3), PHONE) == [CHARGER, CASE]


def test_what_is_looked_at_instead_is_no_complement() -> None:
    events = bought(range(4), PHONE, CASE) + bought(range(10, 13), PHONE, CHARGER)
    assert of(complements.fit(interactions(events), SHOP.select("category"), k=3), PHONE) == [CASE, CHARGER]
    instead = [(user, row, 0, VIEW) for user in range(20, 40) for row in (PHONE, CASE)]
    assert of(complements.fit(interactions(events + instead), SHOP.select("category"), k=3), PHONE) == [CHARGER, CASE]


def test_an_item_that_nobody_bought_has_its_brand_and_its_collection() -> None:
    events = bought(range(9), CASE, CHARGER) + bought(range(10, 19), OTHER_CASE, PAN)
    near = complements.fit(interactions(events), SHOP.select("category", "brand"), k=3)
    assert sorted(of(near, PHONE)) == [CASE, CHARGER]
    titled = SHOP.select("title", "category")
    many = pl.concat([titled, pl.DataFrame({"title": ["Spoon"] * 200, "category": ["Home > Spoons"] * 200})])
    near = complements.fit(interactions(events, len(many)), many, k=3)
    assert sorted(of(near, LID)) == [PHONE, CASE, CHARGER]


def test_carts_count_too_and_a_shop_without_either_goes_by_views() -> None:
    carts = [(0, PHONE, 0, CART), (0, CASE, 0, CART), (1, PHONE, 0, BUY), (1, CHARGER, 0, BUY)]
    assert of(complements.fit(interactions(carts), SHOP.select("category"), k=3), PHONE) == [CHARGER, CASE]
    views = [(0, PHONE, 0, VIEW), (0, CASE, 0, VIEW)]
    assert of(complements.fit(interactions(views), SHOP.select("category"), k=3), PHONE) == [CASE]


@pytest.mark.parametrize("category", ["A > B > A", " a >B>a> b ", "A > B"])
def test_a_category_that_runs_in_a_circle_is_one(category: str) -> None:
    items = pl.DataFrame({"category": ["A > B", category, "C"]})
    near = complements.fit(interactions(bought(range(3), 0, 1, 2), 3), items, k=2)
    assert of(near, 0) == of(near, 1) == [2]


@pytest.mark.parametrize("column", SHOP.columns)
def test_every_column_may_be_missing_or_alone(column: str) -> None:
    past = interactions(bought(range(3), PHONE, CASE, UNKNOWN))
    for items in (SHOP.drop(column), SHOP.select(column), SHOP.with_columns(pl.lit(None).alias(column))):
        near = complements.fit(past, items, k=4)
        assert {CASE, UNKNOWN} <= set(of(near, PHONE))
        assert np.isfinite(near.weights).all()


@pytest.mark.parametrize("events", [[], [(0, 1, 0, EventType.HIDE)], [(0, PHONE, 0, BUY)], bought(range(2), 0, 1)])
def test_nothing_to_learn_from_gives_an_empty_table(events: list[Event]) -> None:
    near = complements.fit(interactions(events), SHOP, k=5)
    assert near.rows.shape == near.weights.shape == (8, 5)
    assert (near.rows == -1).all() and not near.weights.any()


def test_an_empty_catalog_and_one_of_another_size() -> None:
    assert complements.fit(interactions([], 0), SHOP.clear(), k=2).rows.shape == (0, 2)
    with pytest.raises(ValueError, match="8 items for 3 catalog rows"):
        complements.fit(interactions([], 3), SHOP)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(0, 20), st.sampled_from([VIEW, CART, BUY])),
        max_size=60,
    )
)
def test_every_neighbour_is_of_another_category(events: list[Event]) -> None:
    near = complements.fit(interactions(events), SHOP, k=8)
    category = SHOP["category"].to_list()
    for row in range(8):
        assert all(category[other] != category[row] for other in of(near, row))
        assert len(set(of(near, row))) == len(of(near, row))
    total = near.weights.sum(1)
    np.testing.assert_allclose(total[total > 0], 1.0, rtol=1e-5)
    assert (np.diff(near.weights, axis=1) <= 0).all(), "best first"
