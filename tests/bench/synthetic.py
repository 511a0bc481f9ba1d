"""A shop of any size in the real formats, without training.

Items come in clusters of `CLUSTER`, which are also their categories; item `i` belongs to cluster
`i % clusters`. Vectors lie around their cluster's centre, neighbours are the nearest of the cluster, and both
networks have the real architecture with random weights from a fixed seed. Shoppers keep to a few clusters.
"""

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

import app.engine
import models.ranking
import models.recall
import models.sources
from app.bundle import (
    Anchors,
    Bundle,
    BundleError,
    Draft,
    ListSpec,
    NeighbourSpec,
    VectorSpec,
    current,
    open_bundle,
    publish,
    seal,
    versions,
)
from app.catalog import pack_strings
from app.engine import Query
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.engine.program import save_program
from app.engine.recorded import record
from app.state.events import ALIASES, EVENT, MS_PER_DAY, UserState, fold, item_key, records
from app.state.store import Store
from models.catalog import STATISTICS
from models.ranking import mlp
from models.ranking.networks import Network
from models.recall import Vectors, ease, two_tower
from models.recall.index import build_index
from models.recall.two_tower import WIDTH
from models.sources import EASE_GB, INTEREST, LIST_LENGTH, NEIGHBOURS, WINDOW, scenes

CLUSTER = 200
DEPARTMENTS = 20
RANKED = ("home", "buy_again")
RECORDED = 10

Numbers = npt.NDArray[np.int64]


def bundle(root: Path, items: int, prefix: str = "", seed: int = 0) -> Bundle:
    """The shop's bundle in `root`, made if it is not there or no longer what this code makes.

    `items` is a multiple of `CLUSTER`; `prefix` goes before every item id.
    """
    recipe = f"{items} {prefix} {seed} {_recipe()}"
    if (version := current(root)) is not None:
        try:
            found = open_bundle(root / version)
            if found.manifest.provenance.get("recipe") == recipe:
                return found
        except BundleError:
            pass
    for version in versions(root):
        shutil.rmtree(root / version)
    return publish(root, lambda folder, version: _write(folder, version, items, prefix, seed, recipe))


def clickstream(items: int, users: int, now_ms: int, prefix: str = "", seed: int = 0) -> list[dict[str, Any]]:
    """20 to 80 events of each user `u0`, `u1`, ... in the last 60 days, as `POST /events` takes them, in time order."""
    rng = np.random.default_rng(seed)
    clusters = items // CLUSTER
    counts = rng.integers(20, 81, users)
    user = np.repeat(np.arange(users), counts)
    size = len(user)
    taste = rng.integers(clusters, size=(users, 4))
    cluster = taste[user, rng.integers(4, size=size)]
    member = (rng.pareto(1.0, size) * 10).astype(np.int64) % CLUSTER
    item = member * clusters + cluster
    kind = rng.choice(
        ["view_item", "add_to_cart", "purchase", "add_to_wishlist", "hide"], size, p=[0.72, 0.13, 0.12, 0.02, 0.01]
    )
    # Visits of some ten events, the last one within the hour; within a visit an event a minute or so.
    place = np.arange(size) - np.repeat(counts.cumsum() - counts, counts)
    visit = place // 10
    visit_age_ms = np.where(visit == 0, 0.5 * 3_600_000, rng.uniform(0.1, 60, (users, 8))[user, visit] * MS_PER_DAY)
    ts = now_ms - (visit_age_ms + place % 10 * rng.uniform(20_000, 120_000, size)).astype(np.int64)
    return [
        {
            "type": str(kind[i]),
            "event_id": f"{prefix}{seed}-{i}",
            "user_id": f"u{user[i]}",
            "item_id": f"{prefix}{item[i]}",
            "timestamp": int(ts[i]),
            "value": 9.99,
        }
        for i in np.argsort(ts, kind="stable")
    ]


def states(events: Sequence[dict[str, Any]]) -> dict[str, UserState]:
    """What the service knows of each user after the events."""
    mine: dict[str, list[npt.NDArray[np.void]]] = {}
    for event in events:
        line = (event["item_id"], 1, event["value"])
        record = records(event["event_id"], ALIASES[event["type"]], event["timestamp"], [line])
        mine.setdefault(event["user_id"], []).append(record)
    joined = {user: np.concatenate([np.empty(0, EVENT), *parts]) for user, parts in mine.items()}
    return {user: fold(UserState(), events, WINDOW) for user, events in joined.items()}


