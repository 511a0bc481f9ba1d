"""A bundle of any history without anything that takes long to learn."""

from pathlib import Path

import numpy as np
import torch

from app.bundle import Anchors, Bundle, Draft, ListSpec, NeighbourSpec, seal
from app.scenes import Scene, SceneSource
from models.catalog import STATISTICS, columns, listed
from models.data import Tables
from models.data.log import Log
from models.recall import Interactions, Neighbours, item_cf
from models.sources import INTEREST, WINDOW


def write_quick(folder: Path, version: str, tables: Tables, cut_ms: int) -> Bundle:
    """The real catalog, own history, item-CF and the popular, as of `cut_ms`."""
    log = Log.from_tables(tables)
    items, past = listed(tables.items, log, cut_ms), log.before(cut_ms)
    size = len(items.key)
    tensors, categories, brands = columns(items, past, cut_ms)
    draft = Draft(folder, size, WINDOW, STATISTICS, tuple(categories), tuple(brands), [], [], {})
    draft.save("catalog.safetensors", tensors)
    row = items.rows(past.events["item"])
    known = row >= 0
    before = Interactions(
        past.user[known], row[known].astype(np.int32), past.events["ts"][known], past.events["type"][known], size
    )
    near = item_cf.fit(before, k=20)
    own = Neighbours(np.arange(size, dtype=np.int32)[:, None], np.ones((size, 1), np.float32))
    for name, table, half_life_days in (("history", own, 90.0), ("item_cf", near, 30.0)):
        file = draft.save(
            f"{name}.safetensors",
            {"rows": torch.from_numpy(table.rows), "weights": torch.from_numpy(table.weights).half()},
        )
        anchors = Anchors(weights=INTEREST, half_life_days=half_life_days)
        draft.sources.append(NeighbourSpec(name=name, table=file, anchors=anchors))
    score, best = tensors["statistics"][:, 0].sort(descending=True, stable=True)
    popular = draft.save("popular.safetensors", {"rows": best[:300].int(), "scores": score[:300].clone()})
    draft.sources.append(ListSpec(name="popular", rows=popular))
    sources = tuple(SceneSource(name=source.name, k=60) for source in draft.sources)
    draft.scenes = {"home": Scene(sources=sources), "buy_again": Scene(sources=sources, repeats=True)}
    return seal(draft, version)
