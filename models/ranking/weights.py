"""Weights of sources, for the fusions that are not learned: a number a source that is not negative."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.merge import ABSENT, Candidates
from app.engine.ranking import weighted
from models.ranking.examples import Examples, ndcg, of_query, rows_of, sizes, split

CANDIDATES = 250_000
"""Learned from, at most, or so: there are few weights."""
STEPS = 100
LEARNING_RATE = 0.1
LEAST = 0.01
"""Of the largest weight: a source that adds nothing to others still speaks where they are silent."""


def fit(examples: Examples, sources: Sequence[str], *, seed: int) -> dict[str, float]:
    """By source its weight in `weighted` fusion, the largest 1; equal ones where those rank the held-out tenth better.

    Maximises the likelihood of what was wanted, by a softmax over the candidates of each query (ListNet; Cao et al.,
    ICML 2007). The same weights serve the other fusions: on validation, reciprocal rank and votes gain as much by them.
    `examples` name their columns. Raises `ValueError` where they teach nothing.
    """
    parts = split(examples, torch.Generator().manual_seed(seed))
    few = 1 + CANDIDATES * (1 + int(examples.query.max())) // len(examples.query)
    learned, held = (_only(examples, queries[:few], sources) for queries in (parts.train, parts.held))
    inputs = scaled(learned, sources).t().double()
    wanted = of_query(learned, learned.label)
    share = learned.label / wanted[learned.query]
    raw = torch.zeros(len(sources), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            score = inputs @ F.softplus(raw)
            # No score is larger than the sum of the weights: nothing overflows.
            total = torch.zeros(len(wanted), dtype=torch.float64).index_add(0, learned.query, score.exp())
            loss = (share * (total.log()[learned.query] - score)).sum() / len(wanted)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    found = F.softplus(raw.detach()).float()
    found = (found / found.max()).clamp(min=LEAST)
    said = scaled(held, sources)
    everyone = torch.arange(min(few, len(parts.held)))
    if ndcg(held, everyone, found @ said).mean() < ndcg(held, everyone, said.sum(0)).mean():
        found = torch.ones(len(sources))
    return dict(zip(sources, found.tolist(), strict=True))


def scaled(examples: Examples, sources: Sequence[str]) -> Tensor:
    """float32 [S, M]: what each source alone says in `weighted` fusion, read off the features."""
    found = []
    for name in sources:
        score, place = (examples.features[:, examples.names.index(f"{name}.{part}")] for part in ("score", "rank"))
        score = torch.sign(score) * torch.expm1(score.abs()) / 100.0
        rank = torch.where(place <= 10.0 / (10.0 + ABSENT), ABSENT, 10.0 / place - 10.0)
        best = torch.zeros(1, int(examples.query.max()) + 1)
        alone = Candidates(examples.query, examples.query, score[None], rank[None], best)
        found.append(weighted(alone, torch.ones(1)))
    return torch.stack(found)


def _only(examples: Examples, queries: Tensor, sources: Sequence[str]) -> Examples:
    """Of these queries, in their order, what these sources say."""
    size = sizes(examples)
    rows = rows_of(queries, size)
    query = torch.repeat_interleave(torch.arange(len(queries)), size[queries])
    names = tuple(f"{name}.{part}" for name in sources for part in ("score", "rank"))
    columns = torch.tensor([examples.names.index(name) for name in names])
    return Examples(examples.features[rows[:, None], columns], query, examples.label[rows], names=names)
