"""User vectors: what an encoder makes of the last events, or the sum of what the anchors are."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from app.bundle import Anchors, Bundle, BundleError, VectorSpec
from app.engine import kernels
from app.engine.anchors import Rule, anchors
from app.engine.batch import Batch, Scratch
from app.engine.ordering import from_end
from app.engine.program import load_program
from app.state.events import EventType


def open_users(spec: VectorSpec, inputs: Tensor, bundle: Bundle, device: torch.device) -> "Encoder | Sum":
    """`inputs` float16 [n, c] are of the host. Raises `BundleError`."""
    if spec.encoder:
        return Encoder(spec, spec.encoder, inputs, bundle, device)
    if spec.anchors:
        return Sum(spec.anchors, inputs, device)
    raise BundleError(f"source {spec.name!r} has neither an encoder nor anchors")


class Encoder:
    """Runs the program of a source."""

    def __init__(self, spec: VectorSpec, program: str, inputs: Tensor, bundle: Bundle, device: torch.device) -> None:
        self._encode = load_program(bundle.path / program, device)
        self._length, self._profile = spec.history, spec.profile
        self._host, self._inputs = halves(inputs), inputs.to(device)
        # A program does not check what it is given.
        width = inputs.shape[1]
        history, ages_s = (
            torch.zeros(1, self._length, width, device=device),
            torch.zeros(1, self._length, device=device),
        )
        profile = torch.zeros(1, self._profile, dtype=torch.int64, device=device)
        try:
            shape = self._encode(history, ages_s.long(), ages_s, profile).shape
        except Exception as error:
            raise BundleError(f"{program} cannot read histories of {self._length} times {width}: {error}") from error
        self.width = shape[1]

    def __call__(self, batch: Batch, context: bool) -> Tensor:
        """float32 [B, d]."""
        # A solver leaves its answers column by column, which the loops and FAISS do not read.
        return self._encode(*self._events(batch, context)).contiguous()

    def _events(self, batch: Batch, context: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        length, device = self._length, batch.device
        if isinstance(batch.scratch, Scratch):
            begin, rows, age_days, kind_of, *page = batch.host()
            viewed = int(EventType.VIEW_ITEM)
            found = kernels.history(self._host, begin, rows, kind_of, age_days, *page, viewed, context, length)
            vectors, kinds, ages_s = map(torch.from_numpy, found)
            return vectors, kinds, ages_s, batch.profile(self._profile)
        query, row, kind, last = batch.query, batch.row, batch.kind, batch.from_end
        age_s = batch.age_days * 86_400
        if len(batch.anchor_row):
            # What is on the page is what the user looks at now.
            on_page = torch.bincount(batch.anchor_query, minlength=batch.size)
            also = on_page.index_select(0, query)
            before = torch.where(also > 0, length, last) if context else last + also
            last = torch.cat([before, from_end(batch.anchor_query, on_page)])
            query, row = torch.cat([query, batch.anchor_query]), torch.cat([row, batch.anchor_row])
            kind = torch.cat([kind, torch.full_like(batch.anchor_row, EventType.VIEW_ITEM)])
            age_s = torch.cat([age_s, torch.zeros(len(batch.anchor_row), device=device)])
        recent = (last < length).nonzero().squeeze(1)
        cell = query.index_select(0, recent) * length + (length - 1 - last.index_select(0, recent))
        cells = batch.size * length
        history = torch.zeros(cells, self._inputs.shape[1], device=device)
        history.index_copy_(0, cell, self._inputs.index_select(0, row.index_select(0, recent)).float())
        kinds = torch.zeros(cells, dtype=torch.int64, device=device)
        kinds.index_copy_(0, cell, kind.index_select(0, recent))
        ages = torch.zeros(cells, device=device).index_copy_(0, cell, age_s.index_select(0, recent))
        shape = (batch.size, length)
        return history.view(*shape, -1), kinds.view(shape), ages.view(shape), batch.profile(self._profile)


class Sum:
    """Adds up the inputs of the anchors."""

    def __init__(self, spec: Anchors, inputs: Tensor, device: torch.device) -> None:
        self._rule, self.width = Rule(spec, device), inputs.shape[1]
        self._host, self._inputs = halves(inputs), inputs.to(device)

    def __call__(self, batch: Batch, context: bool) -> Tensor:
        """float32 [B, d]: unit vectors, 0 of whom nothing is known."""
        if isinstance(batch.scratch, Scratch):
            scratch = batch.scratch.total
            return torch.from_numpy(kernels.pooled(self._host, *batch.host(), *self._rule.host, context, scratch))
        query, row, weight = anchors([self._rule], batch, context)
        weighted = self._inputs.index_select(0, row).float() * weight[:, None]
        total = torch.zeros(batch.size, weighted.shape[1], device=batch.device).index_add_(0, query, weighted)
        return F.normalize(total, dim=1)


def halves(table: Tensor) -> npt.NDArray[np.uint16]:
    """The bits of a float16 tensor of the host."""
    return table.view(torch.uint16).numpy()
