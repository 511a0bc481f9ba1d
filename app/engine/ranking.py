"""Ranking: one score per candidate, from the sources' own words or from a learned ranker.

Every fusion is a function of candidates and the scene's source weights, so a scene can switch freely.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from app.bundle import Bundle, BundleError, RankerSpec
from app.engine import kernels
from app.engine.features import feature_names
from app.engine.merge import ABSENT, Candidates
from app.engine.program import load_program


def reciprocal_rank(candidates: Candidates, weights: Tensor) -> Tensor:
    """sum of w / (60 + rank), with ranks from 1 (Cormack, Clarke & Buettcher, SIGIR 2009)."""
    return (weights[:, None] * candidates.proposed / (61.0 + candidates.rank)).sum(0)


def voting(candidates: Candidates, weights: Tensor) -> Tensor:
    """One vote a source; the reciprocal-rank score, scaled to below the least vote, breaks ties."""
    tie = reciprocal_rank(candidates, weights / weights.sum())
    return (weights[:, None] * candidates.proposed).sum(0) + tie * weights[weights > 0].min()


def weighted(candidates: Candidates, weights: Tensor) -> Tensor:
    """Weighted mean of the sources' scores, each scaled to 0..1 within the query's proposals."""
    query, score, proposed = candidates.query, candidates.score, candidates.proposed
    by_query = query.expand_as(score)
    lowest = torch.full_like(candidates.best, torch.inf)
    lowest = lowest.scatter_reduce(1, by_query, torch.where(proposed, score, torch.inf), "amin")
    highest = torch.full_like(candidates.best, -torch.inf)
    highest = highest.scatter_reduce(1, by_query, torch.where(proposed, score, -torch.inf), "amax")
    low, spread = lowest.index_select(1, query), (highest - lowest).index_select(1, query)
    scaled = torch.where(spread > 0, (score - low) / spread, 1.0)
    return (torch.where(proposed, scaled, 0.0) * weights[:, None]).sum(0) / weights.sum()


def cascade(candidates: Candidates, weights: Tensor) -> Tensor:
    """All of the first source in its order, then what the second adds, and so on."""
    sources = candidates.rank.shape[0]
    place = torch.arange(sources, device=candidates.rank.device)[:, None] * ABSENT + candidates.rank
    last = sources * ABSENT
    return 1.0 - torch.where(candidates.proposed, place, last).amin(0) / last


FUSIONS: Mapping[str, Callable[[Candidates, Tensor], Tensor]] = {
    "reciprocal_rank": reciprocal_rank,
    "voting": voting,
    "weighted": weighted,
    "cascade": cascade,
}


class Ranker:
    """A learned fusion: features [M, F] -> scores [M]."""

    def __init__(self, spec: RankerSpec, bundle: Bundle, device: torch.device) -> None:
        self.name = spec.name
        self.features = spec.features
        self._calibrated = spec.calibrated
        self._parts: list[Callable[[Tensor], Tensor]] = []
        if spec.program is not None:
            self._parts.append(_Program(spec.program, spec, bundle, device))
        if spec.forest is not None:
            self._parts.append(_Forest(spec.forest, spec, bundle, device))

    def score(self, features: Tensor) -> Tensor:
        """float32 [M] for features [M, F]."""
        first, *others = (part(features) for part in self._parts)
        return sum(others, first)

    def shown(self, score: Tensor) -> Tensor:
        """What a slate says of its items: the probability that each is wanted, where the ranker is calibrated."""
        return score.sigmoid() if self._calibrated else score

    def check(self, scene: str, sources: tuple[str, ...], statistics: tuple[str, ...]) -> None:
        """Raises `BundleError` unless the scene computes the very features the ranker was trained on."""
        computed = feature_names(sources, statistics)
        if computed != self.features:
            odd = sorted(set(computed) ^ set(self.features)) or ["their order"]
            raise BundleError(f"ranker {self.name!r} does not fit scene {scene!r}: {', '.join(odd[:5])} differ")


class _Program:
    def __init__(self, file: str, spec: RankerSpec, bundle: Bundle, device: torch.device) -> None:
        self._program = load_program(bundle.path / file, device)
        self._standard: tuple[Tensor, Tensor, Tensor] | None = None
        if spec.standard is not None:
            names = ("mean", "scale", "clip")
            columns = bundle.tensors(spec.standard)
            if any(columns[name].shape != (len(spec.features),) for name in names):
                raise BundleError(f"{spec.standard} does not fit the {len(spec.features)} features")
            mean, scale, clip = (columns[name].float().to(device) for name in names)
            self._standard = mean, scale, clip

    def __call__(self, features: Tensor) -> Tensor:
        # oneDNN generates code for every new shape and keeps a thousand: rounded up, a few dozen shapes serve all
        # batches. Without this a single request spent more on code generation than on ranking.
        count = len(features)
        rows = count + -count % (64 if count < 1024 else 1024)
        if self._standard is None:
            ready = pad(features, (0, 0, 0, rows - count))
        elif features.is_cuda:
            mean, scale, clip = self._standard
            ready = pad(((features - mean) * scale).clamp(-clip, clip).bfloat16(), (0, 0, 0, rows - count))
        else:
            host = (column.numpy() for column in self._standard)
            ready = torch.from_numpy(kernels.standardised(features.contiguous().numpy(), *host, rows))
            ready = ready.view(torch.bfloat16)
        return self._program(ready)[:count]


LEAVES = 31
"""Of a tree at most: int32 has a bit for each and its sign to spare."""


class _Forest:
    def __init__(self, file: str, spec: RankerSpec, bundle: Bundle, device: torch.device) -> None:
        columns = bundle.tensors(file)
        missing = {"feature", "threshold", "kept", "value"} - columns.keys()
        if missing:
            raise BundleError(f"{file} has no {sorted(missing)[0]!r}")
        feature, threshold, kept, value = (columns[name] for name in ("feature", "threshold", "kept", "value"))
        kinds = [column.dtype for column in (feature, threshold, kept, value)]
        if kinds != [torch.int32, torch.float32, torch.int32, torch.float32]:
            raise BundleError(f"{file} has columns of other types")
        trees, leaves = value.shape if value.dim() == 2 else (0, 0)
        if not 2 <= leaves <= LEAVES or any(c.shape != (trees, leaves - 1) for c in (feature, threshold, kept)):
            raise BundleError(f"{file} is no forest of trees with 2 to {LEAVES} leaves")
        if ((feature < 0) | (feature >= len(spec.features))).any():
            raise BundleError(f"{file} names features beyond the {len(spec.features)} of the ranker")
        # Then some leaf remains whatever fails, and no value is read that is not there.
        if not ((kept >> (leaves - 1)) & 1).all():
            raise BundleError(f"{file} strikes out the last leaf of a tree")
        if not value.isfinite().all():
            raise BundleError(f"{file} has values that are no numbers")
        self._columns = tuple(column.to(device) for column in (feature, threshold, kept, value))

    def __call__(self, features: Tensor) -> Tensor:
        if features.is_cuda:
            return forest(features, *self._columns)
        feature, threshold, kept, value = (column.numpy() for column in self._columns)
        found = kernels.forest(features.contiguous().numpy(), feature, threshold, kept.view(np.uint32), value)
        return torch.from_numpy(found)


def forest(features: Tensor, feature: Tensor, threshold: Tensor, kept: Tensor, value: Tensor) -> Tensor:
    """`kernels.forest` as tensor operations, for a GPU."""
    features = torch.where(features.isnan(), 0.0, features)
    trees, leaves = value.shape
    left = torch.full((len(features), trees), -1, dtype=torch.int32, device=features.device)
    for node in range(leaves - 1):
        failed = features.index_select(1, feature[:, node]) > threshold[:, node]
        left &= torch.where(failed, kept[:, node], -1)
    leaf = torch.frexp((left & -left).float()).exponent - 1
    place = leaf + torch.arange(trees, device=features.device) * leaves
    return value.flatten()[place].sum(1)
