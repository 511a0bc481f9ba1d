"""A two-tower network: a user's last events and profile on one side, an item's id and content on the other.

Trained by sampled softmax over the batch's own targets (Yi et al., RecSys 2019) and drawn items, corrected for how
often each is sampled (`negatives`).

Two things beside that carry the quality. Ids start from the leading singular vectors of the user-item matrix,
which say already who goes with whom (Cremonesi et al., RecSys 2010; Halko et al., 2011). And the network learns
taste from a long past but popularity from the last days: the logits of training are shifted by
log(popularity among targets / popularity now), so that the score alone carries the popularity of now
(prior shift; Saerens et al., 2002).

Where most users have but one basket there is no order to learn. All of such a set is then told from all of it, as an
autoencoder's input is (Liang et al., WWW 2018), at cosines of a fixed temperature and rates of their own (`SETS`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
from models.recall.moments import Moments, held_out, owners
from models.recall.negatives import Negatives
from models.recall.streaming import PART, Parts, spilled
from models.recall.training import Checkpoint, Losses, Run, train

WIDTH = 64
HEADS = 4
HIDDEN = 128
LEARNING_RATE = 6e-4
BATCH = 256
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


@dataclass(frozen=True, slots=True)
class Manner:
    """How a log is learned from."""

    sets: bool
    """Whether users of one basket are sets, of which every event counts alike; else it is the moments that do."""
    temperature: float
    """Where the learned temperature starts, or of sets stays: who may copy is soon too sure."""
    uniform: int
    """Uniformly drawn items in a batch."""
    id_rate: float
    """Learning rate of the ids in the first epoch."""
    decay: float
    """What an epoch leaves of the learning rates."""
    popularity: float
    """Power of an item's events that its vector is scaled by: who tells a set from itself need not know what is
    popular."""


SEQUENCES = Manner(sets=False, temperature=0.2, uniform=4096, id_rate=LEARNING_RATE, decay=1.0, popularity=0.0)
SETS = Manner(sets=True, temperature=0.1, uniform=12_288, id_rate=2e-2, decay=0.85, popularity=0.05)


class UserTower(nn.Module):
    """What the engine runs: `forward(history, kinds, ages_s, profile) -> [B, width]`.

    Each head shares its attention among the events by vector, type and age; padding gets none. The
    vectors that come out have the same length each, 1 / temperature. Few operations, since at one user
    each costs more to start than to do.
    """

    def __init__(self, width: int = WIDTH, manner: Manner = SEQUENCES) -> None:
        super().__init__()
        self.kind = nn.Embedding(256, HEADS)
        nn.init.zeros_(self.kind.weight)
        nn.init.constant_(self.kind.weight[0], NOWHERE)
        # An age of a seconds counts as a ** rate: from heads that forget nothing to heads of this session.
        self.rate = nn.Parameter(-torch.linspace(0.0, 1.0, HEADS)[:, None])
        self.query = nn.Parameter(torch.randn(1, HEADS, width) * 0.1)
        self.profile = nn.Embedding(PROFILE_BUCKETS, width, padding_idx=0)
        nn.init.normal_(self.profile.weight, std=0.02)
        nn.init.zeros_(self.profile.weight[0])
        self.hidden = nn.Linear((HEADS + 1) * width, HIDDEN)
        self.out = nn.Parameter(torch.randn(HIDDEN, width) * HIDDEN**-0.5 * 0.5)
        # From the start a user is the mean of their history; the rest learns what that misses.
        self.mix = nn.Linear(HEADS * width, width)
        nn.init.zeros_(self.mix.bias)
        self.mix.weight.data.copy_(torch.eye(width).repeat(1, HEADS) / HEADS)
        scale = torch.tensor(1.0 / manner.temperature / math.sqrt(width))
        self.scale = nn.Parameter(scale, requires_grad=not manner.sets)

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        age = torch.log1p(ages_s).unsqueeze(1)
        # Heads before events: a softmax over what lies side by side takes half the time.
        logit = torch.addcmul(self.kind(kinds).transpose(1, 2), age, self.rate)
        share = torch.baddbmm(logit, self.query.expand(history.shape[0], -1, -1), history.transpose(1, 2)).softmax(2)
        pooled = torch.bmm(share, history).flatten(1)
        hidden = F.relu(self.hidden(torch.cat([pooled, self.profile(profile).sum(1)], 1)))
        # Layer norm without weights is an L2 norm in one operation, less the mean.
        return F.layer_norm(torch.addmm(self.mix(pooled), hidden, self.out), history.shape[2:]) * self.scale


class ItemTower(nn.Module):
    """Unit vectors of items, from id and content, or from content alone where the id says nothing yet."""

    def __init__(self, start: Tensor, features: Tensor, known: Tensor, length: Tensor) -> None:
        super().__init__()
        # Sparse gradients: a step costs what its items cost, not what the catalog does.
        self.id = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)  # type: ignore[no-untyped-call]
        self.content = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, start.shape[1]))
        self.features = nn.Buffer(features, persistent=False)
        self.known = nn.Buffer(known, persistent=False)
        self.described = nn.Buffer(features.any(1), persistent=False)
        self.length = nn.Buffer(length, persistent=False)
        """float32 [n]: of the vectors that are served, which are those of a history too."""

    def forward(self, rows: Tensor, dropout: float = 0.0) -> Tensor:
        known = self.known[rows]
        if dropout:
            hidden = torch.rand(len(rows), device=rows.device) < dropout
            known = known * ~(hidden & self.described[rows])
        return F.normalize(self.id(rows) * known[:, None] + self.content(self.features[rows]), dim=1)


def fit(
    past: Interactions,
    *,
    features: npt.NDArray[np.float32],
    profiles: Sequence[Mapping[str, str]],
    width: int = WIDTH,
    history: int = 64,
    profile: int = 8,
    seed: int = 0,
    run: Run = Run(),
) -> Vectors:
    """Trains until it foresees what held-out users want no better, and keeps the best epoch.

    `features` [n, d] are of the items (`content.features`), `profiles` of the users by number. The same
    seed gives the same network on one thread. A million items with 130 features need some 4 GB.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    n_items = past.n_items
    codes = torch.tensor([profile_codes(attributes, profile) for attributes in profiles])
    checkpoint = run.checkpoint(
        (*past[:4], features, codes.numpy()), items=n_items, width=width, history=history, profile=profile, seed=seed
    )
    # The service keeps no other events, so the encoder must not learn from them either.
    kept = np.isin(np.arange(256), list(FOLDED))[past.kind]
    people = rng.permutation(np.unique(past.user[kept & (STRENGTH > 0)[past.kind]]))
    held = np.zeros(past.user.max(initial=0) + 1, bool)
    held[people[: min(int(HELD_OUT * len(people)), VALIDATED)]] = True
    judged, now_ms = kept & held[past.user], int(past.ts_ms[kept].max(initial=0))
    manner = _manner(past.where(kept))
    times = np.zeros(n_items)
    np.add.at(times, past.row, kept)
    known = torch.from_numpy((times >= FEWEST).astype(np.float32))
    losses: Losses = ()
    with spilled(past, kept & ~(held_out(past, judged) if manner.sets else judged), seed) as parts:
        # The start must not know what is held out, or validation would find it better than it is.
        start = _spectral([user_items(parts[index], HALF_LIFE_DAYS) for index in range(len(parts))], width, rng)
        length = torch.from_numpy((np.maximum(times, 1.0) / max(times.mean(), 1.0)) ** manner.popularity).float()
        items = ItemTower(torch.from_numpy(start), torch.from_numpy(features), known, length).to(run.device)
        users = UserTower(width, manner).to(run.device)
        if len(people):
            valid = Moments(past.where(judged) if held.any() else parts[0], history, manner.sets, tested=True)
            now = _now(past, now_ms)
            losses = _train(items, users, parts, valid, history, manner, codes, now, now_ms, rng, run, checkpoint)
    with torch.inference_mode():
        rows = torch.arange(n_items, device=run.device)
        vectors = torch.cat([(items(part) * items.length[part, None]).cpu() for part in torch.split(rows, 65_536)])
    return Vectors(vectors.numpy(), users.cpu().eval(), history, profile, losses=losses)


