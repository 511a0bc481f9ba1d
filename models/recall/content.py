"""Items alike in title, category, brand and price: neighbours, and dense features for other models.

Every attribute becomes weighted terms, the terms of an item one sparse unit vector, and likeness is the
cosine of two of them (TF-IDF; Salton & Buckley, 1988). A sparse sign projection, read off each term's
hash, makes it dense while keeping the cosines (Achlioptas, 2003; Kane & Nelson, 2014), so that nothing
is fitted that a new item would need.
"""

import json
import math
import re
from collections.abc import Iterable
from hashlib import blake2b

import faiss
import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp

from models.recall import Neighbours

Floats = npt.NDArray[np.float32]

WORDS, GRAMS, DESCRIPTION, CATEGORY, BRAND, PRICE, VECTOR = 0.4, 0.1, 0.2, 0.25, 0.15, 0.1, 0.5
"""Shares in the likeness of two items that have everything; what an item lacks leaves its share to the rest."""
GRAM = 4
PRICE_STEP = math.log(1.5)
"""Prices further apart than this have nothing in common."""
MODALITIES = ("vector", "text_vector")
"""Columns of given vectors, of equal say: the shop's own, of images or whatever, and those of a sentence model."""
WIDTH = 128
"""Of the projected terms, and of the given vectors where these are wider."""
SIGNS = 8
"""Entries of a term's projection that are not zero: one in each run of WIDTH / SIGNS columns."""
CANDIDATES = 3
"""Candidates per neighbour, found among the projections and scored by their terms."""
EXACT_BELOW = 20_000
"""Items up to which candidates come from an exact scan."""
PAIRS = 200_000
"""Pairs scored at a time."""

_WORD = re.compile(r"\w+")


def features(items: pl.DataFrame) -> Floats:
    """float32 [n, d]: the projected terms, how the price stands among all prices, and the given vectors.

    These are made as narrow as the terms are, and standardised: vectors of networks have a large mean that tells
    nothing. An item without them has zeros. `items` has a row for each catalog row and any of the columns title,
    category ("A > B"), brand, price, attributes, of which description is read, and `MODALITIES`.
    """
    terms, names = _terms(items)
    price = _log_price(items)
    known = np.isfinite(price)
    mean, deviation = (price[known].mean(), price[known].std() + 1e-6) if known.any() else (0.0, 1.0)
    standing = np.where(known, (price - mean) / deviation, 0.0)
    columns: list[npt.NDArray[np.floating]] = [_project(terms, names), np.stack([standing, known], 1) / 4.0]
    if (vectors := _vectors(items)) is not None:
        if vectors.shape[1] > WIDTH:
            vectors = vectors @ _projection([f"vector {place}" for place in range(vectors.shape[1])])
        columns.append(_standardised(vectors))
    return np.concatenate(columns, 1).astype(np.float32)


def fit(items: pl.DataFrame, *, k: int = 50) -> Neighbours:
    """For each item the `k` likest by the square of their likeness, which lets the near ones count.

    `items` as for `features`. Time grows with n * log n or so: 17 s for 100 k items on one core, minutes for a million.
    """
    terms, names = _terms(items)
    dense = _project(terms, names)
    vectors = _vectors(items)
    if vectors is not None:
        # An item without a vector is as like as its terms are.
        has = np.linalg.norm(vectors, axis=1) > 0
        vectors *= math.sqrt(VECTOR)
        rest = np.where(has, math.sqrt(1.0 - VECTOR), 1.0).astype(np.float32)
        terms, dense = (sp.diags(rest) @ terms).tocsr(), np.concatenate([dense * rest[:, None], vectors], 1)
    near = Neighbours(np.full((len(items), k), -1, np.int32), np.zeros((len(items), k), np.float32))
    if not len(items):
        return near
    for start, found in _candidates(dense, CANDIDATES * k + 1):
        size, width = found.shape
        anchor = np.repeat(np.arange(start, start + size), width)
        other = found.ravel().clip(min=0)
        likeness = np.asarray(terms[anchor].multiply(terms[other]).sum(1), np.float32).ravel()
        if vectors is not None:
            likeness += np.einsum("ij,ij->i", vectors[anchor], vectors[other])
        likeness[(other == anchor) | (found.ravel() < 0)] = 0.0
        best = np.argsort(-likeness.reshape(size, width), axis=1, kind="stable")[:, :k]
        weight = np.take_along_axis(likeness.reshape(size, width), best, 1)
        rows = np.where(weight > 0, np.take_along_axis(found, best, 1), -1)
        near.rows[start : start + size, : rows.shape[1]] = rows
        near.weights[start : start + size, : rows.shape[1]] = np.maximum(weight, 0.0) ** 2
    return near


