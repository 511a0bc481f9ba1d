"""Exported forests against LightGBM's own predictions, and what is not exported or not served."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from app.bundle import Bundle, BundleError, Draft, RankerSpec, seal
from app.engine import ranking
from app.engine.ranking import Ranker
from models.ranking import Examples
from models.ranking.trees import fit, forest_of

NAMES = ("a", "b", "c", "d")


def grown(
    trees: int = 40, missing: bool = False, categorical: bool = False, **parameters: Any
) -> tuple[lightgbm.Booster, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, len(NAMES))).astype(np.float32)
    features[:, 1] = features[:, 1].round(1)
    if missing:
        features[::7, 0] = np.nan
    if categorical:
        features[:, 1] = features[:, 1].clip(-2, 2).round() + 2
    label = np.nan_to_num(features[:, 0]) * features[:, 1] + np.sin(3 * features[:, 2]) > 0.5
    parameters = {"objective": "binary", "use_missing": False, "num_threads": 1, "verbosity": -1} | parameters
    data = lightgbm.Dataset(features, label, categorical_feature=[1] if categorical else "auto")
    return lightgbm.train(parameters, data, trees), features


@pytest.mark.parametrize("leaves", [2, 5, 31])
def test_scores_are_lightgbms(leaves: int) -> None:
    booster, features = grown(num_leaves=leaves)
    forest = forest_of(booster)
    # Right at each threshold and a step to either side of it, and what is no number. LightGBM reads what is not beyond
    # 1e-35 as 0, and has thresholds there.
    at = forest.threshold[forest.threshold.isfinite()].numpy()
    edges = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))])
    edges = edges[np.abs(edges) > 1e-34]
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    tried = np.concatenate([features, np.repeat(np.concatenate([edges, odd])[:, None], len(NAMES), 1)])
    expected = booster.predict(tried, raw_score=True)
    np.testing.assert_allclose(forest(torch.from_numpy(tried)), expected, atol=1e-5)
    columns = forest.feature, forest.threshold, forest.kept, forest.value
    np.testing.assert_allclose(ranking.forest(torch.from_numpy(tried), *columns), expected, atol=1e-5)


def test_trees_behind_the_best_are_left_out() -> None:
    booster, features = grown()
    booster.best_iteration = 7
    expected = booster.predict(features, raw_score=True, num_iteration=7)
    np.testing.assert_allclose(forest_of(booster)(torch.from_numpy(features)), expected, atol=1e-5)


def test_trees_without_a_condition_are_their_value() -> None:
    booster, features = grown(min_data_in_leaf=1990)
    expected = booster.predict(features, raw_score=True)
    np.testing.assert_allclose(forest_of(booster)(torch.from_numpy(features)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"use_missing": True, "missing": True}, "missing values with a side of their own"),
        ({"zero_as_missing": True, "use_missing": True}, "missing values with a side of their own"),
        ({"categorical": True}, "conditions on categories"),
        ({"num_leaves": 32, "min_data_in_leaf": 1}, "a tree has 32 leaves, the engine runs 31 at most"),
        ({"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, "the sum of its trees"),
        ({"linear_tree": True}, "linear leaves"),
        ({"objective": "multiclass", "num_class": 2}, "only one score a row"),
    ],
)
def test_what_the_engine_does_not_run_is_not_exported(parameters: Mapping[str, Any], says: str) -> None:
    booster, _ = grown(**parameters)
    with pytest.raises(ValueError, match=says):
        forest_of(booster)


def test_features_that_say_nothing_grow_no_ranker() -> None:
    features = torch.zeros(1000, 4)
    features[0] = 1.0
    query, label = torch.arange(1000) // 20, (torch.arange(1000) % 20 == 3).float()
    with pytest.raises(ValueError, match="no tree found a condition"):
        fit(Examples(features, query, label), seed=0)


def bundle(folder: Path, **changes: Tensor | None) -> Bundle:
    """A bundle with a forest of two conditions on four features, and changes to its columns."""
    draft = Draft(folder, 0, 1, (), (), (), [], [], {})
    draft.save("catalog.safetensors", {})
    booster, _ = grown(trees=2, num_leaves=3)
    forest_of(booster).export("trees", NAMES, draft)
    spec = draft.rankers[0]
    assert spec.forest is not None
    found = {"file": draft.path / spec.forest}
    columns = seal(draft, folder.name).tensors(found["file"].name)
    kept = {name: column for name, column in {**columns, **changes}.items() if column is not None}
    draft.save(spec.forest, kept)
    return seal(draft, folder.name)


def opened(of: Bundle) -> Ranker:
    return Ranker(of.manifest.rankers[0], of, torch.device("cpu"))


def test_a_forest_is_a_file_with_a_checksum(tmp_path: Path) -> None:
    of = bundle(tmp_path)
    assert of.manifest.rankers[0].forest in of.manifest.files
    assert opened(of).score(torch.zeros(3, 4)).shape == (3,)


DAMAGED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no values": ({"value": None}, "has no 'value'"),
    "thresholds of another type": ({"threshold": torch.zeros(2, 2, dtype=torch.float64)}, "columns of other types"),
    "fewer conditions": ({"threshold": torch.zeros(2, 1)}, "no forest of trees"),
    "no trees of two leaves": ({"value": torch.zeros(2, 1)}, "no forest of trees"),
    "values of one tree": ({"value": torch.zeros(3)}, "no forest of trees"),
    "feature beyond the last": ({"feature": torch.full((2, 2), 4, dtype=torch.int32)}, "features beyond the 4"),
    "feature before the first": ({"feature": torch.full((2, 2), -1, dtype=torch.int32)}, "features beyond the 4"),
    "no leaf left": ({"kept": torch.zeros(2, 2, dtype=torch.int32)}, "strikes out the last leaf"),
    "value that is no number": ({"value": torch.full((2, 3), torch.nan)}, "values that are no numbers"),
}


@pytest.mark.parametrize(("changes", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_forest_is_refused(changes: dict[str, Tensor | None], says: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=says):
        opened(bundle(tmp_path, **changes))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "a program, a forest or both"),
        ({"forest": "a.safetensors", "standard": "b.safetensors"}, "only a program takes standardised features"),
    ],
)
def test_a_ranker_has_some_form(files: Mapping[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RankerSpec(name="trees", features=NAMES, **files)
