"""Weights fitted for fusion, where it is known which source is right."""

import pytest
import torch

from app.bundle import Bundle
from app.engine import Query
from app.engine.features import feature_names
from app.engine.pipeline import Pipeline
from app.engine.ranking import weighted
from app.state.events import EventType
from models.ranking import Examples, stack, weights
from tests.test_pipeline import user_of
from tests.tiny import NOW_MS

QUERIES, SLATE = 200, 30
NAMES = ("right.score", "right.rank", "wrong.score", "wrong.rank", "half.score", "half.rank")


def told(*signals: torch.Tensor) -> list[torch.Tensor]:
    """The features of sources that propose every candidate and score it so, [QUERIES, SLATE]."""
    columns = []
    for signal in signals:
        rank = signal.argsort(1, descending=True).argsort(1).float()
        columns += [torch.sign(signal) * torch.log1p(100 * signal.abs()), 10 / (10 + rank)]
    return [column.flatten() for column in columns]


def planted() -> Examples:
    generator = torch.Generator().manual_seed(0)
    right, wrong, noise = torch.randn(3, QUERIES, SLATE, generator=generator)
    label = torch.zeros(QUERIES, SLATE).scatter_(1, right.topk(3).indices, 1.0)
    features = torch.stack(told(right, wrong, right + 2 * noise), 1)
    return Examples(features, torch.arange(QUERIES).repeat_interleave(SLATE), label.flatten(), names=NAMES)


def test_the_source_that_is_right_has_the_say() -> None:
    found = weights.fit(planted(), ("right", "wrong", "half"), seed=0)
    assert found["right"] == 1.0
    assert found["wrong"] == pytest.approx(weights.LEAST)
    assert found["half"] < 0.3


def test_the_order_of_sources_is_kept_and_the_seed_decides() -> None:
    found = weights.fit(planted(), ("half", "right", "wrong"), seed=0)
    assert list(found) == ["half", "right", "wrong"]
    assert found == weights.fit(planted(), ("half", "right", "wrong"), seed=0)


def test_weights_that_rank_no_better_are_not_taken() -> None:
    examples = planted()
    # What is wanted of the held-out tenth is what the others would not want.
    held = weights.split(examples, torch.Generator().manual_seed(0)).held
    turned = torch.isin(examples.query, held)
    label = examples.label.view(QUERIES, SLATE)
    signal = examples.features[:, 0].view(QUERIES, SLATE)
    worst = torch.zeros(QUERIES, SLATE).scatter_(1, (-signal).topk(3).indices, 1.0)
    label = torch.where(turned.view(QUERIES, SLATE), worst, label).flatten()
    found = weights.fit(Examples(examples.features, examples.query, label, names=NAMES), ("right", "wrong"), seed=0)
    assert found == {"right": 1.0, "wrong": 1.0}


def test_what_teaches_nothing_is_refused() -> None:
    examples = planted()
    nothing = Examples(examples.features, examples.query, torch.zeros_like(examples.label), names=NAMES)
    with pytest.raises(ValueError, match="no candidate was wanted by anybody"):
        weights.fit(nothing, ("right", "wrong"), seed=0)


def test_features_say_what_the_fusion_sees(tiny: Bundle) -> None:
    pipeline = Pipeline(tiny, torch.device("cpu"), 8)
    scene = pipeline.scenes["home"]
    names = [source.name for source in scene.sources]
    queries = [Query(str(number)) for number in range(3)]
    histories = [[], [("a1", EventType.VIEW_ITEM)], [("b2", EventType.PURCHASE), ("a3", EventType.VIEW_ITEM)]]
    states = [user_of(history) for history in histories]
    with torch.inference_mode():
        prepared = pipeline.prepare(scene, queries, states, NOW_MS)
        features = pipeline.features(prepared).clone()
        expected = weighted(prepared.candidates, torch.ones(len(names)))
    columns = feature_names(names, tiny.manifest.statistics)
    examples = Examples(features, prepared.candidates.query.clone(), torch.zeros(len(features)), names=columns)
    assert torch.allclose(weights.scaled(examples, names).mean(0), expected, atol=1e-4)


def test_windows_with_other_sources_have_the_rest_in_common() -> None:
    one = planted()
    less = Examples(one.features[:, [2, 3, 0, 1]], one.query, one.label, names=(*NAMES[2:4], *NAMES[:2]))
    both = stack([one, less])
    assert both.names == NAMES[:4]
    assert torch.equal(both.features[len(one.label) :], one.features[:, :4])
