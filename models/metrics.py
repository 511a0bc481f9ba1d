"""How good slates are against what the users did next, and how sure of it one may be.

Everything ranks the whole catalog; nothing is sampled. Gains are binary and a mean is over the users
who have at least one relevant item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

Ints = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]

HEAD_SHARE = 0.8
COLUMNS = tuple(
    f"{name}@20" for name in "ndcg recall precision f1 hr mrr auc coverage novelty diversity long_tail".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """What lists are judged against beyond hits; slates then hold rows of these arrays."""

    interactions: Ints
    """Training interactions of each item, [I]."""
    vectors: npt.NDArray[np.floating] | None = None
    """One content or model vector an item, [I, d]; without them diversity compares `categories`."""
    categories: Ints | None = None
    """One category code an item, [I]."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Metrics by name, such as `ndcg@20`; `scores["ndcg@20"]` is the mean over users."""

    users: Ints
    """Rows of the slates that count: the users with a relevant item, [V]."""
    per_user: Mapping[str, Vector]
    """One value a user, [V]; NaN where a metric says nothing of a user, who is then left out of its mean."""
    overall: Mapping[str, float]
    """Metrics of all slates together, such as `coverage@20`."""

    def __getitem__(self, name: str) -> float:
        return self.overall[name] if name in self.overall else known_mean(self.per_user[name])


class Interval(NamedTuple):
    """A 95 % percentile interval."""

    low: float
    high: float


class Gap(NamedTuple):
    """How far the best segment of users is ahead of the worst."""

    best: int
    worst: int
    value: float
    interval: Interval
    """Of the difference between these two."""
    by_chance: float
    """What 95 of 100 random splits into segments of these sizes stay under: a smaller gap says nothing."""


class Row(NamedTuple):
    """One line of a report: a source alone, a fusion mode, a baseline, the whole pipeline."""

    name: str
    scores: Scores
    interval: Interval | None
    """Of the report's first column."""


def evaluate(
    slates: Ints, relevant: Sequence[Ints], ks: Sequence[int] = (10, 20), catalog: Catalog | None = None
) -> Scores:
    """Scores slates [U, k], best first, against the items each user has in the test window.

    Items are any int64 codes; -1 in a slate is an empty slot, which keeps its place. A relevant item
    that training never saw has a code that no slate contains and so counts as a miss. With a
    `catalog` come AUC, coverage, novelty, diversity and long-tail share.

    Per user, with R relevant items and hits at the ranks r of the first k slots:

    - precision = hits / k, recall = hits / R, f1 their harmonic mean, hr = 1 if any hit, mrr = 1 / first r;
    - ndcg = sum 1 / log2(r + 1) over that of min(R, k) hits on top (Jarvelin and Kekalainen 2002);
    - auc = share of (relevant, irrelevant) pairs of the catalog in the right order. Of the ranking only the first k
      slots are known; the rest is taken to follow in random order, so that a relevant item outside them has half of
      the unlisted irrelevant items above it. With N items of which n are listed, h of them hits:
      [sum over hits (1 - listed irrelevant above / (N-R)) + (R-h) ((N-R) - (n-h)) / (2 (N-R))] / R;
    - novelty = mean -log2 (an item's share of the training interactions), an item without any counted as having one
      (self-information: Zhou et al. 2010);
    - diversity = 1 - mean cosine over the pairs of the list, or the share of pairs of different categories (intra-list
      diversity: Ziegler et al. 2005);
    - long_tail = share of the listed items that `long_tail` names.

    Over all: coverage = share of the catalog that is on any of the lists; gini = `gini` of the slots that items have.

    Raises `ValueError` for a cut-off beyond the slates' width, for lengths that do not match, for an
    item twice in a slate and for a relevant -1.
    """
    if len(slates) != len(relevant):
        raise ValueError(f"{len(slates)} slates for {len(relevant)} users")
    if not ks or min(ks) < 1 or max(ks) > slates.shape[1]:
        raise ValueError(f"cut-offs {tuple(ks)} do not fit slates of {slates.shape[1]}")
    users = np.flatnonzero([len(items) > 0 for items in relevant])
    slates = np.asarray(slates[users, : max(ks)], np.int64)
    hits, relevants = _hits(slates, [relevant[user] for user in users.tolist()])
    per_user: dict[str, Vector] = {}
    overall: dict[str, float] = {}
    for k in ks:
        metrics = _accuracy(hits[:, :k], relevants)
        if catalog is not None:
            listed = slates[:, :k]
            metrics["auc"] = _auc(listed != -1, hits[:, :k], relevants, len(catalog.interactions))
            metrics |= _quality(listed, catalog)
            overall[f"coverage@{k}"] = len(np.unique(listed[listed != -1])) / len(catalog.interactions)
            overall[f"gini@{k}"] = gini(np.bincount(listed[listed != -1], minlength=len(catalog.interactions)))
        per_user |= {f"{name}@{k}": values for name, values in metrics.items()}
    return Scores(users, per_user, overall)


