"""Reading and cleaning: every row is kept, repaired or dropped for a stated reason."""

import gzip
import io
import json
import os
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import narwhals as nw
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from app.state.events import ALIASES, content_id
from models.data import DataError, Tables, canonical, online_retail, read_tables, retailrocket
from models.data.tables import EVENTS, ITEMS, USERS
from models.data.times import instant_ms, with_epoch_ms

NOW_MS = instant_ms("2024-06-01")
AT = "2024-05-01T10:00:00Z"
AT_MS = instant_ms(AT)
COLUMNS = ("user_id", "item_id", "type", "timestamp", "value", "quantity", "event_id")


def raw(*rows: dict[str, object]) -> pl.DataFrame:
    good = {"user_id": "u", "item_id": "i", "type": "purchase", "timestamp": AT}
    return pl.DataFrame([{**good, **row} for row in rows], infer_schema_length=None)


def clean(*rows: dict[str, object], **tables: pl.DataFrame) -> Tables:
    return canonical(raw(*rows), **tables, source="test", now_ms=NOW_MS)


def findings(tables: Tables, table: str = "events") -> set[tuple[str, str, int]]:
    return {(found.effect, found.reason, found.rows) for found in tables.report.findings if found.table == table}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"cancelled": True}, "cancellation"),
        ({"user_id": None}, "no user"),
        ({"user_id": "  "}, "no user"),
        ({"item_id": ""}, "no item"),
        ({"type": None}, "no type"),
        ({"timestamp": None}, "no time"),
        ({"timestamp": "yesterday"}, "no time"),
        ({"timestamp": "2024-02-30"}, "no time"),
        ({"timestamp": "1989-12-31T23:59:59Z"}, "before 1990"),
        ({"timestamp": "2024-06-02T00:00:01Z"}, "in the future"),
        ({"quantity": "-1"}, "non-positive quantity"),
        ({"quantity": "0"}, "non-positive quantity"),
        ({"value": "0"}, "non-positive price"),
        ({"value": "-2.5"}, "non-positive price"),
        ({"type": "rate"}, "no rating"),
    ],
)
def test_row_that_cannot_be_used_is_dropped_by_name(row: dict[str, object], reason: str) -> None:
    tables = clean(row, {"user_id": "other"})
    assert findings(tables) == {("dropped", reason, 1)}
    assert tables.events["user_id"].to_list() == ["other"]


@pytest.mark.parametrize(
    ("row", "effect", "reason", "column", "value"),
    [
        ({"value": "a lot"}, "repaired", "value is no usable number: unknown", "value", None),
        ({"value": "1e300"}, "repaired", "value is no usable number: unknown", "value", None),
        (
            {"type": "view", "value": "0"},
            "repaired",
            "non-positive price of something not bought: unknown",
            "value",
            None,
        ),
        ({"quantity": "some"}, "repaired", "quantity is no positive number: 1", "quantity", 1),
        ({"type": "view", "quantity": "-3"}, "repaired", "quantity is no positive number: 1", "quantity", 1),
        ({"type": "Teleport"}, "noted", "unknown type, kept", "type", "Teleport"),
    ],
)
def test_row_that_can_be_put_right_is_kept(
    row: dict[str, object], effect: str, reason: str, column: str, value: object
) -> None:
    tables = clean(row)
    assert findings(tables) == {(effect, reason, 1)}
    assert tables.events[column].to_list() == [value]


def test_every_alias_is_resolved() -> None:
    rows = [{"user_id": f"{n:02d}", "type": f" {alias.upper()} ", "value": 4.0} for n, alias in enumerate(ALIASES)]
    tables = clean(*rows)
    assert tables.events.sort("user_id")["type"].to_list() == [kind.name.lower() for kind in ALIASES.values()]


def test_event_without_id_gets_that_of_its_content() -> None:
    tables = clean({"value": 2.5, "quantity": 3}, {"type": "pv"}, {"event_id": "given", "type": "like"})
    ids = dict(tables.events.select("type", "event_id").iter_rows())
    assert ids == {
        "purchase": content_id("purchase", "u", None, AT_MS, [("i", 3, 2.5)]),
        "view_item": content_id("view_item", "u", None, AT_MS, [("i", 1, None)]),
        "like": "given",
    }


