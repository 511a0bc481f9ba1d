from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from models.recall.index import EXACT_BELOW, build_index

WIDTH = 16


def unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((400, WIDTH))
    return unit(centres[rng.integers(0, 400, count)] + 0.3 * rng.standard_normal((count, WIDTH)))


@pytest.mark.parametrize(("count", "kind"), [(1, "flat"), (EXACT_BELOW, "flat"), (EXACT_BELOW + 1, "ivf")])
def test_what_is_stated_is_what_the_file_finds(tmp_path: Path, count: int, kind: str) -> None:
    vectors = clustered(count, 0)
    found, recall = build_index(vectors, vectors, tmp_path / "index.faiss")
    assert found == kind
    assert recall == 1.0 if kind == "flat" else 0.95 <= recall <= 1.0
    queries, depth = vectors[:: max(1, count // 300)], min(100, count)
    rows = faiss.read_index(str(tmp_path / "index.faiss")).search(queries, depth)[1]
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :depth]
    shared = np.mean([len(np.intersect1d(a, b)) / depth for a, b in zip(rows, best, strict=True)])
    assert shared == pytest.approx(recall, abs=0.02)


def test_vectors_without_clusters_get_a_graph(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(1).standard_normal((EXACT_BELOW + 1, 4 * WIDTH)))
    kind, recall = build_index(vectors, vectors, tmp_path / "index.faiss")
    assert kind == "hnsw"
    assert recall > 0.5
