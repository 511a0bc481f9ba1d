import numpy as np
import pytest
import torch
import torch.nn.functional as F

from app.state.events import EventType
from models.recall import lightgcn
from models.recall.lightgcn import CENTRES, TEMPERATURE, FoldIn
from tests.test_recall_mf import two_components
from tests.test_recall_spectral import bought, scores


def test_a_checkerboard_is_told_apart() -> None:
    past = bought([(u, i) for u in range(40) for i in range(10) if u % 2 == i % 2 and u // 2 % 5 != i // 2], 10)
    found = scores([[0, 2], [1, 3]], lightgcn.fit(past, width=8, history=4))
    assert found[0, 0::2].min() > found[0, 1::2].max()
    assert found[1, 1::2].min() > found[1, 0::2].max()


def test_nothing_of_another_component_ranks_above_the_own() -> None:
    found = scores([[0, 5], [12, 20, 30]], lightgcn.fit(two_components(), width=4, history=4))
    assert found[0, :12].min() > found[0, 12:].max()
    assert found[1, 12:].min() > found[1, :12].max()


def test_training_improves_on_its_start() -> None:
    losses = lightgcn.fit(two_components(), width=8).losses
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 1)]])
def test_nothing_to_learn_from_still_gives_vectors(pairs: list[tuple[int, int]]) -> None:
    fitted = lightgcn.fit(bought(pairs, 3), history=2)
    assert len(fitted.items) == 3
    assert np.isfinite(scores([[], [0], [1, 2]], fitted)).all()
    assert not scores([[]], fitted).any()


def test_a_seed_gives_the_same_vectors() -> None:
    one, again, other = (lightgcn.fit(two_components(), width=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.items, again.items)
    assert one.losses == again.losses
    assert not np.array_equal(one.items, other.items)


def fold_in(items: torch.Tensor, history: list[int], padding: int = 0, days: float = 0.0) -> torch.Tensor:
    """The vector of who bought these items, of a catalog that is its own centres."""
    encoder = FoldIn(items, bias(items), 60.0)
    held = F.pad(3.0 * items, (0, 1), value=1 / 3)
    read = torch.cat([torch.full((1, padding, held.shape[1]), 7.0), held[None, history]], 1)
    kinds = torch.tensor([[0] * padding + [EventType.PURCHASE] * len(history)])
    vector: torch.Tensor = encoder(read, kinds, torch.full(kinds.shape, days * 86_400), torch.zeros(1, 1).long())[0]
    return vector


def bias(items: torch.Tensor) -> torch.Tensor:
    """Of logits: half of the items are well liked."""
    return torch.arange(len(items)) % 2 * 3.0


def test_a_user_is_told_from_the_rest_better_than_by_a_sum_and_the_better_the_more_events() -> None:
    items = F.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    history = list(range(12))

    def loss(user: torch.Tensor) -> float:
        logit = items @ user / TEMPERATURE + bias(items)
        return float(logit.logsumexp(0) - logit[history].mean())

    once, summed = loss(fold_in(items, history)[:-1]), loss(F.normalize(items[history].sum(0), dim=0))
    assert once < summed - 0.02
    assert loss(fold_in(items, history * 3)[:-1]) < once - 0.001


def test_padding_and_the_length_of_vectors_say_nothing_of_a_user() -> None:
    items = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    torch.testing.assert_close(fold_in(items, [3, 4, 5]), fold_in(items, [5, 3, 4], padding=4))
    *cosines, one = fold_in(items, [3])
    assert torch.stack(cosines).norm() == pytest.approx(1.0, abs=1e-6)
    assert one == 1.0
    assert not fold_in(items, [], padding=3).any()


def test_a_history_of_long_ago_is_the_same_history() -> None:
    items = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    torch.testing.assert_close(fold_in(items, [3, 4, 5], days=3650.0), fold_in(items, [3, 4, 5]))


def test_clusters_stand_for_all_items_and_their_biases() -> None:
    rng = np.random.default_rng(0)
    few, logits = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((CENTRES, 4), CENTRES))
    centres, bias = lightgcn._clusters(few, logits, 0)
    assert torch.equal(centres, few)
    assert torch.equal(bias, logits)
    many = few.repeat(3, 1)
    centres, bias = lightgcn._clusters(many, logits.repeat(3), 0)
    assert centres.shape == few.shape
    torch.testing.assert_close(bias.logsumexp(0), logits.repeat(3).logsumexp(0), atol=0.01, rtol=0.0)
    centres, bias = lightgcn._clusters(many, torch.zeros(len(many)), 0)
    torch.testing.assert_close((centres * bias.exp()[:, None]).sum(0), many.sum(0), atol=0.5, rtol=0.01)


def test_of_items_alike_the_more_often_bought_has_the_higher_bias() -> None:
    rng = np.random.default_rng(0)
    often = np.arange(1, 21) / 210
    pairs = [(u, u % 20 * 20 + int(i)) for u in range(600) for i in rng.choice(20, 5, replace=False, p=often)]
    fitted = lightgcn.fit(bought(pairs, 400), width=8)
    biases = fitted.items[:, -1].reshape(20, 20)
    assert np.mean([np.corrcoef(bias, np.log(often))[0, 1] for bias in biases]) > 0.6
    np.testing.assert_allclose(np.linalg.norm(fitted.items[:, :-1], axis=1), 1.0, rtol=1e-5)
