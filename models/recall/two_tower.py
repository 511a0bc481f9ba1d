"""A two-tower network: a user's last events and profile on one side, an item's id and content on the other.

Trained by sampled softmax over the batch's own targets (Yi et al., RecSys 2019) and uniformly drawn items
(mixed negatives; Yang et al., WWW 2020), every sampled logit less the logarithm of how often it is sampled
(Bengio & Senécal, 2008): without that, popular items are pushed away for being popular.

Two things beside that carry the quality. Ids start from the leading singular vectors of the user-item matrix,
which say already who goes with whom (Cremonesi et al., RecSys 2010; Halko et al., 2011). And the network learns
taste from a long past but popularity from the last days: the logits of training are shifted by
log(popularity among targets / popularity now), so that the score alone carries the popularity of now
(prior shift; Saerens et al., 2002).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.batch import PROFILE_BUCKETS, profile_codes
from app.state.events import FOLDED, MS_PER_DAY
from models.recall import STRENGTH, Interactions, Vectors
from models.recall.item_cf import user_items

WIDTH = 128
HEADS = 4
HIDDEN = 128
LEARNING_RATE = 2e-3
TEMPERATURE = 0.2
"""Where the learned temperature starts."""
BATCH = 256
UNIFORM = 4096
"""Uniformly drawn items in a batch."""
TARGETS = 16
"""Events after a moment that it has to foresee."""
EPOCH = 20_000
"""Moments in an epoch, or an eighth of all where that is more."""
MOST_EPOCHS = 30
PATIENCE = 2
HELD_OUT = 0.05
"""Share of the users whose moments only validate."""
VALIDATED = 2048
"""Moments that validate, at most."""
HALF_LIFE_DAYS = 90.0
"""In which a moment becomes half as likely to be learned from."""
NOW_DAYS = 7.0
"""Half-life of an event in the popularity of now."""
NOW_FLOOR = 0.1
"""Share of the long past in the popularity of now, so that nothing is unthinkable."""
FEWEST = 3
"""Items with fewer events are known by their content alone."""
ID_DROPOUT = 0.25
"""Share of the ids hidden in a step, which trains the path that items without an id take. Items without content keep
theirs: nothing else tells them apart."""
NOWHERE = -1e4
"""Attention logit of padding; finite, so that an empty history is no NaN."""


class UserTower(nn.Module):
    """What the engine runs: `forward(history, kinds, ages_s, profile) -> [B, 128]`.

    Each head shares its attention among the events by vector, type and age; padding gets none. The
    vectors that come out have the same length each, 1 / temperature. Few operations, since at one user
    each costs more to start than to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Embedding(256, HEADS)
        nn.init.zeros_(self.kind.weight)
        nn.init.constant_(self.kind.weight[0], NOWHERE)
        # An age of a seconds counts as a ** rate: from heads that forget nothing to heads of this session.
        self.rate = nn.Parameter(-torch.linspace(0.0, 1.0, HEADS))
        self.query = nn.Parameter(torch.randn(1, WIDTH, HEADS) * 0.1)
        self.profile = nn.Embedding(PROFILE_BUCKETS, WIDTH, padding_idx=0)
        nn.init.normal_(self.profile.weight, std=0.02)
        nn.init.zeros_(self.profile.weight[0])
        self.hidden = nn.Linear((HEADS + 1) * WIDTH, HIDDEN)
        self.out = nn.Parameter(torch.randn(HIDDEN, WIDTH) * HIDDEN**-0.5 * 0.5)
        # From the start a user is the mean of their history; the rest learns what that misses.
        self.mix = nn.Linear(HEADS * WIDTH, WIDTH)
        nn.init.zeros_(self.mix.bias)
        self.mix.weight.data.copy_(torch.eye(WIDTH).repeat(1, HEADS) / HEADS)
        self.scale = nn.Parameter(torch.tensor(1.0 / TEMPERATURE / math.sqrt(WIDTH)))

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        age = torch.log1p(ages_s).unsqueeze(2)
        logit = torch.addcmul(self.kind(kinds), age, self.rate)
        share = torch.baddbmm(logit, history, self.query.expand(history.shape[0], -1, -1)).softmax(1)
        pooled = torch.bmm(share.transpose(1, 2), history).flatten(1)
        hidden = F.relu(self.hidden(torch.cat([pooled, self.profile(profile).sum(1)], 1)))
        # Layer norm without weights is an L2 norm in one operation, less the mean.
        return F.layer_norm(torch.addmm(self.mix(pooled), hidden, self.out), (WIDTH,)) * self.scale


