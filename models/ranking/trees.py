"""Gradient-boosted trees by LightGBM (Ke et al., NIPS 2017), exported so that serving them needs no LightGBM."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
import torch
from torch import Tensor

from app.bundle import Draft, RankerSpec
from app.engine import kernels
from app.engine.ranking import LEAVES
from models.ranking.calibration import platt
from models.ranking.examples import Examples, rows_of, sizes, split

EVERY = 10
"""Trees from one report to the next."""
LEAF_ROWS = 300
"""Examples behind every value, or a hundredth of all where that is less."""
PATIENCE = 60
"""Trees without a better ranking of the held-out tenth before growing ends: that measure is a rough one."""


@dataclass(slots=True)
class Forest:
    """Trees as the engine reads them; `RankerSpec.forest` says how."""

    feature: Tensor
    threshold: Tensor
    kept: Tensor
    value: Tensor
    calibrated: bool = False

    def __call__(self, features: Tensor) -> Tensor:
        kept = self.kept.numpy().view(np.uint32)
        found = kernels.forest(
            features.contiguous().numpy(), self.feature.numpy(), self.threshold.numpy(), kept, self.value.numpy()
        )
        return torch.from_numpy(found)

    def export(self, name: str, features: tuple[str, ...], draft: Draft) -> None:
        """Adds the ranker to the draft, as the arrays that the engine runs."""
        columns = {"feature": self.feature, "threshold": self.threshold, "kept": self.kept, "value": self.value}
        file = draft.save(f"ranker_{name}.safetensors", columns)
        draft.rankers.append(RankerSpec(name=name, forest=file, features=features, calibrated=self.calibrated))


def fit(
    examples: Examples,
    *,
    seed: int,
    trees: int = 400,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train, valid: None,
) -> Forest:
    """Trains on whole slates by XE-NDCG (Bruch, WWW 2021), the listwise softmax of boosted trees.

    A tenth of the queries is held out; the number of trees that ranks it best is kept. `on_epoch` gets 1 - NDCG@20.
    On the held-out tenth the scores become log-odds of being wanted. Raises `ValueError` where there is nothing to
    learn.
    """
    parts = split(examples, torch.Generator().manual_seed(seed))
    size = sizes(examples)

    def data(queries: Tensor, reference: lightgbm.Dataset | None = None) -> lightgbm.Dataset:
        rows = rows_of(queries, size)
        features, label = examples.features[rows].numpy(), examples.label[rows].numpy()
        return lightgbm.Dataset(features, label, group=size[queries].numpy(), reference=reference)

    in_leaf = min(LEAF_ROWS, len(examples.label) // 100)
    train = data(parts.train.sort().values)
    valid = data(parts.held.sort().values, train)

    def report(at: lightgbm.callback.CallbackEnv) -> None:
        if at.iteration % EVERY == 0 and at.evaluation_result_list:
            of_train, of_valid = (1.0 - float(entry[2]) for entry in at.evaluation_result_list)
            on_epoch(at.iteration, of_train, of_valid)

    booster = lightgbm.train(
        {**PARAMETERS, "min_data_in_leaf": in_leaf, "seed": seed, "num_threads": torch.get_num_threads()},
        train,
        trees,
        valid_sets=[train, valid],
        valid_names=["train", "valid"],
        callbacks=[report, lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    forest = forest_of(booster)
    if not forest.threshold.isfinite().any():
        raise ValueError("no tree found a condition: the features say nothing of what is wanted")
    rows = rows_of(torch.cat([parts.held, parts.quiet]), size)
    line = platt(forest(examples.features[rows]).numpy(), examples.label[rows].numpy())
    if line is not None:
        forest.value *= line.slope
        forest.value[0] += line.intercept
        forest.calibrated = True
    return forest


PARAMETERS: Mapping[str, Any] = {
    "objective": "rank_xendcg",
    "metric": "ndcg",
    "eval_at": [20],
    "learning_rate": 0.05,
    "num_leaves": 15,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    # Then NaN counts as 0, in LightGBM as in the engine: no condition has a side of its own for what is missing.
    "use_missing": False,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


def forest_of(booster: lightgbm.Booster) -> Forest:
    """The trees up to the best number of them.

    Raises `ValueError` for what the engine does not run: categorical conditions, missing values with a side of their
    own, several classes, averaged trees, and trees of more than 31 leaves.
    """
    dump = booster.dump_model(num_iteration=booster.best_iteration if booster.best_iteration > 0 else None)
    if dump["num_tree_per_iteration"] != 1 or dump["average_output"]:
        raise ValueError("only one score a row that is the sum of its trees can be served")
    found = [_tree(entry["tree_structure"]) for entry in dump["tree_info"]]
    width = max(2, *(len(values) for _, values in found))
    if width > LEAVES:
        raise ValueError(f"a tree has {width} leaves, the engine runs {LEAVES} at most")
    feature = torch.zeros((len(found), width - 1), dtype=torch.int32)
    threshold = torch.full((len(found), width - 1), torch.inf)
    kept = torch.full((len(found), width - 1), -1, dtype=torch.int32)
    value = torch.zeros((len(found), width))
    for tree, (conditions, values) in enumerate(found):
        value[tree, : len(values)] = torch.tensor(values)
        for node, (column, limit, first, last) in enumerate(conditions):
            feature[tree, node] = column
            threshold[tree, node] = _not_above(limit)
            kept[tree, node] = ~(((1 << last) - 1) ^ ((1 << first) - 1))
    return Forest(feature, threshold, kept, value)


def _tree(root: Mapping[str, Any]) -> tuple[list[tuple[int, float, int, int]], list[float]]:
    """Conditions (feature, threshold, first leaf to the left, one behind the last), and the leaves' values in order."""
    conditions: list[tuple[int, float, int, int]] = []
    values: list[float] = []

    def walk(node: Mapping[str, Any]) -> None:
        if "leaf_coeff" in node:
            raise ValueError("linear leaves are not served")
        if "split_feature" not in node:
            values.append(float(node["leaf_value"]))
            return
        if node["decision_type"] != "<=":
            raise ValueError("conditions on categories are not served")
        if node["missing_type"] != "None":
            raise ValueError(f"missing values with a side of their own ({node['missing_type']}) are not served")
        first = len(values)
        walk(node["left_child"])
        conditions.append((int(node["split_feature"]), float(node["threshold"]), first, len(values)))
        walk(node["right_child"])

    walk(root)
    return conditions, values


def _not_above(limit: float) -> float:
    """The greatest float32 up to a float64 threshold: every float32 is on the same side of both."""
    near = np.float32(limit)
    # As Python's floats: numpy would round the limit before it compares.
    return float(near if float(near) <= limit else np.nextafter(near, np.float32(-np.inf)))
