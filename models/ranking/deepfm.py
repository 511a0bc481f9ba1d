"""DeepFM: a factorisation machine beside a network, their scores added (Guo et al., IJCAI 2017).

There the network reads the factors v_i x_i. Over features that are numbers its first layer makes of them no
more than it makes of the x_i themselves, which it reads here.
"""

from functools import partial

from models.ranking import mlp, networks
from models.ranking.fm import WithPairs


def hidden(features: int) -> WithPairs:
    return WithPairs(features, mlp.hidden(features))


fit = partial(networks.fit, hidden)
