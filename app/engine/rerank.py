"""Re-rank: from scores to the order that is shown."""

from hashlib import blake2b

import torch
from torch import Tensor

from app.catalog import Catalog
from app.engine.batch import Batch
from app.engine.merge import Candidates
from app.engine.ordering import best_first
from app.scenes import Scene

POOL = 3
"""Re-ranking looks at so many times the limit."""


def rerank(
    batch: Batch, candidates: Candidates, score: Tensor, scene: Scene, catalog: Catalog
) -> tuple[Tensor, Tensor]:
    """Positions in `candidates` int64 [B, limit], best first, -1 for none, and scores float32 [B, limit]."""
    limit = max(query.limit for query in batch.queries)
    if not (scene.diversity or scene.explore):
        return best_first(batch, candidates.query, score, limit)
    pool, scores = best_first(batch, candidates.query, score, POOL * limit)
    # Each query sees the pool of its own limit, whatever the others of the batch ask for.
    limits = torch.tensor([query.limit for query in batch.queries], device=batch.device)
    beyond = torch.arange(pool.shape[1], device=batch.device) >= POOL * limits[:, None]
    pool, scores = pool.masked_fill(beyond, -1), scores.masked_fill(beyond, -torch.inf)
    if scene.diversity and pool.shape[1]:
        scores, order = (scores - scene.diversity * _penalty(pool, scores, candidates, catalog)).sort(
            1, descending=True
        )
        pool = pool.gather(1, order)
    if scene.explore and pool.shape[1]:
        order = _explore(batch, pool, scene.explore)
        pool, scores = pool.gather(1, order), scores.gather(1, order)
    return pool[:, :limit], scores[:, :limit]


def _penalty(pool: Tensor, scores: Tensor, candidates: Candidates, catalog: Catalog) -> Tensor:
    """Better items of the same category, counted for each item of the pool, times the spread of the scores.

    A one-shot form of maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): no loop over places.
    """
    category = catalog.leaf.index_select(0, candidates.row).index_select(0, pool.clamp(min=0).flatten()).view_as(pool)
    same = (category[:, :, None] == category[:, None, :]) & (category >= 0)[:, :, None]
    better = same.tril(-1).sum(2)
    real = pool >= 0
    high = scores.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    return better * (high - low).nan_to_num(0.0, 0.0, 0.0)


def _explore(batch: Batch, pool: Tensor, share: float) -> Tensor:
    """The order of places int64 [B, P] in which, in `share` of the queries, a lower item takes the last place.

    The draw depends on the request id alone, so a recorded query keeps its answer.
    """
    order = torch.arange(pool.shape[1], device=pool.device).repeat(len(pool), 1)
    for index, query in enumerate(batch.queries):
        seed = int.from_bytes(blake2b(query.request_id.encode(), digest_size=7).digest(), "little")
        chance, place = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        real = int((pool[index] >= 0).sum())
        if chance < share and real > query.limit:
            order[index, query.limit - 1] = query.limit + int(place * (real - query.limit))
    return order
