"""Fits every source on what was known before a cut and writes them into a draft bundle.

Training calls this once per past cut, to see the candidates that the service would have had then, and
once more on everything, for the bundle that is served.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from app.bundle import Anchors, BasketSpec, Draft, ListSpec, NeighbourSpec, VectorSpec
from app.engine.program import save_program
from app.scenes import Scene, SceneSource
from app.state.events import EventType
from models.catalog import STATISTICS, Items, columns, listed
from models.data import DataError
from models.data.log import Log
from models.recall import (
    STRENGTH,
    Interactions,
    Neighbours,
    Vectors,
    complements,
    content,
    covisits,
    discovery,
    ease,
    gru4rec,
    item_cf,
    lightgcn,
    lists,
    mf,
    rp3beta,
    sasrec,
    session_knn,
    spectral,
    transitions,
    two_tower,
)
from models.recall.index import SAMPLE, build_index
from models.recall.training import Run

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
    "ease_long": 60,
    "rp3beta": 80,
    "user_knn": 60,
    "discovery": 60,
    "item_cf": 60,
    "session_knn": 60,
    "transitions": 60,
    "covisits": 60,
    "session": 40,
    "two_tower": 80,
    "sasrec": 60,
    "gru4rec": 60,
    "spectral": 60,
    "lightgcn": 60,
    "als": 60,
    "bpr": 40,
    "content": 40,
    "taste": 40,
    "complements": 40,
    "category": 40,
    "segment": 40,
    "trending": 50,
    "popular": 40,
    "new": 20,
}
"""Candidates by source, in the order of a cascade: what knows the user best comes first."""
POOL = 700
"""Candidates of all sources together; many sources name less each, and what is named by several is one."""

LONG_DAYS = 3650.0
"""A half-life that forgets nothing."""
LISTS = ("category", "segment", "trending", "popular", "new")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A draft bundle with all its sources, and what is needed to label it."""

    draft: Draft
    items: Items
    losses: Mapping[str, list[tuple[float, float]]]
    seconds: Mapping[str, float]
    silent: tuple[str, ...]
    """Models that the past did not allow."""


@dataclass(frozen=True, slots=True)
class Width:
    """How large tables may become, which serving pays for."""

    neighbours: int = NEIGHBOURS
    likest: int = 100
    """Baskets."""
    two_tower: int = two_tower.WIDTH
    lightgcn: int = 128
    spectral: int = 128
    ease: int = 100
    ease_long: int = 100
    ease_gb: float = EASE_GB


@dataclass(frozen=True, slots=True)
class Past:
    """What the models are fitted on."""

    events: Interactions
    now_ms: int
    items: Items
    category: npt.NDArray[np.int32]
    """[n, depth]."""
    profiles: Sequence[Mapping[str, str]]
    width: Width
    seed: int
    note: Progress
    losses: dict[str, list[tuple[float, float]]]
    """Filled by the models that are learned in epochs."""
    run: Run


def fit(
    folder: Path,
    catalog: pl.DataFrame,
    log: Log,
    cut_ms: int,
    seed: int,
    progress: Progress,
    *,
    models: Sequence[str] | None = None,
    width: Width = Width(),
    run: Run = Run(),
) -> Fitted:
    """Writes catalog and sources, fitted on the events before `cut_ms`, into `folder`.

    `catalog` is `Tables.items`. `log` holds the later events too: they tell which items were not there yet. `models`
    are names of `MODELS`, by default `STANDARD`. Raises `DataError`.
    """
    past = log.before(cut_ms)
    items = listed(catalog, log, cut_ms)
    if not len(items.key):
        raise DataError(
            "items: column created_at: none was listed before the first cut, there is no past to learn from"
        )
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
        raise DataError(
            "events: column type: none before the first cut says what anybody wants, of items that were listed by then:"
            " there is nothing to learn from"
        )
    seconds: dict[str, float] = {}
    given = Past(before, cut_ms, items, tensors["category"].numpy(), past.profiles, width, seed, progress, {}, run)
    silent = []
    for name in STANDARD if models is None else models:
        progress(name)
        begun, before_it = time.monotonic(), len(draft.sources)
        MODELS[name](draft, given)
        seconds[name] = round(time.monotonic() - begun, 1)
        run.of(name).scalar("seconds", 0, seconds[name])
        if len(draft.sources) == before_it:
            silent.append(name)
    if not draft.sources:
        raise DataError(f"nothing can be learned of this history by {', '.join(silent)}: draw on other models too")
    draft.scenes = scenes([source.name for source in draft.sources])
    return Fitted(draft, items, given.losses, seconds, tuple(silent))


