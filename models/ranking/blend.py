"""The network and the trees together: what they get wrong, they get wrong differently."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.bundle import Draft
from models.ranking import mlp, trees
from models.ranking.calibration import platt
from models.ranking.examples import Examples, rows_of, sizes, split
from models.ranking.networks import Network
from models.ranking.trees import Forest


@dataclass(slots=True)
class Blend:
    """The sum of the scores of both."""

    network: Network
    forest: Forest
    calibrated: bool = False

    def __call__(self, features: Tensor) -> Tensor:
        found: Tensor = self.network(features) + self.forest(features)
        return found

    def export(self, name: str, features: tuple[str, ...], draft: Draft) -> None:
        """Adds the ranker to the draft, as the program and the forest that the engine adds up."""
        self.network.export(name, features, draft)
        self.forest.export(f"{name}_trees", features, draft)
        forest, program = draft.rankers.pop(), draft.rankers.pop()
        draft.rankers.append(program.model_copy(update={"forest": forest.forest, "calibrated": self.calibrated}))


def fit(
    examples: Examples,
    *,
    seed: int,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train, valid: None,
) -> Blend | Network:
    """Fits both to the same lists and adds up their log-odds; the network alone where lists are too few for a tree.

    Raises `ValueError` where there is nothing to learn.
    """
    network = mlp.fit(examples, seed=seed, on_epoch=on_epoch)
    try:
        forest = trees.fit(examples, seed=seed, on_epoch=on_epoch)
    except ValueError:
        return network
    blend = Blend(network, forest)
    parts = split(examples, torch.Generator().manual_seed(seed))
    rows = rows_of(torch.cat([parts.held, parts.quiet]), sizes(examples))
    with torch.no_grad():
        line = platt(blend(examples.features[rows]).numpy(), examples.label[rows].numpy())
        if line is not None:
            network.last.weight.mul_(line.slope)
            network.last.bias.mul_(line.slope).add_(line.intercept)
            forest.value.mul_(line.slope)
            blend.calibrated = True
    return blend
