"""A storefront that never was: a catalog, its shoppers, and what they did in it.

A shopper has a taste (some shelves, a style, a price level, a brand's character being its style and
price level), which their profile hints at and which drifts. In a session they look at shelves; the
shop shows each as a list, popular items first and some new ones between; the shopper looks at a
position with a probability that falls with its rank (the examination model of M. Richardson,
E. Dominowska and R. Ragno, WWW 2007), views what they like, puts some of it in the cart and buys
some of that. What is used up is bought again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from app.state.events import EventType
from models.data.tables import EVENTS, ITEMS, USERS, Report, Tables
from models.data.times import DAY_MS, instant_ms

START_MS = instant_ms("2026-01-01")
LIST_LENGTH = 12

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# A department and a group of shelves; then each shelf's product with its median price. * is used up.
_SHELVES = """
Kitchen > Cookware: Frying Pan 38, Stock Pot 55, Wok 44, Casserole 70
Kitchen > Tableware: Mug 11, Dinner Plate 14, Bowl 12, Wine Glass 9
Kitchen > Pantry*: Coffee Blend 12, Tea Tin 9, Olive Oil 15, Granola 7
Home > Bedroom: Pillow 29, Duvet 90, Blanket 52, Bedside Lamp 47
Home > Living Room: Cushion 24, Rug 130, Floor Lamp 95, Side Table 110
Home > Care*: Scented Candle 18, Laundry Soap 11, Surface Cleaner 6, Air Freshener 8
Fashion > Tops: Shirt 42, Sweater 58, Blouse 46, Polo 36
Fashion > Outerwear: Jacket 120, Raincoat 98, Vest 64, Parka 160
Fashion > Accessories: Scarf 27, Belt 33, Backpack 74, Wallet 39
Beauty > Skin*: Face Cream 26, Body Lotion 14, Serum 34, Hand Balm 9
Beauty > Hair*: Shampoo 10, Conditioner 11, Hair Mask 17, Styling Gel 12
Beauty > Tools: Makeup Brush 15, Hair Dryer 65, Mirror 28, Trimmer 45
Sports > Training: Yoga Mat 32, Dumbbell 40, Jump Rope 13, Foam Roller 25
Sports > Outdoor: Tent 190, Sleeping Bag 105, Trekking Pole 48, Water Bottle 22
Sports > Nutrition*: Protein Powder 36, Energy Bar 4, Electrolyte Drink 14, Vitamin Jar 19
Pets > Dogs: Dog Bed 58, Leash 18, Chew Toy 9, Travel Crate 80
Pets > Cats: Cat Tree 85, Scratching Post 38, Litter Tray 24, Cat Tunnel 20
Pets > Food*: Dog Kibble 42, Cat Kibble 34, Training Treat 8, Wet Food Tray 16
Kids > Toys: Puzzle 17, Building Set 45, Doll 29, Toy Train 35
Kids > Books: Picture Book 12, Sticker Book 8, Atlas 24, Story Collection 19
Kids > Baby*: Diaper Pack 28, Baby Wipe Box 12, Baby Lotion 10, Formula Tin 26
Office > Desk: Notebook 12, Desk Lamp 42, Pen Set 20, Desk Organizer 26
Office > Audio: Headphone 95, Speaker 80, Microphone 110, Earbud 60
Office > Supplies*: Paper Ream 8, Ink Cartridge 32, Marker Pack 11, Sticky Note 5
"""
# Of a group of shelves, else of the department.
_MATERIALS = {
    "Kitchen": "Steel Ceramic Copper Glass Bamboo Stoneware",
    "Kitchen > Pantry": "Smoked Toasted Dark Mild Vanilla Citrus",
    "Home": "Oak Linen Wool Cotton Velvet Rattan",
    "Home > Care": "Lavender Citrus Pine Rose Cedar Verbena",
    "Fashion": "Cotton Merino Denim Leather Linen Canvas",
    "Beauty": "Rose Aloe Argan Lavender Honey Cedar",
    "Beauty > Tools": "Ionic Bamboo Ceramic Titanium Silicone Rosewood",
    "Sports": "Cork Nylon Carbon Rubber Alloy Mesh",
    "Sports > Nutrition": "Vanilla Cocoa Berry Citrus Peanut Mango",
    "Pets": "Hemp Rope Plush Willow Canvas Felt",
    "Pets > Food": "Salmon Chicken Beef Lamb Turkey Duck",
    "Kids": "Wooden Cotton Cork Felt Maple Linen",
    "Kids > Books": "Illustrated Pop-Up Bedtime Pocket Hardcover Magnetic",
    "Kids > Baby": "Cotton Chamomile Aloe Oat Bamboo Almond",
    "Office": "Walnut Aluminium Recycled Leather Matte Felt",
    "Office > Supplies": "Recycled Coated Matte Pastel Premium Archival",
}
# Around the circle of styles, neighbours alike; three words for each.
_STYLES = (
    "Classic Timeless Heritage|Elegant Refined Fine|Modern Minimal Sleek|Urban Bold Graphic|"
    "Sporty Active Rugged|Playful Bright Cheerful|Natural Organic Pure|Rustic Handmade Country"
)
_COLORS = "black white grey navy green red yellow beige pink brown".split()
_SYLLABLES = (
    "Nor Vel Kas Bri Ald Tam Sol Mar Fen Lux Hal Ost Rin Cor Dal Eli Gra Ivo Jun Pel".split(),
    "den mar vik lia ton sen ora quist dale wyn bury mont essa holm ford ari nova ley beck ine".split(),
    ["", " & Co", " Studio", " Works", " House", " Goods", " Lab", " Atelier"],
)
_AGES = ("18-24", "25-34", "35-49", "50-64", "65+")
_GENDERS = ("female", "male", "other")
_REGIONS = ("north", "south", "east", "west", "centre", "islands")

_SLOTS = np.array([0.40, 0.25, 0.15, 0.12, 0.08])
"""How often a shopper turns to each of their favourite shelves."""
_EXPLORE = 0.15
_PHASE_DAYS = 20
_HOUR_MS = 3_600_000
_HOURS = np.array([1, 1, 1, 1, 1, 1, 2, 4, 5, 6, 7, 8, 9, 8, 7, 7, 8, 9, 11, 13, 14, 12, 7, 3], float)
_EXAMINED = np.arange(1, LIST_LENGTH + 1) ** -0.8


@dataclass(frozen=True, slots=True)
class _Catalog:
    shelf: Ints
    style: Floats
    """Angle on the circle of styles, in radians."""
    level: Floats
    """Logarithm of the price against the shelf's median."""
    price: Floats
    created_ms: Ints
    appeal: Floats
    used_up: Bools
    shelf_pull: Floats
    """Popularity of each shelf, 0 where it is empty."""
    order: Ints
    """Items by shelf and, on it, by arrival."""
    table: pl.DataFrame


