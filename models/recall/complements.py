"""Complements: what goes with an item and is no other version of it, found across categories in a small item graph.

Bought together makes complements, viewed together without being bought together substitutes (McAuley, Pandey &
Leskovec, KDD 2015). Where purchases are few, the graph says what to expect: which categories are bought together,
and how much more so within a brand or a collection.
"""

import re

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp

from app.state.events import EventType
from models.recall import STRENGTH, Interactions, Neighbours
from models.recall.covisits import IDLE_MINUTES, together
from models.recall.pairs import best_pairs

CHOICES = (EventType.ADD_TO_CART, EventType.BEGIN_CHECKOUT, EventType.PURCHASE)
VIEWS = (EventType.SELECT_ITEM, EventType.VIEW_ITEM)
PAUSE_DAYS = 14.0
"""Purchases of a user with a longer pause between them are not together."""
NEAR_DAYS = 3.0
"""Days between two purchases that make them half as much together."""
HALF_LIFE_DAYS = 180.0
PRIOR = 5.0
"""Purchases that each ratio is held to be 1 with, before there are any."""
BEST_SELLERS = 30
"""Of a brand or collection: these alone are expected beside an item that they were never bought with."""
COLLECTION = 0.02
"""A word in the titles of more than this share of the items names no collection."""
MINUTES_PER_DAY = 1440.0

_WORD = re.compile(r"\w{3,}")

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


def fit(past: Interactions, items: pl.DataFrame, *, k: int = 50) -> Neighbours:
    """For each item the `k` of other categories that are most likely bought with it, weights summing to 1.

    `items` has a row for each catalog row and any of the columns title, category ("A > B"), brand. What has no
    category is of another one than everything else. "Bought" is also what was put in the cart, and
    in a shop without either whatever was wanted.

    With c[i, j] the decayed purchases of both within days, t its row sums plus their mean, and

        e[i, j] = t[i] * t[j] / sum t * category * brand * collection

    what to expect, by chance and by how much more often than by chance the two categories, items of one brand
    and items of one collection (a word of their titles) are bought together: the weight of j for i goes as

        (c + e) / t[i] * (c + PRIOR) / (max(c, r * v) + PRIOR)

    where v[i, j] are the views of both in a session and r is sum c / sum v over all pairs.
    """
    if len(items) != past.n_items:
        raise ValueError(f"{len(items)} items for {past.n_items} catalog rows")
    paths = _paths(items)
    # Each item without a category is a category of its own.
    leaf = np.unique([path or str(row) for row, path in enumerate(paths)], return_inverse=True)[1]
    chosen = np.isin(past.kind, CHOICES)
    bought = together(
        past.where(chosen) if chosen.any() else past,
        idle_minutes=PAUSE_DAYS * MINUTES_PER_DAY,
        near_minutes=NEAR_DAYS * MINUTES_PER_DAY,
        half_life_days=HALF_LIFE_DAYS,
    )
    bought = _across(bought, leaf)
    if not bought.nnz:
        return Neighbours(np.full((past.n_items, k), -1, np.int32), np.zeros((past.n_items, k), np.float32))
    bought /= STRENGTH[EventType.PURCHASE]
    total = np.asarray(bought.sum(1)).ravel()
    total += total.mean()
    brands = _members([[brand.lower()] if brand else [] for brand in _strings(items, "brand")])
    relations = [brands, _collections(_strings(items, "title"), leaf)]
    sellers = [_across(_best_sellers(relation, total), leaf) for relation in relations]
    pairs = (bought + sellers[0] + sellers[1]).tocoo()
    i, j = pairs.row, pairs.col

    c, e = _at(bought, i, j), total[i] * total[j] / total.sum()
    shelf = _members([[path] for path in paths])
    of, shelves, by_shelf = shelf.indices, (shelf.T @ bought @ shelf).tocsr(), total @ shelf
    by_chance = by_shelf[of[i]] * by_shelf[of[j]] / total.sum()
    e *= (_at(shelves, of[i], of[j]) + PRIOR) / (by_chance + PRIOR)
    for relation, expected in zip(relations, sellers, strict=True):
        # Over all that might be bought together: those that are would say that they always are.
        known = _at(expected, i, j) > 0
        related = np.asarray(relation[i].multiply(relation[j]).sum(1)).ravel() > 0
        e[related] *= (c[known].sum() + PRIOR) / (e[known].sum() + PRIOR)

    viewed = together(
        past.where(np.isin(past.kind, VIEWS)),
        idle_minutes=IDLE_MINUTES,
        near_minutes=IDLE_MINUTES,
        half_life_days=HALF_LIFE_DAYS,
    )
    v = _at(viewed, i, j)
    promised = v * c.sum() / max(v.sum(), 1e-9)
    weight = (c + e) / total[i] * (c + PRIOR) / (np.maximum(c, promised) + PRIOR)
    table = sp.csr_matrix((weight.astype(np.float32), (i, j)), shape=bought.shape)
    near = best_pairs(table, sp.identity(past.n_items, np.float32, "csr"), lambda i, j, weights: weights, k)
    listed = near.weights.sum(1, keepdims=True)
    np.divide(near.weights, listed, out=near.weights, where=listed > 0)
    return near


