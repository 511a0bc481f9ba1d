"""Titles and descriptions as vectors of a sentence model, where one is installed."""

import importlib
import json
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from models.data import DataError, Tables

BATCH = 64


class Encoder(Protocol):
    """What is used of `sentence_transformers.SentenceTransformer` (Reimers & Gurevych, EMNLP 2019)."""

    def encode(
        self, texts: list[str], *, batch_size: int, show_progress_bar: bool, convert_to_numpy: bool
    ) -> npt.NDArray[np.float32]: ...


def sentence_model(name: str) -> Encoder:
    """The model of this name or in this folder. Raises `DataError` where it cannot be had."""
    try:
        package: Any = importlib.import_module("sentence_transformers")
    except ImportError:
        raise DataError("a text model needs the package sentence-transformers") from None
    try:
        model: Encoder = package.SentenceTransformer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"text model {name}: {str(error).splitlines()[0]}") from error
    return model


def with_text_vectors(tables: Tables, model: Encoder) -> Tables:
    """With `text_vector` (List[f32]) in the items: what the model makes of title and description, null without either.

    Raises `DataError` where the model says what is no vector.
    """
    texts = [_text(*row) for row in tables.items.select("title", "attributes").iter_rows()]
    distinct = sorted({*texts} - {""})
    if not distinct:
        raise DataError("items: columns title and description: empty in all rows, which leaves a text model nothing")
    found = np.asarray(
        model.encode(distinct, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True), np.float32
    )
    if found.ndim != 2 or len(found) != len(distinct):
        raise DataError(f"the text model made {list(found.shape)} of {len(distinct)} texts")
    if not np.isfinite(found).all():
        odd = distinct[int(np.flatnonzero(~np.isfinite(found).all(1))[0])]
        raise DataError(f"the text model made a vector that is not finite of {odd!r:.60}")
    place = {text: number for number, text in enumerate(distinct)}
    vectors = pl.Series("text_vector", found).cast(pl.List(pl.Float32))
    items = tables.items.with_columns(vectors.gather(pl.Series([place.get(text) for text in texts], dtype=pl.UInt32)))
    return Tables(tables.events, items, tables.users, tables.report)


def _text(title: str | None, attributes: str | None) -> str:
    description = json.loads(attributes or "{}").get("description")
    return ". ".join(filter(None, [title, description if isinstance(description, str) else None]))
