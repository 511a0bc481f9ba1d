"""Recorded queries: a bundle carries questions with their answers and must give them again before it serves."""

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from app.bundle import BundleError
from app.engine import Query
from app.engine.pipeline import Pipeline
from app.state.events import EVENT, EXCLUSION, UserState

TOLERANCE = 2e-2
"""By how much a score may differ on another processor or device, relative to the largest of the slate: what
bfloat16 leaves uncertain of a probability, 1.5e-2 at most where float32 was compared with it."""


def record(pipeline: Pipeline, queries: Sequence[Query], states: Sequence[UserState], now_ms: int, path: Path) -> str:
    """Writes `queries`, the states of their users and the slates they get now; returns the file's name."""
    # Under the ids that `replay` will give them: what a scene explores depends on the id.
    queries = [replace(query, request_id=f"recorded-{index}") for index, query in enumerate(queries)]
    slates = pipeline.run(queries, states, now_ms)
    if failed := {stage for slate in slates for stage in slate.degraded}:
        raise BundleError(f"not to be published: {', '.join(sorted(failed))} failed on recorded queries")
    entries = [
        {
            "query": {"scene": query.scene, "limit": query.limit, "anchors": query.anchors},
            "events": b64encode(state.events.tobytes()).decode(),
            "exclusions": b64encode(state.exclusions.tobytes()).decode(),
            "profile": dict(state.profile),
            "items": [item.item_id for item in slate.items],
            "scores": [item.score for item in slate.items],
        }
        for query, state, slate in zip(queries, states, slates, strict=True)
    ]
    path.write_text(json.dumps({"now_ms": now_ms, "entries": entries}, indent=1))
    return path.name


def replay(pipeline: Pipeline) -> None:
    """Raises `BundleError` when the pipeline answers a recorded query differently; warms it up on the way."""
    name = pipeline.bundle.manifest.recorded
    if name is None:
        return
    try:
        recorded = json.loads((pipeline.bundle.path / name).read_bytes())
        entries = recorded["entries"]
        queries = [_query(index, entry) for index, entry in enumerate(entries)]
        slates = pipeline.run(queries, [_state(entry) for entry in entries], recorded["now_ms"])
    except (ValueError, LookupError, TypeError) as error:
        raise BundleError(f"{name} cannot be replayed: {error!r}") from error
    for index, (entry, slate) in enumerate(zip(entries, slates, strict=True)):
        items = [item.item_id for item in slate.items]
        scores = np.array([item.score for item in slate.items])
        expected = np.array(entry["scores"])
        if slate.degraded or len(items) != len(entry["items"]):
            raise BundleError(f"recorded query {index} got {len(items)} items, degraded {list(slate.degraded)}")
        allowed = TOLERANCE * float(np.abs(expected).max(initial=0.0))
        # Items whose scores tie may change places on another processor; their scores may not change.
        if not (np.abs(scores - expected) <= allowed).all():  # NaN is other too
            raise BundleError(f"recorded query {index} got other scores than the bundle was published with")
        moved = [place for place, item in enumerate(items) if item != entry["items"][place]]
        for place in moved:
            near = np.abs(expected - expected[place]) <= 2 * allowed
            if place + 1 < len(items) and near.sum() < 2:
                raise BundleError(f"recorded query {index} got another item at position {place}")


def _query(index: int, entry: dict[str, Any]) -> Query:
    given = entry["query"]
    return Query(f"recorded-{index}", scene=given["scene"], limit=given["limit"], anchors=tuple(given["anchors"]))


def _state(entry: dict[str, Any]) -> UserState:
    return UserState(
        np.frombuffer(b64decode(entry["events"]), EVENT),
        np.frombuffer(b64decode(entry["exclusions"]), EXCLUSION),
        entry["profile"],
    )
