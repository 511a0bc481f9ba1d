import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from app.state.events import EventType
from models.recall import Interactions, gru4rec, sequences
from tests.sequences import HISTORY, circle, inputs, small_steps


def test_the_recurrence_is_that_of_a_gru_over_the_events_alone() -> None:
    with small_steps():
        fitted = gru4rec.fit(circle(60), history=HISTORY)
    encoder, rows = fitted.encoder, [3, 9, 4]
    assert isinstance(encoder, gru4rec.Encoder)
    cell = torch.nn.GRUCell(gru4rec.WIDTH, gru4rec.STATE)
    state = torch.zeros(1, gru4rec.STATE)
    with torch.inference_mode():
        for given, name in zip(encoder.cell, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True):
            getattr(cell, name).copy_(given[:, : gru4rec.WIDTH] if name == "weight_ih" else given)
        for row in rows:
            event = torch.from_numpy(fitted.items[[row]]) * gru4rec.WIDTH**0.5
            state = cell(event + encoder.kind.weight[EventType.PURCHASE], state)
        told = F.normalize(encoder.after(encoder.out(state)), dim=1) / sequences.TEMPERATURE
        torch.testing.assert_close(encoder(*inputs([rows], fitted)), told, atol=1e-4, rtol=1e-4)


@pytest.mark.training
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_foresees_the_next_click_of_retailrocket_sessions() -> None:
    folder = Path(os.environ["MILLIREC_DATASETS"], "sessions_retailrocket")
    sessions = pl.read_parquet(folder / "train_sessions.parquet").sort("session")["items"]
    length = sessions.list.len().to_numpy()
    row = sessions.explode().to_numpy().astype(np.int32)
    user = np.repeat(np.arange(len(length), dtype=np.int32), length)
    test = pl.read_parquet(folder / "test.parquet")
    # The sessions have no times.
    ts_ms = np.arange(len(row), dtype=np.int64) * 60_000
    kind = np.full(len(row), EventType.VIEW_ITEM, np.uint8)
    fitted = gru4rec.fit(Interactions(user, row, ts_ms, kind, int(max(row.max(), test["label"].max())) + 1))
    ranks = []
    for part in test.iter_slices(512):
        history, kinds, ages_s, profile = inputs(part["prefix"].to_list(), fitted)
        with torch.inference_mode():
            found = fitted.encoder(history, kinds.clamp(max=EventType.VIEW_ITEM), ages_s, profile)
        score = found @ torch.from_numpy(fitted.items).T
        ranks.append((score >= score.gather(1, torch.from_numpy(part["label"].to_numpy().copy())[:, None])).sum(1))
    rank = torch.cat(ranks).numpy()
    # Below the published .567 and .324 (of another split), see the model's docstring.
    assert (rank <= 20).mean() > 0.49
    assert np.where(rank <= 20, 1 / rank, 0).mean() > 0.24
