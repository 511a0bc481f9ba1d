"""What a good answer looks like. The client's process imports this and little else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Complete:
    """Checks that an answer is a whole slate with no stage left out."""

    items: int

    def __call__(self, body: bytes) -> str | None:
        if (found := body.count(b'"item_id"')) != self.items:
            return f"{found} items"
        if b'"degraded":[' in body and b'"degraded":[]' not in body:
            return "degraded"
        return None


@dataclass(frozen=True, slots=True)
class Unmixed:
    """Checks that every item of a slate is of the bundle that the slate names."""

    prefixes: Mapping[str, str]
    """Of the item ids, by bundle version."""
    complete: Complete

    def __call__(self, body: bytes) -> str | None:
        answer = json.loads(body)
        prefix = self.prefixes.get(answer["bundle"])
        if prefix is None:
            return f"unknown bundle {answer['bundle']}"
        if not all(item["item_id"].startswith(prefix) for item in answer["items"]):
            return "mixed slate"
        return self.complete(body)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Checks that all events of a call were taken."""

    events: int

    def __call__(self, body: bytes) -> str | None:
        return None if json.loads(body)["accepted"] == self.events else "events not accepted"
