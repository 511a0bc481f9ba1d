"""Logistic regression, conditional on the slate: a candidate is wanted rather than its neighbours there.

McFadden (1974); with one wanted candidate a slate, the listwise softmax is its likelihood.
"""

from functools import partial

from torch import nn

from models.ranking import networks


def hidden(features: int) -> nn.Identity:
    return nn.Identity()


fit = partial(networks.fit, hidden, rate=2e-2)