def _manner(past: Interactions) -> Manner:
    """That of sets, where of the users of several events most have one basket."""
    _, count, alone = owners(past)
    return SETS if 2 * (alone & (count > 1)).sum() > (count > 1).sum() else SEQUENCES


def _train(
    items: ItemTower,
    users: UserTower,
    parts: Parts,
    valid: Moments,
    history: int,
    manner: Manner,
    codes: Tensor,
    now: Tensor,
    now_ms: int,
    rng: np.random.Generator,
    run: Run,
    checkpoint: Checkpoint | None,
) -> Losses:
    n_items, device = len(now), items.id.weight.device

    def weight(moments: Moments) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = np.exp2(-(now_ms - moments.ts_ms) / MS_PER_DAY / HALF_LIFE_DAYS)
        return found

    @lru_cache(maxsize=1)
    def part(index: int) -> tuple[Moments, npt.NDArray[np.float64]]:
        moments = Moments(parts[index], history, manner.sets)
        return moments, weight(moments)

    tested = np.arange(len(valid.now))
    if len(tested) > VALIDATED:
        tested = rng.choice(tested, VALIDATED, replace=False, p=weight(valid) / weight(valid).sum())
    sizes = [(len(weights), weights.sum()) for _, weights in map(part, range(len(parts)))]
    total, weight_sum = (sum(column) for column in zip(*sizes, strict=True))
    targeted = torch.zeros(n_items)
    for moments, weights in map(part, range(len(parts))):
        targeted += _targeted(moments, torch.from_numpy(weights / weight_sum).float(), n_items)
    targeted /= targeted.sum()
    now = (1.0 - NOW_FLOOR) * now + NOW_FLOOR * targeted
    shift = torch.where(targeted > 0, torch.log(targeted / now.clamp(min=1e-12)), 0.0)
    shift, negatives = shift.to(device), Negatives(targeted.to(device), manner.uniform)

    def told(
        moments: Moments, chosen: Tensor, drawn: Tensor, dropout: float = 0.0, served: bool = False
    ) -> tuple[Tensor, ...]:
        """Of W wanted items the logits and weights [W]; by moment the logits [B, S] of what they are told from, the
        corrections [S] of these, and which moment each wanted item is of [W]. `served` are the logits of vectors in
        their length."""
        past, kinds, ages_s = (column.to(device) for column in moments.before(chosen))
        wanted, strength = (column.to(device) for column in moments.after(chosen))
        profile = codes[moments.user[chosen.numpy()]].to(device)
        moment, place = (wanted >= 0).nonzero(as_tuple=True)
        target = wanted[moment, place]
        # Every item of the batch goes through the tower once. Row 0 of `vectors` stays for padding.
        rows, index = torch.unique(
            torch.cat([past.new_tensor([-1]), past.flatten(), target, drawn]), return_inverse=True
        )
        vectors = F.pad(items(rows[1:], dropout), (0, 0, 1, 0))
        of_past, of_sampled = index[1 : 1 + past.numel()], index[1 + past.numel() :]
        lengths = F.pad(items.length[rows[1:]], (1, 0))[:, None]
        vector = users(F.embedding(of_past, vectors * lengths).view(*past.shape, -1), kinds, ages_s, profile)
        sampled, times = torch.unique(of_sampled, return_counts=True)
        row = rows[sampled]
        logit = vector @ F.embedding(sampled, vectors * lengths if served else vectors).T + shift[row]
        column = torch.searchsorted(sampled, of_sampled[: len(target)])
        own = logit[moment, column]
        # No wanted item may serve as a negative of its own moment.
        others = logit.index_put((moment, column), logit.new_tensor(-torch.inf))
        correction = negatives.correction(row, times, len(target))
        weights = strength[moment, place] if manner.sets else strength[moment, place] / (wanted >= 0).sum(1)[moment]
        return own, weights / weights.sum(), others, correction, moment

    def loss(own: Tensor, weights: Tensor, others: Tensor, correction: Tensor, moment: Tensor) -> Tensor:
        rest = (others + correction).logsumexp(1)[moment]
        return ((torch.logaddexp(own, rest) - own) * weights).sum()

    def gain(own: Tensor, weights: Tensor, others: Tensor, correction: Tensor, moment: Tensor) -> Tensor:
        """The mean of 1 / log2(2 + rank)."""
        rank = (others[moment] > own[:, None]).float() @ correction.exp()
        return (weights / torch.log2(2.0 + rank)).sum()

    dense = [parameter for name, parameter in items.named_parameters() if name != "id.weight"]
    optimisers = (
        torch.optim.Adam([*dense, *users.parameters()], lr=LEARNING_RATE, fused=True),
        torch.optim.SparseAdam([items.id.weight], lr=manner.id_rate),
    )
    size = min(total, max(EPOCH, total // 8))
    validation = torch.split(torch.from_numpy(tested), BATCH)
    drawn = [negatives.draw(rng) for _ in validation]

    def batches(epoch: int) -> Iterator[tuple[Moments, Tensor]]:
        for optimiser, rate in zip(optimisers, (LEARNING_RATE, manner.id_rate), strict=True):
            optimiser.param_groups[0]["lr"] = rate * manner.decay**epoch
        counts = rng.multinomial(size, [weights / weight_sum for _, weights in sizes])
        for index in rng.permutation(np.flatnonzero(counts)).tolist():
            moments, weights = part(index)
            chosen = rng.choice(len(weights), counts[index], p=weights / weights.sum())
            yield from ((moments, batch) for batch in torch.split(torch.from_numpy(chosen), BATCH))

    def taught(batch: tuple[Moments, Tensor]) -> Tensor:
        return loss(*told(*batch, negatives.draw(rng), ID_DROPOUT))

    def validate() -> tuple[float, float]:
        # By the loss a network of moments is soon too sure of itself, while it still ranks better and better. That of
        # sets cannot be, at its fixed temperature, and what an epoch gains is hidden by chance as its rates fall.
        parts = [told(valid, *pair, served=True) for pair in zip(validation, drawn, strict=True)]
        lost, gained = (float(np.mean([mean(*part).item() for part in parts])) for mean in (loss, gain))
        return lost, -lost if manner.sets else gained

    return train(
        nn.ModuleList([items, users]),
        optimisers,
        batches,
        taught,
        validate,
        rng,
        epochs=MOST_EPOCHS,
        patience=PATIENCE,
        margin=1e-4,
        run=run,
        checkpoint=checkpoint,
    )


def _targeted(moments: Moments, chance: Tensor, n_items: int) -> Tensor:
    """float32 [n]: how much of each item there is among the targets that training will see."""
    total = torch.zeros(n_items)
    for chosen in torch.split(torch.arange(len(chance)), 8192):
        rows, _ = moments.after(chosen)
        moment, place = (rows >= 0).nonzero(as_tuple=True)
        total += torch.bincount(rows[moment, place], chance[chosen][moment], minlength=n_items)
    return total


def _now(past: Interactions, now_ms: int) -> Tensor:
    """float32 [n]: the share of each item in what is wanted now."""
    total = np.zeros(past.n_items)
    for start in range(0, len(past.user), PART):
        _, row, ts_ms, kind, n_items = past.where(np.s_[start : start + PART])
        weight = STRENGTH[kind] * np.exp2(-((now_ms - ts_ms) / MS_PER_DAY) / NOW_DAYS)
        total += np.bincount(row, weight, minlength=n_items)
    return torch.from_numpy(total / max(total.sum(), 1e-12)).float()


def _spectral(parts: Sequence[sp.csr_matrix], width: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """[n, width] of mean square length 1: the leading right singular vectors of the user-item matrix, given in parts
    of its rows, items damped by the root of their strength, each vector times the root of its singular value."""
    n_items = parts[0].shape[1]
    if not any(part.nnz for part in parts):
        return np.zeros((n_items, width), np.float32)
    strength = np.sum([part.multiply(part).sum(0) for part in parts], axis=0).ravel()
    damped = 1.0 / np.sqrt(strength + 0.3 * strength[strength > 0].mean())
    scale = sp.diags_array(damped.astype(np.float32))
    # Without the users of other parts.
    parts = [(part[np.diff(part.indptr) > 0] @ scale).tocsr() for part in parts]
    sketch = min(n_items, width + 16)
    basis = np.linalg.qr(rng.standard_normal((n_items, sketch)).astype(np.float32))[0]
    for _ in range(4):
        basis = np.linalg.qr(sum(part.T @ (part @ basis) for part in parts))[0]
    small = [part @ basis for part in parts]
    _, squared, right = np.linalg.svd(sum(part.T @ part for part in small))
    vectors = np.zeros((n_items, width), np.float32)
    kept = min(sketch, width)
    vectors[:, :kept] = (basis @ right.T[:, :kept]) * squared[:kept] ** 0.25
    vectors /= np.sqrt((vectors**2).sum(1).mean()) + 1e-12
    return vectors