class ItemTower(nn.Module):
    """Unit vectors of items, from id and content, or from content alone where the id says nothing yet."""

    def __init__(self, start: Tensor, features: Tensor, known: Tensor) -> None:
        super().__init__()
        # Sparse gradients: a step costs what its items cost, not what the catalog does.
        self.id = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)  # type: ignore[no-untyped-call]
        self.content = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.features = features
        self.known = known
        self.described = features.any(1)

    def forward(self, rows: Tensor, dropout: float = 0.0) -> Tensor:
        known = self.known[rows]
        if dropout:
            known = known * ((torch.rand(len(rows)) >= dropout) | ~self.described[rows])
        return F.normalize(self.id(rows) * known[:, None] + self.content(self.features[rows]), dim=1)


class _Moments:
    """Times of which something can be learned: before each event that is later than the one before it.

    Lines of one basket share their time and so are one moment: none of them is another's history.
    """

    def __init__(self, past: Interactions, history: int) -> None:
        user, row, ts_ms, kind, _ = past
        first = np.ones(len(user), bool)
        first[1:] = user[1:] != user[:-1]
        later = first.copy()
        later[1:] |= ts_ms[1:] != ts_ms[:-1]
        at, begin = np.flatnonzero(later), np.flatnonzero(first)
        owner = np.cumsum(first)[at] - 1
        end = np.append(begin[1:], len(user))[owner]
        wanted = np.append(0, np.cumsum(STRENGTH[kind] > 0))
        useful = wanted[np.minimum(at + TARGETS, end)] > wanted[at]
        self.at, self.begin, self.end = (torch.from_numpy(x[useful]) for x in (at, begin[owner], end))
        self.user = user[at[useful]]
        self.ts_ms = ts_ms[at[useful]]
        self._row = torch.from_numpy(row.astype(np.int64))
        self._kind = torch.from_numpy(kind.astype(np.int64))
        self._strength = torch.from_numpy(STRENGTH[kind])
        self._ts_ms = torch.from_numpy(ts_ms)
        self._history = torch.arange(-history, 0)
        self._targets = torch.arange(TARGETS)

    def before(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, L] (-1 where padding), kinds and ages in seconds of the last events before these moments."""
        at = self.at[chosen, None]
        index = at + self._history
        real = index >= self.begin[chosen, None]
        index = index.clamp(min=0)
        age_s = (self._ts_ms[at] - self._ts_ms[index]).float() / 1000.0
        return (
            torch.where(real, self._row[index], -1),
            torch.where(real, self._kind[index], 0),
            torch.where(real, age_s, 0.0),
        )

    def after(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows wanted next [B, T] (-1 where padding) and how much."""
        index = self.at[chosen, None] + self._targets
        real = index < self.end[chosen, None]
        index = index.clamp(max=len(self._row) - 1)
        strength = torch.where(real, self._strength[index], 0.0)
        rows, order = torch.where(strength > 0, self._row[index], -1).sort(dim=1)
        again = torch.zeros_like(real)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]
        return torch.where(again, -1, rows), strength.gather(1, order)


