"""A catalog of a few items, written by hand through the real format."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.bundle import Bundle, Draft, seal
from app.catalog import Catalog, pack_strings
from app.state.events import item_key


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    price: float = math.nan
    category: tuple[str, ...] = ()
    """The names along its path: ("A", "A > A1")."""
    brand: str | None = None
    available: bool = True
    created_ms: int = 0
    statistics: tuple[float, ...] = ()
    attributes: Mapping[str, object] = field(default_factory=dict)


def shelf(folder: Path, items: Sequence[Item], statistics: Sequence[str] = ()) -> Catalog:
    """The catalog of `items`, whose rows are in the order of their keys."""
    items = sorted(items, key=lambda item: item_key(item.id))
    categories = sorted({name for item in items for name in item.category})
    brands = sorted({item.brand for item in items if item.brand is not None})
    depth = max([1, *(len(item.category) for item in items)])
    draft = Draft(folder, len(items), 64, tuple(statistics), tuple(categories), tuple(brands), [], [], {})
    paths = [[categories.index(name) for name in item.category] for item in items]
    draft.save(
        "catalog.safetensors",
        {
            "key": torch.tensor([item_key(item.id) for item in items], dtype=torch.int64),
            "price": torch.tensor([item.price for item in items], dtype=torch.float32),
            "category": torch.tensor([path + [-1] * (depth - len(path)) for path in paths], dtype=torch.int32).reshape(
                -1, depth
            ),
            "brand": torch.tensor(
                [-1 if item.brand is None else brands.index(item.brand) for item in items], dtype=torch.int32
            ),
            "available": torch.tensor([item.available for item in items], dtype=torch.bool),
            "created_ms": torch.tensor([item.created_ms for item in items], dtype=torch.int64),
            "statistics": torch.tensor([item.statistics for item in items], dtype=torch.float32).reshape(
                len(items), len(statistics)
            ),
            **pack_strings([item.id for item in items], "id"),
            **pack_strings([json.dumps(dict(item.attributes)) for item in items], "attributes"),
        },
    )
    return Catalog(Bundle(folder, seal(draft, folder.name).manifest), torch.device("cpu"))
