import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.catalog import NO_ROW, pack_strings
from app.engine import Where
from app.state.events import item_key
from tests.shelf import Item, shelf

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PATHS = st.sampled_from([(), ("A",), ("A", "A > 1"), ("A", "A > 2"), ("B",), ("B", "B > 1", "B > 1 > x")])
ITEMS = st.lists(
    st.builds(
        Item,
        id=TEXT,
        price=st.sampled_from([math.nan, 0.0, 1.0, 2.5, 10.0]),
        category=PATHS,
        brand=st.sampled_from([None, "acme", "bölt"]),
        available=st.booleans(),
        attributes=st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=2),
    ),
    max_size=12,
    unique_by=lambda item: item.id,
)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.lists(TEXT, max_size=4))
def test_ids_and_rows_round_trip(items: list[Item], others: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        catalog = shelf(Path(folder), items)
    names = [item.id for item in items]
    rows = catalog.rows(np.array([item_key(name) for name in names], np.int64))
    assert sorted(rows.tolist()) == list(range(len(items)))
    assert catalog.ids(rows.tolist()) == names
    assert [catalog.attributes(row) for row in rows.tolist()] == [item.attributes for item in items]
    strangers = [name for name in others if name not in names]
    keys = np.array([item_key(name) for name in strangers], np.int64)
    assert catalog.rows(keys).tolist() == [NO_ROW] * len(strangers)
    assert catalog.rows_of([*strangers, *names, *strangers]).tolist() == rows.tolist()


@pytest.mark.parametrize("key", [-(2**63), -1, 0, 2**63 - 1])
def test_keys_at_either_end_are_nobody(tmp_path: Path, key: int) -> None:
    for items in ([], [Item("a"), Item("b")]):
        assert shelf(tmp_path, items).rows(np.array([key, key])).tolist() == [NO_ROW, NO_ROW]


@settings(max_examples=100, deadline=None)
@given(
    ITEMS,
    st.builds(
        Where,
        category=st.sampled_from([(), ("A",), ("A > 1",), ("B > 1 > x", "A > 2"), ("none",), ("none", "B")]),
        brand=st.sampled_from([(), ("acme",), ("bölt", "none"), ("none",)]),
        price_min=st.sampled_from([None, 0.0, 1.0, 11.0]),
        price_max=st.sampled_from([None, 0.0, 2.5, 10.0]),
        in_stock=st.booleans(),
    ),
)
def test_eligible_is_what_a_loop_over_the_items_finds(items: list[Item], where: Where) -> None:
    with tempfile.TemporaryDirectory() as folder:
        catalog = shelf(Path(folder), items)
    mask = catalog.eligible(where)
    expected = {
        item.id
        for item in items
        if item.available
        and (not where.category or set(where.category) & set(item.category))
        and (not where.brand or item.brand in where.brand)
        and (where.price_min is None or item.price >= where.price_min)
        and (where.price_max is None or item.price <= where.price_max)
    }
    assert set(catalog.ids(mask.nonzero().flatten().tolist())) == expected
    # What one request leaves out is no reason to compute the mask of the others again.
    assert catalog.eligible(replace(where, exclude=("a", "b"))) is mask


def test_the_leaf_is_the_end_of_the_path(tmp_path: Path) -> None:
    items = [Item("1"), Item("2", category=("A",)), Item("3", category=("A", "A > 1")), Item("4", category=("B",))]
    catalog = shelf(tmp_path, items)
    leaves = catalog.leaf[catalog.rows_of(["1", "2", "3", "4"])].tolist()
    assert leaves == [-1, 0, 1, 2]


@settings(max_examples=100)
@given(st.lists(TEXT, max_size=10))
def test_packed_strings_are_cut_where_they_end(strings: list[str]) -> None:
    columns = pack_strings(strings, "title")
    assert set(columns) == {"title_bytes", "title_ends"}
    whole = bytes(columns["title_bytes"].tolist())
    ends = columns["title_ends"].tolist()
    assert [whole[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)] == strings
    assert whole == "".join(strings).encode()
    assert (columns["title_bytes"].dtype, columns["title_ends"].dtype) == (torch.uint8, torch.int64)
