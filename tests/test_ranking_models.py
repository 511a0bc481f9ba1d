"""What every ranker must do, and which rules each can learn."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from app.bundle import Draft, seal
from app.engine.ranking import Ranker as Served
from models.ranking import RANKERS, Examples, Ranker, stack
from models.ranking.blend import Blend
from models.ranking.calibration import calibration_error, reliability
from models.ranking.networks import Network

NAMES = ("a", "b", "c", "d", "constant")
SLATE = 20
WANTED = 2

Rule = Callable[[Tensor], Tensor]
RULES: dict[str, Rule] = {"sum": lambda x: 2 * x[:, 0] - x[:, 1], "product": lambda x: 2 * x[:, 0] * x[:, 1]}


def planted(rule: Rule, queries: int, seed: int) -> Examples:
    """Slates in which the best `WANTED` by the rule, and some noise, are wanted; features of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    standard = torch.randn(queries * SLATE, len(NAMES), generator=generator)
    best = rule(standard) + 0.3 * torch.randn(len(standard), generator=generator)
    label = torch.zeros(queries, SLATE).scatter_(1, best.view(queries, SLATE).topk(WANTED).indices, 1.0)
    features = standard * torch.tensor([1.0, 100.0, 1e-3, 1.0, 0.0]) + torch.tensor([0.0, 5.0, 0.0, -3.0, 7.0])
    return Examples(features, torch.arange(queries).repeat_interleave(SLATE), label.flatten(), names=NAMES)


@cache
def fitted(name: str, rule: str) -> Ranker:
    return RANKERS[name](planted(RULES[rule], 1000, seed=0), seed=0)


def ordered(ranker: Ranker, examples: Examples) -> float:
    """The share of pairs of a slate, one wanted and one not, in the right order; by chance a half."""
    with torch.inference_mode():
        score = ranker(examples.features).view(-1, SLATE)
    wanted = examples.label.view(-1, SLATE) > 0
    pair = wanted[:, :, None] & ~wanted[:, None, :]
    return float((score[:, :, None] > score[:, None, :])[pair].float().mean())


@pytest.mark.parametrize("name", RANKERS)
def test_learns_a_sum(name: str) -> None:
    assert ordered(fitted(name, "sum"), planted(RULES["sum"], 200, seed=1)) > 0.95


@pytest.mark.parametrize("name", [name for name in RANKERS if name != "linear"])
def test_learns_a_product(name: str) -> None:
    assert ordered(fitted(name, "product"), planted(RULES["product"], 200, seed=1)) > 0.9


def test_a_product_is_beyond_a_linear_ranker() -> None:
    assert ordered(fitted("linear", "product"), planted(RULES["product"], 200, seed=1)) < 0.6


@pytest.mark.parametrize("name", RANKERS)
def test_scores_are_log_odds(name: str) -> None:
    ranker, held = fitted(name, "sum"), planted(RULES["sum"], 200, seed=1)
    assert ranker.calibrated
    with torch.inference_mode():
        probability = ranker(held.features).sigmoid().numpy()
    assert probability.mean() == pytest.approx(WANTED / SLATE, rel=0.1)
    assert calibration_error(reliability(probability, held.label.numpy())) < 0.03


def served(ranker: Ranker, folder: Path) -> Served:
    draft = Draft(folder, 0, 1, (), (), (), [], [], {})
    draft.save("catalog.safetensors", {})
    ranker.export("planted", NAMES, draft)
    return Served(draft.rankers[0], seal(draft, folder.name), torch.device("cpu"))


@pytest.mark.parametrize("name", RANKERS)
def test_the_engine_gives_the_order_of_the_fitted_ranker(name: str, tmp_path: Path) -> None:
    ranker, held = fitted(name, "product"), planted(RULES["product"], 50, seed=2)
    engine = served(ranker, tmp_path)
    with torch.inference_mode():
        ours, theirs = ranker(held.features).numpy(), engine.score(held.features).numpy()
        assert torch.equal(engine.shown(torch.zeros(1)), torch.full((1,), 0.5))
    if isinstance(ranker, Network | Blend):
        # Its features come in bfloat16, with three digits.
        np.testing.assert_allclose(ours, theirs, atol=0.1 * ours.std())
        assert np.corrcoef(ours, theirs)[0, 1] > 0.999
    else:
        assert (ours == theirs).all()


