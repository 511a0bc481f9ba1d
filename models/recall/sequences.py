"""What SASRec and GRU4Rec share: learning to foresee every next event of everybody.

The loss decides more than the network does: with binary cross-entropy and one negative the same networks are a third
worse (Klenitskiy & Vasilev, RecSys 2023; Petrov & Macdonald, RecSys 2023). Here it is a softmax over the batch's own
targets and drawn items, corrected for how often each is sampled (`negatives`), of unit vectors over a small
temperature.

Where items have content, their vectors start from it (S3-Rec: Zhou et al., CIKM 2020, pre-trains for it; a sum does):
better, sooner, and a new item has its place at once.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.state.events import FOLDED
from models.recall import STRENGTH, Interactions, Vectors
from models.recall.negatives import Negatives
from models.recall.streaming import Parts, forever, spilled
from models.recall.training import Checkpoint, Losses, Run, train

TEMPERATURE = 0.07
START = 0.02
"""Standard deviation of the item vectors at the start. Only direction counts, so that the shorter turn faster."""
TARGETS = 1024
"""Events foretold in a step."""
FEWEST = 3
"""Events from which on an item has an id of its own."""
UNIFORM = 1024
"""Items drawn for a step besides its own targets."""
FEWEST_STEPS, MOST_STEPS = 32, 256
"""In an epoch, which within these bounds sees every event once."""
PATIENCE = 3
"""Epochs without a better one after which training stops."""
HELD_OUT = 0.05
"""Share of the users who only validate."""
VALIDATED = 8192
"""Targets that validate, at most."""
CELLS = 2**24
"""Scores in memory at a time when validating."""

Longs = npt.NDArray[np.int64]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Encoder(nn.Module):
    """A network of sequences: `forward` as in `Vectors.encoder`, and what it would have said after every event."""

    def states(self, history: Tensor, kinds: Tensor, ages_s: Tensor) -> Tensor:
        """[B, L, d], each of length 1 / `TEMPERATURE`; the last ones are what `forward` gives."""
        raise NotImplementedError


class Items(nn.Module):
    """Unit vectors of items: of an id and of content, which says at once what the id takes many events to learn.

    An item with fewer than `FEWEST` events is known by its content alone, if it has any.
    """

    def __init__(self, features: Tensor, times: Tensor, width: int) -> None:
        super().__init__()
        # Sparse gradients: a step costs what its items cost, not what the catalog does.
        self.id = nn.Embedding(len(features), width, sparse=True)
        nn.init.normal_(self.id.weight, std=START)
        self.content = nn.Linear(features.shape[1], width, bias=False)
        self.features = features
        self.known = ((times >= FEWEST) | ~features.any(1)).float()

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.id(rows) * self.known[rows, None] + self.content(self.features[rows]), dim=1)

    def all(self) -> Tensor:
        """[n, d]."""
        rows = torch.arange(len(self.features), device=self.features.device)
        return torch.cat([self(part) for part in torch.split(rows, 65_536)])


class Stretches:
    """Everybody's events in stretches of at most `length`, the first of a user being what is left.

    Each event is foretold once, from those before it in its stretch and the one before the stretch. A user's first is
    foretold from nothing: what a stranger gets is learned too.
    """

    def __init__(self, past: Interactions, length: int) -> None:
        user, row, ts_ms, kind, self._n_items = past
        begin = np.flatnonzero(np.diff(user, prepend=-1))
        size = np.diff(begin, append=len(user))
        count = -(-size // length)
        owner = np.repeat(np.arange(len(begin)), count)
        from_end = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        end = (begin + size)[owner] - from_end * length
        start = np.maximum(end - length, begin[owner])
        wanted = np.append(0, np.cumsum(STRENGTH[kind] > 0))
        useful = wanted[end] > wanted[start]
        self.start, self.end = start[useful], end[useful]
        self._read_from = np.maximum(start - 1, begin[owner])[useful]
        self.user = user[self.start]
        self._row, self._kind, self._ts_ms = row.astype(np.int64), kind.astype(np.int64), ts_ms

    def read(self, chosen: Longs) -> Batch:
        """[B, T + 1], the last event last: rows (-1 where padding), kinds, ages in seconds as of the last, and how
        much each but the first is to be foretold [B, T]."""
        start, end = self.start[chosen, None], self.end[chosen, None]
        index = end - np.arange((end - start).max() + 1, 0, -1)
        real, target = index >= self._read_from[chosen, None], index[:, 1:]
        age_s = (self._ts_ms[end - 1] - self._ts_ms[index]) / 1000.0
        return (
            torch.from_numpy(np.where(real, self._row[index], -1)),
            torch.from_numpy(np.where(real, self._kind[index], 0)),
            torch.from_numpy(np.where(real, age_s, 0.0).astype(np.float32)),
            torch.from_numpy(np.where(target >= start, STRENGTH[self._kind[target]], np.float32(0))),
        )

    def batches(self, rng: np.random.Generator, chosen: Longs | None = None) -> list[Longs]:
        """All, or those chosen, in batches of some `TARGETS` targets and of about one length, for little padding."""
        chosen = np.arange(len(self.user)) if chosen is None else chosen
        length = (self.end - self.start)[chosen]
        order = np.lexsort((rng.random(len(chosen)), length))
        batch = np.cumsum(length[order]) // TARGETS
        parts = np.split(chosen[order], np.flatnonzero(np.diff(batch)) + 1)
        return [parts[index] for index in rng.permutation(len(parts))]

    def targets(self) -> npt.NDArray[np.int64]:
        """[n]: how often each item is to be foretold."""
        return np.bincount(self._row[STRENGTH[self._kind] > 0], minlength=self._n_items)


def fit(
    past: Interactions,
    make: Callable[[], Encoder],
    *,
    features: npt.NDArray[np.float32] | None,
    width: int,
    learning_rate: float,
    epochs: int,
    history: int,
    seed: int,
    run: Run,
) -> Vectors:
    """Trains the encoder that `make` gives, and unit vectors of the items with it, until it foresees the next items
    of held-out users no better, and keeps the best epoch. Validation losses are over the whole catalog.

    `features` [n, d] are of the items (`content.features`), None where nothing is known of them.

    The learning rate falls in a line from the given one to 0 after `epochs`. The same seed gives the same network
    on one thread of a CPU.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    if features is None:
        features = np.zeros((past.n_items, 1), np.float32)
    checkpoint = run.checkpoint(
        (*past[:4], features),
        items=past.n_items,
        rate=learning_rate,
        epochs=epochs,
        history=history,
        width=width,
        seed=seed,
    )
    losses: Losses = ()
    # The service keeps no other events, so the encoder must not learn from them either.
    kept = np.isin(np.arange(256), list(FOLDED))[past.kind]
    times = np.zeros(past.n_items)
    np.add.at(times, past.row, kept)
    encoder = make().to(run.device)
    shown = torch.from_numpy(features).to(run.device)
    items = Items(shown, torch.from_numpy(times).to(run.device), width).to(run.device)
    people = rng.permutation(np.unique(past.user[kept & (STRENGTH > 0)[past.kind]]))
    if len(people):
        held = np.zeros(past.user.max() + 1, bool)
        held[people[: min(int(HELD_OUT * len(people)), VALIDATED)]] = True
        aside = held[past.user]
        with spilled(past, kept & ~aside, seed) as parts:
            valid = past.where(kept & aside) if held.any() else parts[0]
            losses = _train(
                encoder, items, parts, Stretches(valid, history), history, learning_rate, epochs, rng, run, checkpoint
            )
    with torch.no_grad():
        vectors = items.all().cpu().numpy()
    return Vectors(vectors, encoder.cpu().eval(), history, losses=losses)


