"""The made-up storefront behaves as the models expect of a real one."""

import itertools
import json

import numpy as np
import polars as pl
import pytest

from models.data import Tables, canonical
from models.data.simulator import LIST_LENGTH, START_MS, simulate
from models.data.tables import EVENTS, ITEMS, USERS
from models.data.times import DAY_MS

DAYS = 45


@pytest.fixture(scope="module")
def shop() -> Tables:
    return simulate(items=2_000, users=1_500, events=60_000, seed=7, days=DAYS)


@pytest.fixture(scope="module")
def joined(shop: Tables) -> pl.DataFrame:
    path = pl.col("category").str.split(" > ")
    level = pl.col("price").log() - pl.col("price").log().mean().over("category")
    items = shop.items.with_columns(path.list.first().alias("department"), level.alias("price_level"))
    return shop.events.join(items.rename({"price": "list_price"}), on="item_id")


def test_same_seed_same_shop(shop: Tables) -> None:
    again = simulate(items=2_000, users=1_500, events=60_000, seed=7, days=DAYS)
    other = simulate(items=2_000, users=1_500, events=60_000, seed=8, days=DAYS)
    for name in ("events", "items", "users"):
        assert getattr(again, name).equals(getattr(shop, name))
        assert not getattr(other, name).equals(getattr(shop, name))
    # Two runs replayed at one service do not take each other's events for duplicates.
    assert not set(other.events["event_id"]) & set(shop.events["event_id"])


@pytest.mark.parametrize(("items", "users", "events"), [(1, 1, 1), (3, 2, 50), (97, 400, 1_000)])
def test_any_size(items: int, users: int, events: int) -> None:
    tables = simulate(items, users, events)
    assert (tables.items.height, tables.users.height, tables.events.height) == (items, users, events)


def test_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        simulate(items=0)


def test_tables_are_canonical(shop: Tables) -> None:
    assert shop.events.drop("position").schema == EVENTS
    assert shop.items.schema == ITEMS
    assert shop.users.schema == USERS
    assert shop.items["item_id"].is_unique().all()
    assert shop.items.null_count().sum_horizontal().item() == 0
    # Cleaning finds nothing to do; only events of the same moment may change places.
    cleaned = canonical(shop.events.drop("position"), source="test", now_ms=START_MS + DAYS * DAY_MS)
    assert cleaned.report.findings == ()
    assert cleaned.events.sort(pl.all()).equals(shop.events.drop("position").sort(pl.all()))
    profile = json.loads(shop.users["attributes"][0])
    assert set(profile) == {"age_band", "gender", "region"}
    assert set(json.loads(shop.items["attributes"][0])) == {"color", "material"}


def test_catalog_is_readable(shop: Tables) -> None:
    assert (shop.items["category"].str.count_matches(" > ") == 2).all()
    assert (shop.items["price"] > 0).all()
    said = shop.items.filter(pl.col("title").str.ends_with(pl.format(" by {}", "brand")))
    assert said.height == shop.items.height
    # Brands have price levels: the same shelf costs more under one name than under another.
    level = pl.col("price").log() - pl.col("price").log().mean().over("category")
    levels = shop.items.select("brand", level=level).with_columns(brand=pl.col("level").mean().over("brand"))
    assert levels["brand"].var() > (levels["level"] - levels["brand"]).var()  # type: ignore[operator]


def test_each_step_of_the_funnel_follows_the_one_before(shop: Tables) -> None:
    steps = ["view_item", "add_to_cart", "purchase"]
    counts = dict(shop.events["type"].value_counts().iter_rows())
    assert counts["view_item"] > 2 * counts["add_to_cart"] > 2 * counts["purchase"] > 0
    first = shop.events.pivot("type", index=["user_id", "item_id"], values="timestamp", aggregate_function="min")
    for before, after in itertools.pairwise(steps):
        assert first.filter(pl.col(after).is_not_null())[before].null_count() == 0
        assert (first[before] < first[after]).drop_nulls().all()
    assert shop.events.filter(pl.col("type") != "view_item")["value"].null_count() == 0


def test_purchases_of_a_session_are_one_event(shop: Tables) -> None:
    orders = (
        shop.events.filter(pl.col("type") == "purchase")
        .group_by("event_id")
        .agg(pl.len(), pl.col("user_id").n_unique(), pl.col("timestamp").n_unique().alias("moments"))
    )
    assert orders["len"].max() > 1  # type: ignore[operator]
    assert orders.select("user_id", "moments").max().row(0) == (1, 1)


def test_popularity_has_a_long_tail(shop: Tables) -> None:
    counts = shop.events["item_id"].value_counts(sort=True)["count"]
    assert counts.head(400).sum() > 0.6 * counts.sum()
    assert counts.head(20).sum() < 0.4 * counts.sum()
    assert len(counts) > 0.7 * shop.items.height


def test_higher_positions_are_looked_at_more(shop: Tables) -> None:
    views = shop.events.filter(pl.col("type") == "view_item")["position"].drop_nulls().value_counts().sort("position")
    assert views["position"].to_list() == list(range(LIST_LENGTH))
    assert views["count"][0] > 1.5 * views["count"][1] > 2 * views["count"][LIST_LENGTH - 1]
    assert np.corrcoef(views["position"], views["count"].rank())[0, 1] < -0.9