def candidates(path: Path, redis_url: str, users: int = 200) -> float:
    """Mean number of candidates that the home page ranks for the users `u0`, `u1`, ..., with their states in Redis."""
    names = [f"u{number}" for number in range(users)]

    async def read() -> Sequence[UserState]:
        async with Store(redis_url, timeout_ms=5_000, window=WINDOW) as store:
            return await store.read([(name, None) for name in names])

    found = asyncio.run(read())
    pipeline = Pipeline(open_bundle(path), torch.device("cpu"), users)
    total = 0
    with torch.inference_mode():
        for name, state in zip(names, found, strict=True):
            query = Query(name, user=name)
            prepared = pipeline.prepare(pipeline.scenes["home"], [query], [state], time.time_ns() // 1_000_000)
            total += len(prepared.candidates.row)
    return total / users


def _recipe() -> str:
    """Changes with any code that decides what is in a bundle or what it answers."""
    packages = (app.engine, models.ranking, models.recall)
    files = [file for package in packages for file in Path(package.__path__[0]).glob("*.py")]
    files += [Path(__file__), Path(models.sources.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _write(folder: Path, version: str, items: int, prefix: str, seed: int, recipe: str) -> Bundle:
    if items % CLUSTER:
        raise ValueError(f"{items} items are no multiple of {CLUSTER}")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    now_ms = time.time_ns() // 1_000_000
    clusters = items // CLUSTER
    ids = [f"{prefix}{number}" for number in range(items)]
    key = np.fromiter(map(item_key, ids), np.int64, items)
    # Everything below is made by item number and written by row, in the order of the keys.
    number = np.argsort(key)
    row = np.empty(items, np.int64)
    row[number] = np.arange(items)
    names = [f"Department {c % DEPARTMENTS} > Category {c}" for c in range(clusters)]
    departments = [f"Department {d}" for d in range(DEPARTMENTS)]
    brands = [f"Brand {b}" for b in range(max(10, items // 500))]
    draft = Draft(folder, items, WINDOW, STATISTICS, (*departments, *names), tuple(brands), [], [], {})

    cluster = number % clusters
    popularity = rng.exponential(1.0, clusters)[cluster] * 1000 / (1 + number // clusters) ** 0.8
    brand = rng.integers(len(brands), size=items)
    price = np.exp(rng.normal(3, 1, items)).round(2)
    created_ms = now_ms - (rng.uniform(0, 720, items) * MS_PER_DAY).astype(np.int64)
    attributes = [
        json.dumps({"title": f"Item {n}", "category": names[c], "brand": brands[b], "price": p}, separators=(",", ":"))
        for n, c, b, p in zip(number.tolist(), cluster.tolist(), brand.tolist(), price.tolist(), strict=True)
    ]
    noise = rng.lognormal(0, 0.3, (items, len(STATISTICS)))
    draft.save(
        "catalog.safetensors",
        {
            "key": torch.from_numpy(key[number]),
            "price": torch.from_numpy(price.astype(np.float32)),
            "category": torch.from_numpy(np.stack([cluster % DEPARTMENTS, DEPARTMENTS + cluster], 1).astype(np.int32)),
            "brand": torch.from_numpy(brand.astype(np.int32)),
            "available": torch.ones(items, dtype=torch.bool),
            "created_ms": torch.from_numpy(created_ms),
            "statistics": torch.from_numpy(np.log1p(popularity[:, None] * noise).astype(np.float32)),
            **pack_strings([ids[n] for n in number.tolist()], "id"),
            **pack_strings(attributes, "attributes"),
        },
    )
    del attributes, noise

    def neighbours(name: str, half_life_days: float, limit: int, table: str) -> None:
        anchors = Anchors(weights=INTEREST, half_life_days=half_life_days, limit=limit)
        draft.sources.append(NeighbourSpec(name=name, table=table, anchors=anchors))

    itself = {"rows": torch.arange(items, dtype=torch.int32)[:, None], "weights": torch.ones(items, 1).half()}
    neighbours("history", 90, WINDOW, draft.save("history.safetensors", itself))
    centres = normalize(torch.randn(clusters, 1, WIDTH), dim=2)
    if ease.needed_gb(items) <= EASE_GB:
        neighbours("ease", 60, 64, _nearest(draft, "ease", centres, row))
    neighbours("discovery", 365, 64, _nearest(draft, "discovery", centres, row))
    neighbours("item_cf", 90, WINDOW, _nearest(draft, "item_cf", centres, row))
    neighbours("session", 0.25, 8, "item_cf.safetensors")
    vectors = _around(centres).transpose(0, 1).reshape(items, WIDTH)[number].contiguous()
    _towers(draft, vectors, seed)
    neighbours("content", 7, 16, _nearest(draft, "content", centres, row))
    for name, score in {
        "trending": popularity * rng.lognormal(0, 1, items),
        "popular": popularity,
        "new": (created_ms / MS_PER_DAY),
    }.items():
        best = np.argsort(-score)[:LIST_LENGTH]
        listed = {
            "rows": torch.from_numpy(best.astype(np.int32)),
            "scores": torch.from_numpy(score[best].astype(np.float32)),
        }
        draft.sources.append(ListSpec(name=name, rows=draft.save(f"{name}.safetensors", listed)))

    draft.scenes = scenes([source.name for source in draft.sources])
    for name in RANKED:
        features = feature_names([source.name for source in draft.scenes[name].sources], STATISTICS)
        ranker = Network(mlp.hidden(len(features)), torch.zeros(len(features)), torch.ones(len(features)))
        ranker.eval().export(name, features, draft)
        draft.scenes[name] = draft.scenes[name].model_copy(update={"fusion": "learned", "ranker": name})
    draft.provenance = {"recipe": recipe}

    users = states(clickstream(items, RECORDED, now_ms, prefix, seed))
    queries = [
        Query(f"{scene}-{user}", user=user, scene=scene, anchors=(ids[0],) if draft.scenes[scene].context else ())
        for scene in draft.scenes
        for user in users
    ]
    pipeline = Pipeline(seal(draft, version), torch.device("cpu"), len(users))
    draft.recorded = record(pipeline, queries, [*users.values()] * len(draft.scenes), now_ms, folder / "recorded.json")
    return seal(draft, version)


def _around(centres: torch.Tensor) -> torch.Tensor:
    """Unit vectors [clusters, CLUSTER, d] around the centres [clusters, 1, d]."""
    noise = torch.randn(len(centres), CLUSTER, WIDTH) / WIDTH**0.5
    return normalize(centres + noise, dim=2)


def _nearest(draft: Draft, name: str, centres: torch.Tensor, row: Numbers) -> str:
    """Writes the table of each item's nearest of its cluster, seen from vectors of its own."""
    clusters = len(centres)
    rows = np.empty((len(row), NEIGHBOURS), np.int32)
    weights = np.empty((len(row), NEIGHBOURS), np.float32)
    for first in range(0, clusters, 100):
        vectors = _around(centres[first : first + 100])
        similar = vectors @ vectors.transpose(1, 2) - 2 * torch.eye(CLUSTER)
        weight, member = similar.topk(NEIGHBOURS)
        of_cluster = torch.arange(first, first + len(vectors))[:, None]
        mine = row[torch.arange(CLUSTER) * clusters + of_cluster]
        rows[mine] = row[member.numpy() * clusters + of_cluster[:, :, None].numpy()]
        weights[mine] = weight.clamp(min=0).numpy() / NEIGHBOURS
    return draft.save(
        f"{name}.safetensors", {"rows": torch.from_numpy(rows), "weights": torch.from_numpy(weights).half()}
    )


def _towers(draft: Draft, vectors: torch.Tensor, seed: int) -> None:
    kind, recall = build_index(vectors.numpy(), vectors.numpy(), draft.path / "two_tower.faiss", seed)
    towers = Vectors(vectors.numpy(), two_tower.UserTower().eval(), history=64, profile=8)
    draft.sources.append(
        VectorSpec(
            name="two_tower",
            vectors=draft.save("two_tower.safetensors", {"vectors": vectors.half()}),
            index="two_tower.faiss",
            index_kind=kind,
            index_recall=recall,
            encoder=save_program(towers.export(), draft.path / "two_tower.pt2"),
            history=towers.history,
            profile=towers.profile,
        )
    )
