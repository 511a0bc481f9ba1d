"""A bundle small enough to know by heart: two groups of items, written by hand through the real formats.

Items `a0`..`a19` (category "A > A1" or "A > A2", brand "acme") and `b0`..`b19` ("B", brand "bolt"); the
price of item i is 1 + i. Vectors and neighbours keep to their group; popularity falls with i.
"""

import time
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from app.bundle import (
    Anchors,
    BasketSpec,
    Bundle,
    Draft,
    ListSpec,
    NeighbourSpec,
    RankerSpec,
    VectorSpec,
    publish,
    seal,
)
from app.catalog import pack_strings
from app.engine import Query
from app.engine.batch import profile_codes
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.engine.program import save_program
from app.engine.recorded import record
from app.scenes import Scene, SceneSource
from app.state.events import EVENT, EventType, UserState, event_key, exclusions_of, item_key

GROUP = 20
WIDTH = 8
NOW_MS = 1_700_000_000_000
STATISTICS = ("purchases", "views")


class MeanEncoder(nn.Module):
    """The mean of the history's vectors, or a fixed direction for a stranger."""

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        seen = (kinds > 0).float()[:, :, None] * (ages_s[:, :, None] >= 0)
        known = (profile > 0).float().sum(1, keepdim=True) * 1e-6
        return (history * seen).sum(1) / (seen.sum(1) + 1e-6) + known + 0.01