def _history(draft: Draft, past: Past) -> None:
    size = len(past.items.key)
    own = Neighbours(np.arange(size, dtype=np.int32)[:, None], np.ones((size, 1), np.float32))
    _neighbours(draft, "history", own, _anchors(90, WINDOW))


def _ease(draft: Draft, past: Past) -> None:
    table = ease.fit(past.events, now_ms=past.now_ms, k=past.width.ease, memory_gb=past.width.ease_gb)
    if table is not None:
        _neighbours(draft, "ease", table, _anchors(60, 64))


def _ease_long(draft: Draft, past: Past) -> None:
    """What people have in common over all the time there is, and what keeps them apart."""
    table = ease.fit(
        past.events,
        now_ms=past.now_ms,
        k=past.width.ease_long,
        half_life_days=None,
        ridge=300.0,
        signed=True,
        memory_gb=past.width.ease_gb,
    )
    if table is not None:
        _neighbours(draft, "ease_long", table, _anchors(LONG_DAYS, WINDOW))


def _rp3beta(draft: Draft, past: Past) -> None:
    _neighbours(draft, "rp3beta", rp3beta.fit(past.events, k=past.width.neighbours), _anchors(60, 64))


def _discovery(draft: Draft, past: Past) -> None:
    table = discovery.fit(past.events, now_ms=past.now_ms, k=past.width.neighbours)
    _neighbours(draft, "discovery", table, _anchors(365, 64))


def _item_cf(draft: Draft, past: Past) -> None:
    _neighbours(draft, "item_cf", item_cf.fit(past.events, k=past.width.neighbours), _anchors(90, WINDOW))
    # The same table asked about the last hours alone: what the shopper is after right now.
    draft.sources.append(NeighbourSpec(name="session", table="item_cf.safetensors", anchors=_anchors(0.25, 8)))


def _transitions(draft: Draft, past: Past) -> None:
    _neighbours(draft, "transitions", transitions.fit(past.events, k=past.width.neighbours), _anchors(7, 16, 1.2))


def _covisits(draft: Draft, past: Past) -> None:
    _neighbours(draft, "covisits", covisits.fit(past.events, k=past.width.neighbours), _anchors(7, 16, 2.1))


def _session_knn(draft: Draft, past: Past) -> None:
    _baskets(draft, "session_knn", session_knn.fit(past.events), past.width, _anchors(7, 16, 2.1))


def _user_knn(draft: Draft, past: Past) -> None:
    _baskets(draft, "user_knn", session_knn.fit(past.events, idle_minutes=None), past.width, _anchors(60, 64))


def _two_tower(draft: Draft, past: Past) -> None:
    if len(past.events.user) >= TOWERS_FROM:
        towers = two_tower.fit(
            past.events,
            features=content.features(past.items.frame),
            profiles=past.profiles,
            width=past.width.two_tower,
            seed=past.seed,
            run=_noted(past, "two_tower"),
        )
        _vectors(draft, "two_tower", towers, past.events, past.seed)


def _sequences(draft: Draft, past: Past, name: str, fitted: Callable[..., Vectors]) -> None:
    if len(past.events.user) >= TOWERS_FROM:
        features = content.features(past.items.frame)
        network = fitted(past.events, features=features, seed=past.seed, run=_noted(past, name))
        _vectors(draft, name, network, past.events, past.seed)


