"""Fits every source on what was known before a cut and writes them into a draft bundle.

Training calls this once per past cut, to see the candidates that the service would have had then, and
once more on everything, for the bundle that is served.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from app.bundle import Anchors, Draft, ListSpec, NeighbourSpec, VectorSpec
from app.engine.program import save_program
from app.scenes import Scene, SceneSource
from app.state.events import MS_PER_DAY, EventType
from models.catalog import STATISTICS, VIEWS, Items, columns, listed
from models.data import DataError, Tables
from models.data.log import Log
from models.recall import STRENGTH, Interactions, Neighbours, Vectors, content, discovery, ease, item_cf, two_tower
from models.recall.index import build_index

WINDOW = 256
"""Events of a user that models and features see."""
LIST_LENGTH = 300
TOWERS_FROM = 1_000
"""Events; a network learns nothing from fewer that the other sources do not know."""
EASE_GB = 0.6
"""Memory that EASE may take: enough for 12,000 items, a quarter of a minute each time it is fitted."""
NEIGHBOURS = 32
"""Neighbours an item; the time of a request goes with them, and 50 rank no better."""

INTEREST = {kind.name.lower(): float(STRENGTH[kind]) for kind in EventType if STRENGTH[kind]}
"""By event type, as anchors want it: the strengths that the models themselves are fitted with."""

K: Mapping[str, int] = {
    "history": 100,
    "ease": 80,
    "discovery": 60,
    "item_cf": 60,
    "session": 40,
    "two_tower": 80,
    "content": 40,
    "trending": 50,
    "popular": 40,
    "new": 20,
}
"""Candidates by source, in the order of a cascade: what knows the user best comes first."""

LISTS = ("trending", "popular", "new")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A draft bundle with all its sources, and what is needed to label it."""

    draft: Draft
    items: Items
    losses: Mapping[str, list[tuple[float, float]]]
    seconds: Mapping[str, float]


def fit(folder: Path, tables: Tables, log: Log, cut_ms: int, seed: int, progress: Progress) -> Fitted:
    """Writes catalog and sources, fitted on the events before `cut_ms`, into `folder`.

    `log` holds the later events too: they tell which items were not there yet. Raises `DataError`.
    """
    past = log.before(cut_ms)
    items = listed(tables.items, log, cut_ms)
    if not len(items.key):
        raise DataError("no item was listed before the first cut: the history is too short to learn from")
    tensors, categories, brands = columns(items, past, cut_ms)
    draft = Draft(folder, len(items.key), WINDOW, STATISTICS, tuple(categories), tuple(brands), [], [], {})
    draft.save("catalog.safetensors", tensors)
    known = items.rows(past.events["item"])
    kept = known >= 0
    before = Interactions(
        past.user[kept],
        known[kept].astype(np.int32),
        past.events["ts"][kept],
        past.events["type"][kept],
        len(items.key),
    )
    if not STRENGTH[before.kind].any():
        raise DataError("no event before the first cut says what anybody wants: there is nothing to learn from")
    seconds: dict[str, float] = {}
    losses: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str) -> Callable[[], None]:
        progress(name)
        begun = time.monotonic()
        return lambda: seconds.update({name: round(time.monotonic() - begun, 1)})

    own = Neighbours(np.arange(len(items.key), dtype=np.int32)[:, None], np.ones((len(items.key), 1), np.float32))
    _neighbours(draft, "history", own, Anchors(weights=INTEREST, half_life_days=90, limit=WINDOW))

    done = timed("ease")
    if (table := ease.fit(before, now_ms=cut_ms, memory_gb=EASE_GB)) is not None:
        _neighbours(draft, "ease", table, Anchors(weights=INTEREST, half_life_days=60, limit=64))
    done()
    done = timed("discovery")
    table = discovery.fit(before, now_ms=cut_ms, k=NEIGHBOURS)
    _neighbours(draft, "discovery", table, Anchors(weights=INTEREST, half_life_days=365, limit=64))
    done()
    done = timed("item_cf")
    table = item_cf.fit(before, k=NEIGHBOURS)
    _neighbours(draft, "item_cf", table, Anchors(weights=INTEREST, half_life_days=30, limit=32))
    # The same table asked about the last hours alone: what the shopper is after right now.
    _neighbours(draft, "session", table, Anchors(weights=INTEREST, half_life_days=0.25, limit=8), shared="item_cf")
    done()

    done = timed("two_tower")
    if len(before.user) >= TOWERS_FROM:
        towers = two_tower.fit(
            before,
            features=content.features(items.frame),
            profiles=past.profiles,
            seed=seed,
            on_epoch=lambda epoch, train, valid: progress(
                f"two_tower, epoch {epoch}: loss {train:.3f}, validation {valid:.3f}"
            ),
        )
        losses["two_tower"] = [(float(a), float(b)) for a, b in towers.losses]
        _vectors(draft, "two_tower", towers, seed)
    done()

    done = timed("content")
    table = content.fit(items.frame, k=NEIGHBOURS)
    _neighbours(draft, "content", table, Anchors(weights=INTEREST, half_life_days=7, limit=16))
    done()

    _list(draft, "trending", _decayed(before, cut_ms, half_life_days=5.0))
    _list(draft, "popular", _decayed(before, cut_ms, half_life_days=365.0))
    _list(draft, "new", items.created_ms / MS_PER_DAY)
    draft.scenes = scenes([source.name for source in draft.sources])
    return Fitted(draft, items, losses, seconds)