def _candidates(dense: Floats, count: int) -> Iterable[tuple[int, npt.NDArray[np.int64]]]:
    """For runs of rows, each from the given one on, the rows nearest to them; -1 where there is none."""
    size, width = dense.shape
    if size <= EXACT_BELOW:
        index: faiss.Index = faiss.IndexFlatIP(width)
    else:
        lists = 2 ** round(math.log2(4 * math.sqrt(size)))
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 8
        index.cp.max_points_per_centroid = 40
        index.cp.niter = 6
        index.train(dense)
    index.add(dense)
    count = min(count, size)
    step = max(1, PAIRS // count)
    for start in range(0, size, step):
        yield start, index.search(dense[start : start + step], count)[1]


def _terms(items: pl.DataFrame) -> tuple[sp.csr_matrix, list[str]]:
    """float32 [n, V] with rows of length 1 (or 0), and the V terms."""
    words, vocabulary = _counted([_WORD.findall(title.lower()) for title in _strings(items, "title")])
    grams, gram_names = _counted([_grams(word) for word in vocabulary])
    paths, path_names = _counted([_prefixes(path) for path in _strings(items, "category")])
    brands, brand_names = _counted([[brand.lower()] if brand else [] for brand in _strings(items, "brand")])
    prices, steps = _steps(_log_price(items))
    described, description_names = _counted([_described(text) for text in _descriptions(items)])
    fields = (
        (WORDS, _weighted(words), [f"word {name}" for name in vocabulary]),
        (GRAMS, _weighted((words @ grams).tocsr()), [f"gram {name}" for name in gram_names]),
        (DESCRIPTION, _weighted(described), [f"described {name}" for name in description_names]),
        (CATEGORY, _weighted(paths), [f"category {name}" for name in path_names]),
        (BRAND, _weighted(brands), [f"brand {name}" for name in brand_names]),
        (PRICE, _unit(prices), [f"price {step}" for step in steps]),
    )
    stacked = sp.hstack([math.sqrt(share) * matrix for share, matrix, _ in fields], format="csr", dtype=np.float32)
    return _unit(stacked), [name for _, _, names in fields for name in names]


def _counted(lists: list[list[str]]) -> tuple[sp.csr_matrix, list[str]]:
    """How often each name stands in each list, and the names."""
    code: dict[str, int] = {}
    column = np.fromiter((code.setdefault(name, len(code)) for names in lists for name in names), np.int32)
    start = np.concatenate([[0], np.cumsum([len(names) for names in lists], dtype=np.int64)])
    matrix = sp.csr_matrix((np.ones(len(column), np.float32), column, start), shape=(len(lists), len(code)))
    matrix.sum_duplicates()
    return matrix, list(code)


def _weighted(counts: sp.csr_matrix) -> sp.csr_matrix:
    """TF-IDF with the logarithm of the counts, rows of length 1."""
    size, width = counts.shape
    documents = np.bincount(counts.indices, minlength=width)
    weight = np.log1p(counts.data) * np.log1p(size / np.maximum(documents, 1))[counts.indices]
    return _unit(sp.csr_matrix((weight.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape))


def _unit(matrix: sp.csr_matrix) -> sp.csr_matrix:
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1), np.float32).ravel())
    inverse = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
    data = matrix.data * np.repeat(inverse, np.diff(matrix.indptr))
    return sp.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def _project(terms: sp.csr_matrix, names: list[str]) -> Floats:
    dense: Floats = (terms @ _projection(names)).toarray()
    return dense