def _sasrec(draft: Draft, past: Past) -> None:
    _sequences(draft, past, "sasrec", sasrec.fit)


def _gru4rec(draft: Draft, past: Past) -> None:
    _sequences(draft, past, "gru4rec", gru4rec.fit)


def _spectral(draft: Draft, past: Past) -> None:
    fitted = spectral.fit(past.events, width=past.width.spectral, seed=past.seed)
    _vectors(draft, "spectral", fitted, past.events, past.seed)


def _lightgcn(draft: Draft, past: Past) -> None:
    fitted = lightgcn.fit(past.events, width=past.width.lightgcn, seed=past.seed, run=_noted(past, "lightgcn"))
    _vectors(draft, "lightgcn", fitted, past.events, past.seed)


def _als(draft: Draft, past: Past) -> None:
    _vectors(draft, "als", mf.fit_als(past.events, seed=past.seed), past.events, past.seed)


def _bpr(draft: Draft, past: Past) -> None:
    _vectors(draft, "bpr", mf.fit_bpr(past.events, seed=past.seed, run=_noted(past, "bpr")), past.events, past.seed)


def _content(draft: Draft, past: Past) -> None:
    _neighbours(draft, "content", content.fit(past.items.frame, k=past.width.neighbours), _anchors(7, 16))
    # The same table asked about all that the shopper ever wanted: a taste rather than an errand.
    draft.sources.append(NeighbourSpec(name="taste", table="content.safetensors", anchors=_anchors(365, WINDOW)))


def _complements(draft: Draft, past: Past) -> None:
    table = complements.fit(past.events, past.items.frame, k=past.width.neighbours)
    _neighbours(draft, "complements", table, _anchors(30, 16))


def _popularity(draft: Draft, past: Past) -> None:
    lists_of = {
        "trending": lists.popular(past.events, now_ms=past.now_ms, half_life_days=5.0, k=LIST_LENGTH),
        "popular": lists.popular(past.events, now_ms=past.now_ms, k=LIST_LENGTH),
        "new": lists.new(past.items.created_ms, k=LIST_LENGTH),
    }
    for name, made in lists_of.items():
        length = int((made.rows[0] >= 0).sum())
        tensors = {"rows": torch.from_numpy(made.rows[0, :length]), "scores": torch.from_numpy(made.scores[0, :length])}
        draft.sources.append(ListSpec(name=name, rows=draft.save(f"{name}.safetensors", tensors)))


def _category(draft: Draft, past: Past) -> None:
    """What is popular in the category of an item, as its neighbours."""
    depth = (past.category >= 0).sum(1)
    leaf = np.where(depth > 0, past.category[np.arange(len(depth)), np.maximum(depth - 1, 0)], -1)
    by = lists.by_category(past.events, leaf[:, None], now_ms=past.now_ms, half_life_days=30.0, k=past.width.neighbours)
    place = np.searchsorted(by.groups, leaf).clip(max=len(by.groups) - 1)
    has = (leaf >= 0) & (by.groups[place] == leaf)
    if has.any():
        best = np.maximum(by.scores[:, :1], 1e-9)
        rows = np.where(has[:, None], by.rows[place], -1)
        _neighbours(
            draft, "category", Neighbours(rows, np.where(rows >= 0, (by.scores / best)[place], 0)), _anchors(7, 16)
        )


def _segment(draft: Draft, past: Past) -> None:
    """What is popular among people of the same age band, region, ..., where users have such attributes."""
    by = lists.by_segment(past.events, past.profiles, now_ms=past.now_ms)
    if len(by.groups) > 1:
        tensors = {"groups": by.groups, "rows": by.rows, "scores": by.scores}
        file = draft.save("segment.safetensors", {name: torch.from_numpy(column) for name, column in tensors.items()})
        draft.sources.append(ListSpec(name="segment", rows=file))


