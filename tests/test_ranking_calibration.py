import numpy as np
import pytest

from models.ranking.calibration import Bin, calibration_error, platt, reliability


def drawn(slope: float, intercept: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels with these log-odds."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=count)
    return score, (rng.random(count) < 1 / (1 + np.exp(-(slope * score + intercept)))).astype(np.float32)


@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -3.0), (0.5, 1.0), (6.0, -4.0)])
def test_platt_finds_the_line_that_labels_were_drawn_from(slope: float, intercept: float) -> None:
    score, wanted = drawn(slope, intercept)
    found = platt(score, wanted)
    assert found is not None
    assert found == pytest.approx((slope, intercept), rel=0.1)


def test_platt_makes_a_scores_probability_the_share_that_was_wanted() -> None:
    score, wanted = drawn(2.0, -3.0)
    line = platt(1000 * score + 5, wanted)
    assert line is not None

    def error(log_odds: np.ndarray) -> float:
        return calibration_error(reliability(1 / (1 + np.exp(-log_odds)), wanted))

    assert error(line.slope * (1000 * score + 5) + line.intercept) < 0.01 < 0.2 < error(score)


def test_platt_is_finite_where_scores_tell_all_apart() -> None:
    line = platt(np.array([-1.0, -0.5, 0.5, 1.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert line is not None and 0 < line.slope < 100


@pytest.mark.parametrize(
    ("score", "wanted"),
    [([1.0, 2.0, 3.0], [1.0, 0.0, 0.0]), ([1.0, 1.0], [0.0, 1.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [1.0, 1.0])],
    ids=["the wrong way round", "one score", "nothing wanted", "all wanted"],
)
def test_platt_keeps_the_order_or_gives_nothing(score: list[float], wanted: list[float]) -> None:
    assert platt(np.array(score), np.array(wanted)) is None


def test_reliability_by_hand() -> None:
    bins = reliability(np.array([0.9, 0.1, 0.3, 0.7]), np.array([1.0, 0.0, 1.0, 0.0]), bins=2)
    assert bins == [Bin(2, pytest.approx(0.2), 0.5), Bin(2, pytest.approx(0.8), 0.5)]
    assert calibration_error(bins) == pytest.approx(0.3)


def test_equal_probabilities_share_a_bin() -> None:
    bins = reliability(np.array([0.5] * 7 + [0.1] * 3), np.array([1.0] * 7 + [0.0] * 3), bins=5)
    assert [(each.candidates, each.wanted) for each in bins] == [(3, 0.0), (7, 1.0)]


def test_nothing_to_judge_has_no_error() -> None:
    assert reliability(np.empty(0), np.empty(0)) == []
    assert np.isnan(calibration_error([]))


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="column probability has values outside"):
        reliability(np.array([0.5, value]), np.array([0.0, 1.0]))