@dataclass(frozen=True, slots=True)
class _Shoppers:
    shelves: Ints
    """[phase, shopper, slot] favourite shelves."""
    style: Floats
    """[phase, shopper], in radians."""
    level: Floats
    activity: Floats
    """Cumulative share of the sessions."""
    table: pl.DataFrame


@dataclass(frozen=True, slots=True)
class _Rows:
    """Events in the making; `position` is the 0-based rank on the list, -1 where there was none."""

    session: Ints
    user: Ints
    item: Ints
    kind: Ints
    ts: Ints
    quantity: Ints
    position: Ints

    def __getitem__(self, chosen: Bools | Ints) -> "_Rows":
        return _Rows(*(getattr(self, name)[chosen] for name in self.__slots__))


def _concat(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in _Rows.__slots__))


def simulate(items: int = 5_000, users: int = 5_000, events: int = 200_000, seed: int = 0, days: int = 60) -> Tables:
    """The history of a made-up storefront from `START_MS` on: the same numbers give the same tables.

    `events` has, beside the canonical columns, the position (0-based, null for a repeat purchase) on
    the list where the shopper found the item. One session's purchases are the lines of one event.
    """
    if min(items, users, events, days) < 1:
        raise ValueError("items, users, events and days must be at least 1")
    rng = np.random.default_rng(seed)
    catalog = _stock(rng, items, days)
    shoppers = _invite(rng, users, days, catalog)
    rows = _concat(list(_sessions(rng, catalog, shoppers, events, days)))
    run = blake2b(repr((items, users, events, seed, days)).encode(), digest_size=4).hexdigest()
    history = _history(rows, catalog, shoppers, run)
    kept = {"events": history.height, "items": items, "users": users}
    return Tables(history, catalog.table, shoppers.table, Report(f"simulated storefront, seed {seed}", {}, kept))