def fit(
    past: Interactions,
    *,
    features: npt.NDArray[np.float32],
    profiles: Sequence[Mapping[str, str]],
    history: int = 64,
    profile: int = 8,
    seed: int = 0,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train, valid: None,
) -> Vectors:
    """Trains until the loss on held-out users stops falling, and keeps the best epoch.

    `features` [n, d] are of the items (`content.features`), `profiles` of the users by number. The same
    seed gives the same network on one thread. A million items with 130 features need some 4 GB.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    n_items = past.n_items
    # The service keeps no other events, so the encoder must not learn from them either.
    past = past.where(np.isin(past.kind, list(FOLDED)))
    moments = _Moments(past, history)
    held = np.zeros(len(profiles), bool)
    people = rng.permutation(np.unique(moments.user))
    held[people[: int(HELD_OUT * len(people))]] = True

    # The start must not know the held-out users, or validation would find it better than it is.
    start = _spectral(past.where(~held[past.user]), rng)
    known = torch.from_numpy((np.bincount(past.row, minlength=n_items) >= FEWEST).astype(np.float32))
    items, users = ItemTower(torch.from_numpy(start), torch.from_numpy(features), known), UserTower()
    losses: list[tuple[float, float]] = []
    if len(moments.at):
        codes = torch.tensor([profile_codes(attributes, profile) for attributes in profiles])
        _train(items, users, moments, held, codes, _now(past), rng, losses, on_epoch)
    with torch.inference_mode():
        vectors = torch.cat([items(rows) for rows in torch.split(torch.arange(n_items), 65_536)])
    return Vectors(vectors.numpy(), users.eval(), history, profile, losses=tuple(losses))


def _train(
    items: ItemTower,
    users: UserTower,
    moments: _Moments,
    held: npt.NDArray[np.bool_],
    codes: Tensor,
    now: Tensor,
    rng: np.random.Generator,
    losses: list[tuple[float, float]],
    on_epoch: Callable[[int, float, float], None],
) -> None:
    n_items = len(now)
    owner = torch.from_numpy(moments.user.astype(np.int64))
    weight = np.exp2(-(moments.ts_ms.max() - moments.ts_ms) / MS_PER_DAY / HALF_LIFE_DAYS)
    validating = held[moments.user]
    train = np.flatnonzero(~validating)
    chance = weight[train] / weight[train].sum()
    valid = np.flatnonzero(validating) if validating.any() else train
    if len(valid) > VALIDATED:
        valid = rng.choice(valid, VALIDATED, replace=False, p=weight[valid] / weight[valid].sum())
    targeted = _targeted(moments, torch.from_numpy(train), torch.from_numpy(chance).float(), n_items)
    now = (1.0 - NOW_FLOOR) * now + NOW_FLOOR * targeted
    shift = torch.where(targeted > 0, torch.log(targeted / now.clamp(min=1e-12)), 0.0)

    def loss(chosen: Tensor, drawn: Tensor, dropout: float) -> Tensor:
        past, kinds, ages_s = moments.before(chosen)
        wanted, strength = moments.after(chosen)
        moment, place = (wanted >= 0).nonzero(as_tuple=True)
        target = wanted[moment, place]
        # Every item of the batch goes through the tower once. Row 0 of `vectors` stays for padding.
        rows, index = torch.unique(
            torch.cat([past.new_tensor([-1]), past.flatten(), target, drawn]), return_inverse=True
        )
        vectors = F.pad(items(rows[1:], dropout), (0, 0, 1, 0))
        of_past, of_sampled = index[1 : 1 + past.numel()], index[1 + past.numel() :]
        vector = users(F.embedding(of_past, vectors).view(*past.shape, WIDTH), kinds, ages_s, codes[owner[chosen]])
        sampled, times = torch.unique(of_sampled, return_counts=True)
        row = rows[sampled]
        logit = vector @ F.embedding(sampled, vectors).T + shift[row]
        expected = len(target) * targeted[row] + len(drawn) / n_items
        column = torch.searchsorted(sampled, of_sampled[: len(target)])
        own = logit[moment, column]
        # No wanted item may serve as a negative of its own moment.
        others = (logit + torch.log(times / expected)).index_put((moment, column), torch.tensor(-torch.inf))
        rest = others.logsumexp(1)[moment]
        weights = strength[moment, place] / (wanted >= 0).sum(1)[moment]
        total: Tensor = ((torch.logaddexp(own, rest) - own) * weights).sum() / weights.sum()
        return total

    dense = [parameter for name, parameter in items.named_parameters() if name != "id.weight"]
    optimisers = (
        torch.optim.Adam([*dense, *users.parameters()], lr=LEARNING_RATE, fused=True),
        torch.optim.SparseAdam([items.id.weight], lr=LEARNING_RATE),
    )
    size = min(len(train), max(EPOCH, len(train) // 8))
    validation = torch.split(torch.from_numpy(valid), BATCH)
    negatives = [torch.from_numpy(rng.integers(0, n_items, UNIFORM)) for _ in validation]
    best, waited = math.inf, 0
    kept = copy.deepcopy((items.state_dict(), users.state_dict()))
    for epoch in range(MOST_EPOCHS):
        taught = []
        for chosen in torch.split(torch.from_numpy(rng.choice(train, size, p=chance)), BATCH):
            value = loss(chosen, torch.from_numpy(rng.integers(0, n_items, UNIFORM)), ID_DROPOUT)
            for optimiser in optimisers:
                optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            for optimiser in optimisers:
                optimiser.step()
            taught.append(value.item())
        with torch.no_grad():
            tested = [loss(*pair, 0.0).item() for pair in zip(validation, negatives, strict=True)]
        losses.append((float(np.mean(taught)), float(np.mean(tested))))
        on_epoch(epoch, *losses[-1])
        if losses[-1][1] < best - 1e-4:
            best, waited = losses[-1][1], 0
            kept = copy.deepcopy((items.state_dict(), users.state_dict()))
        elif (waited := waited + 1) >= PATIENCE:
            break
    items.load_state_dict(kept[0])
    users.load_state_dict(kept[1])


def _targeted(moments: _Moments, train: Tensor, chance: Tensor, n_items: int) -> Tensor:
    """float32 [n]: the share of each item among the targets that training will see."""
    total = torch.zeros(n_items)
    for chosen, weight in zip(torch.split(train, 65_536), torch.split(chance, 65_536), strict=True):
        rows, _ = moments.after(chosen)
        moment, place = (rows >= 0).nonzero(as_tuple=True)
        total += torch.bincount(rows[moment, place], weight[moment], minlength=n_items)
    return total / total.sum()


def _now(past: Interactions) -> Tensor:
    """float32 [n]: the share of each item in what is wanted now."""
    age_days = (past.ts_ms.max() - past.ts_ms) / MS_PER_DAY
    total = np.bincount(past.row, STRENGTH[past.kind] * np.exp2(-age_days / NOW_DAYS), minlength=past.n_items)
    return torch.from_numpy(total / max(total.sum(), 1e-12)).float()


def _spectral(past: Interactions, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """[n, 128] of mean square length 1: the leading right singular vectors of the user-item matrix, items damped
    by the root of their strength, each vector times the root of its singular value."""
    matrix, n_items = user_items(past, HALF_LIFE_DAYS), past.n_items
    if not matrix.nnz:
        return np.zeros((n_items, WIDTH), np.float32)
    strength = np.asarray(matrix.multiply(matrix).sum(0)).ravel()
    damped = 1.0 / np.sqrt(strength + 0.3 * strength[strength > 0].mean())
    matrix = (matrix @ sp.diags_array(damped.astype(np.float32))).tocsr()
    transposed = matrix.T.tocsr()
    width = min(n_items, WIDTH + 16)
    basis = np.linalg.qr(rng.standard_normal((n_items, width)).astype(np.float32))[0]
    for _ in range(4):
        basis = np.linalg.qr(transposed @ (matrix @ basis))[0]
    small = matrix @ basis
    _, squared, right = np.linalg.svd(small.T @ small)
    vectors = np.zeros((n_items, WIDTH), np.float32)
    kept = min(width, WIDTH)
    vectors[:, :kept] = (basis @ right.T[:, :kept]) * squared[:kept] ** 0.25
    vectors /= np.sqrt((vectors**2).sum(1).mean()) + 1e-12
    return vectors
