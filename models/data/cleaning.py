"""From rows as a shop keeps them to canonical tables, with an account of every row.

What looks at every event is written once over narwhals: a polars frame in memory and a Spark frame
too large for it go through the same lines, and what is kept arrives as polars.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import narwhals as nw
import polars as pl
from narwhals.typing import IntoFrame

from app.state.events import ALIASES, EventType, content_id
from models.data.categories import TREE, paths
from models.data.tables import EVENTS, ITEMS, USERS, DataError, Effect, Finding, Report, Tables
from models.data.times import DAY_MS, Frame, instant_ms, number, with_epoch_ms

EARLIEST_MS = instant_ms("1990-01-01")
_ONE_EVENT_MS = 3_600_000
_LARGEST = 1e9

_PURCHASE, _RATE = EventType.PURCHASE.name.lower(), EventType.RATE.name.lower()


def canonical(
    events: IntoFrame,
    items: pl.DataFrame | None = None,
    users: pl.DataFrame | None = None,
    categories: pl.DataFrame | None = None,
    *,
    source: str,
    now_ms: int,
    repeats: bool = False,
) -> Tables:
    """Clean tables from frames whose columns have the canonical names; any type that can be read will do.

    `events` needs user_id, item_id, type and timestamp, may have value, quantity, event_id and
    cancelled (true drops the row), and may be any frame that narwhals knows; in `items` and `users`
    every further column becomes an attribute. Without `items` they are made from the events. With `categories`,
    category_id and parent_id, the category of an item is a place in their tree and becomes the path to it.
    `repeats` keeps rows that are equal in everything, as lines of one event may be. Raises `DataError`.
    """
    found: list[Finding] = []
    kept, read = _clean_events(nw.from_native(events), found, source, now_ms, repeats)
    shelf = _items_of(kept) if items is None else _clean_items(items, categories, kept, found)
    people = _clean_users(users, kept, found)
    if items is not None:
        strange = kept.join(shelf, on="item_id", how="anti").height
        if strange == kept.height:
            raise _strangers("events", kept, "items", shelf, "item_id")
        _note(found, "events", "noted", "item not in the items table", strange)
    tables = {"events": kept, "items": shelf, "users": people}
    given = {name: frame.height for name, frame in (("items", items), ("users", users)) if frame is not None}
    height = {name: frame.height for name, frame in tables.items()}
    return Tables(**tables, report=Report(source, {"events": read, **given}, height, tuple(found)))


def _note(found: list[Finding], table: str, effect: Effect, reason: str, rows: int, first: int | None = None) -> None:
    if rows:
        found.append(Finding(table, effect, reason, rows, first))


def _strangers(table: str, rows: pl.DataFrame, other: str, known: pl.DataFrame, column: str) -> DataError:
    """For two tables that have no id in common, which are not of one shop or write ids differently."""
    ours, theirs = rows[column].min(), known[column].min()
    return DataError(
        f"{table}: column {column}: none of {rows.height:,} rows is in {other}; it is {ours!r} here, {theirs!r} there"
    )


def _text(column: nw.Expr, dtype: Any) -> nw.Expr:
    """The column as stripped text, null where nothing is left; a whole number kept as a float loses its ".0"."""
    if dtype.is_float():
        column = nw.when(column.is_finite()).then(column).cast(nw.Int64)
    text = column.cast(nw.String).str.strip_chars()
    return nw.when(text != "").then(text)


def _rows(frame: Frame) -> pl.DataFrame:
    collected = frame.collect("polars") if isinstance(frame, nw.LazyFrame) else frame
    return collected.to_polars()


def _totals(frame: Frame, **flags: nw.Expr) -> dict[str, int]:
    """How many rows there are, and in how many each flag holds."""
    sums = [flag.cast(nw.Int64).sum().alias(name) for name, flag in flags.items()]
    return {
        name: int(total or 0)
        for name, total in _rows(frame.select(nw.len().alias("rows"), *sums)).row(0, named=True).items()
    }


_ROW = "__row"


def _numbered(frame: Frame) -> Frame:
    """With the number of each row, from 1 on, where rows have an order."""
    if isinstance(frame, nw.LazyFrame):
        return frame.with_columns(nw.lit(None, nw.Int64).alias(_ROW))
    return frame.with_row_index(_ROW).with_columns(nw.col(_ROW).cast(nw.Int64) + 1)


def _firsts(frame: Frame, flags: Mapping[str, nw.Expr]) -> dict[str, int | None]:
    """The number of the first row in which each flag holds."""
    firsts = [nw.when(flag).then(nw.col(_ROW)).min().alias(name) for name, flag in flags.items()]
    return dict(_rows(frame.select(*firsts)).row(0, named=True))


def _clean_events(
    frame: Frame, found: list[Finding], source: str, now_ms: int, repeats: bool
) -> tuple[pl.DataFrame, int]:
    if missing := [name for name in ("user_id", "item_id", "type", "timestamp") if name not in frame.collect_schema()]:
        raise DataError(f"{source}: no column {', '.join(missing)}")
    read = _totals(frame)["rows"]
    if not read:
        raise DataError(f"{source}: no rows")
    frame = _judged(_typed(_numbered(frame)), now_ms)
    dropped = _rows(frame.group_by("dropped").agg(nw.len().alias("rows"), nw.col(_ROW).min())).drop_nulls("dropped")
    for reason, rows, first in dropped.sort("rows", "dropped", descending=[True, False]).iter_rows():
        _note(found, "events", "dropped", reason, rows, first)
    frame = frame.filter(nw.col("dropped").is_null())
    frame, flags = _mended(frame)
    flags["unknown_type"] = nw.col("unknown_type")
    totals, first_of = _totals(frame, **flags), _firsts(frame, flags)
    if not totals["rows"]:
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows, _ in dropped.iter_rows())
        raise DataError(f"{source}: none of {read:,} rows can be used: {reasons}")
    frame = frame.select(*EVENTS)
    distinct = frame.unique()
    repeated = totals["rows"] - _totals(distinct)["rows"]
    if repeats:
        _note(found, "events", "noted", "equal to another line of the same event, kept", repeated)
    else:
        _note(found, "events", "dropped", "duplicate", repeated)
        frame = distinct
    for name, reason in _REPAIRS.items():
        _note(found, "events", "repaired", reason, totals[name], first_of[name])
    _note(found, "events", "noted", "unknown type, kept", totals["unknown_type"], first_of["unknown_type"])
    return _identified(_rows(frame)), read


_REPAIRS = {
    "unreadable_value": "value is no usable number: unknown",
    "no_price": "non-positive price of something not bought: unknown",
    "unreadable_quantity": "quantity is no positive number: 1",
    "reused": "event id shared by different events: derived from the content",
    "moved": "time differs within one event: the first",
}


def _typed(frame: Frame) -> Frame:
    """Canonical types, and beside them what the raw text showed."""
    schema = frame.collect_schema()
    for name in ("event_id", "value", "quantity", "cancelled"):
        if name not in schema:
            frame = frame.with_columns(nw.lit(None, nw.Boolean if name == "cancelled" else nw.String).alias(name))
    schema = frame.collect_schema()
    kind = _text(nw.col("type"), schema["type"])
    known = {alias: canonical.name.lower() for alias, canonical in ALIASES.items()}
    canonical_kind = kind.str.to_lowercase().replace_strict(
        list(known), list(known.values()), default=kind, return_dtype=nw.String
    )
    frame = frame.with_columns(
        *(_text(nw.col(name), schema[name]).alias(name) for name in ("user_id", "item_id", "event_id")),
        canonical_kind.alias("type"),
        *(_plausible(name, schema[name]).alias(name) for name in ("value", "quantity")),
        *(_unreadable(name, schema[name]).alias(f"unreadable_{name}") for name in ("value", "quantity")),
    )
    frame = frame.with_columns(
        (~nw.col("type").is_in(sorted(set(known.values())))).fill_null(False).alias("unknown_type"),
        (nw.col("quantity").fill_null(1.0) < 1).alias("no_quantity"),
    )
    return with_epoch_ms(frame, "timestamp")


def _plausible(name: str, dtype: Any) -> nw.Expr:
    value = number(nw.col(name), dtype)
    return nw.when(value.abs() < _LARGEST).then(value)


def _unreadable(name: str, dtype: Any) -> nw.Expr:
    if dtype != nw.String:
        if not dtype.is_numeric():
            return nw.lit(False)
        large = nw.col(name).abs() >= _LARGEST
        # What a table writes for "unknown" is no mistake, and compares as larger than everything.
        return (large & ~nw.col(name).is_nan() if dtype.is_float() else large).fill_null(False)
    return (~_text(nw.col(name), dtype).is_null()) & _plausible(name, dtype).is_null()


def _judged(frame: Frame, now_ms: int) -> Frame:
    """With a column `dropped`: the first reason, if any, why a row cannot be used."""
    when, bought = nw.col("timestamp"), nw.col("type") == _PURCHASE
    reasons = {
        "cancellation": nw.col("cancelled"),
        "no user": nw.col("user_id").is_null(),
        "no item": nw.col("item_id").is_null(),
        "no type": nw.col("type").is_null(),
        "no time": when.is_null(),
        "before 1990": when < EARLIEST_MS,
        "in the future": when > now_ms + DAY_MS,
        "non-positive quantity": bought & nw.col("no_quantity"),
        "non-positive price": bought & (nw.col("value") <= 0),
        "no rating": (nw.col("type") == _RATE) & nw.col("value").is_null(),
    }
    dropped = nw.lit(None, nw.String)
    for reason, holds in reversed(reasons.items()):
        dropped = nw.when(holds.fill_null(False)).then(nw.lit(reason)).otherwise(dropped)
    return frame.with_columns(dropped.alias("dropped"))


def _mended(frame: Frame) -> tuple[Frame, dict[str, nw.Expr]]:
    """With what can be put right put right, and the flags that say in which rows."""
    no_price = ((nw.col("type") != _RATE) & (nw.col("value") <= 0)).fill_null(False)
    frame = frame.with_columns(
        no_price.alias("no_price"),
        (nw.col("unreadable_quantity") | nw.col("no_quantity")).alias("unreadable_quantity"),
    ).with_columns(
        nw.when(~nw.col("no_price")).then(nw.col("value")).alias("value"),
        nw.when(~nw.col("no_quantity")).then(nw.col("quantity")).fill_null(1.0).cast(nw.Int64).alias("quantity"),
    )
    given, when = ~nw.col("event_id").is_null(), nw.col("timestamp")
    first, last = when.min().over("event_id"), when.max().over("event_id")
    differ = last - first > _ONE_EVENT_MS
    for name in ("user_id", "type"):
        differ = differ | (nw.col(name).min().over("event_id") != nw.col(name).max().over("event_id"))
    # An event has one rating, whatever its lines.
    value = nw.col("value")
    rated = (nw.col("type") == _RATE) & (value.min().over("event_id") != value.max().over("event_id"))
    differ = differ | rated.fill_null(False)
    frame = frame.with_columns((given & differ).alias("reused"), first.alias("first"))
    one = given & ~nw.col("reused")
    frame = frame.with_columns(
        nw.when(one).then(nw.col("event_id")).alias("event_id"),
        nw.when(one).then(nw.col("first")).otherwise(when).alias("timestamp"),
        (one & (nw.col("first") != when)).alias("moved"),
    )
    return frame, {name: nw.col(name) for name in _REPAIRS}


def _identified(events: pl.DataFrame) -> pl.DataFrame:
    """In their final order, and with an id for every event that had none."""
    events = events.cast(EVENTS)
    nameless = events.filter(pl.col("event_id").is_null())
    rows = nameless.select("type", "user_id", "timestamp", "item_id", "quantity", "value").iter_rows()
    ids = [
        content_id(kind, user, None, ts, [(item, quantity, value)]) for kind, user, ts, item, quantity, value in rows
    ]
    derived = nameless.with_columns(pl.Series("event_id", ids, dtype=pl.String))
    return pl.concat([events.drop_nulls("event_id"), derived]).sort(
        "timestamp", "user_id", "event_id", "item_id", "quantity", "value"
    )


def _median_price(events: pl.DataFrame) -> pl.DataFrame:
    paid = pl.col("value").filter(pl.col("type") != _RATE).median().alias("price")
    return events.group_by("item_id").agg(paid).sort("item_id")


def _items_of(events: pl.DataFrame) -> pl.DataFrame:
    return _shelf(_median_price(events).with_columns(attributes=pl.lit("{}")))


def _shelf(items: pl.DataFrame) -> pl.DataFrame:
    """The canonical columns of `items`, null where it lacks one."""
    lacking = {name: pl.lit(None, dtype) for name, dtype in ITEMS.items() if name not in items.columns}
    vector = ["vector"] if "vector" in items.columns else []
    return items.with_columns(**lacking).select(*(pl.col(name).cast(dtype) for name, dtype in ITEMS.items()), *vector)


def _clean_items(
    items: pl.DataFrame, categories: pl.DataFrame | None, events: pl.DataFrame, found: list[Finding]
) -> pl.DataFrame:
    items = _with_attributes(_keyed(items, "item_id", "items", found), [*ITEMS, "vector", _ROW], as_text=False)
    if "price" not in items.columns:
        items = items.join(_median_price(events), on="item_id", how="left", maintain_order="left")
    if isinstance(items.schema.get("category"), pl.List):
        items = items.with_columns(pl.col("category").cast(pl.List(pl.String)).list.join(" > "))
    frame: Frame = nw.from_native(items)
    for name in ("title", "category", "brand"):
        if name in items.columns:
            frame = frame.with_columns(_text(nw.col(name), frame.collect_schema()[name]).alias(name))
    price = number(nw.col("price"), frame.collect_schema()["price"])
    frame = frame.with_columns(nw.when((price > 0) & (price < _LARGEST)).then(price).alias("price"))
    if "created_at" in items.columns:
        frame = with_epoch_ms(frame, "created_at")
    cleaned = _rows(frame)
    for name, reason in (
        ("price", "price is no usable number: unknown"),
        ("created_at", "created_at is no time: unknown"),
    ):
        if name in items.columns:
            given = items[name].cast(pl.String).str.strip_chars().fill_null("") != ""
            odd = cleaned.filter(given & cleaned[name].is_null())[_ROW]
            _note(found, "items", "repaired", reason, len(odd), *odd.head(1))
    if "vector" in items.columns:
        cleaned = _with_vectors(cleaned, found)
    if categories is not None:
        cleaned = _placed(cleaned, categories, found)
    return _shelf(cleaned).with_columns(pl.col("category").str.replace_all(r"\s*>\s*", " > ")).sort("item_id")


def _placed(items: pl.DataFrame, categories: pl.DataFrame, found: list[Finding]) -> pl.DataFrame:
    """With the path of each category instead of its id; one that is not in the tree stays as it is."""
    frame = nw.from_native(categories)
    path = paths(frame.with_columns(_text(nw.col(name), frame.schema[name]).alias(name) for name in TREE).to_native())
    if "category" not in items.columns:
        raise DataError("items: no column category, for which there are categories")
    lost = items.filter(pl.col("category").is_not_null() & ~pl.col("category").is_in(list(path)))[_ROW]
    if len(lost) == items["category"].count():
        raise DataError("items: column category: none is in categories")
    _note(found, "items", "noted", "category not in the categories table, kept", len(lost), *lost.head(1))
    return items.with_columns(pl.col("category").replace(path))


def _with_vectors(items: pl.DataFrame, found: list[Finding]) -> pl.DataFrame:
    """Vectors as List[f32]: all finite and as wide as most are, else null.

    Raises `DataError` where no width is that of most, since then nobody can tell which are the wrong ones.
    """
    vectors, row = _vectors(items), items[_ROW]
    vectors = vectors.set(vectors.list.len() == 0, None)
    widths = pl.DataFrame({"width": vectors.list.len(), "row": row}).drop_nulls("width")
    by_width = widths.group_by("width").agg(pl.len(), pl.col("row").min()).sort("len", "width", descending=True)
    if by_width.height > 1 and 2 * by_width["len"][0] <= widths.height:
        (width, count, first), (other, others, second) = by_width.head(2).iter_rows()
        raise DataError(
            f"items: column vector: {count:,} of width {width}, as in row {first:,},"
            f" and {others:,} of width {other}, as in row {second:,}"
        )
    width = by_width["width"][0] if by_width.height else 0
    for reason, usable in (
        (f"vector not of width {width}: none", vectors.list.len() == width),
        ("vector not finite: none", vectors.list.eval(pl.element().is_finite().fill_null(False)).list.all()),
    ):
        odd = row.filter((~usable).fill_null(False))
        _note(found, "items", "repaired", reason, len(odd), *odd.head(1))
        vectors = vectors.set(~usable, None)
    return items.with_columns(vector=vectors)


def _vectors(items: pl.DataFrame) -> pl.Series:
    """The column as List[f32]. Raises `DataError` that names the first row that holds something else."""
    given = items["vector"]
    try:
        if given.dtype == pl.String:
            given = given.str.json_decode(pl.List(pl.Float32))
        return given.cast(pl.List(pl.Float32))
    except pl.exceptions.PolarsError:
        for number, cell in zip(items[_ROW].to_list(), items["vector"].to_list(), strict=True):
            try:
                pl.Series([json.loads(cell) if isinstance(cell, str) else cell]).cast(pl.List(pl.Float32))
            except (ValueError, TypeError, pl.exceptions.PolarsError):
                raise DataError(f"items: column vector: {cell!r:.60} in row {number:,} is no list of numbers") from None
        raise


def _clean_users(users: pl.DataFrame | None, events: pl.DataFrame, found: list[Finding]) -> pl.DataFrame:
    seen = events.select(pl.col("user_id").unique(), attributes=pl.lit("{}"))
    if users is None:
        return seen.sort("user_id")
    users = _with_attributes(_keyed(users, "user_id", "users", found), [*USERS, _ROW], as_text=True).select(*USERS)
    if users.join(seen, on="user_id", how="semi").is_empty():
        raise _strangers("users", users, "events", seen, "user_id")
    unlisted = seen.join(users, on="user_id", how="anti")
    _note(found, "users", "added", "only in events", unlisted.height)
    return pl.concat([users, unlisted]).sort("user_id")


def _keyed(frame: pl.DataFrame, key: str, table: str, found: list[Finding]) -> pl.DataFrame:
    """With the key as text, once each: where it comes again the last row counts. And with the number of the row."""
    text = _text(nw.col(key), nw.from_native(frame).schema[key])
    rows = _rows(_numbered(nw.from_native(frame)).with_columns(text.alias(key)))
    repeated = pl.col(key).is_not_null() & ~pl.col(key).is_last_distinct()
    for reason, odd in ((f"no {key}", pl.col(key).is_null()), (f"{key} comes again later", repeated)):
        dropped = rows.filter(odd)[_ROW]
        _note(found, table, "dropped", reason, len(dropped), *dropped.head(1))
    kept = rows.filter(pl.col(key).is_not_null() & ~repeated)
    if kept.is_empty():
        raise DataError(f"{table}: column {key}: empty in all {rows.height:,} rows")
    return kept


def _with_attributes(frame: pl.DataFrame, canonical: Iterable[str], *, as_text: bool) -> pl.DataFrame:
    """With every column that is not canonical packed into `attributes`, beside what is there, without nulls."""
    free = frame.select(pl.exclude(*canonical))
    given = frame["attributes"].to_list() if "attributes" in frame.columns else [None] * frame.height
    rows = free.iter_rows(named=True) if free.width else ({} for _ in given)
    packed = [_packed(_object(text) | row, as_text) for text, row in zip(given, rows, strict=True)]
    return frame.with_columns(pl.Series("attributes", packed, dtype=pl.String))


def _object(text: object) -> dict[str, object]:
    if text is None or text == "":
        return {}
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        value = text
    return value if isinstance(value, dict) else {"attributes": value}


def _packed(attributes: Mapping[str, object], as_text: bool) -> str:
    known = {
        name: value
        for name, value in attributes.items()
        if not (value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)))
    }
    if as_text:
        known = {
            name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in known.items()
        }
    text = json.dumps(known, ensure_ascii=False, default=str)
    if "NaN" in text or "Infinity" in text:
        # Python writes them inside lists and objects, and no other reader of JSON takes them.
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)
    return text
