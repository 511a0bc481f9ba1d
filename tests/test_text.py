"""Texts as vectors: what a sentence model says of titles and descriptions, and what becomes of it."""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from app.__main__ import cli
from app.bundle import current, open_bundle
from models.data import DataError, Tables, canonical
from models.data.simulator import simulate
from models.recall import content
from models.text import sentence_model, with_text_vectors

WORDS = ("mug", "cup", "lamp", "desk", "for", "tea")
WIDTH = 16
INSTALLED = importlib.util.find_spec("sentence_transformers") is not None


def embeddings() -> npt.NDArray[np.float32]:
    """Mugs are cups to it."""
    found = np.random.default_rng(0).normal(size=(len(WORDS), WIDTH)).astype(np.float32)
    found[1] = found[0] + 0.05
    return found


class MeanOfWords(nn.Module):
    """A network with the one method of a sentence model that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag.from_pretrained(torch.from_numpy(embeddings()), mode="mean")  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def encode(self, texts: list[str], **_: object) -> npt.NDArray[np.float32]:
        codes = [[WORDS.index(word) for word in WORDS if word in text.lower()] for text in texts]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in codes])[:-1]])
        found: npt.NDArray[np.float32] = self.words(
            torch.tensor([code for row in codes for code in row]), torch.from_numpy(starts)
        ).numpy()
        return found


def shop(**columns: object) -> Tables:
    items = pl.DataFrame({"item_id": ["1", "2", "3", "4", "5"], **columns})
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["1"], "type": ["view"], "timestamp": ["2024-05-01"]})
    return canonical(events, items, source="test", now_ms=1_800_000_000_000)


TITLES = ["mug", "cup", "lamp", "mug", None]


def test_items_get_the_vector_of_their_text() -> None:
    items = with_text_vectors(shop(title=TITLES), MeanOfWords()).items
    found = items["text_vector"].to_list()
    assert found[4] is None and found[0] == found[3]
    np.testing.assert_allclose(np.array(found[:3]), embeddings()[:3], rtol=1e-6)


def test_descriptions_are_read_too() -> None:
    described = shop(title=TITLES, description=[None, None, "for tea", None, "desk"])
    found = with_text_vectors(described, MeanOfWords()).items["text_vector"].to_list()
    np.testing.assert_allclose(found[2], embeddings()[[2, 4, 5]].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[4], embeddings()[3], atol=1e-6)
    plain = content.features(described.items)
    assert plain[4].any() and not content.features(shop(title=TITLES).items)[4, : content.WIDTH].any()


def test_what_means_the_same_is_alike_without_a_letter_in_common() -> None:
    tables = shop(title=["mug", "cup", "lamp", "desk", None])
    assert content.fit(tables.items, k=1).rows[0, 0] == -1
    near = content.fit(with_text_vectors(tables, MeanOfWords()).items, k=4)
    assert near.rows[0, 0] == 1 and near.rows[1, 0] == 0
    assert 4 not in near.rows


def test_two_modalities_have_an_equal_say() -> None:
    vectors = {"vector": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], None]}
    items = with_text_vectors(shop(title=["mug", "cup", "lamp", "desk", None], **vectors), MeanOfWords()).items
    likeness = content.fit(items, k=4)
    found = dict(zip(likeness.rows[0].tolist(), likeness.weights[0].tolist(), strict=True))
    assert found[1] > 0 and found[2] > 0
    assert content.fit(items.drop("text_vector"), k=1).rows[0, 0] == 2
    assert content.fit(items.drop("vector"), k=1).rows[0, 0] == 1


def test_wide_vectors_become_narrow_and_stay_alike() -> None:
    rng = np.random.default_rng(1)
    theme = rng.normal(size=(4, 768))
    wide = theme[np.arange(200) % 4] + 0.3 * rng.normal(size=(200, 768)) + 5.0
    frame = pl.DataFrame({"vector": pl.Series([*wide.tolist(), None], dtype=pl.List(pl.Float32))})
    found = content.features(frame)[:, -content.WIDTH :]
    assert found.shape == (201, content.WIDTH) and not found[200].any()
    given = found[:200]
    np.testing.assert_allclose(given.mean(0), 0, atol=1e-5)
    assert np.linalg.norm(given, axis=1).mean() == pytest.approx(1, abs=0.1)
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T), axis=1)[:, 1:11]
    assert (near % 4 == np.arange(200)[:, None] % 4).mean() > 0.99


def test_vectors_that_are_all_the_same_say_nothing() -> None:
    frame = pl.DataFrame({"vector": pl.Series([[1.0, 2.0]] * 5, dtype=pl.List(pl.Float32))})
    assert not content.features(frame)[:, -2:].any()


class Odd:
    def __init__(self, found: list[list[float]]) -> None:
        self.found = found

    def encode(self, texts: list[str], **_: object) -> npt.NDArray[np.float32]:
        return np.array(self.found, np.float32)


@pytest.mark.parametrize(
    ("tables", "found", "says"),
    [
        (shop(title=[None] * 5), [[1.0]], "columns title and description: empty in all rows"),
        (shop(title=TITLES), [[1.0]], r"the text model made \[1, 1\] of 3 texts"),
        (shop(title=TITLES), [[1.0], [float("nan")], [2.0]], "a vector that is not finite of 'lamp'"),
    ],
)
def test_what_is_no_vector_is_refused(tables: Tables, found: list[list[float]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        with_text_vectors(tables, Odd(found))


@pytest.mark.skipif(INSTALLED, reason="sentence-transformers is installed")
def test_without_the_package_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,time\na,1,2024-05-01\n")
    ended = CliRunner().invoke(cli, ["train", "--events", str(tmp_path / "e.csv"), "--text-model", "any"])
    assert ended.exit_code == 2
    assert ended.stderr.splitlines()[-1] == "millirec: a text model needs the package sentence-transformers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A real sentence model of a few words, as its own package writes it."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is optional")
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    words = WordEmbeddings(WhitespaceTokenizer(WORDS), embedding_weights=embeddings(), update_embeddings=False)
    model = sentence_transformers.SentenceTransformer(modules=[words, Pooling(WIDTH)], device="cpu")
    model.save(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.mark.slow
def test_a_sentence_model_of_the_package_is_used(folder: Path, tmp_path: Path) -> None:
    found = with_text_vectors(shop(title=TITLES), sentence_model(str(folder))).items["text_vector"].to_list()
    np.testing.assert_allclose(np.array(found[:3]), embeddings()[:3], rtol=1e-5)
    with pytest.raises(DataError, match=r"^text model .*nowhere: "):
        sentence_model(str(tmp_path / "nowhere"))

    tables = simulate(items=40, users=40, events=1_200, days=20)
    titles = pl.Series("title", [WORDS[number % 4] for number in range(len(tables.items))])
    tables.events.write_parquet(tmp_path / "events.parquet")
    tables.items.with_columns(titles).write_parquet(tmp_path / "items.parquet")
    files = [f"--events={tmp_path}/events.parquet", f"--items={tmp_path}/items.parquet", f"--bundles={tmp_path}/b"]
    models = ["--models=content,two_tower,popularity", "--ranker=linear", "--windows=1", f"--text-model={folder}"]
    ended = CliRunner().invoke(cli, ["train", *files, *models])
    assert ended.exit_code == 0, ended.stderr
    version = current(tmp_path / "b")
    assert version is not None
    assert open_bundle(tmp_path / "b" / version).manifest.provenance["parameters"]["modalities"] == ["text_vector"]