def _train(
    encoder: Encoder,
    items: Items,
    parts: Parts,
    valid: Stretches,
    history: int,
    learning_rate: float,
    epochs: int,
    rng: np.random.Generator,
    run: Run,
    checkpoint: Checkpoint | None,
) -> Losses:
    @lru_cache(maxsize=1)
    def part(index: int) -> Stretches:
        return Stretches(parts[index], history)

    chosen = rng.permutation(len(valid.user))
    of_valid = np.cumsum((valid.end - valid.start)[chosen])
    validation = valid.batches(rng, chosen[: max(1, int((of_valid <= VALIDATED).sum()))])
    device, n_items = items.features.device, len(items.features)
    times, steps = np.zeros(n_items), 0
    for index in range(len(parts)):
        times += part(index).targets()
        steps += len(part(index).batches(rng))
    steps = min(max(steps, FEWEST_STEPS), MOST_STEPS)
    negatives = Negatives(torch.from_numpy(times / times.sum()).float().to(device), UNIFORM)

    def read(stretches: Stretches, chosen: Longs) -> Batch:
        rows, kinds, ages_s, weight = stretches.read(chosen)
        return rows.to(device), kinds.to(device), ages_s.to(device), weight.to(device)

    def loss(batch: tuple[int, Longs]) -> Tensor:
        rows, kinds, ages_s, weight = read(part(batch[0]), batch[1])
        drawn = negatives.draw(rng)
        # Every item of the batch is looked up once. Row 0 of `vectors` stays for padding.
        distinct, index = torch.unique(torch.cat([rows.new_tensor([-1]), rows.flatten(), drawn]), return_inverse=True)
        vectors = F.pad(items(distinct[1:]), (0, 0, 1, 0))
        of_rows, of_drawn = index[1:].split([rows.numel(), len(drawn)])
        of_rows, wanted = of_rows.view(rows.shape), weight > 0
        states = encoder.states(F.embedding(of_rows[:, :-1], vectors), kinds[:, :-1], ages_s[:, :-1])[wanted]
        target, weight = of_rows[:, 1:][wanted], weight[wanted]
        sampled, times = torch.unique(torch.cat([target, of_drawn]), return_counts=True)
        logit = states @ F.embedding(sampled, vectors).T
        place = torch.searchsorted(sampled, target)[:, None]
        corrected = logit + negatives.correction(distinct[sampled], times, len(target))
        logit = corrected.scatter(1, place, logit.float().gather(1, place))
        each = F.cross_entropy(logit, place.squeeze(1), reduction="none")
        total: Tensor = (each * weight).sum() / weight.sum()
        return total

    def validate() -> tuple[float, float]:
        """The loss, and the mean of 1 / log2(1 + rank), which goes on rising when the network becomes too sure."""
        vectors = F.pad(items.all(), (0, 0, 1, 0))
        total = torch.zeros(3, device=device)
        for rows, kinds, ages_s, weight in (read(valid, batch) for batch in validation):
            wanted = weight > 0
            states = encoder.states(F.embedding(rows[:, :-1] + 1, vectors), kinds[:, :-1], ages_s[:, :-1])[wanted]
            columns = states, rows[:, 1:][wanted], weight[wanted]
            parts = (torch.split(column, max(1, CELLS // n_items)) for column in columns)
            for state, target, weigh in zip(*parts, strict=True):
                logit = state @ vectors[1:].T
                own = logit.gather(1, target[:, None])
                gain = 1.0 / torch.log2(2.0 + (logit > own).sum(1))
                each = torch.stack([logit.logsumexp(1) - own[:, 0], gain, torch.ones_like(gain)])
                total += (each * weigh).sum(1)
        lost, gained, weight_sum = total.tolist()
        return lost / weight_sum, gained / weight_sum

    optimisers = (
        torch.optim.Adam([*encoder.parameters(), *items.content.parameters()], lr=learning_rate, fused=True),
        torch.optim.SparseAdam(items.id.parameters(), lr=learning_rate),
    )
    position: dict[str, Any] = {}
    passes = forever(parts, lambda index: part(index).batches(rng), rng, position)

    def batches(epoch: int) -> Iterable[tuple[int, Longs]]:
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate * (1.0 - epoch / epochs)
        return islice(passes, steps)

    return train(
        nn.ModuleList([encoder, items]),
        optimisers,
        batches,
        loss,
        validate,
        rng,
        epochs=epochs,
        patience=PATIENCE,
        run=run,
        checkpoint=checkpoint,
        position=position,
    )
