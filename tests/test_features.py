"""Every feature against plain Python over dictionaries, on five items and three shoppers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from app.catalog import Catalog
from app.engine import Query
from app.engine.batch import Batch, PairSet, Scratch, collate
from app.engine.features import HALF_LIFE_DAYS, INTEREST, MINUTES, NEVER_DAYS, compute, feature_names
from app.engine.merge import ABSENT, Candidates
from app.state.events import EVENT, EventType, UserState, event_key, exclusions_of, item_key
from tests.shelf import Item, shelf

DAY_MS = 86_400_000
NOW_MS = 1_700_000_000_000
SOURCES = ("cf", "towers")
STATISTICS = ("purchases", "views")

ITEMS = {
    item.id: item
    for item in (
        Item("tea", 4.0, ("food", "food > tea"), "acme", True, NOW_MS - 10 * DAY_MS, (1.5, 2.5)),
        Item("oolong", 9.0, ("food", "food > tea"), "bolt", True, NOW_MS - DAY_MS // 2, (0.5, 0.25)),
        Item("bread", 2.0, ("food",), "acme", True, NOW_MS + DAY_MS, (0.0, 0.0)),
        Item("lamp", 50.0, ("home", "home > light", "home > light > lamp"), None, True, 0, (3.0, 4.0)),
        Item("gift", math.nan, (), "bolt", True, NOW_MS - DAY_MS, (0.1, 0.2)),
    )
}

Deed = tuple[str, EventType, float, int]
"""Item, what was done, how many days ago, how many."""
E = EventType
SHOPPERS: tuple[tuple[Deed, ...], ...] = (
    (
        ("tea", E.VIEW_ITEM, 40.0, 1),
        ("tea", E.PURCHASE, 30.0, 3),
        ("lamp", E.ADD_TO_CART, 12.25, 1),
        ("tea", E.PURCHASE, 3.0, 2),
        ("gift", E.LIKE, 2.5, 1),
        ("unknown", E.PURCHASE, 2.0, 7),
        ("oolong", E.SELECT_ITEM, 1.5, 1),
        ("tea", E.SELECT_ITEM, 1.0, 1),
        ("lamp", E.HIDE, 0.5, 1),
        ("bread", E.ADD_TO_WISHLIST, 0.25, 1),
        ("bread", E.BEGIN_CHECKOUT, 0.125, 1),
    ),
    (),
    (("gift", E.VIEW_ITEM, -0.5, 1), ("gift", E.RATE, -1.0, 1)),
)

# query, item, (score, rank) of each source
PROPOSED: tuple[tuple[int, str, tuple[float, float], tuple[float, float]], ...] = (
    (0, "tea", (2.0, 0), (-0.5, ABSENT)),
    (0, "oolong", (1.0, 3), (0.75, 0)),
    (0, "bread", (0.0, ABSENT), (0.5, 1)),
    (0, "lamp", (0.25, 12), (0.1, 7)),
    (0, "gift", (0.0, ABSENT), (0.0, ABSENT)),
    (1, "tea", (0.0, ABSENT), (0.25, 0)),
    (1, "gift", (0.0, ABSENT), (-0.25, 1)),
    (2, "gift", (4.0, 0), (3.0, 0)),
    (2, "lamp", (1.0, 1), (0.0, ABSENT)),
)
BEST = ((2.0, 0.0, 4.0), (0.75, 0.25, 3.0))


def user_of(deeds: Sequence[Deed]) -> UserState:
    events = np.zeros(len(deeds), EVENT)
    for place, (item, kind, days, quantity) in enumerate(deeds):
        ts = NOW_MS - int(days * DAY_MS)
        events[place] = (ts, event_key(f"{place}"), item_key(item), np.nan, quantity, kind, 0)
    events.sort(order="ts")
    return UserState(events, exclusions_of(events))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return shelf(tmp_path_factory.mktemp("shelf"), list(ITEMS.values()), STATISTICS)


def batch_of(catalog: Catalog, shoppers: Sequence[Sequence[Deed]], form: str) -> Batch:
    queries = [Query(f"{n}") for n in range(len(shoppers))]
    return collate(queries, [user_of(deeds) for deeds in shoppers], catalog, 64, NOW_MS, SCRATCH[form](catalog))


SCRATCH: dict[str, Callable[[Catalog], Scratch | PairSet]] = {
    "compiled": lambda catalog: Scratch(catalog.size),
    "tensors": lambda catalog: PairSet(len(SHOPPERS), catalog.size, catalog.device),
}


def computed(catalog: Catalog, form: str) -> list[dict[str, float]]:
    batch = batch_of(catalog, SHOPPERS, form)
    candidates = Candidates(
        torch.tensor([query for query, *_ in PROPOSED]),
        catalog.rows_of([item for _, item, *_ in PROPOSED]),
        torch.tensor([[marks[s][0] for _, _, *marks in PROPOSED] for s in range(2)]),
        torch.tensor([[float(marks[s][1]) for _, _, *marks in PROPOSED] for s in range(2)]),
        torch.tensor(BEST),
    )
    features = compute(batch, candidates, catalog)
    names = feature_names(SOURCES, STATISTICS)
    assert features.dtype is torch.float32
    assert features.shape == (len(PROPOSED), len(names))
    assert len(set(names)) == len(names)
    return [dict(zip(names, row, strict=True)) for row in features.tolist()]


def expected(query: int, item: Item, marks: Sequence[tuple[float, float]]) -> dict[str, float]:
    known = [(ITEMS[name], kind, max(days, 0.0), n) for name, kind, days, n in SHOPPERS[query] if name in ITEMS]
    taste = [(of, INTEREST.get(kind, 0.0) * 0.5 ** (days / HALF_LIFE_DAYS)) for of, kind, days, _ in known]
    total = sum(weight for _, weight in taste)
    priced = [(math.log1p(of.price), weight) for of, weight in taste if of.price > 0]
    mean = sum(price * weight for price, weight in priced) / max(sum(weight for _, weight in priced), 1e-9)
    price = math.log1p(item.price) if item.price > 0 else 0.0
    gap = price - mean if price and mean else 0.0

    def did(*kinds: EventType) -> list[float]:
        return [days for of, kind, days, _ in known if of.id == item.id and kind in kinds]

    def share(same: Sequence[float]) -> float:
        return sum(same) / total if total else 0.0

    def leaf(of: Item) -> str | None:
        return of.category[-1] if of.category else None

    found: dict[str, float] = {"agreement": sum(rank < ABSENT for _, rank in marks)}
    for source, (name, (score, rank)) in enumerate(zip(SOURCES, marks, strict=True)):
        found[f"{name}.score"] = math.copysign(math.log1p(100 * abs(score)), score)
        best = max(BEST[source][query], 1e-9)
        found[f"{name}.share"] = min(max(score / best, -1.0), 1.0)
        found[f"{name}.rank"] = 10 / (10 + rank)
    found |= {f"item.{name}": value for name, value in zip(STATISTICS, item.statistics, strict=True)}
    found |= {
        "item.age": math.log1p(max(NOW_MS - item.created_ms, 0) / DAY_MS),
        "item.price": price,
        "user.events": math.log1p(len(known)),
        "user.purchases": math.log1p(sum(kind is E.PURCHASE for _, kind, _, _ in known)),
        "user.items": math.log1p(total),
        "user.recency": math.log1p(MINUTES * min([NEVER_DAYS, *(days for _, _, days, _ in known)])),
        "user.price": mean,
        "own.quantity": math.log1p(sum(n for of, kind, _, n in known if of.id == item.id and kind is E.PURCHASE)),
        "affinity.category": share([w for of, w in taste if leaf(item) and leaf(of) == leaf(item)]),
        "affinity.department": share([w for of, w in taste if item.category and of.category[:1] == item.category[:1]]),
        "affinity.brand": share([w for of, w in taste if item.brand and of.brand == item.brand]),
        "price.gap": abs(gap),
        "price.below": min(gap, 0.0),
    }
    for name, kinds in (
        ("views", (E.SELECT_ITEM, E.VIEW_ITEM)),
        ("carts", (E.ADD_TO_CART, E.ADD_TO_WISHLIST, E.BEGIN_CHECKOUT)),
        ("purchases", (E.PURCHASE,)),
    ):
        found[f"own.{name}"] = math.log1p(len(did(*kinds)))
        found[f"own.{name}.recency"] = math.log1p(MINUTES * min([NEVER_DAYS, *did(*kinds)]))
    return found


@pytest.mark.parametrize("form", SCRATCH)
@pytest.mark.parametrize("name", feature_names(SOURCES, STATISTICS))
def test_each_feature_is_what_a_loop_finds(catalog: Catalog, name: str, form: str) -> None:
    found = [row[name] for row in computed(catalog, form)]
    wanted = [expected(query, ITEMS[item], marks)[name] for query, item, *marks in PROPOSED]
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # An example in which a column is the same for all would prove little.
    assert len(set(wanted)) > 1


def test_names_are_all_there_is(catalog: Catalog) -> None:
    assert set(expected(0, ITEMS["tea"], ((1.0, 0), (1.0, 0)))) == set(feature_names(SOURCES, STATISTICS))


@pytest.mark.parametrize("form", SCRATCH)
def test_some_numbers_by_hand(catalog: Catalog, form: str) -> None:
    """A loop may have the same mistake as the vectors; these were worked out on paper."""
    rows = computed(catalog, form)
    tea, gift_of_a_stranger = rows[0], rows[6]
    assert tea["own.views"] == pytest.approx(math.log(3))
    assert tea["own.views.recency"] == pytest.approx(math.log(1 + 1440))
    assert tea["own.purchases"] == pytest.approx(math.log(3))
    assert tea["own.purchases.recency"] == pytest.approx(math.log(1 + 3 * 1440))
    assert tea["own.quantity"] == pytest.approx(math.log(6))
    assert tea["own.carts.recency"] == pytest.approx(math.log(1 + 1000 * 1440))
    assert tea["user.events"] == pytest.approx(math.log(11))
    assert tea["cf.score"] == pytest.approx(math.log(201))
    assert tea["towers.share"] == pytest.approx(-2 / 3)
    assert tea["agreement"] == 1
    assert gift_of_a_stranger["towers.share"] == -1
    assert {gift_of_a_stranger[name] for name in ("user.events", "user.price", "affinity.brand", "price.gap")} == {0.0}


def test_the_future_is_now(catalog: Catalog) -> None:
    batch = batch_of(catalog, SHOPPERS[2:], "compiled")
    assert batch.age_days.tolist() == [0.0, 0.0]


def test_the_batch_in_plain_words(catalog: Catalog) -> None:
    batch = batch_of(catalog, SHOPPERS, "compiled")
    kept = [deed for deed in SHOPPERS[0] if deed[0] != "unknown"]
    mine = batch.query == 0
    assert catalog.ids(batch.row[mine].tolist()) == [item for item, *_ in kept]
    assert batch.kind[mine].tolist() == [kind for _, kind, *_ in kept]
    assert batch.age_days[mine].tolist() == pytest.approx([days for *_, days, _ in kept])
    assert batch.quantity[mine].tolist() == [quantity for *_, quantity in kept]
    assert batch.from_end[mine].tolist() == list(range(len(kept)))[::-1]
    assert batch.query.tolist() == [0] * len(kept) + [2] * 2
    assert {
        (query, item)
        for query, item in zip(batch.excluded_query.tolist(), catalog.ids(batch.excluded_row.tolist()), strict=True)
    } == {(0, "tea"), (0, "lamp")}
