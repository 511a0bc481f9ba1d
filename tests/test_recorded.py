import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.bundle import Bundle, BundleError, open_bundle
from app.engine.pipeline import Pipeline
from app.engine.program import save_program
from app.engine.recorded import replay
from tests.damage import copy, reseal, tensors

VERSION = "20260101T000000-00000000"


@pytest.fixture
def folder(tiny: Bundle, tmp_path: Path) -> Path:
    return copy(tiny, tmp_path / VERSION, VERSION).path


def opened(folder: Path) -> Pipeline:
    return Pipeline(open_bundle(folder), torch.device("cpu"), 4)


def rerecord(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    recorded = json.loads((folder / "recorded.json").read_text())
    change(recorded["entries"])
    (folder / "recorded.json").write_text(json.dumps(recorded))
    reseal(folder)


class Constant(nn.Module):
    def __init__(self, columns: int, value: float) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.full((columns,), value))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights


def rank_by(folder: Path, value: float) -> None:
    columns = len(open_bundle(folder).manifest.rankers[0].features)
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(Constant(columns, value), (torch.rand(5, columns),), dynamic_shapes=({0: rows},))
    save_program(exported, folder / "sum.pt2")
    reseal(folder)


def test_a_bundle_gives_its_answers_again(folder: Path) -> None:
    pipeline = opened(folder)
    replay(pipeline)
    replay(pipeline)


def test_a_bundle_without_recorded_queries_has_nothing_to_prove(folder: Path) -> None:
    rank_by(folder, 1.0)
    reseal(folder, recorded=None)
    replay(opened(folder))


def test_another_ranker_is_refused(folder: Path) -> None:
    rank_by(folder, 0.1)
    with pytest.raises(BundleError, match="recorded query 0 got other scores"):
        replay(opened(folder))


def test_a_ranker_that_gives_no_numbers_is_refused(folder: Path) -> None:
    rank_by(folder, float("nan"))
    with pytest.raises(BundleError, match="recorded query 0"):
        replay(opened(folder))


def test_a_ranker_that_fails_is_refused(folder: Path) -> None:
    exported = torch.export.export(Constant(3, 1.0), (torch.rand(5, 3),))
    save_program(exported, folder / "sum.pt2")
    reseal(folder)
    with pytest.raises(BundleError, match=r"recorded query 0 got 20 items, degraded \['rank'\]"):
        replay(opened(folder))


def test_other_vectors_are_refused(folder: Path) -> None:
    tensors(folder, "towers.safetensors", lambda found: {"vectors": found["vectors"].flip(0)})
    with pytest.raises(BundleError, match="recorded query"):
        replay(opened(folder))


def test_other_neighbours_are_refused(folder: Path) -> None:
    tensors(folder, "item_cf.safetensors", lambda found: {"rows": found["rows"].flip(0)})
    with pytest.raises(BundleError, match="recorded query"):
        replay(opened(folder))


def test_another_list_is_refused(folder: Path) -> None:
    tensors(folder, "popular.safetensors", lambda found: {"rows": found["rows"].flip(0)})
    with pytest.raises(BundleError, match="recorded query"):
        replay(opened(folder))


def test_items_whose_scores_tie_may_change_places(folder: Path) -> None:
    def tie(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if entry["query"]["scene"] in ("home", "buy_again"):
                entry["scores"] = [0.0] * len(entry["scores"])
                entry["items"].reverse()

    rank_by(folder, 0.0)
    rerecord(folder, tie)
    replay(opened(folder))


def test_items_whose_scores_do_not_tie_may_not_change_places(folder: Path) -> None:
    scores = json.loads((folder / "recorded.json").read_text())["entries"][0]["scores"]
    gaps = [before - after for before, after in pairwise(scores[:-1])]
    far = gaps.index(max(gaps))

    def swap(entries: list[dict[str, Any]]) -> None:
        items = entries[0]["items"]
        items[far], items[far + 1] = items[far + 1], items[far]

    rerecord(folder, swap)
    with pytest.raises(BundleError, match=f"recorded query 0 got another item at position {far}"):
        replay(opened(folder))


def test_a_shorter_slate_is_refused(folder: Path) -> None:
    rerecord(folder, lambda entries: entries[0]["items"].append("a0"))
    with pytest.raises(BundleError, match="recorded query 0 got 20 items"):
        replay(opened(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[0].pop("query"),
        lambda entries: entries[0].update(events="AAAA"),
        lambda entries: entries[0].update(events="x"),
        lambda entries: entries[0]["query"].update(scene="attic"),
        lambda entries: entries[0]["query"].update(anchors=None),
        lambda entries: entries.append(7),
    ],
)
def test_records_that_cannot_be_read_are_refused(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rerecord(folder, change)
    with pytest.raises(BundleError, match=r"recorded\.json cannot be replayed"):
        replay(opened(folder))
