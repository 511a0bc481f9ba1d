"""Every model on histories that are legal and poor: it serves, or says that it cannot."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

import models.sources
from app.bundle import seal
from app.engine import Query
from app.engine.pipeline import Pipeline
from models.data import DataError, Tables, canonical
from models.data.log import Log
from models.data.times import DAY_MS
from models.recall import gru4rec, index, sasrec, two_tower
from models.sources import MODELS, WINDOW, fit

END_MS = 1_700_000_000_000


def table(users: int, items: int, kinds: tuple[str, ...] = ("view", "purchase"), step_ms: int = DAY_MS // 4) -> Tables:
    """60 events, one after the other."""
    number = np.arange(60)
    rows = {
        "user_id": [f"u{n % users}" for n in number],
        "item_id": [f"i{n // users % items}" for n in number],
        "type": [kinds[n % len(kinds)] for n in number],
        "timestamp": END_MS - DAY_MS - step_ms * (60 - number),
        "event_id": [f"e{n}" for n in number],
    }
    return canonical(pl.DataFrame(rows), source="test", now_ms=END_MS)


def described(tables: Tables, **columns: object) -> Tables:
    return Tables(
        tables.events,
        tables.items.with_columns(**{name: pl.lit(value) for name, value in columns.items()}),
        tables.users,
        tables.report,
    )


ALIKE = {"title": "A thing", "category": "A > B", "brand": "b", "price": 2.5, "vector": [1.0, 0.0]}
POOR = {
    "one user": table(1, 7),
    "one item": table(9, 1),
    "one user, one item": table(1, 1),
    "one event a user": table(60, 7),
    "everybody wants everything": table(4, 3),
    "all at one time": table(9, 7, step_ms=0),
}
DESCRIBED = {
    "items all alike": described(table(9, 7), **ALIKE),
    "items without anything": described(table(9, 7), price=None),
    "vectors of zeros": described(table(9, 7), vector=[0.0, 0.0]),
}


READERS = ("two_tower", "content", "complements", "category")
"""Models that look at what items are."""


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, case) for case in POOR for name in MODELS), *((name, case) for case in DESCRIBED for name in READERS)],
)
def test_poor_history_is_served_or_refused(
    tmp_path: Path, name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.sources, "TOWERS_FROM", 1)
    for network, epochs in ((gru4rec, "EPOCHS"), (sasrec, "EPOCHS"), (two_tower, "MOST_EPOCHS")):
        monkeypatch.setattr(network, epochs, 2)
    tables = (POOR | DESCRIBED)[case]
    log = Log.from_tables(tables)
    try:
        fitted = fit(tmp_path, tables.items, log, END_MS, 0, lambda step: None, models=(name,))
    except DataError as error:
        assert name in str(error)
        return
    pipeline = Pipeline(seal(fitted.draft, tmp_path.name), torch.device("cpu"), 16)
    users = range(min(len(log.users), 8))
    queries = [Query(str(user), scene="buy_again", limit=5) for user in users]
    slates = pipeline.run(queries, log.states(END_MS, WINDOW, users), END_MS)
    assert not any(slate.degraded for slate in slates)
    assert all(len(slate.items) == min(5, len(fitted.items.key)) for slate in slates)
    assert np.isfinite([item.score for slate in slates for item in slate.items]).all()


def test_models_without_a_word_are_named(tmp_path: Path) -> None:
    tables = table(9, 7)
    log = Log.from_tables(tables)
    fitted = fit(tmp_path, tables.items, log, END_MS, 0, lambda step: None, models=("history", "category", "segment"))
    assert fitted.silent == ("category", "segment")
    with pytest.raises(DataError, match="nothing can be learned of this history by category, segment"):
        fit(tmp_path, tables.items, log, END_MS, 0, lambda step: None, models=("category", "segment"))


def test_an_index_is_measured_with_what_users_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = table(9, 7)
    log, asked = Log.from_tables(tables), []

    def noted(vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], path: Path, seed: int) -> object:
        asked.append(queries)
        return index.build_index(vectors, queries, path, seed)

    monkeypatch.setattr(models.sources, "build_index", noted)
    fit(tmp_path, tables.items, log, END_MS, 0, lambda step: None, models=("lightgcn",))
    assert len(asked[0]) == 9
    np.testing.assert_array_equal(asked[0][:, -1], 1.0)
