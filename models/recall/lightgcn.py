"""LightGCN (He et al., SIGIR 2020): vectors learned through the graph of users and items, users known by their items.

A user starts from nothing, not from a vector of their own (as INMO; Wu et al., SIGIR 2022), so that three layers of
propagation over R, the user-item matrix divided by the roots of both degrees, are

    items = E + R'R E        users = R items

and a user's vector begins as a sum over their items. Where the paper's training would have gone on to fit a vector of
the user's own, the service does: a few steps down the same loss (`FoldIn`). Two more changes make a thousand epochs a
few: a sampled softmax over cosines in the place of BPR (Wu et al., TOIS 2024), and a start from the leading singular
vectors of R. Since a cosine alone knows no popularity, an item's score has a bias of its own, learned with the rest.
"""

import math
from collections.abc import Iterator

import faiss
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recall import Interactions, Vectors
from models.recall.ease import user_items
from models.recall.mf import Weights, bag, product
from models.recall.spectral import damped, degrees, leading
from models.recall.training import Losses, Run, train

TEMPERATURE = 0.1
LEARNING_RATES = 0.02, 0.001
"""Of vectors and of biases, both in units of a cosine."""
WARM_UP = 10
"""Steps in which the learning rates are reached; over the others they fall to zero."""
BATCH = 32, 1024
"""Users in a step: the most, or less where an epoch would have fewer than 16 steps, but not below the least."""
NEGATIVES = 12_288
"""Uniformly drawn items in a step, or all there are: the more, the better it ranks."""
STEPS = 3
"""In which a user's vector is fitted."""
RATE = 3.0
"""Of a step for a history of one event; it grows with the fourth root of their number."""
CENTRES = 256
"""Clusters that stand for all items when a user's vector is fitted."""


class FoldIn(nn.Module):
    """`forward(history, kinds, ages_s, profile) -> [B, d + 1]`: unit vectors that tell a history from all other items,
    and a one for the items' biases.

    From the sum of what the history holds of its items it takes steps down the loss of training, the softmax over all
    items, with `centres` [C, d] in their place, each with the `bias` [C] of all that it stands for. What the history
    holds of an item is d wide, followed by one through its length.
    """

    def __init__(self, centres: Tensor, bias: Tensor, half_life_days: float | None) -> None:
        super().__init__()
        self.weights = Weights(half_life_days)
        self.centres = nn.Buffer(centres)
        self.bias = nn.Buffer(bias)

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        weight = self.weights(kinds, ages_s)
        total = weight.sum(1, keepdim=True)
        # Shares, since of what is years ago hardly any weight is left.
        weight = weight / total.clamp(min=1e-37)
        # Events are as many as equal weights would be (Kish): the more speak, the further the fit may go.
        # Clamped for those without any.
        rate = RATE * (weight * weight).sum(1, keepdim=True).clamp(min=1e-6) ** -0.25
        summed = torch.bmm(torch.stack([weight, weight * history[:, :, -1]], 1), history)
        added, own = summed[:, :, :-1].unbind(1)
        user, centres = F.normalize(added, dim=1) / TEMPERATURE, self.centres.t()
        for _ in range(STEPS):
            share = torch.addmm(self.bias, user, centres).softmax(1)
            user = torch.addcmul(user, rate, torch.addmm(own, share, self.centres, alpha=-1))
        found: Tensor = F.pad(F.normalize(user, dim=1), (0, 1), value=1.0) * (total > 0)
        return found