@pytest.mark.parametrize("name", RANKERS)
def test_the_same_seed_gives_the_same_ranker(name: str) -> None:
    examples = planted(RULES["sum"], 60, seed=3)
    one, same, other = (RANKERS[name](examples, seed=seed)(examples.features) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", RANKERS)
def test_reports_while_it_learns(name: str) -> None:
    said: list[tuple[int, float, float]] = []
    RANKERS[name](planted(RULES["sum"], 60, seed=3), seed=0, on_epoch=lambda *report: said.append(report))
    assert len(said) > 1 and said[-1][2] < said[0][2]


def test_a_constant_column_is_carried_along() -> None:
    ranker = fitted("mlp", "sum")
    assert isinstance(ranker, Network)
    assert ranker.scale[NAMES.index("constant")] == 1


def spoiled(column: int, row: int, value: float) -> Callable[[Examples], Examples]:
    def spoil(examples: Examples) -> Examples:
        features = examples.features.clone()
        features[row, column] = value
        return Examples(features, examples.query, examples.label, names=examples.names)

    return spoil


def labelled(label: Callable[[Examples], Tensor]) -> Callable[[Examples], Examples]:
    return lambda examples: Examples(examples.features, examples.query, label(examples))


BAD = {
    "NaN": (spoiled(1, 17, float("nan")), r"feature column 1 \(b\) is nan in row 17"),
    "infinity": (spoiled(3, 4, float("-inf")), r"feature column 3 \(d\) is -inf in row 4"),
    "constant columns": (
        lambda e: Examples(torch.ones_like(e.features), e.query, e.label),
        "every feature column is constant",
    ),
    "nothing wanted": (labelled(lambda e: torch.zeros_like(e.label)), "no candidate was wanted by anybody"),
    "all wanted": (labelled(lambda e: torch.ones_like(e.label)), "every candidate was wanted"),
    "wanted in one query": (labelled(lambda e: e.label * (e.query == 3)), "wanted in one query only"),
    "half wanted": (labelled(lambda e: e.label / 2), "column label has other values"),
    "no candidates": (lambda e: stack([Examples(e.features[:0], e.query[:0], e.label[:0])]), "no candidate was wanted"),
    "queries out of order": (lambda e: Examples(e.features, e.query.flip(0), e.label), "query does not ascend"),
    "clicks that are no clicks": (
        lambda e: Examples(e.features, e.query, e.label, e.label + 1),
        "column clicked has other values",
    ),
}


@pytest.mark.parametrize("name", RANKERS)
@pytest.mark.parametrize(("spoil", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_learned_from_is_refused(name: str, spoil: Callable[[Examples], Examples], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RANKERS[name](spoil(planted(RULES["sum"], 10, seed=0)), seed=0)


def few(queries: int, slate: int, columns: int = 5, scale: float = 1.0) -> Examples:
    """The first of each slate is wanted, in every other slate if it is the only one."""
    features = torch.randn(queries * slate, columns, generator=torch.Generator().manual_seed(0)) * scale
    label = torch.zeros(queries, slate)
    label[:: 2 if slate == 1 else 1, 0] = 1.0
    return Examples(features, torch.arange(queries).repeat_interleave(slate), label.flatten())


LITTLE = {
    "two slates of two": few(2, 2),
    "slates of one": few(40, 1),
    "one column": few(20, 10, columns=1),
    "enormous": few(20, 10, scale=1e30),
    "minute": few(20, 10, scale=1e-30),
}


@pytest.mark.parametrize("case", LITTLE)
@pytest.mark.parametrize("name", RANKERS)
def test_little_is_learned_from_or_refused(name: str, case: str) -> None:
    examples = LITTLE[case]
    try:
        ranker = RANKERS[name](examples, seed=0)
    except ValueError as error:
        assert name == "trees" and "no tree found a condition" in str(error)
    else:
        with torch.inference_mode():
            assert ranker(examples.features).isfinite().all()


def test_clicks_teach_what_too_few_purchases_cannot() -> None:
    rule, held = RULES["product"], planted(RULES["product"], 200, seed=1)
    clicks = planted(rule, 1000, seed=0)
    few = clicks.label * (clicks.query < 40)
    alone = RANKERS["mlp"](Examples(clicks.features, clicks.query, few), seed=0)
    both = RANKERS["mlp"](Examples(clicks.features, clicks.query, few, clicks.label), seed=0)
    assert ordered(both, held) > 0.9 > 0.8 > ordered(alone, held)


def test_one_output_is_served_where_two_were_learned(tmp_path: Path) -> None:
    examples = planted(RULES["sum"], 100, seed=0)
    clicked = Examples(examples.features, examples.query, examples.label, 1 - examples.label)
    ranker = RANKERS["mlp"](clicked, seed=0)
    assert isinstance(ranker, Network) and ranker.tasks(examples.features).shape == (2000, 2)
    assert served(ranker, tmp_path).score(examples.features).shape == (2000,)
    assert ordered(ranker, examples) > 0.9, "by what was wanted, not by what was clicked"


def test_windows_are_stacked_with_their_queries_apart() -> None:
    one = planted(RULES["sum"], 3, seed=0)
    clicked = Examples(one.features, one.query, one.label, one.label, NAMES)
    both = stack([clicked, clicked])
    assert both.query.tolist() == [query for query in range(6) for _ in range(SLATE)]
    assert both.clicked is not None and both.names == NAMES
    assert stack([clicked, one]).clicked is None
