"""SASRec: the next item from attention over the last ones (Kang & McAuley, ICDM 2018).

One layer and one head, as is best on sparse shops (eSASRec: Tikhonovich et al., RecSys 2025), and differently from the
paper: softmax instead of binary cross-entropy (`sequences`), unit vectors, and positions counted back from the event
that is read last, in the attention alone, so that every position of training looks like the last one when it is served.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recall import Interactions, Vectors, sequences
from models.recall.training import Run

WIDTH = 128
HIDDEN = 128
LEARNING_RATE = 2e-3
EPOCHS = 16
DROPOUT = 0.4
NOWHERE = -1e4
"""Attention logit of padding; finite, so that an empty history is no NaN."""


class Encoder(sequences.Encoder):
    """What the engine runs: `forward(history, kinds, ages_s, profile) -> [B, 128]`.

    The last event shares its attention among all by vector, type, how many events ago and how long ago; padding
    gets none but from padding.
    """

    def __init__(self, history: int) -> None:
        super().__init__()
        self.scale = math.sqrt(WIDTH)
        self.kind = nn.Embedding(256, WIDTH)
        nn.init.zeros_(self.kind.weight)
        self.kind_logit = nn.Embedding(256, 1)
        nn.init.zeros_(self.kind_logit.weight)
        nn.init.constant_(self.kind_logit.weight[0], NOWHERE)
        self.distance = nn.Parameter(torch.zeros(history))
        self.age = nn.Parameter(torch.zeros(()))
        self.before, self.between, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # With one head, what would project keys and values is a factor of these two.
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        logit = self.kind_logit(kinds).squeeze(2) + torch.log1p(ages_s) * self.age + self.distance[-history.shape[1] :]
        events = self._events(history, kinds)
        return self._attend(events[:, -1:], self.before(events), logit.unsqueeze(1)).squeeze(1)

    def states(self, history: Tensor, kinds: Tensor, ages_s: Tensor) -> Tensor:
        width = history.shape[1]
        at = torch.arange(width, device=history.device)
        back = at[:, None] - at
        # An event's now is when the next one comes.
        now_s = F.pad(ages_s[:, 1:], (0, 1))
        age = torch.log1p((ages_s[:, None] - now_s[:, :, None]).clamp(min=0.0)) * self.age
        distance = self.distance[(len(self.distance) - 1 - back).clamp(max=len(self.distance) - 1)]
        # What is yet to come is farther than padding: before the first event there is nothing but padding to read.
        logit = self.kind_logit(kinds).squeeze(2)[:, None] + age + distance.masked_fill(back < 0, 2 * NOWHERE)
        events = self._events(history, kinds)
        return self._attend(events, self.before(events), logit)

    def _events(self, history: Tensor, kinds: Tensor) -> Tensor:
        events: Tensor = self.dropout(self.kind(kinds).add_(history, alpha=self.scale))
        return events

    def _attend(self, reading: Tensor, read: Tensor, logit: Tensor) -> Tensor:
        """From events [B, Q, d], normalised ones [B, L, d] and what is added to their logits [B, Q, L]."""
        query = self.query(read[:, -reading.shape[1] :])
        share = torch.baddbmm(logit, query, read.transpose(1, 2), alpha=1.0 / self.scale).softmax(2)
        told = reading + self.dropout(self.out(torch.bmm(self.dropout(share), read)))
        told = told + self.dropout(self.down(self.dropout(F.relu(self.up(self.between(told))))))
        return F.normalize(self.after(told), dim=2) / sequences.TEMPERATURE


def fit(
    past: Interactions,
    *,
    features: npt.NDArray[np.float32] | None = None,
    history: int = 50,
    seed: int = 0,
    run: Run = Run(),
) -> Vectors:
    """Reads the last `history` events. See `sequences.fit`."""
    return sequences.fit(
        past,
        lambda: Encoder(history),
        features=features,
        width=WIDTH,
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        history=history,
        seed=seed,
        run=run,
    )