def _projection(names: list[str]) -> sp.csr_matrix:
    """float32 [len(names), WIDTH]."""
    bits = np.frombuffer(b"".join(blake2b(name.encode(), digest_size=2 * SIGNS).digest() for name in names), np.uint16)
    bits = bits.reshape(len(names), SIGNS)
    run = WIDTH // SIGNS
    column = (bits >> 1) % run + np.arange(SIGNS) * run
    sign = np.where(bits & 1, 1.0, -1.0).astype(np.float32) / np.float32(math.sqrt(SIGNS))
    start = np.arange(len(names) + 1) * SIGNS
    return sp.csr_matrix((sign.ravel(), column.ravel(), start), shape=(len(names), WIDTH))


def _steps(log_price: npt.NDArray[np.float64]) -> tuple[sp.csr_matrix, list[int]]:
    """Each price between the two steps around it, so that the cosine falls with the distance."""
    known = np.flatnonzero(np.isfinite(log_price))
    place = log_price[known] / PRICE_STEP
    low = np.floor(place).astype(np.int64)
    upper = (place - low).astype(np.float32)
    steps, column = np.unique(np.concatenate([low, low + 1]), return_inverse=True)
    matrix = sp.csr_matrix(
        (np.concatenate([1.0 - upper, upper]), (np.tile(known, 2), column)), shape=(len(log_price), len(steps))
    )
    return matrix, steps.tolist()


def _grams(word: str) -> list[str]:
    framed = f"<{word}>"
    return [framed[at : at + GRAM] for at in range(len(framed) - GRAM + 1)]


def _described(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [gram for word in words for gram in _grams(word)]


def _descriptions(items: pl.DataFrame) -> list[str]:
    """The attribute of that name, empty where there is none."""
    found = []
    for text in _strings(items, "attributes"):
        value = json.loads(text).get("description") if '"description"' in text else None
        found.append(value if isinstance(value, str) else "")
    return found


def _prefixes(path: str) -> list[str]:
    parts = [part.strip().lower() for part in path.split(">") if part.strip()]
    return [" > ".join(parts[: end + 1]) for end in range(len(parts))]


def _strings(items: pl.DataFrame, name: str) -> list[str]:
    return items[name].fill_null("").to_list() if name in items.columns else [""] * len(items)


def _log_price(items: pl.DataFrame) -> npt.NDArray[np.float64]:
    """NaN where unknown."""
    if "price" not in items.columns:
        return np.full(len(items), np.nan)
    price = items["price"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    return np.log(np.where(price > 0, price, np.nan))


def _vectors(items: pl.DataFrame) -> Floats | None:
    """The modalities side by side: rows of length 1, 0 where an item has none."""
    found = []
    for name in MODALITIES:
        if name in items.columns and not items[name].drop_nulls().is_empty():
            column = items[name]
            width = int(column.list.len().max())  # type: ignore[arg-type]
            vectors = np.zeros((len(items), width), np.float32)
            given = column.is_not_null().to_numpy()
            vectors[given] = column.drop_nulls().explode().to_numpy().reshape(-1, width)
            found.append(_of_length_one(vectors))
    return _of_length_one(np.concatenate(found, 1)) if found else None


def _of_length_one(vectors: Floats) -> Floats:
    # The squares of what float32 can hold, it cannot.
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    np.divide(vectors, length, out=vectors, where=length > 0)
    return vectors


def _standardised(vectors: Floats) -> Floats:
    """Each column less its mean and over its deviation among the rows that are not zero; these have mean length 1."""
    given = vectors.any(1)
    known = vectors[given]
    if not len(known):
        return vectors
    deviation = known.std(0)
    found = np.zeros_like(vectors)
    varies = deviation > 1e-6
    found[np.ix_(given, varies)] = (known - known.mean(0))[:, varies] / deviation[varies]
    found /= np.float32(math.sqrt(max(int(varies.sum()), 1)))
    return found