def bootstrap(per_user: Vector, n: int = 1000, seed: int = 0) -> Interval:
    """Interval of the mean over users, from `n` resamples of the users (Efron 1979); NaN is left out."""
    known = per_user[~np.isnan(per_user)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = [known[rng.integers(len(known), size=len(known))].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def paired_bootstrap(a: Vector, b: Vector, n: int = 1000, seed: int = 0) -> Interval:
    """Interval of the mean of `a - b`, of the same users in the same order; above 0 as a whole, a is the better."""
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} are not of the same users")
    return bootstrap(a - b, n, seed)


def long_tail(interactions: Ints) -> npt.NDArray[np.bool_]:
    """Which items [I] are not in the head, the most popular that together have 80 % of the interactions."""
    popular_first = np.argsort(-interactions, kind="stable")
    before = np.cumsum(interactions[popular_first]) - interactions[popular_first]
    tail = np.empty(len(interactions), bool)
    tail[popular_first] = before >= HEAD_SHARE * interactions.sum()
    return tail


def gini(exposure: npt.NDArray[np.number]) -> float:
    """How unevenly the items share the exposure, [I]: 0 if evenly, (I - 1) / I if one has it all; NaN without any."""
    total, size = float(exposure.sum()), len(exposure)
    if not total:
        return float("nan")
    return float(np.arange(1 - size, size, 2) @ np.sort(exposure) / (size * total))


def shares(owner: Ints, hit: npt.NDArray[np.bool_], users: int) -> Vector:
    """By user, [users]: the share of their (user, item) pairs that are a hit; NaN for a user without a pair."""
    return _ratio(np.bincount(owner, hit, users), np.bincount(owner, minlength=users))


def gap(per_user: Vector, segment: Ints, n: int = 1000, seed: int = 0) -> Gap:
    """The largest difference between the means of two segments; `segment` is a code a user, -1 for none.

    Raises `ValueError` where fewer than two segments have a value.
    """
    kept = (segment >= 0) & ~np.isnan(per_user)
    codes, place = np.unique(segment[kept], return_inverse=True)
    values = per_user[kept]
    if len(codes) < 2:
        raise ValueError("a gap needs two segments")
    counts = np.bincount(place)

    def means(of: Vector) -> Vector:
        return _ratio(np.bincount(place, of), counts)

    found = means(values)
    best, worst = int(found.argmax()), int(found.argmin())
    rng = np.random.default_rng(seed)
    high, low = values[place == best], values[place == worst]
    drawn = [
        high[rng.integers(len(high), size=len(high))].mean() - low[rng.integers(len(low), size=len(low))].mean()
        for _ in range(n)
    ]
    shuffled = [float(np.ptp(means(rng.permutation(values)))) for _ in range(n)]
    interval = Interval(*np.percentile(drawn, [2.5, 97.5]).tolist())
    value = float(found[best] - found[worst])
    return Gap(int(codes[best]), int(codes[worst]), value, interval, float(np.percentile(shuffled, 95)))


def table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Table:
    """A report for the terminal: one line a row, the first column with its interval, the best of each column bold."""
    rendered = Table("", *columns[:1], "95 %", *columns[1:])
    for column in rendered.columns[1:]:
        column.justify = "right"
    for cells in _cells(rows, columns, "[bold]{}[/bold]"):
        rendered.add_row(*cells)
    return rendered


def markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The same report as a Markdown table."""
    lines = [["", *columns[:1], "95 %", *columns[1:]], ["---", *["---:"] * (len(columns) + 1)]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines + _cells(rows, columns, "**{}**"))


def _hits(slates: Ints, relevant: Sequence[Ints]) -> tuple[npt.NDArray[np.bool_], Vector]:
    """Which slots hold a relevant item, [V, k], and how many distinct relevant items each user has, [V]."""
    ordered = np.sort(slates, axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)):
        raise ValueError("an item is twice in a slate")
    owners = np.repeat(np.arange(len(relevant)), [len(items) for items in relevant])
    wanted = np.concatenate([np.empty(0, np.int64), *relevant]).astype(np.int64)
    if np.any(wanted == -1):
        raise ValueError("-1 is an empty slot, not a relevant item")
    items, codes = np.unique(np.concatenate([wanted, slates.ravel()]), return_inverse=True)
    pairs = np.unique(owners * len(items) + codes[: len(wanted)])
    shown = np.arange(len(slates))[:, None] * len(items) + codes[len(wanted) :].reshape(slates.shape)
    counts = np.bincount(pairs // max(len(items), 1), minlength=len(slates))
    return np.isin(shown, pairs), counts.astype(np.float64)


def _accuracy(hits: npt.NDArray[np.bool_], relevants: Vector) -> dict[str, Vector]:
    k = hits.shape[1]
    found = hits.sum(1).astype(np.float64)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(relevants, k).astype(np.int64)]
    return {
        "precision": found / k,
        "recall": found / relevants,
        "f1": 2 * found / (k + relevants),
        "hr": (found > 0).astype(np.float64),
        "ndcg": hits @ discounts / ideal,
        "mrr": np.where(found > 0, 1 / (hits.argmax(1) + 1), 0.0),
    }


def _auc(filled: npt.NDArray[np.bool_], hits: npt.NDArray[np.bool_], relevants: Vector, n_items: int) -> Vector:
    found = hits.sum(1)
    misplaced = (filled & ~hits).sum(1)
    # A relevant item may be outside the catalog, which then is larger by at least what is known to exist.
    irrelevants = np.maximum(n_items - relevants, misplaced)
    above = (np.cumsum(filled & ~hits, axis=1) * hits).sum(1) + (relevants - found) * (misplaced + irrelevants) / 2
    with np.errstate(invalid="ignore"):
        return np.where(irrelevants > 0, 1 - above / (irrelevants * relevants), np.nan)


def _quality(slates: Ints, catalog: Catalog) -> dict[str, Vector]:
    filled = slates != -1
    listed = filled.sum(1)
    total = catalog.interactions.sum()
    information = np.log2(max(total, 1)) - np.log2(np.maximum(catalog.interactions, 1))
    tail = long_tail(catalog.interactions)
    quality = {
        "novelty": _ratio((information[slates] * filled).sum(1), listed),
        "long_tail": _ratio((tail[slates] * filled).sum(1), listed),
    }
    pairs = listed * (listed - 1)
    if catalog.vectors is not None:
        norms = np.linalg.norm(catalog.vectors, axis=1, keepdims=True)
        units = catalog.vectors / np.where(norms > 0, norms, 1)
        # The squared norm of the sum of unit vectors is the cosines of all ordered pairs and the squares themselves.
        summed, squares = np.zeros((len(slates), units.shape[1])), np.zeros(len(slates))
        for slot in range(slates.shape[1]):
            unit = units[slates[:, slot]] * filled[:, slot, None]
            summed += unit
            squares += np.square(unit).sum(1)
        quality["diversity"] = 1 - _ratio(np.square(summed).sum(1) - squares, pairs)
    elif catalog.categories is not None:
        codes = catalog.categories[slates]
        same = (codes[:, :, None] == codes[:, None, :]) & filled[:, :, None] & filled[:, None, :]
        quality["diversity"] = 1 - _ratio(same.sum((1, 2)) - listed, pairs)
    return quality


def _ratio(sums: npt.NDArray[np.number], counts: npt.NDArray[np.integer]) -> Vector:
    ratios: Vector = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return ratios


def known_mean(per_user: Vector) -> float:
    """The mean of what is not NaN, or NaN."""
    known = per_user[~np.isnan(per_user)]
    return float(known.mean()) if len(known) else float("nan")


def _cells(rows: Sequence[Row], columns: Sequence[str], best: str) -> list[list[str]]:
    values = [
        [
            row.scores[column] if column in row.scores.per_user or column in row.scores.overall else np.nan
            for column in columns
        ]
        for row in rows
    ]
    tops = [max((value for value in column if value == value), default=np.nan) for column in zip(*values, strict=True)]
    lines = []
    for row, numbers in zip(rows, values, strict=True):
        cells = [
            "-" if value != value else best.format(f"{value:.4f}") if value == top and len(rows) > 1 else f"{value:.4f}"
            for value, top in zip(numbers, tops, strict=True)
        ]
        interval = "-" if row.interval is None else f"{row.interval.low:.4f} .. {row.interval.high:.4f}"
        lines.append([row.name, *cells[:1], interval, *cells[1:]])
    return lines