def test_same_content_twice_is_one_event() -> None:
    tables = clean({"type": "buy"}, {"type": "purchase", "timestamp": str(AT_MS)}, {"event_id": "a"}, {"event_id": "a"})
    assert findings(tables) == {("dropped", "duplicate", 2)}
    assert tables.events.height == 2


def test_lines_of_one_event_share_its_first_moment() -> None:
    tables = clean(
        {"event_id": "order", "item_id": "b", "timestamp": "2024-05-01T10:01:00Z"},
        {"event_id": "order", "item_id": "a"},
    )
    assert findings(tables) == {("repaired", "time differs within one event: the first", 1)}
    assert tables.events["timestamp"].to_list() == [AT_MS, AT_MS]


@pytest.mark.parametrize(
    "other", [{"user_id": "v"}, {"type": "like"}, {"timestamp": "2024-05-02"}, {"type": "rate", "value": 2}]
)
def test_id_shared_by_different_events_is_replaced(other: dict[str, object]) -> None:
    kind = {"type": "rate", "value": 5} if other.get("type") == "rate" else {}
    tables = clean({"event_id": "x", **kind}, {"event_id": "x", "item_id": "j", **other})
    assert findings(tables) == {("repaired", "event id shared by different events: derived from the content", 2)}
    assert "x" not in tables.events["event_id"].to_list()
    assert tables.events["event_id"].n_unique() == 2


MESSY = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["u", "v", " u ", "", None]),
        "item_id": st.sampled_from(["i", "j", "k", None]),
        "type": st.sampled_from(["buy", "purchase", "view", "RATE", "like", "zap", None]),
        "timestamp": st.sampled_from(
            [AT, "2024-05-01 10:00", "2024-05-01T12:30:00.5+02:00", "1714557600", "1970", "x", None]
        ),
        "value": st.sampled_from(["1.5", "-1", "0", "x", None]),
        "quantity": st.sampled_from(["1", "2.0", "0", "-3", "x", None]),
        "event_id": st.sampled_from(["a", "b", "c", None]),
        "cancelled": st.sampled_from([True, False, False, None]),
    }
)


@settings(deadline=None, max_examples=25)
@given(st.lists(MESSY, max_size=40), st.booleans())
def test_every_row_is_accounted_for(rows: list[dict[str, object]], repeats: bool) -> None:
    schema = dict.fromkeys(COLUMNS, pl.String) | {"cancelled": pl.Boolean}
    frame = pl.DataFrame([*rows, {"user_id": "u", "item_id": "i", "type": "like", "timestamp": AT}], schema=schema)
    tables = canonical(frame, source="test", now_ms=NOW_MS, repeats=repeats)
    events = tables.events
    dropped = sum(found.rows for found in tables.report.findings if found.effect == "dropped")
    assert tables.report.read["events"] == frame.height == events.height + dropped
    assert events.schema == EVENTS
    assert events["timestamp"].is_sorted()
    assert events.drop("value").null_count().sum_horizontal().item() == 0
    assert (events["quantity"] >= 1).all()
    assert (events.filter(pl.col("type") != "rate")["value"].drop_nulls() > 0).all()
    # The lines of an event lie together and agree on all that an event has one of.
    one = events.select("event_id", "user_id", "type", "timestamp")
    assert one.unique().height == one["event_id"].n_unique() == one["event_id"].rle().len()
    assert set(tables.items["item_id"]) == set(events["item_id"])
    assert set(tables.users["user_id"]) == set(events["user_id"])
    # Nor does it matter in which order the rows lie, or whether they are in memory yet.
    for again in (frame.reverse(), frame.lazy()):
        other = canonical(again, source="test", now_ms=NOW_MS, repeats=repeats)
        assert other.events.equals(events)
        assert other.report == tables.report


