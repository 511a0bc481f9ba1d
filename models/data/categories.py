"""A shop's category tree, parent by parent, as the paths that items carry."""

import polars as pl

from models.data.tables import DataError

TREE = ("category_id", "parent_id")


def paths(tree: pl.DataFrame) -> dict[str, str]:
    """By category its path, "A > B > C"; a parent that has no row of its own is a root.

    `tree` has category_id and parent_id as text, the latter null for a root. Raises `DataError` that names the row
    where a category has two parents, or is its own ancestor.
    """
    parent: dict[str, str | None] = {}
    row: dict[str, int] = {}
    for number, (name, above) in enumerate(tree.select(*TREE).iter_rows(), 1):
        if name is None:
            raise DataError(f"categories: column category_id: empty in row {number:,}")
        if parent.setdefault(name, above) != above:
            raise DataError(
                f"categories: column parent_id: {above!r} in row {number:,} for {name!r},"
                f" which row {row[name]:,} puts below {parent[name]!r}"
            )
        row.setdefault(name, number)
    found: dict[str, str] = {}
    for name in parent:
        line: dict[str, None] = {}
        at: str | None = name
        while at is not None and at not in found:
            if at in line:
                ring = list(line)[list(line).index(at) :]
                start = min(ring, key=row.__getitem__)
                turn = ring.index(start)
                names = " > ".join([*ring[turn:], *ring[:turn], start][::-1])
                raise DataError(f"categories: column parent_id: a cycle, {names}, from row {row[start]:,} on")
            line[at] = None
            at = parent.get(at)
        above = found[at] if at is not None else ""
        for each in reversed(line):
            above = found[each] = f"{above} > {each}" if above else each
    return found
