"""The service that a good engineer writes in an afternoon, to measure ours against.

It serves the same bundle, by the same sources, features and ranker, and answers with the same slates
(`tests/test_bench.py` holds it to that): FastAPI, one request at a time, redis-py, FAISS, numpy over the
candidates, torch for the two networks. It does less than ours: no contexts, no filters, no impressions.

    python -m tests.bench.naive BUNDLE REDIS_URL PORT
"""

import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import orjson
import redis
import redis.asyncio
import torch
import uvicorn
from fastapi import FastAPI, Query
from pydantic import BaseModel

from app.bundle import Anchors, Bundle, ListSpec, NeighbourSpec, VectorSpec, open_bundle
from app.engine.batch import profile_codes
from app.engine.features import HALF_LIFE_DAYS, INTEREST, MINUTES, NEVER_DAYS
from app.engine.merge import ABSENT
from app.engine.program import load_program
from app.engine.recall import DEPTH
from app.state.events import ALIASES, MS_PER_DAY, EventType

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]
Recalled = tuple[Rows, Floats]

CPU = torch.device("cpu")


class Item(BaseModel):
    item_id: str
    score: float
    position: int
    sources: list[str]


class Recommendation(BaseModel):
    user_id: str
    items: list[Item]
    bundle: str
    took_ms: float


@dataclass(frozen=True, slots=True)
class History:
    """A user's events of known items, oldest first."""

    row: Rows
    kind: npt.NDArray[np.int64]
    age_days: Floats
    quantity: Floats


