"""The FAISS index over a source's item vectors, chosen by size and measured against exact search."""

from math import sqrt
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import numpy.typing as npt

IndexKind = Literal["flat", "ivf", "hnsw"]

EXACT_BELOW = 50_000
"""Items up to which the engine looks at all of them: in a batch it takes half of an index's time, alone half a
millisecond more."""
TARGET_RECALL = 0.95
DEPTH = 100
SAMPLE = 500
"""Queries that recall is measured with, at most."""


def build_index(
    vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], path: Path, seed: int = 0
) -> tuple[IndexKind, float]:
    """Writes an inner-product index of `vectors` [n, d] and returns its kind and measured recall@100.

    Small catalogs are scanned exactly, as are those that nobody asks. Larger ones get inverted lists with just enough
    probes to find 95 % of the exact answers to a sample of `queries` [m, d]; where an eighth of the lists would not be
    enough (vectors without clusters), a graph (HNSW; Malkov & Yashunin, 2018) takes their place.
    """
    count, width = vectors.shape
    exact = faiss.IndexFlatIP(width)
    exact.add(vectors)
    if count <= EXACT_BELOW or not len(queries):
        faiss.write_index(exact, str(path))
        return "flat", 1.0
    sample = queries[np.random.default_rng(seed).permutation(len(queries))[:SAMPLE]]
    truth = exact.search(sample, DEPTH)[1]

    lists = 2 ** round(np.log2(4 * sqrt(count)))
    quantizer = faiss.IndexFlatIP(width)
    ivf = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.seed = seed + 1
    # More training points than this change the centroids no further but take their time.
    ivf.cp.max_points_per_centroid = 64
    ivf.cp.niter = 10
    ivf.train(vectors)
    ivf.add(vectors)
    probes = 4
    while probes <= lists // 8:
        ivf.nprobe = probes
        if (found := _recall(ivf, sample, truth)) >= TARGET_RECALL:
            faiss.write_index(ivf, str(path))
            return "ivf", found
        probes *= 2

    graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    graph.add(vectors)
    for breadth in (128, 256, 512, 1024):
        graph.hnsw.efSearch = breadth
        if (found := _recall(graph, sample, truth)) >= TARGET_RECALL:
            break
    faiss.write_index(graph, str(path))
    return "hnsw", found


def _recall(index: faiss.Index, queries: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]) -> float:
    found = index.search(queries, DEPTH)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / DEPTH for a, b in zip(found, truth, strict=True)]))
