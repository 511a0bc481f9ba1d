"""`millirec runs`: the bundles of a root, and what sets two of them apart."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.bundle import MANIFEST, BundleError, Manifest, current, versions
from app.settings import Settings
from models.commands import Root, one_line_errors

LEAST_WIDTH = 200


def manifest(root: Path, version: str) -> Manifest:
    """The bundle's word for itself; its files are not looked at, which takes long. Raises `BundleError`."""
    if version not in versions(root):
        raise BundleError(f"no bundle {version!r} in {root}")
    try:
        return Manifest.model_validate_json((root / version / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(f"{version}: {error.strerror}") from error
    except ValidationError as error:
        raise BundleError(f"{version}: {MANIFEST} does not read: {error.errors()[0]['msg']}") from error


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a JSON value with its dotted name; a list of plain values is a leaf, and so is what is empty."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        for place, part in enumerate(value):
            own = part.get("name", place) if isinstance(part, Mapping) else place
            yield from flat(part, f"{name}.{own}")
    elif name:
        yield name, value if isinstance(value, str) else json.dumps(value)


def headline(metrics: Mapping[str, Any]) -> str:
    """The metrics of a manifest, a line each; of a model's losses, the best on validation."""
    return "\n".join(f"{name} {value}" for name, value in flat(figures(metrics)))


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with the curves of the losses left at their best validation loss, and numbers to four digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: rounded(part) for name, part in value.items()}
        return round(value, 4) if isinstance(value, float) else value

    found = {name: rounded(value) for name, value in metrics.items() if name != "losses"}
    best = {model: min(valid for _, valid in epochs) for model, epochs in metrics.get("losses", {}).items() if epochs}
    return found | ({"loss": rounded(best)} if best else {})


def listing(root: Path) -> Table:
    """A line a bundle, the newest first; the one that is served is marked with *."""
    table = Table("", "version", "created", "data", "events", "users", "items", "seconds", "code", "metrics", box=None)
    for number, column in enumerate(table.columns):
        column.no_wrap = column.header not in ("code", "metrics")
        column.justify = "right" if 4 <= number < 8 else "left"
    live = current(root)
    for version in reversed(versions(root)):
        mark = "*" if version == live else ""
        try:
            found = manifest(root, version)
        except BundleError as error:
            table.add_row(mark, version, *[""] * 7, Text(str(error), style="red"))
            continue
        told = found.provenance
        cells = [
            version,
            found.created_at[:16].replace("T", " "),
            str(told.get("data_sha256", "-"))[:12],
            _count(told.get("events")),
            _count(told.get("users")),
            _count(found.items),
            str(told.get("seconds", {}).get("total", "-")),
            str(told.get("code", "-")),
            headline(found.metrics) or "-",
        ]
        table.add_row(mark, *map(Text, cells))
    return table


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def sides(found: Manifest) -> dict[str, dict[str, str]]:
    """What two bundles are compared by: section, name and value."""
    told = dict(found.provenance)
    data = {name: told.pop(name) for name in ("data_sha256", "events", "users", "cut_ms") if name in told}
    code = {"created_at": found.created_at, "code": told.pop("code", "-"), "seconds": told.pop("seconds", {})}
    model = found.model_dump(mode="json", include={"window", "statistics", "sources", "rankers", "scenes"})
    return {
        "data": dict(flat(data | {"items": found.items})),
        "parameters": dict(flat(told.pop("parameters", {}) | told | model)),
        "metrics": dict(flat(figures(found.metrics))),
        "training": dict(flat(code)),
    }


def comparison(root: Path, one: str, other: str) -> Table:
    """Both bundles side by side; of the parameters only those that differ, as there are hundreds."""
    table = Table("", "", one, other, box=None)
    for column in table.columns:
        column.overflow = "fold"
    left, right = (sides(manifest(root, version)) for version in (one, other))
    for section in left:
        names = list(left[section] | right[section])
        same = 0
        for name in names:
            a, b = left[section].get(name, "-"), right[section].get(name, "-")
            if a == b and section == "parameters":
                same += 1
                continue
            mark, style = ("", "") if a == b else ("≠", "bold")
            table.add_row(mark, f"{section}: {name}", Text(a), Text(b), style=style)
        if same:
            table.add_row("", f"{section}: {same} alike", "", "")
    return table


def runs(
    pair: Annotated[list[str] | None, typer.Argument(metavar="[A B]", help="Two versions to compare.")] = None,
    bundles: Root = None,
) -> None:
    """List the bundles with their data, code and metrics, or compare two of them."""
    root = bundles or Settings().bundles
    with one_line_errors():
        if pair and len(pair) != 2:
            raise BundleError("name two versions to compare, or none to list all")
        if not versions(root):
            raise BundleError(f"no bundle in {root}")
        table = comparison(root, *pair) if pair else listing(root)
        # Versions and fingerprints are there to be copied: a narrow terminal wraps lines, and cuts none.
        console = Console()
        console.width = max(console.width, LEAST_WIDTH)
        console.print(table, soft_wrap=True)