@pytest.mark.slow
def test_spark_frame_gives_the_same_tables() -> None:
    """Where PySpark is installed, for it is not needed otherwise."""
    sql = pytest.importorskip("pyspark.sql")
    kinds = ["Buy", "view", "rate", "zap", None]
    times = [AT, "2024-05-01 10:00", "2024-05-01T12:30:00.5+02:00", "1714557600", "2024-02-30", "1980-01-01", None]
    rows = [
        (
            f"u{n % 7}" if n % 11 else None,
            f"i{n % 5}",
            kinds[n % 5],
            times[n % 7],
            str(n % 4 - 1),
            str(n % 3),
            f"e{n % 90}",
        )
        for n in range(500)
    ]
    frame = pl.DataFrame(rows, schema=COLUMNS, orient="row")
    options = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "1", "spark.driver.host": "127.0.0.1"}
    spark = sql.SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    try:
        of_spark = canonical(
            spark.createDataFrame(rows, ", ".join(f"{name} string" for name in COLUMNS)), source="test", now_ms=NOW_MS
        )
    finally:
        spark.stop()
    of_polars = canonical(frame, source="test", now_ms=NOW_MS)
    assert of_spark.events.equals(of_polars.events)
    assert of_spark.report == of_polars.report


def epochs(*cells: object) -> list[int | None]:
    frame = nw.from_native(pl.DataFrame({"t": cells}), eager_only=True)
    read: list[int | None] = with_epoch_ms(frame, "t").to_native()["t"].to_list()
    return read


ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.datetimes(datetime(1600, 1, 1), datetime(2400, 1, 1), timezones=ZONES | st.just(UTC)), min_size=1))
def test_text_and_datetimes_are_read_as_python_reads_them(moments: list[datetime]) -> None:
    expected = [(moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) for moment in moments]
    assert epochs(*(moment.isoformat() for moment in moments)) == expected
    assert epochs(*(moment.isoformat(" ").replace("+00:00", "Z") for moment in moments)) == expected
    assert epochs(*(moment.astimezone(UTC) for moment in moments)) == expected


def test_times_of_every_kind() -> None:
    assert epochs("2024-02-29", "2023-02-29", "2024-04-31", "2024-05-01T10:00", "2024-05-01T10:00+0200") == [
        instant_ms("2024-02-29"), None, None, AT_MS, AT_MS - 7_200_000,
    ]  # fmt: skip
    assert epochs(1_714_557_600, 1_714_557_600_000, 1_714_557_600_000_000, 1_714_557_600_000_000_000) == [AT_MS] * 4
    assert epochs("1714557600", " 1714557600000 ", "1714557600.25", "", None) == [AT_MS, AT_MS, AT_MS + 250, None, None]
    assert epochs(1_714_557_600.5, float("nan"), 1e300) == [AT_MS + 500, None, None]
    assert epochs(date(2024, 5, 1), None) == [instant_ms("2024-05-01"), None]


def test_items_are_cleaned() -> None:
    items = pl.DataFrame(
        {
            "item_id": ["i", "i", "j", "k", None],
            "title": ["old", " new ", "", "k", "x"],
            "category": [["A"], ["A", "B"], None, ["A"], None],
            "price": ["1", "2.5", "-1", "free", "1"],
            "created_at": ["2024-01-01", "2024-01-02", "once", None, None],
            "vector": [[1.0, 2.0], [3.0, 4.0], [1.0, float("nan")], [1.0], None],
            "color": ["red", "blue", None, "green", None],
            "weight": [1.5, 2.5, float("nan"), None, None],
        }
    )
    tables = clean({}, {"item_id": "gone"}, items=items)
    assert tables.items.rows_by_key("item_id") == {
        "i": [("new", "A > B", None, 2.5, instant_ms("2024-01-02"), '{"color": "blue", "weight": 2.5}', [3.0, 4.0])],
        "j": [(None, None, None, None, None, "{}", None)],
        "k": [("k", "A", None, None, None, '{"color": "green"}', None)],
    }
    assert tables.items.schema == ITEMS | {"vector": pl.List(pl.Float32)}
    assert findings(tables, "items") == {
        ("dropped", "no item_id", 1),
        ("dropped", "item_id comes again later", 1),
        ("repaired", "price is no usable number: unknown", 2),
        ("repaired", "created_at is no time: unknown", 1),
        ("repaired", "vector not of width 2: none", 1),
        ("repaired", "vector not finite: none", 1),
    }
    assert findings(tables) == {("noted", "item not in the items table", 1)}


