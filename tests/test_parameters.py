"""Query strings: everything that can be written is either read as meant or refused by name."""

from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.parameters import openapi_parameters, parse
from app.problems import Problem
from app.schemas import RecommendParameters

# Surrogates have no UTF-8.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)
REPEATABLE = {"item_id", "category", "brand", "exclude", "fields"}


def refused(query_string: str | bytes) -> dict[str, str]:
    with pytest.raises(Problem) as caught:
        parse(query_string if isinstance(query_string, bytes) else query_string.encode(), RecommendParameters)
    document = caught.value.document
    assert document.status == 422
    assert all(error.field in document.detail for error in document.errors)
    return {error.field: error.message for error in document.errors}


@given(
    user_id=TEXT,
    item_id=st.lists(TEXT, max_size=5),
    limit=st.integers(1, 200),
    price_max=st.none() | st.floats(0, 1e12),
    explain=st.booleans(),
)
def test_what_urlencode_writes_is_read_back(
    user_id: str, item_id: list[str], limit: int, price_max: float | None, explain: bool
) -> None:
    given: dict[str, Any] = {"user_id": user_id, "item_id": item_id, "limit": limit, "explain": explain}
    if price_max is not None:
        given["price_max"] = price_max
    for quoting in ({}, {"quote_via": quote}):
        read = parse(urlencode(given, doseq=True, **quoting).encode(), RecommendParameters)  # type: ignore[arg-type]
        expected = RecommendParameters(
            user_id=user_id, item_id=tuple(item_id), limit=limit, price_max=price_max, explain=explain
        )
        assert read == expected


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(query_string: bytes) -> None:
    try:
        parse(query_string, RecommendParameters)
    except Problem as problem:
        assert problem.document.status == 422
        assert problem.document.errors
        assert problem.response().body


def test_nothing_given_means_the_defaults() -> None:
    assert parse(b"", RecommendParameters) == parse(b"&&", RecommendParameters) == RecommendParameters()


def test_commas_and_repeats_both_name_fields() -> None:
    read = parse(b"fields=title,price&fields=brand", RecommendParameters)
    assert read.fields == ("title", "price", "brand")


@pytest.mark.parametrize(
    ("query_string", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("user_id=", "user_id"),
        ("user_id=" + "a" * 257, "user_id"),
        ("session_id=" + quote("é" * 129), "session_id"),
        ("item_id=ok&item_id=", "item_id"),
        ("item_id=" + "&item_id=x" * 200, "item_id"),
        ("user_id=%ff", "user_id"),
        ("brand=%ed%a0%80", "brand"),
        ("user_id=a&user_id=b", "user_id"),
        ("price_min=nan", "price_min"),
        ("price_max=inf", "price_max"),
        ("price_min=-1", "price_min"),
        ("price_min=3&price_max=2", "price_max"),
        ("explain=maybe", "explain"),
        ("fields=title,,price", "fields"),
        ("fields=" + ",".join("abcdefg" * 8), "fields"),
        ("userid=a", "userid"),
        ("=a", ""),
        ("us%ffer=a", "us\\xffer"),
        ("x" * 300 + "=a", "x" * 64 + "..."),
    ],
)
def test_what_cannot_be_is_refused_by_name(query_string: str, field: str) -> None:
    assert list(refused(query_string)) == [field]


def test_ids_are_limited_in_bytes() -> None:
    assert parse(f"user_id={quote('é' * 128)}".encode(), RecommendParameters).user_id == "é" * 128
    assert parse(b"user_id=" + b"a" * 256, RecommendParameters).user_id == "a" * 256


def test_all_that_is_wrong_is_named_at_once_and_values_are_not_repeated() -> None:
    errors = refused("limit=0&user_id=%ff&scen=hunter2&price_min=hunter2")
    assert set(errors) == {"limit", "user_id", "scen", "price_min"}
    assert not any("hunter2" in message for message in errors.values())


def test_the_document_says_what_is_read() -> None:
    documented = {each["name"]: each for each in openapi_parameters(RecommendParameters)}
    assert list(documented) == list(RecommendParameters.model_fields)
    for name, field in RecommendParameters.model_fields.items():
        schema = documented[name]["schema"]
        assert documented[name]["description"] == field.description
        assert (schema["type"] == "array") == (name in REPEATABLE)
        assert schema.get("default") == (list(field.default) if isinstance(field.default, tuple) else field.default)
        assert "anyOf" not in schema


@pytest.mark.parametrize("each", openapi_parameters(RecommendParameters), ids=lambda each: each["name"])
def test_documented_bounds_are_the_bounds(each: dict[str, Any]) -> None:
    name, schema = each["name"], each["schema"]
    allowed, refusals = [], []
    match schema["type"]:
        case "array":
            allowed = ["&".join([f"{name}=x"] * schema["maxItems"])]
            refusals = [allowed[0] + f"&{name}=x", f"{name}={'x' * (schema['items']['maxLength'] + 1)}", f"{name}="]
        case "string":
            allowed = [f"{name}=x", f"{name}={'x' * schema['maxLength']}"]
            refusals = [f"{name}=", f"{name}={'x' * (schema['maxLength'] + 1)}"]
        case "integer" | "number":
            allowed = [f"{name}={schema[bound]}" for bound in ("minimum", "maximum") if bound in schema]
            refusals = [f"{name}={schema['minimum'] - 1}"]
            refusals += [f"{name}={schema['maximum'] + 1}"] if "maximum" in schema else []
        case "boolean":
            allowed, refusals = [f"{name}=true", f"{name}=false"], [f"{name}=x"]
    for query_string in allowed:
        parse(query_string.encode(), RecommendParameters)
    for query_string in refusals:
        assert list(refused(query_string)) == [name]
