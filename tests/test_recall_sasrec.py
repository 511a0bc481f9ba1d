import copy
import dataclasses
import gzip
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from app.state.events import EventType
from models.benchmark import SPLITS
from models.recall import Vectors, content, sasrec, sequences
from tests.sequences import HISTORY, bought, circle, inputs, scores, small_steps


@pytest.fixture(scope="module")
def fitted() -> Vectors:
    with small_steps():
        return sasrec.fit(circle(60), history=HISTORY)


def test_the_attention_written_out(fitted: Vectors) -> None:
    fitted = dataclasses.replace(fitted, encoder=copy.deepcopy(fitted.encoder))
    encoder = fitted.encoder
    assert isinstance(encoder, sasrec.Encoder)
    with torch.no_grad():
        encoder.age.fill_(-0.3)
        encoder.distance.copy_(torch.linspace(-1, 1, HISTORY))
    p = {name: value.double().numpy() for name, value in encoder.state_dict().items()}
    rows = [3, 9, 4, 4]

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        scaled: npt.NDArray[np.float64] = (x - x.mean(-1, keepdims=True)) / spread * p[f"{name}.weight"]
        return scaled + p[f"{name}.bias"]

    def linear(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        product: npt.NDArray[np.float64] = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        return product

    events = fitted.items[rows] * np.sqrt(sasrec.WIDTH) + p["kind.weight"][EventType.PURCHASE]
    read, age = norm(events, "before"), np.log1p(86_400.0 * np.arange(4, 0, -1))
    logit = read @ linear(read[-1], "query") / np.sqrt(sasrec.WIDTH) + p["distance"][-4:] + p["age"] * age
    share = np.exp(logit + p["kind_logit.weight"][EventType.PURCHASE])
    told = events[-1] + linear(share / share.sum() @ read, "out")
    told = told + linear(np.maximum(linear(norm(told, "between"), "up"), 0), "down")
    told = norm(told, "after")
    expected = fitted.items @ told / np.linalg.norm(told) / sequences.TEMPERATURE
    np.testing.assert_allclose(scores([rows], fitted)[0], expected, atol=1e-4)


@pytest.mark.training
@pytest.mark.skipif("MILLIREC_DATASETS" not in os.environ, reason="MILLIREC_DATASETS names no folder of data sets")
def test_holds_its_own_against_the_published_on_beauty() -> None:
    folder = Path(os.environ["MILLIREC_DATASETS"])
    with gzip.open(folder / "amazon_s3rec" / "Beauty.txt.gz", "rt") as file:
        everything = [[int(item) for item in line.split()[1:]] for line in file]
    items = SPLITS["beauty"](folder, 0).items
    past = bought([sequence[:-2] for sequence in everything], len(items))
    fitted = sasrec.fit(past, features=content.features(items))
    ranks = []
    for start in range(0, len(everything), 512):
        part = everything[start : start + 512]
        with torch.inference_mode():
            found = fitted.encoder(*inputs([sequence[:-1] for sequence in part], fitted, width=fitted.history)).numpy()
        found = found @ fitted.items.T
        for score, (*past, target) in zip(found, part, strict=True):
            score[past] = -np.inf
            ranks.append(int((score >= score[target]).sum()))
    rank = np.array(ranks)
    assert (rank <= 10).mean() > 0.092
    assert np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean() > 0.053
