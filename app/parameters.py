"""Query parameters: read in a few microseconds, documented from the same models.

FastAPI's own reading costs as much as all the rest of a small route.
"""

from functools import cache
from typing import Any, TypeVar, get_origin
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, ValidationError

from app.problems import FieldError, Problem


class Parameters(BaseModel):
    """The parameters of one route. A tuple may be given many times, anything else once."""

    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=Parameters)


@cache
def _repeatable(model: type[Parameters]) -> frozenset[str]:
    return frozenset(name for name, field in model.model_fields.items() if get_origin(field.annotation) is tuple)


def parse(query_string: bytes, model: type[P]) -> P:
    """Raises `Problem` 422 naming every bad, unknown or wrongly repeated parameter."""
    repeatable = _repeatable(model)
    values: dict[str, str | list[str]] = {}
    errors: list[FieldError] = []
    for pair in query_string.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        if b"%" in pair or b"+" in pair:
            raw_name = unquote_to_bytes(raw_name.replace(b"+", b" "))
            raw_value = unquote_to_bytes(raw_value.replace(b"+", b" "))
        name = raw_name.decode(errors="backslashreplace")
        try:
            value = raw_value.decode()
        except UnicodeDecodeError:
            errors.append(_error(name, "Value should be UTF-8"))
            continue
        if name in repeatable:
            values.setdefault(name, []).append(value)  # type: ignore[union-attr]
        elif name in values:
            errors.append(_error(name, "Parameter should be given once"))
        else:
            values[name] = value
    try:
        parameters = model.model_validate(values)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False, include_input=False, include_context=False):
            unknown = error["type"] == "extra_forbidden"
            errors.append(_error(str(error["loc"][0]), "Unknown parameter" if unknown else error["msg"]))
    if errors:
        raise Problem.of_fields(errors)
    return parameters


def _error(name: str, message: str) -> FieldError:
    return FieldError(field=name if len(name) <= 64 else f"{name[:64]}...", message=message)


def openapi_parameters(model: type[Parameters]) -> list[dict[str, Any]]:
    """The `parameters` of an OpenAPI operation that reads `model`."""
    return [
        {"name": name, "in": "query", "required": False, "description": schema.pop("description"), "schema": schema}
        for name, schema in (
            (name, _without_null(schema)) for name, schema in model.model_json_schema()["properties"].items()
        )
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    # What may be left out is None in Python, but nobody can write null into a query string.
    schema = {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}
    given = [option for option in schema.pop("anyOf", []) if option != {"type": "null"}]
    return {**schema, **given[0]} if given else schema
