"""A factorisation machine: every pair of features interacts, through factors instead of a weight a pair.

Rendle (ICDM 2010), over features that are numbers: <v_i, v_j> x_i x_j. Each of the factors has a weight
of its own in the sum over them, which is 1 in the paper, so that a factor may also count against.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.ranking import networks

FACTORS = 16


class Pairs(nn.Module):
    """By factor, the sum over pairs i < j of v_i x_i v_j x_j: [M, F] -> [M, FACTORS]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.randn(features, FACTORS) / features**0.5)

    def forward(self, standardised: Tensor) -> Tensor:
        # In float32 also where the rest is not: what remains of the difference of two sums has few of their digits.
        x, factors = standardised.float(), self.factors.float()
        return 0.5 * ((x @ factors) ** 2 - (x * x) @ (factors * factors))


class WithPairs(nn.Module):
    """[M, F] -> the features, their `Pairs`, and what `deep` makes of them."""

    def __init__(self, features: int, deep: nn.Module | None = None) -> None:
        super().__init__()
        self.pairs = Pairs(features)
        self.deep = deep

    def forward(self, standardised: Tensor) -> Tensor:
        found = [standardised, self.pairs(standardised)]
        if self.deep is not None:
            found.append(self.deep(standardised))
        return torch.cat(found, 1)


fit = partial(networks.fit, WithPairs, rate=2e-2)
