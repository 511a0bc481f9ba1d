"""Scores as probabilities, and how far to believe them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.floating]

ROUNDS = 100


class Platt(NamedTuple):
    """Log-odds of being wanted = slope * score + intercept; slope > 0, so that no order changes."""

    slope: float
    intercept: float


class Bin(NamedTuple):
    """Candidates of about the same probability: a point of the reliability diagram."""

    candidates: int
    predicted: float
    """Mean probability."""
    wanted: float
    """Share that was wanted."""


def platt(score: Vector, wanted: Vector) -> Platt | None:
    """The likeliest line through the log-odds (Platt 1999, by Newton's method as in Lin, Lin & Weng, 2007).

    The targets are his, a little inside of 0 and 1, so that scores which tell all apart have an answer too. None where
    higher scores are not wanted more often: then there is no order to keep.
    """
    score = score.astype(np.float64)
    positives = float(wanted.sum())
    negatives = len(wanted) - positives
    target = np.where(wanted > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, spread = score.mean(), score.std()
    if not spread > 0:
        return None
    inputs = np.stack([(score - centre) / spread, np.ones(len(score))], 1)
    line = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    before = _surprise(inputs @ line, target)
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-inputs @ line))
        gradient = inputs.T @ (p - target)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        while (after := _surprise(inputs @ (line - length * step), target)) > before and length > 1e-6:
            length /= 2
        if not after < before:
            break
        line, done = line - length * step, before - after < 1e-12 * abs(before)
        before = after
        if done:
            break
    slope = float(line[0] / spread)
    return Platt(slope, float(line[1] - slope * centre)) if slope > 0 else None


def _surprise(log_odds: Vector, target: Vector) -> float:
    """Cross-entropy."""
    return float((np.logaddexp(0, log_odds) - target * log_odds).sum())


def reliability(probability: Vector, wanted: Vector, bins: int = 10) -> list[Bin]:
    """Bins of equally many candidates, ascending (Nguyen & O'Connor, EMNLP 2015).

    Of equal width, nearly all candidates would be in the first: few are wanted. Equal probabilities share a bin.
    """
    if len(probability) != len(wanted):
        raise ValueError(f"{len(probability)} probabilities for {len(wanted)} candidates")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("column probability has values outside 0..1")
    order = np.argsort(probability, kind="stable")
    ascending, hit = probability[order].astype(np.float64), wanted[order]
    wished = np.linspace(0, len(order), bins + 1).astype(np.int64)[1:-1]
    ends = np.searchsorted(ascending, ascending[wished[wished > 0] - 1], "right") if len(order) else wished
    parts = np.unique(np.r_[0, ends, len(order)])
    return [
        Bin(int(end - start), float(ascending[start:end].mean()), float(hit[start:end].mean()))
        for start, end in pairwise(parts)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean over candidates of |predicted - wanted| of their bin (Guo et al., ICML 2017)."""
    total = sum(each.candidates for each in bins)
    return sum(each.candidates * abs(each.predicted - each.wanted) for each in bins) / total if total else float("nan")
