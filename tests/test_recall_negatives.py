import numpy as np
import pytest
import torch

from models.recall.negatives import Negatives

TARGETED = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize(("targets", "uniform", "popular"), [(8, 4, 0), (0, 8, 0), (8, 2, 6), (3, 1, 4)])
def test_a_sampled_softmax_is_in_the_mean_that_over_the_catalog(targets: int, uniform: int, popular: int) -> None:
    rng = np.random.default_rng(0)
    logit = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.0, -1.0])
    negatives = Negatives(TARGETED, uniform, popular)
    sums = torch.zeros(6)
    trials = 5_000
    for _ in range(trials):
        target = torch.from_numpy(rng.choice(6, targets, p=np.array([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])))
        rows, times = torch.unique(torch.cat([target, negatives.draw(rng)]), return_counts=True)
        sums[rows] += (logit[rows] + negatives.correction(rows, times, targets)).exp()
    torch.testing.assert_close(sums / trials, logit.exp(), rtol=0.06, atol=0.0)


def test_draws_are_as_many_and_as_popular_as_asked_for() -> None:
    drawn = Negatives(TARGETED, uniform=60_000, popular=40_000).draw(np.random.default_rng(0))
    share = torch.bincount(drawn, minlength=6) / 100_000
    torch.testing.assert_close(share, 0.6 / 6 + 0.4 * TARGETED, atol=0.005, rtol=0.0)
    popular = Negatives(TARGETED, uniform=0, popular=1000).draw(np.random.default_rng(0))
    assert len(popular) == 1000 and int(popular.max()) == 3