class SumOfSources(nn.Module):
    """Score, share and rank of every source, added up: enough to be a learned fusion."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weights", (torch.arange(width) < columns).float())

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights


def item_ids(prefix: str = "") -> list[str]:
    return [f"{prefix}{group}{i}" for group in "ab" for i in range(GROUP)]


def write_tiny(folder: Path, version: str, prefix: str = "", window: int = 64) -> Bundle:
    """Fills and seals `folder`; `prefix` goes before every item id, to tell two bundles' items apart."""
    names = sorted(item_ids(prefix), key=item_key)
    group = np.array([name.removeprefix(prefix)[0] == "b" for name in names])
    number = np.array([int(name.removeprefix(prefix)[1:]) for name in names])
    categories = ("A", "A > A1", "A > A2", "B")
    draft = Draft(folder, len(names), window, STATISTICS, categories, ("acme", "bolt"), [], [], {})
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 0.1, (len(names), WIDTH)).astype(np.float32)
    vectors[np.arange(len(names)), group.astype(int)] += 1.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float16).astype(np.float32)
    popularity = np.log1p(100.0 - 2 * number - group)
    draft.save(
        "catalog.safetensors",
        {
            "key": torch.tensor([item_key(name) for name in names]),
            "price": torch.from_numpy((1.0 + number).astype(np.float32)),
            "category": torch.tensor(
                [[3, -1] if g else [0, 1 + n % 2] for g, n in zip(group, number, strict=True)], dtype=torch.int32
            ),
            "brand": torch.from_numpy(group.astype(np.int32)),
            "available": torch.ones(len(names), dtype=torch.bool),
            "created_ms": torch.full((len(names),), NOW_MS - 10 * 86_400_000),
            "statistics": torch.from_numpy(np.stack([popularity, popularity], 1).astype(np.float32)),
            **pack_strings(names, "id"),
            **pack_strings(
                [f'{{"title":"Item {name}","price":{1 + n}}}' for name, n in zip(names, number, strict=True)],
                "attributes",
            ),
        },
    )
    near = np.stack(
        [np.flatnonzero((group == group[row]) & (np.arange(len(names)) != row))[:10] for row in range(len(names))]
    )
    weights = np.tile(np.linspace(1.0, 0.1, near.shape[1], dtype=np.float32), (len(names), 1))
    table = draft.save(
        "item_cf.safetensors",
        {"rows": torch.from_numpy(near.astype(np.int32)), "weights": torch.from_numpy(weights).half()},
    )
    anchors = Anchors(weights={"view_item": 1.0, "add_to_cart": 2.0, "purchase": 3.0})
    own = draft.save(
        "history.safetensors",
        {"rows": torch.arange(len(names), dtype=torch.int32)[:, None], "weights": torch.ones(len(names), 1).half()},
    )
    best = np.argsort(-popularity, kind="stable")
    popular = draft.save(
        "popular.safetensors",
        {
            "rows": torch.from_numpy(best.astype(np.int32)),
            "scores": torch.from_numpy(popularity[best].astype(np.float32)),
        },
    )
    # Six baskets, each of some items of one group, and the lists of who says where they are from.
    basket = np.array([rng.permutation(np.flatnonzero(group == (number % 2)))[:6] for number in range(6)])
    of_item = np.full((len(names), 6), -1)
    for row in range(len(names)):
        with_it = np.flatnonzero((basket == row).any(1))
        of_item[row, : len(with_it)] = with_it
    baskets = draft.save(
        "sessions.safetensors",
        {
            "of_item": torch.from_numpy(of_item.astype(np.int32)),
            "of_weights": torch.from_numpy(np.where(of_item >= 0, rng.uniform(0.5, 1.0, of_item.shape), 0.0)).half(),
            "items": torch.from_numpy(basket.astype(np.int32)),
            "weights": torch.from_numpy(rng.uniform(0.5, 1.0, (6, 6))).half(),
        },
    )
    codes = np.array([-1, *sorted(profile_codes({"country": country}, 1)[0] for country in ("FR", "DE"))])
    segments = draft.save(
        "segments.safetensors",
        {
            "groups": torch.from_numpy(codes.astype(np.int32)),
            "rows": torch.stack([torch.arange(10), torch.arange(10, 20), torch.arange(20, 30)]).int(),
            "scores": torch.linspace(1.0, 0.1, 10).repeat(3, 1),
        },
    )
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    faiss.write_index(index, str(folder / "towers.faiss"))
    batch = torch.export.Dim("batch", min=1)
    example = (
        torch.rand(3, 8, WIDTH),
        torch.ones(3, 8, dtype=torch.int64),
        torch.rand(3, 8),
        torch.ones(3, 4, dtype=torch.int64),
    )
    encoder = torch.export.export(MeanEncoder(), example, dynamic_shapes=({0: batch},) * 4)
    draft.sources = [
        NeighbourSpec(name="history", table=own, anchors=anchors),
        NeighbourSpec(name="item_cf", table=table, anchors=anchors),
        VectorSpec(
            name="towers",
            vectors=draft.save("towers.safetensors", {"vectors": torch.from_numpy(vectors).half()}),
            index="towers.faiss",
            index_kind="flat",
            index_recall=1.0,
            encoder=save_program(encoder, folder / "towers.pt2"),
            history=8,
            profile=4,
        ),
        ListSpec(name="popular", rows=popular),
    ]
    sources = tuple(SceneSource(name=source.name, k=15) for source in draft.sources)
    draft.sources += [
        BasketSpec(
            name="sessions", table=baskets, anchors=anchors.model_copy(update={"half_life_events": 3.0}), likest=4
        ),
        ListSpec(name="segments", rows=segments),
        VectorSpec(
            name="sums",
            vectors="towers.safetensors",
            index="towers.faiss",
            index_kind="flat",
            index_recall=1.0,
            anchors=anchors,
        ),
    ]
    wider = tuple(SceneSource(name=source.name, k=15) for source in draft.sources)
    features = feature_names([source.name for source in sources], STATISTICS)
    rows = torch.export.Dim("rows", min=1)
    ranker = torch.export.export(
        SumOfSources(3 * len(sources), len(features)), (torch.rand(5, len(features)),), dynamic_shapes=({0: rows},)
    )
    draft.rankers = [RankerSpec(name="sum", program=save_program(ranker, folder / "sum.pt2"), features=features)]
    learned = Scene(sources=sources, fusion="learned", ranker="sum")
    draft.scenes = {
        "home": learned,
        "buy_again": learned.model_copy(update={"repeats": True}),
        "detail": Scene(sources=sources[1:], context=True),
        **{name: Scene(sources=sources, fusion=name) for name in ("reciprocal_rank", "voting", "weighted", "cascade")},  # type: ignore[arg-type]
        "wider": Scene(sources=wider),
        "diverse": Scene(sources=sources, diversity=0.2),
        "explore": Scene(sources=sources, explore=1.0),
    }
    pipeline = Pipeline(seal(draft, version), torch.device("cpu"), 32)
    queries = [Query(f"recorded-{name}", scene=name) for name in draft.scenes]
    states = [state(f"{prefix}a1", f"{prefix}a2", f"{prefix}b3")] * len(queries)
    draft.recorded = record(pipeline, queries, states, NOW_MS, folder / "recorded.json")
    return seal(draft, version)


def publish_tiny(root: Path, prefix: str = "", window: int = 64) -> Bundle:
    return publish(root, lambda folder, version: write_tiny(folder, version, prefix, window))


def state(
    *items: str, kind: EventType = EventType.VIEW_ITEM, end_ms: int | None = None, profile: dict[str, str] | None = None
) -> UserState:
    """A user who did `kind` to `items`, one a minute, the last one at `end_ms`."""
    end_ms = NOW_MS if end_ms is None else end_ms
    events = np.zeros(len(items), EVENT)
    for place, item in enumerate(items):
        at = end_ms - 60_000 * (len(items) - 1 - place)
        events[place] = (at, event_key(f"{item}-{at}-{kind}"), item_key(item), np.nan, 1, kind, 0)
    return UserState(events, exclusions_of(events), profile or {})


def now_ms() -> int:
    return time.time_ns() // 1_000_000
