"""Readers: a shop's own files as canonical tables."""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
from narwhals.exceptions import NarwhalsError

from models.data.categories import TREE
from models.data.cleaning import canonical
from models.data.tables import DataError, Finding, Tables

_EVENT_NAMES = {
    "user_id": "userid user customerid customer visitorid visitor shopperid shopper memberid uid reviewerid",
    "item_id": "itemid item productid product sku stockcode articleid article asin movieid",
    "type": "type event eventtype eventname action behavior behaviortype interaction interactiontype",
    "timestamp": "timestamp time ts datetime date eventtime eventtimestamp createdat invoicedate unixtime",
    "value": "value price unitprice rating",
    "quantity": "quantity qty",
    "event_id": "eventid transactionid orderid invoiceid invoiceno",
}
_ITEM_NAMES = {
    "item_id": "itemid item id productid product sku stockcode articleid article asin movieid",
    "title": "title name itemname productname description",
    "category": "category categorypath categories categoryname categoryid",
    "brand": "brand brandname manufacturer vendor",
    "price": "price unitprice listprice",
    "created_at": "createdat created publishedat releasedate",
    "vector": "vector embedding",
    "attributes": "attributes",
}
_USER_NAMES = {
    "user_id": "userid user id customerid customer visitorid visitor shopperid shopper memberid uid reviewerid",
    "attributes": "attributes",
}
_TREE_NAMES = {"category_id": "categoryid category id", "parent_id": "parentid parent parentcategory"}

_KNOWN = sorted({*_EVENT_NAMES, *_ITEM_NAMES, *_USER_NAMES, *_TREE_NAMES})


def read_tables(
    events: Path,
    items: Path | None = None,
    users: Path | None = None,
    columns: Mapping[str, str] | None = None,
    now_ms: int | None = None,
    categories: Path | None = None,
) -> Tables:
    """Tables from CSV, JSON-lines (either also .gz) or Parquet files.

    `columns` maps canonical names to the files' own, where those are not recognised by themselves;
    `now_ms` (default: the clock) is the latest that an event can have happened. `categories` has the parent of each
    category that items name, where they do not name whole paths. Without a type
    column events are ratings, purchases or views, by whether there is a rating or a quantity.
    Raises `DataError` where a file cannot be read or lacks a column that must be there.
    """
    columns = dict(columns or {})
    if unknown := columns.keys() - set(_KNOWN):
        raise DataError(f"no canonical column {', '.join(sorted(unknown))}; there are {', '.join(_KNOWN)}")
    paths = [path for path in (events, items, users, categories) if path is not None]
    everything = {name for path in paths for name in _columns(path)}
    if absent := set(columns.values()) - everything:
        raise DataError(f"{', '.join(map(str, paths))}: no column {', '.join(sorted(absent))}")

    named = _named(events, _EVENT_NAMES, columns, ("user_id", "item_id", "timestamp"))
    history = _collect(events, _scan(events).select(**{name: pl.col(column) for name, column in named.items()}))
    notes = [f"column {name} is not used" for name in _columns(events) if name not in named.values()]
    if "type" not in named:
        rated = _plain(named.get("value", "")) == "rating"
        kind = "rate" if rated else "purchase" if "quantity" in named else "view_item"
        history = history.with_columns(type=pl.lit(kind))
        notes.append(f"no type: taken as {kind}")
    try:
        tables = canonical(
            history,
            None if items is None else _renamed(items, _ITEM_NAMES, columns, "item_id"),
            None if users is None else _renamed(users, _USER_NAMES, columns, "user_id"),
            None if categories is None else _renamed(categories, _TREE_NAMES, columns, *TREE),
            source=str(events),
            now_ms=round(time.time() * 1000) if now_ms is None else now_ms,
        )
    except (pl.exceptions.PolarsError, NarwhalsError) as error:
        # A column of a type that nothing can be made of, such as a list of objects for a title.
        raise _unreadable(", ".join(map(str, paths)), error) from error
    noted = tuple(Finding("events", "noted", note, history.height) for note in notes)
    return replace(tables, report=replace(tables.report, findings=tables.report.findings + noted))