def scenes(sources: list[str]) -> dict[str, Scene]:
    """The scenes a bundle starts with; rankers are named once they are trained."""
    everything = tuple(SceneSource(name=name, k=k) for name, k in K.items() if name in sources)
    # On a product page or in the cart, what goes with the items there comes before what is popular.
    around = tuple(
        source.model_copy(update={"weight": 0.3 if source.name in LISTS else 1.0})
        for source in everything
        if source.name != "history"
    )
    return {
        "home": Scene(sources=everything),
        "buy_again": Scene(sources=everything, repeats=True),
        "detail": Scene(sources=around, context=True, diversity=0.02),
        "cart": Scene(sources=around, context=True, diversity=0.02),
    }


def _neighbours(draft: Draft, name: str, table: Neighbours, anchors: Anchors, shared: str | None = None) -> None:
    file = f"{shared or name}.safetensors"
    if shared is None:
        draft.save(file, {"rows": torch.from_numpy(table.rows), "weights": torch.from_numpy(table.weights).half()})
    draft.sources.append(NeighbourSpec(name=name, table=file, anchors=anchors))


def _list(draft: Draft, name: str, score: npt.NDArray[np.float64]) -> None:
    best = np.argsort(-score, kind="stable")[:LIST_LENGTH]
    best = best[score[best] > 0]
    tensors = {
        "rows": torch.from_numpy(best.astype(np.int32)),
        "scores": torch.from_numpy(score[best].astype(np.float32)),
    }
    draft.sources.append(ListSpec(name=name, rows=draft.save(f"{name}.safetensors", tensors)))


def _vectors(draft: Draft, name: str, towers: Vectors, seed: int) -> None:
    vectors = np.ascontiguousarray(towers.items, np.float32)
    kind, recall = build_index(vectors, vectors, draft.path / f"{name}.faiss", seed)
    inputs = None
    if towers.inputs is not None:
        inputs = draft.save(f"{name}_inputs.safetensors", {"vectors": torch.from_numpy(towers.inputs).half()})
    draft.sources.append(
        VectorSpec(
            name=name,
            vectors=draft.save(f"{name}.safetensors", {"vectors": torch.from_numpy(vectors).half()}),
            index=f"{name}.faiss",
            index_kind=kind,
            index_recall=recall,
            encoder=save_program(towers.export(), draft.path / f"{name}.pt2"),
            inputs=inputs,
            history=towers.history,
            profile=towers.profile,
        )
    )


def _decayed(past: Interactions, now_ms: int, half_life_days: float) -> npt.NDArray[np.float64]:
    """How much each item is wanted, old events counting less; each user counts once an item and kind."""
    user, row, ts, kind, size = past
    weight_by_kind = STRENGTH.astype(np.float64)
    # Many look, few want: views are left to break ties.
    weight_by_kind[list(VIEWS)] /= 10
    _, last = np.unique(np.stack([user.astype(np.int64), row, kind])[:, ::-1], axis=1, return_index=True)
    chosen = len(user) - 1 - last
    age_days = (now_ms - ts[chosen]) / MS_PER_DAY
    decayed = weight_by_kind[kind[chosen]] * 0.5 ** (age_days / half_life_days)
    return np.bincount(row[chosen], decayed, minlength=size).astype(np.float64)
