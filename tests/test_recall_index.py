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


def scattered(count: int, seed: int) -> npt.NDArray[np.float32]:
    return unit(np.random.default_rng(seed).standard_normal((count, 4 * WIDTH)))


@pytest.mark.parametrize(
    ("vectors", "kind"),
    [
        pytest.param(clustered(1, 0), "flat", id="one"),
        pytest.param(clustered(EXACT_BELOW, 0), "flat", id="few"),
        pytest.param(clustered(EXACT_BELOW + 1, 0), "ivf", id="clustered"),
        pytest.param(scattered(EXACT_BELOW + 1, 0), "hnsw", id="scattered"),
    ],
)
def test_what_is_stated_is_what_the_file_finds(tmp_path: Path, vectors: npt.NDArray[np.float32], kind: str) -> None:
    found, recall = build_index(vectors, vectors, tmp_path / "index.faiss")
    assert found == kind
    assert recall == 1.0 if kind == "flat" else 0.5 < recall <= 1.0
    assert recall >= 0.95 or kind == "hnsw"
    queries, depth = vectors[:: max(1, len(vectors) // 300)], min(100, len(vectors))
    rows = faiss.read_index(str(tmp_path / "index.faiss")).search(queries, depth)[1]
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :depth]
    shared = np.mean([len(np.intersect1d(a, b)) / depth for a, b in zip(rows, best, strict=True)])
    assert shared == pytest.approx(recall, abs=0.03)


def test_what_nobody_asks_is_scanned(tmp_path: Path) -> None:
    vectors = scattered(EXACT_BELOW + 1, 0)
    assert build_index(vectors, vectors[:0], tmp_path / "index.faiss") == ("flat", 1.0)