def test_users_are_cleaned() -> None:
    users = pl.DataFrame(
        {"user_id": ["u", None, "w", "w"], "age": [30, 1, None, 41], "vip": [True, False, None, False]}
    )
    tables = clean({}, {"user_id": "v"}, users=users)
    assert tables.users.schema == USERS
    assert dict(tables.users.iter_rows()) == {
        "u": '{"age": "30", "vip": "true"}',
        "v": "{}",
        "w": '{"age": "41", "vip": "false"}',
    }
    assert findings(tables, "users") == {
        ("dropped", "no user_id", 1),
        ("dropped", "user_id comes again later", 1),
        ("added", "only in events", 1),
    }


def test_items_from_events_cost_what_was_paid() -> None:
    prices = [1.0, 2.0, 9.0]
    tables = clean(*({"value": price} for price in prices), {"item_id": "j", "type": "rate", "value": 5.0})
    assert dict(tables.items.select("item_id", "price").iter_rows()) == {"i": 2.0, "j": None}
    assert tables.items.schema == ITEMS


ROWS = [
    {"Customer ID": "007", "SKU": "1.0", "event": "view", "time": 1_714_557_600, "price": None, "qty": 1},
    {"Customer ID": "7", "SKU": "2", "event": "buy", "time": 1_714_557_601, "price": 2.5, "qty": 2},
]


def write(folder: Path, kind: str) -> Path:
    path, frame = folder / f"events.{kind}", pl.DataFrame(ROWS)
    match kind:
        case "csv":
            frame.write_csv(path)
        case "csv.gz":
            path.write_bytes(gzip.compress(frame.write_csv().encode()))
        case "jsonl":
            frame.write_ndjson(path)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
        case "parquet":
            frame.write_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_tables(tmp_path: Path, kind: str) -> None:
    tables = read_tables(write(tmp_path, kind), now_ms=NOW_MS)
    assert tables.events.drop("event_id").rows() == [
        ("007", "1.0", "view_item", AT_MS, None, 1),
        ("7", "2", "purchase", AT_MS + 1000, 2.5, 2),
    ]


def test_columns_are_found_by_mapping_and_the_rest_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("who,what,user,when,shop\na,1,x,2024-05-01,s\n")
    columns = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    tables = read_tables(tmp_path / "e.csv", columns=columns, now_ms=NOW_MS)
    assert tables.events.select("user_id", "item_id", "type").rows() == [("a", "1", "view_item")]
    assert findings(tables) == {
        ("noted", "column user is not used", 1),
        ("noted", "column shop is not used", 1),
        ("noted", "no type: taken as view_item", 1),
    }


@pytest.mark.parametrize(("header", "kind"), [("rating", "rate"), ("quantity", "purchase"), ("price", "view_item")])
def test_type_follows_from_what_there_is(tmp_path: Path, header: str, kind: str) -> None:
    (tmp_path / "e.csv").write_text(f"user,item,time,{header}\na,1,2024-05-01,3\n")
    assert read_tables(tmp_path / "e.csv", now_ms=NOW_MS).events["type"].to_list() == [kind]


