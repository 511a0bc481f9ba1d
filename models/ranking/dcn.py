"""DCN-v2: layers that multiply with the input again, beside a network (Wang et al., WWW 2021, parallel)."""

from functools import partial

import torch
from torch import Tensor, nn

from models.ranking import mlp, networks

CROSSES = 2


class Crossed(nn.Module):
    """x' = x0 * (W x + b) + x, `CROSSES` times, with the network's output behind it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(features, features) for _ in range(CROSSES))
        self.deep = mlp.hidden(features)

    def forward(self, standardised: Tensor) -> Tensor:
        found = standardised
        for cross in self.crosses:
            found = standardised * cross(found) + found
        return torch.cat([found, self.deep(standardised)], 1)


fit = partial(networks.fit, Crossed)
