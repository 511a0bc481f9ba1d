"""What the target of a softmax is told from, where the catalog is too large for all of it.

The other targets of the batch, and items drawn uniformly, as the batch lacks the rare ones (mixed negatives; Yang et
al., WWW 2020), or by popularity; every sampled logit less the logarithm of how often it is sampled (Bengio & Senécal,
2008). Without that, popular items are pushed away for being popular.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Negatives:
    """Draws `uniform` items uniformly and `popular` ones as often as they are `targeted` for each step."""

    targeted: Tensor
    """float32 [n]: the share of each item among the targets."""
    uniform: int
    popular: int = 0
    _below: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_below", np.cumsum(self.targeted.cpu().double().numpy()))

    def draw(self, rng: np.random.Generator) -> Tensor:
        """int64 [uniform + popular], on the device of `targeted`."""
        uniform = rng.integers(0, len(self.targeted), self.uniform)
        popular = np.searchsorted(self._below, rng.random(self.popular) * self._below[-1], "right")
        return torch.from_numpy(np.append(uniform, popular)).to(self.targeted.device)

    def correction(self, rows: Tensor, times: Tensor, targets: int) -> Tensor:
        """What to add to the logits of these rows [S] of a step, which came `times` among its targets and draws.

        The sum of the corrected exponentials is in the mean that over the whole catalog.
        """
        expected = (targets + self.popular) * self.targeted[rows] + self.uniform / len(self.targeted)
        return torch.log(times / expected)