def test_three_files(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,time\na,01,2024-05-01\n")
    (tmp_path / "i.csv").write_text('id,name,price,vector,fit\n01,"Oak, round",3.5,"[1, 2]",loose\n')
    (tmp_path / "u.jsonl").write_text('{"user": "a", "plan": "gold"}\n')
    tables = read_tables(tmp_path / "e.csv", tmp_path / "i.csv", tmp_path / "u.jsonl", now_ms=NOW_MS)
    assert tables.items.rows(named=True) == [
        {
            "item_id": "01",
            "title": "Oak, round",
            "category": None,
            "brand": None,
            "price": 3.5,
            "created_at": None,
            "attributes": '{"fit": "loose"}',
            "vector": [1.0, 2.0],
        }
    ]
    assert tables.users.rows() == [("a", '{"plan": "gold"}')]
    assert tables.report.read == tables.report.kept == {"events": 1, "items": 1, "users": 1}


def test_a_file_of_categories(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,time\na,1,2024-05-01\n")
    (tmp_path / "i.csv").write_text("item_id,categoryid\n1,8\n")
    (tmp_path / "c.csv").write_text("categoryid,parentid\n8,7\n7,\n")
    read = read_tables(tmp_path / "e.csv", tmp_path / "i.csv", now_ms=NOW_MS, categories=tmp_path / "c.csv")
    assert read.items["category"].to_list() == ["7 > 8"]


def test_canonical_files_come_back_unchanged(tmp_path: Path) -> None:
    items = pl.DataFrame(
        {"item_id": ["i"], "created_at": [AT_MS], "vector": [[0.5]], "color": ["red"], "size": [{"w": 1}]}
    )
    tables = clean({"event_id": "a"}, {"event_id": "a", "item_id": "j", "value": 3.0}, {"type": "zap"}, items=items)
    for name in ("events", "items", "users"):
        getattr(tables, name).write_parquet(tmp_path / f"{name}.parquet")
    again = read_tables(*(tmp_path / f"{name}.parquet" for name in ("events", "items", "users")), now_ms=NOW_MS)
    assert again.events.equals(tables.events)
    assert again.items.equals(tables.items)
    assert again.users.equals(tables.users)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", b"", "the file is empty"),
        ("e.csv", b"user,item,time\n", "no rows"),
        ("e.csv", b"user\na\nb\n", "no column for item_id, timestamp among user"),
        ("e.csv", b"user,item,time\n,1,2024-05-01\n", "none of 1 rows can be used: 1 no user"),
        ("e.csv", b"user,item,time\n\xff\xfe,1,2024-05-01\n", "cannot be read"),
        ("e.jsonl", b"{not json\n", "cannot be read"),
        ("e.parquet", b"PAR?", "cannot be read"),
        ("e.xlsx", b"", "not a .csv, .jsonl or .parquet file"),
        (None, b"", "no such file"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "absent.csv")
    if name:
        path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_tables(path, now_ms=NOW_MS)
    text = str(raised.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("i.csv", "item_id,title\n", "i.csv: no rows"),
        ("i.csv", "title\nx\n", "i.csv: no column for item_id among title"),
        ("i.csv", "item_id,vector\n1,[1]\n2,round\n", "items: column vector: 'round' in row 2 is no list of numbers"),
        ("i.jsonl", '{"item_id": "1", "title": [{"en": "x"}]}\n', "cannot be read"),
    ],
)
def test_unusable_items_are_one_clear_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "e.csv").write_text("user,item,time\na,1,2024-05-01\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        read_tables(tmp_path / "e.csv", tmp_path / name, now_ms=NOW_MS)
    assert "\n" not in str(raised.value)


FIRST_ROWS: dict[str, tuple[dict[str, pl.DataFrame], str, str, int]] = {
    "no id": ({"items": pl.DataFrame({"item_id": ["i", " "]})}, "items", "dropped: no item_id", 2),
    "an id again": (
        {"items": pl.DataFrame({"item_id": ["x", "i", "x", "x"]})},
        "items",
        "dropped: item_id comes again later",
        1,
    ),
    "endless price": (
        {"items": pl.DataFrame({"item_id": ["x", "i"], "price": [1.0, float("inf")]})},
        "items",
        "repaired: price is no usable number: unknown",
        2,
    ),
    "price beyond float32": (
        {"items": pl.DataFrame({"item_id": ["i"], "price": ["1e300"]})},
        "items",
        "repaired: price is no usable number: unknown",
        1,
    ),
    "narrow vector": (
        {"items": pl.DataFrame({"item_id": ["x", "y", "i"], "vector": ["[1,2]", "[1,2]", "[1]"]})},
        "items",
        "repaired: vector not of width 2: none",
        3,
    ),
    "vector with a gap": (
        {"items": pl.DataFrame({"item_id": ["x", "i"], "vector": [[1.0, 2.0], [1.0, None]]})},
        "items",
        "repaired: vector not finite: none",
        2,
    ),
    "vector beyond float32": (
        {"items": pl.DataFrame({"item_id": ["x", "i"], "vector": [[1.0, 2.0], [1e300, 1.0]]})},
        "items",
        "repaired: vector not finite: none",
        2,
    ),
    "category nobody knows": (
        {
            "items": pl.DataFrame({"item_id": ["x", "i"], "category": ["a", "b"]}),
            "categories": pl.DataFrame({"category_id": ["a"], "parent_id": ["z"]}),
        },
        "items",
        "noted: category not in the categories table, kept",
        2,
    ),
    "nobody": ({"users": pl.DataFrame({"user_id": ["u", None]})}, "users", "dropped: no user_id", 2),
}


@pytest.mark.parametrize("name", FIRST_ROWS)
def test_first_row_that_is_odd_is_named(name: str) -> None:
    given, table, line, row = FIRST_ROWS[name]
    tables = clean({}, **given)
    assert f"{line}, first in row {row}" in [found.line() for found in tables.report.findings if found.table == table]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"user_id": None}, "dropped: no user, first in row 3"),
        ({"quantity": float("inf")}, "repaired: quantity is no positive number: 1, first in row 3"),
        ({"value": float("inf")}, "repaired: value is no usable number: unknown, first in row 3"),
        ({"value": 1e12}, "repaired: value is no usable number: unknown, first in row 3"),
        ({"type": "zap"}, "noted: unknown type, kept, first in row 3"),
    ],
)
def test_first_event_that_is_odd_is_named(row: dict[str, object], line: str) -> None:
    good = {"type": "view", "value": 1.0, "quantity": 1.0}
    tables = clean({**good, "item_id": "a"}, {**good, "value": float("nan")}, {**good, "item_id": "c", **row})
    assert [found.line() for found in tables.report.findings] == [line]


