"""Rankers: learned fusions of what the sources say, one file a model, all over the same candidate features."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from app.bundle import Draft
from models.ranking import blend, dcn, deepfm, fm, linear, mlp, trees
from models.ranking.examples import Examples, ndcg, split, stack

__all__ = ["RANKERS", "Examples", "Ranker", "ndcg", "split", "stack"]


class Ranker(Protocol):
    """A fitted ranker."""

    calibrated: bool
    """Whether the scores are log-odds of being wanted; without it they only have an order."""

    def __call__(self, features: Tensor) -> Tensor:
        """float32 [M] for features float32 [M, F]."""
        ...

    def export(self, name: str, features: tuple[str, ...], draft: Draft) -> None:
        """Adds the ranker to the draft, in the form that the engine runs."""
        ...


RANKERS: Mapping[str, Callable[..., Ranker]] = {
    "mlp": mlp.fit,
    "linear": linear.fit,
    "fm": fm.fit,
    "deepfm": deepfm.fit,
    "dcn": dcn.fit,
    "trees": trees.fit,
    "blend": blend.fit,
}
"""By name: `fit(examples, *, seed, on_epoch)`, which raises `ValueError` where the examples can teach no ranking."""