class Naive:
    """One scene of one bundle, for one user at a time."""

    def __init__(self, bundle: Bundle, scene: str = "home") -> None:
        manifest = bundle.manifest
        self.version = manifest.version
        self.window = manifest.window
        self.scene = manifest.scenes[scene]
        columns = {name: column.numpy() for name, column in bundle.tensors("catalog.safetensors").items()}
        ends = columns["id_ends"]
        text = columns["id_bytes"].tobytes()
        self.ids = [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.row_of = {name: row for row, name in enumerate(self.ids)}
        category = columns["category"]
        self.department = category[:, 0]
        self.leaf = category[np.arange(len(category)), (category >= 0).sum(1).clip(min=1) - 1]
        self.brand = columns["brand"]
        self.log_price = np.log1p(np.nan_to_num(columns["price"]).clip(min=0))
        self.created_ms = columns["created_ms"]
        self.statistics = columns["statistics"]
        self.available = columns["available"]
        self.spec = {spec.name: spec for spec in manifest.sources}
        self.tables: dict[str, tuple[npt.NDArray[np.int32], Floats]] = {}
        self.lists: dict[str, Recalled] = {}
        for spec in manifest.sources:
            if isinstance(spec, NeighbourSpec):
                table = bundle.tensors(spec.table)
                self.tables[spec.name] = table["rows"].numpy(), table["weights"].numpy()
            elif isinstance(spec, ListSpec):
                listed = bundle.tensors(spec.rows)
                self.lists[spec.name] = listed["rows"].numpy().astype(np.int64), listed["scores"].numpy()
            elif isinstance(spec, VectorSpec) and spec.encoder:
                self.vectors = bundle.tensors(spec.vectors)["vectors"].numpy()
                self.index = faiss.read_index(str(bundle.path / spec.index))
                self.encode = load_program(bundle.path / spec.encoder, CPU)
        ranker = next(ranker for ranker in manifest.rankers if ranker.name == self.scene.ranker)
        self.rank = load_program(bundle.path / str(ranker.program), CPU)
        self.standard = bundle.tensors(str(ranker.standard))
        self.interest = _by_kind({kind.name: weight for kind, weight in INTEREST.items()})
        self.weights = {
            spec.name: _by_kind(spec.anchors.weights) for spec in manifest.sources if isinstance(spec, NeighbourSpec)
        }

    @torch.inference_mode()
    def recommend(self, events: Sequence[Mapping[str, Any]], excluded: set[str], limit: int, now_ms: int) -> list[Item]:
        history = self._history(events, now_ms)
        user = np.zeros(0, np.float32)
        recalled: list[Recalled] = []
        for source in self.scene.sources:
            spec = self.spec[source.name]
            if isinstance(spec, NeighbourSpec):
                recalled.append(self._neighbours(spec, history, DEPTH * source.k))
            elif isinstance(spec, VectorSpec):
                user = self._encode(spec, history)
                scores, rows = self.index.search(user[None], source.k)
                recalled.append((rows[0], scores[0]))
            else:
                rows, scores = self.lists[spec.name]
                recalled.append((rows[: source.k], scores[: source.k]))

        proposed: set[int] = set()
        for source, (rows, _) in zip(self.scene.sources, recalled, strict=True):
            proposed.update(rows[: source.k].tolist())
        proposed.discard(-1)
        proposed -= {self.row_of[item] for item in excluded if item in self.row_of}
        candidates = np.fromiter(proposed, np.int64, len(proposed))
        candidates = np.sort(candidates[self.available[candidates]])
        if not len(candidates):
            return []

        score = np.zeros((len(candidates), len(recalled)), np.float32)
        rank = np.full(score.shape, ABSENT, np.float32)
        best = np.zeros(len(recalled), np.float32)
        for column, (source, (rows, scores)) in enumerate(zip(self.scene.sources, recalled, strict=True)):
            if not len(rows):
                continue
            best[column] = scores[0]
            place = np.searchsorted(candidates, rows).clip(max=len(candidates) - 1)
            found = np.flatnonzero(candidates[place] == rows)
            score[place[found], column] = scores[found]
            rank[place[found], column] = np.where(found < source.k, found, ABSENT)
            if isinstance(self.spec[source.name], VectorSpec):
                score[:, column] = self.vectors[candidates] @ user

        features = self._features(history, candidates, score, rank, best, now_ms)
        mean, scale, clip = (self.standard[name] for name in ("mean", "scale", "clip"))
        standardised = ((torch.from_numpy(features) - mean) * scale).clamp(-clip, clip).bfloat16()
        final = self.rank(standardised).numpy()
        top = np.argsort(-final)[:limit]
        names = [source.name for source in self.scene.sources]
        return [
            Item(
                item_id=self.ids[candidates[i]],
                score=float(final[i]),
                position=position,
                sources=[name for name, place in zip(names, rank[i], strict=True) if place < ABSENT],
            )
            for position, i in enumerate(top, 1)
        ]

    def _history(self, events: Sequence[Mapping[str, Any]], now_ms: int) -> History:
        known = [event for event in events if event["item_id"] in self.row_of]
        age_ms = now_ms - np.array([event["ts"] for event in known], np.int64)
        return History(
            np.array([self.row_of[event["item_id"]] for event in known], np.int64),
            np.array([_KIND[event["type"]] for event in known], np.int64),
            (age_ms.clip(min=0) / MS_PER_DAY).astype(np.float32),
            np.array([event["quantity"] for event in known], np.float32),
        )

    def _encode(self, spec: VectorSpec, history: History) -> npt.NDArray[np.float32]:
        length = spec.history
        last = min(length, len(history.row))
        vectors = np.zeros((1, length, self.vectors.shape[1]), np.float32)
        kinds = np.zeros((1, length), np.int64)
        ages_s = np.zeros((1, length), np.float32)
        if last:
            vectors[0, -last:] = self.vectors[history.row[-last:]]
            kinds[0, -last:] = history.kind[-last:]
            ages_s[0, -last:] = history.age_days[-last:] * 86_400
        profile = torch.tensor([profile_codes({}, spec.profile)])
        user = self.encode(*map(torch.from_numpy, (vectors, kinds, ages_s)), profile)
        return user[0].numpy()

    def _neighbours(self, spec: NeighbourSpec, history: History, depth: int) -> Recalled:
        anchors: Anchors = spec.anchors
        last = slice(-anchors.limit, None)
        weight = self.weights[spec.name][history.kind[last]] * np.exp2(-history.age_days[last] / anchors.half_life_days)
        row, weight = history.row[last][weight > 0], weight[weight > 0]
        rows, weights = self.tables[spec.name]
        near = rows[row].ravel()
        scores = (weights[row] * weight[:, None]).ravel()
        distinct, inverse = np.unique(near[near >= 0], return_inverse=True)
        total = np.bincount(inverse, scores[near >= 0], len(distinct)).astype(np.float32)
        best = np.argsort(-total)[:depth]
        return distinct[best].astype(np.int64), total[best]

    def _features(
        self, history: History, candidates: Rows, score: Floats, rank: Floats, best: Floats, now_ms: int
    ) -> npt.NDArray[np.float32]:
        size = len(candidates)
        share = np.clip(score / best.clip(min=1e-9), -1, 1)
        sources = np.stack([np.sign(score) * np.log1p(100 * np.abs(score)), share, 10 / (10 + rank)], 2).reshape(
            size, -1
        )
        age = np.log1p((now_ms - self.created_ms[candidates]).clip(min=0) / MS_PER_DAY)
        price = self.log_price[candidates]

        weight = self.interest[history.kind] * np.exp2(-history.age_days / HALF_LIFE_DAYS)
        paid = self.log_price[history.row]
        priced = weight * (paid > 0)
        mean_price = (priced * paid).sum() / max(priced.sum(), 1e-9)
        bought = history.kind == EventType.PURCHASE
        recency = history.age_days.min() if len(history.row) else NEVER_DAYS
        user = [np.log1p(len(history.row)), np.log1p(bought.sum()), np.log1p(weight.sum()), np.log1p(MINUTES * recency)]

        place = np.searchsorted(candidates, history.row).clip(max=size - 1)
        hit = np.flatnonzero(candidates[place] == history.row)
        place, kind, age_days = place[hit], history.kind[hit], history.age_days[hit]
        own = []
        for kinds in _OWN:
            mine = np.isin(kind, kinds)
            days = np.full(size, NEVER_DAYS)
            np.minimum.at(days, place[mine], age_days[mine])
            own += [np.log1p(np.bincount(place[mine], minlength=size)), np.log1p(MINUTES * days)]
        bought = kind == EventType.PURCHASE
        own.append(np.log1p(np.bincount(place[bought], history.quantity[hit][bought], size)))

        total = max(weight.sum(), 1e-9)
        affinities = []
        for codes in (self.leaf, self.department, self.brand):
            by_code = np.bincount(codes[history.row] + 1, weight, int(codes.max(initial=-1)) + 2)
            of_candidate = codes[candidates]
            affinities.append(np.where(of_candidate >= 0, by_code[of_candidate + 1] / total, 0.0))
        gap = np.where((price > 0) & (mean_price > 0), price - mean_price, 0.0)
        columns = [
            sources,
            (rank < ABSENT).sum(1),
            self.statistics[candidates],
            age,
            price,
            np.broadcast_to([*user, mean_price], (size, 5)),
            *own,
            *affinities,
            np.abs(gap),
            gap.clip(max=0),
        ]
        return np.column_stack(columns).astype(np.float32)


_KIND = {alias: int(kind) for alias, kind in ALIASES.items()}
_OWN = (
    (EventType.SELECT_ITEM, EventType.VIEW_ITEM),
    (EventType.ADD_TO_CART, EventType.ADD_TO_WISHLIST, EventType.BEGIN_CHECKOUT),
    (EventType.PURCHASE,),
)


def _by_kind(weights: Mapping[str, float]) -> Floats:
    by_kind = np.zeros(256, np.float32)
    for name, weight in weights.items():
        by_kind[EventType[name.upper()]] = weight
    return by_kind


def write(url: str, events: Iterable[Mapping[str, Any]]) -> None:
    """Stores canonical events, in time order, the simple way: a list of JSON a user and a set of what not to show."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        for event in events:
            kept = {"item_id": event["item_id"], "type": event["type"], "ts": event["timestamp"], "quantity": 1}
            pipeline.rpush(f"naive:{event['user_id']}:events", orjson.dumps(kept))
            if event["type"] in ("purchase", "hide"):
                pipeline.sadd(f"naive:{event['user_id']}:excluded", event["item_id"])
            if len(pipeline) >= 1000:
                pipeline.execute()
        pipeline.execute()


def create_app(bundle: Path, redis_url: str) -> FastAPI:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    naive = Naive(open_bundle(bundle))
    client = redis.asyncio.Redis.from_url(redis_url)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/recommend")
    async def recommend(user_id: str, limit: int = Query(20, ge=1, le=200)) -> Recommendation:
        began = time.perf_counter()
        async with client.pipeline(transaction=False) as pipeline:
            pipeline.lrange(f"naive:{user_id}:events", -naive.window, -1)
            pipeline.smembers(f"naive:{user_id}:excluded")
            events, excluded = await pipeline.execute()
        items = naive.recommend(
            [orjson.loads(event) for event in events],
            {item.decode() for item in excluded},
            limit,
            time.time_ns() // 1_000_000,
        )
        took_ms = (time.perf_counter() - began) * 1000
        return Recommendation(user_id=user_id, items=items, bundle=naive.version, took_ms=took_ms)

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"bundle": naive.version}

    return app


if __name__ == "__main__":
    uvicorn.run(
        create_app(Path(sys.argv[1]), sys.argv[2]),
        port=int(sys.argv[3]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
