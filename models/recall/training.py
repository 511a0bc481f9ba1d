"""How what is learned in epochs is trained: one loop for all, that stops early, goes on from a checkpoint and tells
what it sees. The same on a CPU and on a GPU, where torch chooses what is computed in bfloat16.
"""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import Tensor, nn

from models.data.tables import DataError

SUFFIX = ".checkpoint"

OnEpoch = Callable[[int, float, float], None]
"""Gets the number of an epoch from 0, its mean loss in training and that in validation."""
Losses = tuple[tuple[float, float], ...]
Batch = TypeVar("Batch")


class Board:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            self._writer = EventFileWriter(str(folder))
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}") from error

    def scalar(self, tag: str, step: int, value: float) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Run:
    """Where a model is learned, what is kept of it and who hears of it."""

    device: str = "cpu"
    checkpoints: Path | None = None
    """Folder; a fit that finds its checkpoint there goes on from it."""
    board: Board | None = None
    name: str = ""
    on_epoch: OnEpoch = lambda epoch, train, valid: None

    def of(self, name: str, on_epoch: OnEpoch | None = None) -> "Run":
        """The run of a part of this one, such as of one model in the first window."""
        return replace(self, name=f"{self.name}/{name}".strip("/"), on_epoch=on_epoch or self.on_epoch)

    def scalar(self, what: str, step: int, value: float) -> None:
        if self.board is not None and math.isfinite(value):
            self.board.scalar(f"{self.name}/{what}", step, value)

    def standing(self) -> list[Path]:
        """The checkpoints that are there."""
        return [] if self.checkpoints is None else sorted(self.checkpoints.rglob(f"*{SUFFIX}"))

    def tell(self, epoch: int, train: float, valid: float) -> None:
        self.scalar("training loss", epoch, train)
        self.scalar("validation loss", epoch, valid)
        self.on_epoch(epoch, train, valid)

    def checkpoint(self, data: Iterable[npt.NDArray[Any]], **parameters: object) -> "Checkpoint | None":
        """That of this run, which has to be of these data and parameters; a parameter is what JSON can say."""
        if self.checkpoints is None:
            return None
        digest = hashlib.sha256()
        for array in data:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        of = {
            "data": digest.hexdigest(),
            "parameters": json.dumps({**parameters, "device": self.device}),
            "code": _code(),
        }
        return Checkpoint(self.checkpoints / f"{self.name}{SUFFIX}", of)


@cache
def _code() -> str:
    """SHA-256 over the modules of the recall models, after the version of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file of tensors whose metadata is the rest, as JSON."""

    path: Path
    of: Mapping[str, str]
    """What it must be of to be gone on from, by subject."""

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """None where there is none. Raises `DataError` where it is of something else, or damaged."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                found = json.loads(file.metadata()["checkpoint"])
            tensors = load_file(self.path)
        except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read: {str(error).splitlines()[0]}") from error
        if other := [subject for subject, expected in self.of.items() if found["of"].get(subject) != expected]:
            raise DataError(f"{self.path} is of other {' and '.join(other)}: nothing goes on from it")
        return tensors, found

    def write(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Whole or not at all, whatever happens meanwhile. Raises `DataError` where it cannot be."""
        unfinished = self.path.with_suffix(".tmp")
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(contiguous, unfinished, {"checkpoint": json.dumps({"of": dict(self.of), **rest})})
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.path}: cannot be written: {error}") from error


@dataclass(slots=True)
class _Learner:
    """What changes from epoch to epoch."""

    model: nn.Module
    optimisers: Sequence[torch.optim.Optimizer]
    rng: np.random.Generator
    position: dict[str, Any]
    kept: dict[str, Tensor]
    losses: list[tuple[float, float]] = field(default_factory=list)
    best: float = -math.inf
    waited: int = 0

    def save(self, checkpoint: Checkpoint, device: torch.device) -> None:
        tensors = {f"model {name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"kept {name}": tensor for name, tensor in self.kept.items()} if self.waited else {}
        numbers: dict[str, Any] = {}
        for index, optimiser in enumerate(self.optimisers):
            for parameter, state in optimiser.state_dict()["state"].items():
                for name, value in state.items():
                    kind = tensors if isinstance(value, Tensor) else numbers
                    kind[f"optimiser {index} {parameter} {name}"] = value
        tensors["random cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            tensors["random cuda"] = torch.cuda.get_rng_state(device)
        checkpoint.write(
            tensors,
            {
                "losses": self.losses,
                "best": self.best,
                "waited": self.waited,
                "position": self.position,
                "random": self.rng.bit_generator.state,
                "numbers": numbers,
            },
        )

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], device: torch.device) -> None:
        self.model.load_state_dict(_under("model ", tensors))
        self.kept = _under("kept ", tensors) or copy.deepcopy(self.model.state_dict())
        for index, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Any]] = {}
            for key, value in _under(f"optimiser {index} ", {**tensors, **rest["numbers"]}).items():
                parameter, name = key.split(" ", 1)
                states.setdefault(int(parameter), {})[name] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
        torch.set_rng_state(tensors["random cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random cuda"], device)
        self.rng.bit_generator.state = rest["random"]
        self.position.clear()
        self.position.update(rest["position"])
        self.losses = [(taught, tested) for taught, tested in rest["losses"]]
        self.best, self.waited = rest["best"], rest["waited"]


def _under(prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def train(
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[Batch], Tensor],
    validate: Callable[[], tuple[float, float]] | None,
    rng: np.random.Generator,
    *,
    epochs: int,
    patience: int = 1,
    margin: float = 0.0,
    run: Run,
    checkpoint: Checkpoint | None,
    position: dict[str, Any] | None = None,
) -> Losses:
    """Steps through `batches(epoch)` until `epochs` are over or `patience` of them, one after the other, were no better
    by `margin`, and leaves the model as the best epoch had it. Gives the losses of each epoch.

    `validate` gives a loss and a quality; without it the last epoch is the best. `rng`, and `position`, of what JSON
    can say, are all that `batches` may know of the epochs before. With a checkpoint, one is written after every epoch,
    before it is told of; one that is there is gone on from, as if nothing had happened: on one thread of a CPU the
    outcome is the same to the last bit.
    """
    device = next(model.parameters()).device
    learner = _Learner(model, optimisers, rng, {} if position is None else position, copy.deepcopy(model.state_dict()))
    if checkpoint is not None and (found := checkpoint.read()):
        learner.load(*found, device)
        for epoch, pair in enumerate(learner.losses):
            run.tell(epoch, *pair)
    while (epoch := len(learner.losses)) < epochs and learner.waited < patience:
        taught = []
        model.train()
        for batch in batches(epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(batch)
            for optimiser in optimisers:
                optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            for optimiser in optimisers:
                optimiser.step()
            taught.append(value.item())
        model.eval()
        with torch.no_grad():
            tested, quality = validate() if validate else (math.nan, float(epoch))
        learner.losses.append((float(np.mean(taught)), tested))
        if quality > learner.best + margin:
            learner.best, learner.waited, learner.kept = quality, 0, copy.deepcopy(model.state_dict())
        else:
            learner.waited += 1
        if checkpoint is not None:
            learner.save(checkpoint, device)
        run.tell(epoch, *learner.losses[-1])
    model.load_state_dict(learner.kept)
    return tuple(learner.losses)
