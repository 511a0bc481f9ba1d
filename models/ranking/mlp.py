"""A small network over the candidate features."""

from functools import partial
from itertools import pairwise

from torch import nn

from models.ranking import networks

HIDDEN = (64, 32)
DROPOUT = 0.1


def hidden(features: int) -> nn.Sequential:
    sizes = [features, *HIDDEN]
    return nn.Sequential(
        *(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(DROPOUT)))
    )


fit = partial(networks.fit, hidden)
