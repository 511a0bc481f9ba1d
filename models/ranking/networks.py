"""Rankers that are networks: each candidate by itself, trained on whole slates."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from app.bundle import Draft, RankerSpec
from app.engine.program import save_program
from models.ranking.calibration import platt
from models.ranking.examples import Examples, of_query, rows_of, sizes, split

CLIP = 4.0
"""Standard deviations beyond which a feature counts no further: one absurd price must not carry an item to the top."""
CLICK_WEIGHT = 0.3
"""Of the click task's loss; the wanted task's is 1."""


class Network(nn.Module):
    """score = linear(hidden(standardised features)), one column a task.

    With clicks to learn from there are two tasks on one body: wanted and clicked. What is served is the head for
    wanted. The product of the two (ESMM: Ma et al., SIGIR 2018) takes a purchase for a click and then a conversion, and
    would put last whatever goes from a list into the cart unseen. Clicks, far more numerous, are here to teach the
    body.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden: nn.Module, mean: Tensor, deviation: Tensor, tasks: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1.0 / deviation)
        self.hidden = hidden
        width = hidden.eval()(torch.zeros(1, len(mean))).shape[1]
        self.last = nn.Linear(width, tasks)
        self.calibrated = False

    def tasks(self, features: Tensor) -> Tensor:
        """float32 [M, T]: wanted, and clicked where it was learned."""
        standard = ((features - self.mean) * self.scale).clamp(-CLIP, CLIP)
        scores: Tensor = self.last(self.hidden(standard))
        return scores

    def forward(self, features: Tensor) -> Tensor:
        return self.tasks(features)[:, 0]

    def export(self, name: str, features: tuple[str, ...], draft: Draft) -> None:
        """Adds the ranker to the draft, as the program that the engine runs."""
        rows = torch.export.Dim("rows", min=1)
        example = torch.zeros(8, len(features), dtype=torch.bfloat16)
        exported = torch.export.export(_Served(self).eval(), (example,), dynamic_shapes=({0: rows},))
        standard = {"mean": self.mean, "scale": self.scale, "clip": torch.full_like(self.mean, CLIP)}
        draft.rankers.append(
            RankerSpec(
                name=name,
                program=save_program(exported, draft.path / f"ranker_{name}.pt2"),
                standard=draft.save(f"ranker_{name}.safetensors", standard),
                features=features,
                calibrated=self.calibrated,
            )
        )


class _Served(nn.Module):
    """The same network on standardised features, its hidden layers in bfloat16.

    Processors with bfloat16 instructions run it five times as fast as in float32, at one thread and
    14,000 rows; the ranking moves by less than a seed's worth. The last layer is exact, or near ties
    would become real ones.
    """

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.hidden = copy.deepcopy(model.hidden).bfloat16()
        self.last = nn.Linear(model.last.in_features, 1)
        with torch.no_grad():
            self.last.weight.copy_(model.last.weight[:1])
            self.last.bias.copy_(model.last.bias[:1])

    def forward(self, standardised: Tensor) -> Tensor:
        scores: Tensor = self.last(self.hidden(standardised).float())
        return scores.squeeze(1)


def fit(
    hidden: Callable[[int], nn.Module],
    examples: Examples,
    *,
    seed: int,
    epochs: int = 10,
    slates: int = 32,
    rate: float = 2e-3,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train, valid: None,
) -> Network:
    """Trains by listwise softmax cross-entropy (ListNet; Cao et al., ICML 2007), one list a query.

    `hidden` makes the body for so many features. A tenth of the queries is held out, and the epoch that ranks it best
    is kept. Queries without a positive candidate teach nothing here and are left out. On the held-out tenth the scores
    become log-odds of being wanted. Raises `ValueError` where there is nothing to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    parts = split(examples, generator)
    train, valid = parts.train, parts.held
    labels, positives = examples.label[:, None], of_query(examples, examples.label)[:, None]
    weights = torch.ones(1)
    if examples.clicked is not None and examples.clicked.any():
        clicks = of_query(examples, examples.clicked)
        looked = (clicks > 0) & (positives[:, 0] == 0)
        looked[parts.quiet] = False
        train = torch.cat([train, looked.nonzero().squeeze(1)])
        labels = torch.stack([examples.label, examples.clicked], 1)
        positives = torch.cat([positives, clicks[:, None]], 1)
        weights = torch.tensor([1.0, CLICK_WEIGHT])
    counts = sizes(examples)
    mean, deviation = examples.features.mean(0), examples.features.std(0)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)
    model = Network(hidden(len(mean)), mean, deviation, len(weights))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * -(-len(train) // slates))

    def loss(chosen: Tensor) -> Tensor:
        """[T]: means over the queries with a positive candidate of the task."""
        rows = rows_of(chosen, counts)
        place = torch.repeat_interleave(torch.arange(len(chosen)), counts[chosen])
        column = torch.cat([torch.arange(int(counts[q])) for q in chosen])
        scores = model.tasks(examples.features[rows])
        padded = torch.full((len(chosen), int(counts[chosen].max()), len(weights)), -torch.inf)
        log_share = padded.index_put((place, column), scores).log_softmax(1)[place, column]
        share = labels[rows] / positives[chosen].clamp(min=1)[place]
        return -(log_share * share).sum(0) / (positives[chosen] > 0).sum(0).clamp(min=1)

    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        model.train()
        total = 0.0
        order = train[torch.randperm(len(train), generator=generator)]
        for start in range(0, len(order), slates):
            optimiser.zero_grad()
            value = (loss(order[start : start + slates]) * weights).sum()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += value.item() * len(order[start : start + slates])
        model.eval()
        with torch.inference_mode():
            losses = [loss(valid[start : start + slates])[0].item() for start in range(0, len(valid), slates)]
        now = float(np.mean(losses))
        on_epoch(epoch, total / len(train), now)
        if now < best:
            best, kept = now, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    _calibrate(model.eval(), examples, torch.cat([parts.held, parts.quiet]))
    return model


@torch.no_grad()
def _calibrate(model: Network, examples: Examples, queries: Tensor) -> None:
    """Makes the last layer give log-odds: a probability then costs the engine nothing, and no order is lost to a
    sigmoid that rounds to 1."""
    rows = rows_of(queries, sizes(examples))
    line = platt(model(examples.features[rows]).numpy(), examples.label[rows].numpy())
    if line is not None:
        model.last.weight[0] *= line.slope
        model.last.bias[0] = model.last.bias[0] * line.slope + line.intercept
        model.calibrated = True