def online_retail(path: Path) -> Tables:
    """The UCI gift shop's invoice lines (D. Chen, doi 10.24432/C5BW33) as CSV: one purchase per invoice.

    The file has no category and no brand, so the items have none. Equal lines of an invoice stay:
    they lie apart in it, are mostly single pieces, and the same invoices list an item as often in
    unequal lines, so that they are pieces scanned one by one rather than rows written twice.
    """
    names = {
        "user_id": "CustomerID",
        "item_id": "StockCode",
        "timestamp": "InvoiceDate",
        "value": "UnitPrice",
        "quantity": "Quantity",
        "event_id": "InvoiceNo",
        "title": "Description",
        "country": "Country",
    }
    if absent := set(names.values()) - set(_columns(path)):
        raise DataError(f"{path}: no column {', '.join(sorted(absent))}")
    lines = _collect(path, _scan(path).select(**{name: pl.col(column) for name, column in names.items()}))
    lines = lines.with_columns(type=pl.lit("purchase"), cancelled=pl.col("event_id").str.starts_with("C"))
    tables = canonical(lines.drop("title", "country"), source=str(path), now_ms=round(time.time() * 1000), repeats=True)
    sold = lines.join(tables.events, on=["event_id", "user_id", "item_id"], how="semi")
    titles = _most_frequent(sold.with_columns(pl.col("title").str.strip_chars()), "item_id", "title")
    countries = _most_frequent(sold, "user_id", "country")
    items = tables.items.drop("title").join(titles, on="item_id", how="left", maintain_order="left")
    users = tables.users.join(countries, on="user_id", how="left", maintain_order="left")
    return replace(
        tables,
        items=items.select(tables.items.columns),
        users=users.select("user_id", pl.struct("country").struct.json_encode().alias("attributes")),
    )


def retailrocket(path: Path) -> Tables:
    """RetailRocket's clickstream, as the site's own events.csv or as a Parquet file of user, item, type, timestamp."""
    return read_tables(path)


def _most_frequent(lines: pl.DataFrame, key: str, column: str) -> pl.DataFrame:
    counts = lines.drop_nulls(column).group_by(key, column).len()
    return (
        counts.sort("len", column, descending=[True, False]).unique(key, keep="first", maintain_order=True).drop("len")
    )


def _scan(path: Path) -> pl.LazyFrame:
    try:
        match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
            case "csv":
                return pl.scan_csv(path, infer_schema=False)
            case "jsonl" | "ndjson":
                return pl.scan_ndjson(path, infer_schema_length=None)
            case "parquet":
                return pl.scan_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error
    raise DataError(f"{path}: not a .csv, .jsonl or .parquet file")


def _columns(path: Path) -> list[str]:
    try:
        return _scan(path).collect_schema().names()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file")
    if isinstance(error, pl.exceptions.NoDataError):
        return DataError(f"{path}: the file is empty")
    return DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(path: Path, names: Mapping[str, str], columns: Mapping[str, str], needed: Iterable[str]) -> dict[str, str]:
    """Canonical name -> the file's: as mapped, else the first known name that the file has."""
    there = _columns(path)
    plain = {_plain(name): name for name in reversed(there)}
    found = {name: columns[name] for name in names if columns.get(name) in there}
    for name, known in names.items():
        match = next((plain[word] for word in known.split() if word in plain), None)
        if match is not None and name not in found and match not in found.values():
            found[name] = match
    if missing := [name for name in needed if name not in found]:
        raise DataError(f"{path}: no column for {', '.join(missing)} among {', '.join(there)}; map it by name")
    return found


def _renamed(path: Path, names: Mapping[str, str], columns: Mapping[str, str], *keys: str) -> pl.DataFrame:
    found = _named(path, names, columns, keys)
    table = _collect(path, _scan(path).rename({column: name for name, column in found.items()}))
    if table.is_empty():
        raise DataError(f"{path}: no rows")
    return table