def _stock(rng: np.random.Generator, items: int, days: int) -> _Catalog:
    shelves = _shelves()
    departments = _departments(shelves)
    median = np.array([shelf.price for shelf in shelves])
    pull = rng.lognormal(0, 0.6, len(shelves))
    pull[items:] = 0.0
    # One item on every shelf to begin with; then as the shelves' popularity has it.
    shelf = np.arange(items) % len(shelves)
    shelf[len(shelves) :] = rng.choice(len(shelves), max(items - len(shelves), 0), p=pull / pull.sum())
    department = np.array([departments.index(shelf.department) for shelf in shelves])[shelf]

    brands = min(max(items // 60, 24), 3_000)
    brand_style, brand_level = rng.uniform(0, 2 * np.pi, brands), 0.4 * rng.integers(-1, 2, brands)
    per_department = brands // len(departments)
    share = np.cumsum(np.arange(1, per_department + 1) ** -0.7)
    brand = np.searchsorted(share, rng.uniform(0, share[-1], items)) * len(departments) + department

    style = brand_style[brand] + rng.normal(0, 0.4, items)
    level = brand_level[brand] + rng.normal(0, 0.25, items)
    price = median[shelf] * np.exp(level)
    price = np.where(price < 20, np.maximum(np.floor(price * 10), 4) / 10 + 0.09, np.round(price) - 0.01).round(2)

    arrives = rng.random(items) < 0.2
    arrives[: len(shelves)] = False
    before_ms = START_MS - rng.integers(1, 365 * DAY_MS, items)
    created_ms = np.where(arrives, START_MS + rng.integers(0, days * DAY_MS, items), before_ms)
    appeal = np.exp(-0.8 * np.log(rng.permutation(items) + 1))

    used_up = np.array([shelf.used_up for shelf in shelves])[shelf]
    words = np.array([style.split() for style in _STYLES.split("|")])
    sector = (style % (2 * np.pi) / (2 * np.pi) * len(words)).astype(int) % len(words)
    materials = np.array([shelf.materials for shelf in shelves])
    names = _brand_names(rng, brands)
    made_of = pl.Series(materials.ravel()).gather(
        shelf * materials.shape[1] + rng.integers(0, materials.shape[1], items)
    )
    adjective = pl.Series(words.ravel()).gather(sector * words.shape[1] + rng.integers(0, words.shape[1], items))
    table = pl.DataFrame(
        {
            "item_id": _ids("p", items),
            "adjective": adjective,
            "material": made_of,
            "product": pl.Series([shelf.product for shelf in shelves]).gather(shelf),
            "category": pl.Series([shelf.category for shelf in shelves]).gather(shelf),
            "brand": pl.Series(names).gather(brand),
            "price": price,
            "created_at": created_ms,
            "color": pl.Series(_COLORS).gather(rng.integers(0, len(_COLORS), items)),
        }
    ).with_columns(
        title=pl.format("{} {} {} by {}", "adjective", "material", "product", "brand"),
        attributes=pl.struct("color", pl.col("material").str.to_lowercase()).struct.json_encode(),
    )
    return _Catalog(
        shelf=shelf,
        style=style,
        level=level,
        price=price,
        created_ms=created_ms,
        appeal=appeal,
        used_up=used_up,
        shelf_pull=pull,
        order=np.lexsort((created_ms, shelf)),
        table=table.select(*ITEMS).cast(ITEMS),
    )


@dataclass(frozen=True, slots=True)
class _Shelf:
    department: str
    category: str
    product: str
    price: float
    used_up: bool
    materials: list[str]


def _shelves() -> list[_Shelf]:
    shelves = []
    for line in _SHELVES.strip().splitlines():
        group, _, products = line.partition(": ")
        used_up, group = group.endswith("*"), group.rstrip("*")
        department = group.partition(" > ")[0]
        materials = (_MATERIALS.get(group) or _MATERIALS[department]).split()
        for entry in products.split(", "):
            product, _, price = entry.rpartition(" ")
            category = f"{group} > {product}{'es' if product[-1] in 'sh' else 's'}"
            shelves.append(_Shelf(department, category, product, float(price), used_up, materials))
    return shelves


def _departments(shelves: Sequence[_Shelf]) -> list[str]:
    """In the order of the shelves, so that a department's shelves lie together."""
    return list(dict.fromkeys(shelf.department for shelf in shelves))


def _brand_names(rng: np.random.Generator, count: int) -> list[str]:
    first, second, third = _SYLLABLES
    return [
        first[n % len(first)] + second[n // len(first) % len(second)] + third[n // len(first) // len(second)]
        for n in rng.permutation(len(first) * len(second) * len(third))[:count]
    ]


def _ids(letter: str, count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"{letter}{n:0{width}d}" for n in range(count)]


def _invite(rng: np.random.Generator, users: int, days: int, catalog: _Catalog) -> _Shoppers:
    shelves = _shelves()
    departments = _departments(shelves)
    of_shelf = np.array([departments.index(shelf.department) for shelf in shelves])
    profile = {
        "age_band": rng.choice(len(_AGES), users, p=(0.2, 0.3, 0.25, 0.15, 0.1)),
        "gender": rng.choice(len(_GENDERS), users, p=(0.49, 0.48, 0.03)),
        "region": rng.integers(0, len(_REGIONS), users),
    }
    liking, styles, levels = np.zeros((users, len(departments))), np.zeros(users), np.zeros(users)
    for (name, strength), kinds in zip((("age_band", 1.2), ("gender", 1.2), ("region", 0.5)), (5, 3, 6), strict=True):
        liking += strength * rng.normal(0, 1, (kinds, len(departments)))[profile[name]]
        styles += strength * rng.normal(0, 0.8, kinds)[profile[name]]
        levels += strength * rng.normal(0, 0.15, kinds)[profile[name]]
    best = np.argsort(-(liking + rng.gumbel(0, 0.8, liking.shape)), axis=1)[:, :2]

    phases = max(round(days / _PHASE_DAYS), 1)
    favourites = np.empty((phases, users, len(_SLOTS)), np.int64)
    style = np.empty((phases, users))
    for phase in range(phases):
        second = rng.random((users, len(_SLOTS))) < 0.35
        fresh = _shelf_in(rng, catalog.shelf_pull, of_shelf, np.where(second, best[:, 1:], best[:, :1]))
        if phase == 0:
            favourites[0], style[0] = fresh, styles + rng.normal(0, 0.8, users)
        else:
            favourites[phase] = np.where(rng.random(fresh.shape) < 0.15, fresh, favourites[phase - 1])
            style[phase] = style[phase - 1] + rng.normal(0, 0.3, users)
    names = {"age_band": _AGES, "gender": _GENDERS, "region": _REGIONS}
    table = pl.DataFrame(
        {"user_id": _ids("u", users)} | {name: pl.Series(names[name]).gather(code) for name, code in profile.items()}
    ).select("user_id", attributes=pl.struct(*names).struct.json_encode())
    activity = np.cumsum(rng.lognormal(0, 1.1, users))
    return _Shoppers(favourites, style, levels + rng.normal(0, 0.3, users), activity, table.cast(USERS))


def _shelf_in(rng: np.random.Generator, pull: Floats, of_shelf: Ints, department: Ints) -> Ints:
    """A shelf of each given department, by popularity; of any where the department has none."""
    upto = np.concatenate([[0.0], np.cumsum(pull)])
    low, high = upto[np.searchsorted(of_shelf, department)], upto[np.searchsorted(of_shelf, department, "right")]
    low, high = np.where(low < high, low, 0.0), np.where(low < high, high, upto[-1])
    return _draw(rng, upto, low, high)


def _draw(rng: np.random.Generator, upto: Floats, low: Floats, high: Floats) -> Ints:
    """For each pair a position in the cumulative weights `upto` (which begins with 0) between low and high."""
    return np.searchsorted(upto, low + rng.random(low.shape) * (high - low), "right") - 1


def _sessions(
    rng: np.random.Generator, catalog: _Catalog, shoppers: _Shoppers, events: int, days: int
) -> Iterator[_Rows]:
    """Whole sessions until there are just `events` events; the last one may be cut short."""
    first = 0
    while events > 0:
        rows = _visits(rng, catalog, shoppers, min(events // 3 + 64, 200_000), days)
        sessions = int(rows.session.max(initial=0)) + 1
        if len(rows.ts) > events:
            rank = rng.permutation(sessions)[rows.session]
            rows = rows[np.lexsort((rows.kind, rows.ts, rank))[:events]]
        yield replace(rows, session=rows.session + first)
        events, first = events - len(rows.ts), first + sessions


def _visits(rng: np.random.Generator, catalog: _Catalog, shoppers: _Shoppers, count: int, days: int) -> _Rows:
    """`count` sessions and the repeat purchases that follow from them."""
    user = _pick(rng, shoppers.activity, count)
    hour = _pick(rng, np.cumsum(_HOURS), count)
    start_ms = rng.integers(0, days, count) * DAY_MS + hour * _HOUR_MS + rng.integers(0, _HOUR_MS, count)
    # No session runs over the end of the period.
    start_ms = START_MS + np.minimum(start_ms, days * DAY_MS - _HOUR_MS // 2)
    views, match = _looks(rng, catalog, shoppers, user, start_ms)

    chosen = views[rng.random(len(match)) < _chance(0.5 * match - 1.7)]
    carts = _added(rng, catalog, chosen, 0.5, 3)
    bought = rng.random(len(carts.ts)) < 0.5
    checkout_ms = np.zeros(count, np.int64)
    np.maximum.at(checkout_ms, carts.session, carts.ts)
    checkout_ms += _pause(rng, count, 60, 240)
    lines = carts[bought]
    purchases = replace(lines, kind=np.full(bought.sum(), EventType.PURCHASE), ts=checkout_ms[lines.session])

    parts, sessions, end_ms = [views, carts, purchases], count, START_MS + days * DAY_MS
    while len(purchases.ts):
        again_ms = purchases.ts + (rng.lognormal(np.log(15), 0.35, len(purchases.ts)) * DAY_MS).astype(np.int64)
        again = (
            catalog.used_up[purchases.item] & (rng.random(len(again_ms)) < 0.6) & (again_ms < end_ms - _HOUR_MS // 2)
        )
        n = int(again.sum())
        views = replace(
            purchases[again],
            session=sessions + np.arange(n),
            kind=np.full(n, EventType.VIEW_ITEM),
            ts=again_ms[again],
            quantity=np.ones(n, np.int64),
            position=np.full(n, -1),
        )
        carts = _added(rng, catalog, views, 2, 20)
        purchases = replace(carts, kind=np.full(n, EventType.PURCHASE), ts=carts.ts + _pause(rng, n, 30, 120))
        parts += [views, carts, purchases]
        sessions += n
    return _concat(parts)


def _added(rng: np.random.Generator, catalog: _Catalog, views: _Rows, least_s: float, most_s: float) -> _Rows:
    """The same items put in the cart a moment after; of what is used up sometimes several."""
    count = len(views.ts)
    return replace(
        views,
        kind=np.full(count, EventType.ADD_TO_CART),
        ts=views.ts + _pause(rng, count, least_s, most_s),
        quantity=np.where(catalog.used_up[views.item], rng.geometric(0.6, count), 1),
    )


def _looks(
    rng: np.random.Generator, catalog: _Catalog, shoppers: _Shoppers, user: Ints, start_ms: Ints
) -> tuple[_Rows, Floats]:
    """The views of every session, once per item, and how well each item suits the shopper."""
    looks = np.minimum(rng.geometric(0.5, len(user)), 6)
    session = np.repeat(np.arange(len(user)), looks)
    nth = np.arange(len(session)) - np.repeat(np.cumsum(looks) - looks, looks)
    who, at_ms = user[session], start_ms[session] + nth * 90_000
    phase = np.minimum((at_ms - START_MS) // (_PHASE_DAYS * DAY_MS), len(shoppers.style) - 1)

    slot = _pick(rng, np.cumsum(_SLOTS), len(session))
    exploring = rng.random(len(session)) < _EXPLORE
    shelf = np.where(
        exploring, _pick(rng, np.cumsum(catalog.shelf_pull), len(session)), shoppers.shelves[phase, who, slot]
    )
    # Half of the further looks go on where the last one was.
    turned = (nth == 0) | (rng.random(len(session)) < 0.5)
    source = np.maximum.accumulate(np.where(turned, np.arange(len(session)), 0))
    shelf, exploring = shelf[source], exploring[source]

    shown = _shown(rng, catalog, shelf, at_ms)
    turn = shoppers.style[phase, who][:, None] - catalog.style[shown]
    dearer = np.abs(catalog.level[shown] - shoppers.level[who][:, None])
    match = 2.5 * np.cos(turn) - 2.0 * dearer - 0.8 * exploring[:, None]
    seen = rng.random(shown.shape) < _EXAMINED * _chance(match - 0.6)
    look, position = np.nonzero(seen)
    rows = _Rows(
        session=session[look],
        user=who[look],
        item=shown[seen],
        kind=np.full(len(look), EventType.VIEW_ITEM),
        ts=at_ms[look] + position * 4_000 + _pause(rng, len(look), 0, 3),
        quantity=np.ones(len(look), np.int64),
        position=position,
    )
    _, once = np.unique(rows.session * len(catalog.shelf) + rows.item, return_index=True)
    return rows[once], match[seen][once]


def _shown(rng: np.random.Generator, catalog: _Catalog, shelf: Ints, at_ms: Ints) -> Ints:
    """[look, LIST_LENGTH] what the shop shows of a shelf: popular items before others, only what has arrived."""
    arrival = catalog.created_ms[catalog.order]
    span = 2 * (int(arrival.max()) - int(arrival.min()) + 1 + 400 * DAY_MS)
    origin = int(arrival.min())
    keys = catalog.shelf[catalog.order] * span + (arrival - origin)
    low = np.searchsorted(keys, shelf * span)
    high = np.searchsorted(keys, shelf * span + (at_ms - origin), "right")
    upto = np.concatenate([[0.0], np.cumsum(catalog.appeal[catalog.order])])
    size = (len(shelf), LIST_LENGTH)
    row = _draw(rng, upto, np.broadcast_to(upto[low][:, None], size), np.broadcast_to(upto[high][:, None], size))
    newest = np.maximum(low, high - 20)[:, None]
    fresh = newest + (rng.random(size) * (high[:, None] - newest)).astype(np.int64)
    row = np.where(rng.random(size) < 0.08, fresh, row)
    shown = catalog.order[np.clip(row, low[:, None], high[:, None] - 1)]
    rank = np.log(catalog.appeal[shown]) + rng.normal(0, 1, size)
    return np.take_along_axis(shown, np.argsort(-rank, axis=1), axis=1)


def _pick(rng: np.random.Generator, upto: Floats, count: int) -> Ints:
    """`count` positions by the cumulative weights `upto`."""
    picked: Ints = np.searchsorted(upto, rng.random(count) * upto[-1], "right")
    return picked


def _pause(rng: np.random.Generator, count: int, least_s: float, most_s: float) -> Ints:
    return (rng.uniform(least_s, most_s, count) * 1000).astype(np.int64)


def _chance(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))


def _history(rows: _Rows, catalog: _Catalog, shoppers: _Shoppers, run: str) -> pl.DataFrame:
    rows = rows[np.lexsort((rows.item, rows.kind, rows.session, rows.ts))]
    number = np.arange(len(rows.ts))
    bought = np.flatnonzero(rows.kind == EventType.PURCHASE)
    _, first, order = np.unique(rows.session[bought], return_index=True, return_inverse=True)
    number[bought] = bought[first][order]
    kinds = pl.Series([kind.name.lower() for kind in EventType])
    priced = pl.Series(rows.kind != EventType.VIEW_ITEM)
    return (
        pl.DataFrame(
            {
                "user_id": shoppers.table["user_id"].gather(rows.user),
                "item_id": catalog.table["item_id"].gather(rows.item),
                "type": kinds.gather(rows.kind),
                "timestamp": rows.ts,
                "value": catalog.price[rows.item],
                "quantity": rows.quantity,
                "event_id": number,
                "position": rows.position,
            }
        )
        .select(
            pl.col("user_id", "item_id", "type", "timestamp"),
            pl.when(priced).then("value").alias("value"),
            pl.col("quantity"),
            pl.format("{}-{}", pl.lit(run), "event_id").alias("event_id"),
            pl.when(pl.col("position") >= 0).then("position").alias("position"),
        )
        .cast(pl.Schema([*EVENTS.items(), ("position", pl.Int64())]))
    )