REFUSED: dict[str, tuple[dict[str, pl.DataFrame], str]] = {
    "items of another shop": (
        {"items": pl.DataFrame({"item_id": ["SKU-i"]})},
        "events: column item_id: none of 1 rows is in items; it is 'i' here, 'SKU-i' there",
    ),
    "users of another shop": (
        {"users": pl.DataFrame({"user_id": ["U1", "U2"]})},
        "users: column user_id: none of 2 rows is in events; it is 'U1' here, 'u' there",
    ),
    "items without ids": (
        {"items": pl.DataFrame({"item_id": [None, " "]})},
        "items: column item_id: empty in all 2 rows",
    ),
    "vectors of two widths": (
        {"items": pl.DataFrame({"item_id": ["x", "i", "y"], "vector": [[1.0, 2.0], [], [1.0]]})},
        "items: column vector: 1 of width 2, as in row 1, and 1 of width 1, as in row 3",
    ),
    "numbers for vectors": (
        {"items": pl.DataFrame({"item_id": ["i"], "vector": [1.5]})},
        "items: column vector: 1.5 in row 1 is no list of numbers",
    ),
    "words for vectors": (
        {"items": pl.DataFrame({"item_id": ["i"], "vector": [["a"]]})},
        "items: column vector: ['a'] in row 1 is no list of numbers",
    ),
    "a category above itself": (
        {"items": pl.DataFrame({"item_id": ["i"], "category": ["b"]})}
        | {"categories": pl.DataFrame({"category_id": ["a", "b", "c", "d"], "parent_id": [None, "d", "b", "c"]})},
        "categories: column parent_id: a cycle, b > c > d > b, from row 2 on",
    ),
    "a category its own parent": (
        {"items": pl.DataFrame({"item_id": ["i"], "category": ["b"]})}
        | {"categories": pl.DataFrame({"category_id": [1, 2], "parent_id": [None, 2]})},
        "categories: column parent_id: a cycle, 2 > 2, from row 2 on",
    ),
    "a category with two parents": (
        {"items": pl.DataFrame({"item_id": ["i"], "category": ["b"]})}
        | {"categories": pl.DataFrame({"category_id": ["a", "b", "b"], "parent_id": [None, "a", "c"]})},
        "categories: column parent_id: 'c' in row 3 for 'b', which row 2 puts below 'a'",
    ),
    "a category without a name": (
        {"items": pl.DataFrame({"item_id": ["i"], "category": ["b"]})}
        | {"categories": pl.DataFrame({"category_id": ["a", ""], "parent_id": [None, "a"]})},
        "categories: column category_id: empty in row 2",
    ),
    "categories of another shop": (
        {"items": pl.DataFrame({"item_id": ["i"], "category": ["b"]})}
        | {"categories": pl.DataFrame({"category_id": ["a"], "parent_id": ["c"]})},
        "items: column category: none is in categories",
    ),
    "categories for items without": (
        {"items": pl.DataFrame({"item_id": ["i"]})}
        | {"categories": pl.DataFrame({"category_id": ["a"], "parent_id": ["c"]})},
        "items: no column category, for which there are categories",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_names_column_and_row(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(DataError) as raised:
        clean({}, **given)
    assert str(raised.value) == says


def test_categories_become_paths() -> None:
    items = pl.DataFrame({"item_id": ["i", "j", "k", "l"], "category": [3, 1, None, 9]})
    categories = pl.DataFrame({"category_id": [3, 2, 1], "parent_id": [2, 1, None]})
    tables = clean({}, items=items, categories=categories)
    assert tables.items["category"].to_list() == ["1 > 2 > 3", "1", None, "9"]


def test_empty_vector_is_none() -> None:
    items = pl.DataFrame({"item_id": ["i", "j", "k"], "vector": [[], [], [1.0, 2.0]]})
    tables = clean({}, items=items)
    assert tables.items["vector"].to_list() == [None, None, [1.0, 2.0]]
    assert not findings(tables, "items")


def test_attributes_are_json_that_anybody_reads() -> None:
    items = pl.DataFrame({"item_id": ["i"], "attributes": ['{"a": [NaN, 1], "b": NaN, "c": "NaN"}']})
    assert clean({}, items=items).items["attributes"].to_list() == ['{"a": [null, 1], "c": "NaN"}']


@pytest.mark.parametrize("columns", [{"user_id": "nobody"}, {"shopper": "user"}])
def test_mapping_that_names_nothing_is_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    (tmp_path / "e.csv").write_text("user,item,time\na,1,2024-05-01\n")
    with pytest.raises(DataError, match=r"no column nobody|no canonical column shopper"):
        read_tables(tmp_path / "e.csv", columns=columns)


def test_report_is_readable() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(clean({}, {"user_id": None}).report)
    assert all(part in text.getvalue() for part in ("2 │ read", "1 │ dropped: no user", "1 │ kept"))


def dataset(*parts: str) -> Path:
    if folder := os.environ.get("MILLIREC_DATASETS"):
        return Path(folder, *parts)
    pytest.skip("MILLIREC_DATASETS is not set")


def test_online_retail() -> None:
    tables = online_retail(dataset("online_retail", "online_retail.csv.gz"))
    assert tables.report.read["events"] == 541_909
    assert tables.events.height == tables.report.kept["events"] == 397_884
    assert tables.events["user_id"].n_unique() == tables.users.height == 4_338
    assert tables.events["item_id"].n_unique() == tables.items.height == 3_665
    assert tables.report.rows("cancellation") == 9_288
    assert tables.events.select(COLUMNS).is_duplicated().any()
    items: dict[Any, Any] = {row["item_id"]: row for row in tables.items.iter_rows(named=True)}
    assert items["85123A"]["title"] == "WHITE HANGING HEART T-LIGHT HOLDER"
    assert items["85123A"]["price"] == 2.95
    assert tables.items.select("category", "brand").null_count().row(0) == (3_665, 3_665)
    assert json.loads(tables.users.row(by_predicate=pl.col("user_id") == "17850")[1]) == {"country": "United Kingdom"}


def test_retailrocket() -> None:
    tables = retailrocket(dataset("retailrocket_buyers", "events.parquet"))
    assert tables.events.height == 97_381
    assert set(tables.events["type"]) == {"view_item", "add_to_cart", "purchase"}
    assert tables.events["timestamp"].min() == 1_430_623_510_000