def _across(pairs: sp.csr_matrix, leaf: Ints) -> sp.csr_matrix:
    """Those of items with different leaves."""
    pairs = pairs.tocoo()
    apart = leaf[pairs.row] != leaf[pairs.col]
    return sp.csr_matrix((pairs.data[apart], (pairs.row[apart], pairs.col[apart])), shape=pairs.shape)


def _best_sellers(members: sp.csr_matrix, total: Floats) -> sp.csr_matrix:
    """[n, n]: positive where column j is one of the best sellers of a group that row i is a member of."""
    sellers = (members.T @ sp.diags_array(total)).tocsr()
    group = np.repeat(np.arange(sellers.shape[0]), np.diff(sellers.indptr))
    order = np.lexsort((-sellers.data, group))
    best = order[np.arange(len(order)) - sellers.indptr[group] < BEST_SELLERS]
    kept = sp.csr_matrix((np.ones(len(best)), (group[best], sellers.indices[best])), shape=sellers.shape)
    return (members @ kept).tocsr()


def _at(matrix: sp.csr_matrix, i: Ints, j: Ints) -> Floats:
    values: Floats = np.asarray(matrix[i, j], np.float64).ravel()
    return values


def _paths(items: pl.DataFrame) -> list[str]:
    """The category of each item, in which a name that comes back, in a tree with circles, counts once."""
    parts = [[part.strip().lower() for part in path.split(">")] for path in _strings(items, "category")]
    return [" > ".join(dict.fromkeys(filter(None, path))) for path in parts]


def _collections(titles: list[str], leaf: Ints) -> sp.csr_matrix:
    """Membership of items in the words of their titles that are rare and yet in more than one category."""
    words = _members([sorted(set(_WORD.findall(title.lower()))) for title in titles])
    of_leaf = sp.csr_matrix((np.ones(len(leaf)), (leaf, np.arange(len(leaf)))))
    leaves = np.diff((of_leaf @ words).tocsc().indptr)
    rare = np.diff(words.tocsc().indptr) <= max(COLLECTION * len(titles), 2)
    return words[:, np.flatnonzero(rare & (leaves > 1))]


def _members(groups: list[list[str]]) -> sp.csr_matrix:
    """[n, G]: 1 where the item is in the group."""
    code: dict[str, int] = {}
    column = np.fromiter((code.setdefault(name, len(code)) for names in groups for name in names), np.int32)
    start = np.concatenate([[0], np.cumsum([len(names) for names in groups], dtype=np.int64)])
    return sp.csr_matrix((np.ones(len(column)), column, start), shape=(len(groups), len(code)))


def _strings(items: pl.DataFrame, name: str) -> list[str]:
    return items[name].fill_null("").to_list() if name in items.columns else [""] * len(items)