MODELS: Mapping[str, Callable[[Draft, Past], None]] = {
    "history": _history,
    "ease": _ease,
    "ease_long": _ease_long,
    "rp3beta": _rp3beta,
    "user_knn": _user_knn,
    "discovery": _discovery,
    "item_cf": _item_cf,
    "session_knn": _session_knn,
    "transitions": _transitions,
    "covisits": _covisits,
    "two_tower": _two_tower,
    "sasrec": _sasrec,
    "gru4rec": _gru4rec,
    "spectral": _spectral,
    "lightgcn": _lightgcn,
    "als": _als,
    "bpr": _bpr,
    "content": _content,
    "complements": _complements,
    "category": _category,
    "segment": _segment,
    "popularity": _popularity,
}
"""Each adds its sources to the draft, or none where the past does not allow it."""

STANDARD = ("history", "ease", "ease_long", "discovery", "item_cf", "two_tower", "content", "popularity")


def scenes(sources: list[str]) -> dict[str, Scene]:
    """The scenes a bundle starts with; rankers are named once they are trained."""
    share = min(1.0, POOL / max(sum(K[name] for name in sources), 1))
    everything = tuple(SceneSource(name=name, k=round(k * share)) for name, k in K.items() if name in sources)
    # On a product page or in the cart, what goes with the items there comes before what is popular.
    around = tuple(
        source.model_copy(update={"weight": 0.3 if source.name in LISTS else 1.0})
        for source in everything
        if source.name != "history" or len(everything) == 1
    )
    return {
        "home": Scene(sources=everything),
        "buy_again": Scene(sources=everything, repeats=True),
        "detail": Scene(sources=around, context=True, diversity=0.02),
        "cart": Scene(sources=around, context=True, diversity=0.02),
    }


def _anchors(half_life_days: float, limit: int, half_life_events: float | None = None) -> Anchors:
    return Anchors(weights=INTEREST, half_life_days=half_life_days, half_life_events=half_life_events, limit=limit)


def _noted(past: Past, name: str) -> Run:
    def on_epoch(epoch: int, train: float, valid: float) -> None:
        said = f"{name}, epoch {epoch}: loss {train:.3f}"
        # What does not validate has no second curve, and JSON no word for that.
        if math.isfinite(valid):
            past.losses.setdefault(name, []).append((float(train), float(valid)))
            said += f", validation {valid:.3f}"
        past.note(said)

    return past.run.of(name, on_epoch)


def _neighbours(draft: Draft, name: str, table: Neighbours, anchors: Anchors) -> None:
    tensors = {"rows": torch.from_numpy(table.rows), "weights": torch.from_numpy(table.weights).half()}
    file = draft.save(f"{name}.safetensors", tensors)
    draft.sources.append(NeighbourSpec(name=name, table=file, anchors=anchors))


def _baskets(draft: Draft, name: str, made: session_knn.Baskets, width: Width, anchors: Anchors) -> None:
    tensors = {
        "of_item": torch.from_numpy(made.of_item),
        "of_weights": torch.from_numpy(made.of_weights).half(),
        "items": torch.from_numpy(made.items),
        "weights": torch.from_numpy(made.weights).half(),
    }
    table = draft.save(f"{name}.safetensors", tensors)
    draft.sources.append(BasketSpec(name=name, table=table, anchors=anchors, likest=width.likest))


def _vectors(draft: Draft, name: str, towers: Vectors, past: Interactions, seed: int) -> None:
    # As they are kept: the index finds what scores best.
    vectors = np.ascontiguousarray(towers.items, np.float16).astype(np.float32)
    sample = np.random.default_rng(seed).permutation(np.unique(past.user))[:SAMPLE]
    queries = towers.users(past, sample, int(past.ts_ms.max(initial=0)))
    # Of whom nothing is known, nothing is looked for.
    queries = queries[queries.any(1)]
    kind, recall = build_index(vectors, queries, draft.path / f"{name}.faiss", seed)
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
            encoder=save_program(towers.export(), draft.path / f"{name}.pt2") if towers.encoder else None,
            anchors=None if towers.encoder else _anchors(towers.half_life_days or LONG_DAYS, towers.history),
            inputs=inputs,
            history=towers.history,
            profile=towers.profile,
        )
    )