@pytest.mark.parametrize(("column", "times"), [("department", 1.7), ("category", 5), ("brand", 2)])
def test_shoppers_keep_to_their_taste(joined: pl.DataFrame, column: str, times: float) -> None:
    """The chance that two of a shopper's events agree, against that of two shoppers' events."""
    shares = joined.group_by("user_id", column).len().with_columns(n=pl.col("len").sum().over("user_id"))
    mine = (
        shares.filter(pl.col("n") >= 20)
        .group_by("user_id")
        .agg(((pl.col("len") * (pl.col("len") - 1)).sum() / (pl.col("n") * (pl.col("n") - 1)).first()).alias("agree"))
    )
    everyone = joined[column].value_counts()["count"] / joined.height
    assert mine["agree"].mean() > times * (everyone**2).sum()  # type: ignore[operator]


def test_taste_drifts(joined: pl.DataFrame) -> None:
    """Shelves of the first and the last third agree less than those of two halves of the first."""
    at = (pl.col("timestamp") - START_MS) // (DAYS * DAY_MS // 6)
    parts = joined.with_columns(part=at).group_by("user_id", "part", "category").len()
    parts = parts.with_columns(share=pl.col("len") / pl.col("len").sum().over("user_id", "part"))

    def agreement(a: int, b: int) -> float:
        pairs = parts.filter(pl.col("part") == a).join(parts.filter(pl.col("part") == b), on=["user_id", "category"])
        both = set(parts.filter(pl.col("part") == a)["user_id"]) & set(parts.filter(pl.col("part") == b)["user_id"])
        return float((pairs["share"] * pairs["share_right"]).sum()) / len(both)

    assert agreement(0, 5) < 0.9 * agreement(0, 1)


def test_taste_reaches_over_shelves(joined: pl.DataFrame) -> None:
    """Who likes a brand or a price level on one shelf likes it on another."""
    level = pl.col("price_level")
    liked = joined.unique(["user_id", "item_id"]).sort("user_id", "item_id")
    strangers = liked.with_columns(pl.col("user_id").shuffle(seed=1).over("category"))

    def pairs(events: pl.DataFrame, *same: str) -> float:
        lines = events.group_by("user_id", *same).len()["len"]
        return float((lines * (lines - 1)).sum())

    def brand(events: pl.DataFrame) -> float:
        agree = pairs(events, "department", "brand") - pairs(events, "category", "brand")
        return agree / (pairs(events, "department") - pairs(events, "category"))

    def price(events: pl.DataFrame) -> float:
        halves = events.group_by("user_id", pl.col("category").hash(seed=0) % 2).agg(level.mean())
        both = halves.pivot("category", index="user_id", values="price_level").drop_nulls()
        return float(np.corrcoef(both["0"], both["1"])[0, 1])

    assert brand(liked) > 1.1 * brand(strangers)
    assert price(liked) > 0.1 > price(strangers)


def test_profile_hints_at_taste(shop: Tables, joined: pl.DataFrame) -> None:
    shares = joined.group_by("user_id", "department").len()
    shares = shares.with_columns(share=pl.col("len") / pl.col("len").sum().over("user_id"))
    ages = shop.users.select("user_id", age=pl.col("attributes").str.json_path_match("$.age_band"))

    def spread(ages: pl.DataFrame) -> float:
        """How far the ages' mean shares of a department lie apart."""
        told = shares.join(ages, on="user_id").with_columns(people=pl.col("user_id").n_unique().over("age"))
        means = told.group_by("age", "department").agg(pl.col("share").sum() / pl.col("people").first())
        return float(means.group_by("department").agg(pl.col("share").std())["share"].sum())

    assert spread(ages) > 2 * spread(ages.with_columns(pl.col("age").shuffle(seed=1)))


def test_nothing_happens_to_an_item_before_it_arrives(shop: Tables, joined: pl.DataFrame) -> None:
    end_ms = START_MS + DAYS * DAY_MS
    assert joined.filter(pl.col("timestamp") < pl.col("created_at")).is_empty()
    assert joined["timestamp"].is_between(START_MS, end_ms, closed="left").all()
    arrived = shop.items.filter(pl.col("created_at") >= START_MS)
    assert 0.1 < arrived.height / shop.items.height < 0.3
    assert (arrived["created_at"] < end_ms).all()
    assert len(set(arrived["item_id"]) & set(joined["item_id"])) > 0.5 * arrived.height


def test_what_is_used_up_is_bought_again(joined: pl.DataFrame) -> None:
    bought = (
        joined.filter(pl.col("type") == "purchase")
        .group_by("user_id", "item_id", "category")
        .agg(pl.col("event_id").n_unique())
    )
    again = bought.group_by(
        pl.col("category").str.contains("> (Pantry|Care|Skin|Hair|Nutrition|Food|Baby|Supplies) >")
    ).agg((pl.col("event_id") > 1).mean())
    rate = dict(again.iter_rows())
    assert rate[True] > 0.2
    assert rate[True] > 3 * rate[False]