def fit(
    past: Interactions,
    *,
    half_life_days: float | None = 60.0,
    width: int = 128,
    epochs: int = 16,
    history: int = 64,
    seed: int = 0,
    run: Run = Run(),
) -> Vectors:
    """Learns to tell what each user had from items drawn uniformly, each by its weight in `user_items`.

    One of the `width` is the bias.

    The same seed gives the same vectors on one thread.
    """
    matrix = user_items(past, int(past.ts_ms.max(initial=0)), half_life_days)
    active, n_items = np.flatnonzero(np.diff(matrix.indptr)), matrix.shape[1]
    walk = damped(matrix, 0.5, 0.5)
    back = walk.T.tocsr()
    of_item = torch.from_numpy(degrees(matrix, 0))[:, None].to(run.device)
    rng = np.random.default_rng(seed)
    values, right = leading(walk, width - 1, rng)
    start = right * values
    start *= math.sqrt(n_items) / (float(np.linalg.norm(start)) + 1e-12)
    table = nn.Parameter(torch.from_numpy(start).to(run.device))
    bias = nn.Parameter(torch.zeros(n_items, 1, device=run.device))

    def outputs() -> tuple[Tensor, Tensor]:
        """What a history holds of each item, and the unit vector of its cosine."""
        items = table + product(back, product(walk, table))
        return items * of_item**-0.5, F.normalize(items, dim=1)

    steps = math.ceil(len(active) / np.clip(len(active) / 16, *BATCH))
    parameters = [{"params": [parameter]} for parameter in (table, bias)]
    optimiser = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)

    def batches(epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        for step, users in enumerate(np.array_split(rng.permutation(active), steps), epoch * steps):
            for group, rate in zip(optimiser.param_groups, LEARNING_RATES, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * (1.0 - step / (epochs * steps))
            yield users

    def loss(users: npt.NDArray[np.int64]) -> Tensor:
        inputs, unit = outputs()
        items, wanted = torch.cat([unit, bias], 1), matrix[users]
        vectors = F.pad(bag(wanted, inputs), (0, 1), value=1.0) / TEMPERATURE
        drawn = torch.from_numpy(rng.permutation(n_items)[:NEGATIVES]).to(run.device)
        any_item = (vectors @ items[drawn].T).float().logsumexp(1) + math.log(n_items / len(drawn))
        weight = torch.from_numpy(np.asarray(wanted.sum(1), np.float32).ravel()).to(run.device)
        own = (vectors * product(wanted, items)).sum(1)
        return (weight * any_item - own).sum() / weight.sum()

    checkpoint = run.checkpoint(past[:4], items=n_items, decay=half_life_days, width=width, epochs=epochs, seed=seed)
    losses: Losses = ()
    if steps:
        model = nn.ParameterList([table, bias])
        losses = train(model, [optimiser], batches, loss, None, rng, epochs=epochs, run=run, checkpoint=checkpoint)
    with torch.no_grad():
        inputs, unit = outputs()
        encoder = FoldIn(*_clusters(unit.cpu(), bias[:, 0].cpu() / TEMPERATURE, seed), half_life_days)
        items = torch.cat([unit, bias], 1)
        # Known of an item, not to be found out for every event. float16 goes to 65,504.
        shortened = (1 / torch.linalg.vector_norm(inputs, dim=1, keepdim=True)).clamp(max=6e4)
        inputs = torch.cat([inputs, shortened], 1)
    return Vectors(items.cpu().numpy(), encoder.eval(), history, inputs=inputs.cpu().numpy(), losses=losses)


def _clusters(items: Tensor, bias: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Centres of the items, and the bias that each has for all around it; the items themselves where these are few."""
    if len(items) <= CENTRES:
        return items, bias
    bounds = {"min_points_per_centroid": 1, "max_points_per_centroid": 256}
    clusters = faiss.Kmeans(items.shape[1], CENTRES, niter=10, seed=seed + 1, **bounds)
    clusters.train(items.numpy())
    nearest = torch.from_numpy(clusters.index.search(items.numpy(), 1)[1][:, 0])
    # An empty cluster is of no weight, of which there is a logarithm.
    sums = torch.full((CENTRES,), 1e-6).index_add_(0, nearest, bias.exp())
    return torch.from_numpy(clusters.centroids), sums.log()
