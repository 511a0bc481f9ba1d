"""What rankers learn from, and which of it they only look at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Examples:
    """Candidates with their features and labels; `query` ascends and numbers the slates."""

    features: Tensor
    """float32 [M, F]."""
    query: Tensor
    """int64 [M]."""
    label: Tensor
    """float32 [M]: 1 where the user went on to want the item."""
    clicked: Tensor | None = None
    """float32 [M]: 1 where the user went on to look at it; None where nobody recorded that."""
    names: tuple[str, ...] = ()
    """Of the F columns, for messages."""


@dataclass(frozen=True, slots=True)
class Split:
    """Queries, int64, by what they are for."""

    train: Tensor
    """Those with a wanted candidate, in random order."""
    held: Tensor
    """A tenth of those with a wanted candidate: choose by them."""
    quiet: Tensor
    """A tenth of the others: with `held`, what calibration looks at."""


def stack(parts: Sequence[Examples]) -> Examples:
    """Several windows as one, their queries renumbered; clicks and columns count only where every window has them."""
    names = tuple(name for name in parts[0].names if all(name in part.names for part in parts))
    queries, features, offset = [], [], 0
    for part in parts:
        kept = [part.names.index(name) for name in names]
        features.append(part.features if names == part.names else part.features[:, kept])
        queries.append(part.query + offset)
        offset += int(part.query.max()) + 1 if len(part.query) else 0
    clicked = [part.clicked for part in parts if part.clicked is not None]
    return Examples(
        torch.cat(features),
        torch.cat(queries),
        torch.cat([part.label for part in parts]),
        torch.cat(clicked) if len(clicked) == len(parts) else None,
        names,
    )


def split(examples: Examples, generator: torch.Generator) -> Split:
    """Raises `ValueError` for examples that no ranker can learn from, naming the column or what is missing.

    A constant column among others is carried along and changes nothing.
    """
    features, label = examples.features, examples.label
    odd = (~features.isfinite()).nonzero()
    if len(odd):
        row, column = odd[0].tolist()
        name = f" ({examples.names[column]})" if examples.names else ""
        raise ValueError(f"feature column {column}{name} is {features[row, column].item()} in row {row}")
    for column_name, column_of in {"label": label, "clicked": examples.clicked}.items():
        if column_of is not None and not ((column_of == 0) | (column_of == 1)).all():
            raise ValueError(f"column {column_name} has other values than 0 and 1")
    if (examples.query.diff() < 0).any():
        raise ValueError("column query does not ascend")
    positives = of_query(examples, label)
    useful = (positives > 0).nonzero().squeeze(1)
    if not len(useful):
        raise ValueError("no candidate was wanted by anybody in the training windows: nothing to learn a ranking from")
    if label.all():
        raise ValueError("every candidate was wanted: nothing to learn a ranking from")
    if (features == features[0]).all():
        raise ValueError("every feature column is constant: nothing to tell candidates apart by")
    if len(useful) < 2:
        raise ValueError("candidates were wanted in one query only, and one more is needed to choose by")
    useful = useful[torch.randperm(len(useful), generator=generator)]
    held = max(1, len(useful) // 10)
    return Split(useful[held:], useful[:held], (positives == 0).nonzero().squeeze(1)[::10])


def of_query(examples: Examples, column: Tensor) -> Tensor:
    """float32 [Q]: the sum of a column [M] over each query."""
    sums = torch.zeros(int(examples.query.max()) + 1 if len(examples.query) else 0)
    return sums.index_add_(0, examples.query, column)


def ndcg(examples: Examples, queries: Tensor, score: Tensor, k: int = 20) -> Tensor:
    """float32 [Q]: NDCG@k of the candidates of the queries in the order of the scores [M] of all examples."""
    size = sizes(examples)
    rows, counts = rows_of(queries, size), size[queries]
    place = torch.repeat_interleave(torch.arange(len(queries)), counts)
    column = torch.cat([torch.arange(int(count)) for count in counts])
    shape = len(queries), max(int(counts.max()), k)
    scores = torch.full(shape, -torch.inf).index_put((place, column), score[rows])
    labels = torch.zeros(shape).index_put((place, column), examples.label[rows])
    discount = 1.0 / torch.log2(torch.arange(2.0, k + 2.0))
    gained = labels.gather(1, scores.argsort(stable=True, dim=1, descending=True)[:, :k]) @ discount
    ideal = labels.sort(1, descending=True).values[:, :k] @ discount
    return gained / ideal


def sizes(examples: Examples) -> Tensor:
    """int64 [Q]: the candidates of each query."""
    return torch.bincount(examples.query)


def rows_of(queries: Tensor, size: Tensor) -> Tensor:
    """int64: the rows of the queries, one query after the other, all queries having the `sizes`."""
    ends = size.cumsum(0)
    return torch.cat([torch.arange(int(ends[q] - size[q]), int(ends[q])) for q in queries])
