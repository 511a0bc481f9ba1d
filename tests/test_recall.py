import numpy as np
import torch
from torch import Tensor, nn

from app.state.events import EventType
from models.recall import Interactions, Vectors

DAY_MS = 86_400_000
VIEW, BUY = EventType.VIEW_ITEM, EventType.PURCHASE


class Reader(nn.Module):
    """What it is given, side by side."""

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        return torch.cat([history.flatten(1), kinds, ages_s, profile], 1)


def past() -> Interactions:
    """Users 1 and 4, each item of the row's number on day 0, 1, ..."""
    user, row = np.array([1, 4, 4, 4], np.int32), np.array([2, 0, 1, 2], np.int32)
    return Interactions(user, row, row * np.int64(DAY_MS), np.array([BUY, VIEW, VIEW, BUY], np.uint8), 3)


def test_a_user_who_asks_is_their_last_events_in_order() -> None:
    items = np.array([[10.0], [11.0], [12.0]], np.float32)
    asking = Vectors(items, Reader(), 2).users(past(), np.array([4, 3, 1], np.int32), 3 * DAY_MS)
    day = 86_400
    assert asking.tolist() == [
        [11, 12, VIEW, BUY, 2 * day, day, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 12, 0, BUY, 0, day, 0],
    ]


def test_what_is_read_of_items_need_not_be_what_they_are_scored_by() -> None:
    items, inputs = np.zeros((3, 1), np.float32), np.array([[5.0], [6.0], [7.0]], np.float32)
    assert Vectors(items, Reader(), 1, inputs=inputs).users(past(), np.array([1], np.int32), 0)[0, 0] == 7.0


def test_without_an_encoder_a_user_is_a_sum_by_strength_and_age() -> None:
    vectors = Vectors(np.eye(3, dtype=np.float32), None, 3, half_life_days=1.0)
    asking = vectors.users(past(), np.array([4, 0], np.int32), 2 * DAY_MS)
    expected = np.array([0.5 / 4, 0.5 / 2, 2.0])
    np.testing.assert_allclose(asking, [expected / np.linalg.norm(expected), np.zeros(3)], rtol=1e-6)
