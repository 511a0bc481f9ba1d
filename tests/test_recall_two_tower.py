from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from app.engine.program import load_program, save_program
from app.state.events import EventType
from models.recall import Interactions, Vectors, two_tower
from models.recall.training import Run
from models.recall.two_tower import SEQUENCES, SETS, _manner

HOUR_MS = 3_600_000
GROUP = 20
"""Items of one group; the last of each group nobody has touched yet."""


def checkerboard(users: int = 120, length: int = 12) -> Interactions:
    """Even users want items of the first group, odd users of the second."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users, dtype=np.int32), length)
    row = (rng.integers(0, GROUP - 1, len(user)) + user % 2 * GROUP).astype(np.int32)
    ts_ms = np.tile(np.arange(length) * HOUR_MS, users).astype(np.int64)
    return Interactions(user, row, ts_ms, np.full(len(user), EventType.PURCHASE, np.uint8), 2 * GROUP)


def features() -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(1).normal(size=(2 * GROUP, 8)) * 0.1
    noise[:GROUP, 0] += 1
    noise[GROUP:, 1] += 1
    return noise.astype(np.float32)


def fit(seed: int = 0) -> Vectors:
    return two_tower.fit(checkerboard(), features=features(), profiles=[{}] * 120, history=8, seed=seed)


@pytest.fixture(scope="module")
def towers() -> Vectors:
    return fit()


def inputs(rows: list[list[int]], towers: Vectors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Histories of purchases, an hour apart, the last an hour ago."""
    shape = (len(rows), towers.history)
    history, kinds, ages_s = (
        torch.zeros(*shape, two_tower.WIDTH),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape),
    )
    for index, of_user in enumerate(rows):
        for place, row in enumerate(reversed(of_user[-towers.history :])):
            history[index, -1 - place] = torch.from_numpy(towers.items[row])
            kinds[index, -1 - place] = EventType.PURCHASE
            ages_s[index, -1 - place] = 3600.0 * (place + 1)
    return history, kinds, ages_s, torch.zeros(len(rows), towers.profile, dtype=torch.int64)


def scores(rows: list[list[int]], towers: Vectors) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        users: npt.NDArray[np.float32] = towers.encoder(*inputs(rows, towers)).numpy()
    return users @ towers.items.T


def test_users_get_the_items_of_their_group(towers: Vectors) -> None:
    found = scores([[1, 2, 3], [GROUP + 1, GROUP + 2, GROUP + 3]], towers)
    best = np.argsort(-found, axis=1)[:, : GROUP - 1]
    assert (best[0] < GROUP).all()
    assert (best[1] >= GROUP).all()


def test_an_item_nobody_touched_is_found_by_its_content(towers: Vectors) -> None:
    first, second = GROUP - 1, 2 * GROUP - 1
    found = scores([[1, 2, 3], [GROUP + 1, GROUP + 2, GROUP + 3]], towers)
    others = np.delete(np.arange(2 * GROUP), [first, second])
    assert found[0, first] > found[0, others[others >= GROUP]].max() and found[0, first] > found[0, second]
    assert found[1, second] > found[1, others[others < GROUP]].max() and found[1, second] > found[1, first]


def test_vectors_have_the_promised_shape_and_length(towers: Vectors) -> None:
    assert towers.items.shape == (2 * GROUP, two_tower.WIDTH) and towers.items.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(towers.items, axis=1), 1.0, atol=1e-5)
    with torch.inference_mode():
        users = towers.encoder(*inputs([[1], [2, 3, GROUP]], towers))
    length = towers.encoder.state_dict()["scale"] * two_tower.WIDTH**0.5
    torch.testing.assert_close(users.norm(dim=1), length.expand(2), rtol=1e-3, atol=0)


def test_a_user_without_history_has_a_vector(towers: Vectors) -> None:
    assert np.isfinite(scores([[]], towers)).all()


def test_padding_tells_nothing(towers: Vectors) -> None:
    history, kinds, ages_s, profile = inputs([[1, 2, 3]], towers)
    with torch.inference_mode():
        expected = towers.encoder(history, kinds, ages_s, profile)
        for width in (3, 8, 20):
            wider = (
                torch.zeros(1, width, two_tower.WIDTH),
                torch.zeros(1, width, dtype=torch.int64),
                torch.zeros(1, width),
            )
            for padded, whole in zip(wider, (history, kinds, ages_s), strict=True):
                padded[:, -3:] = whole[:, -3:]
            torch.testing.assert_close(towers.encoder(*wider, profile), expected)


def test_losses_are_reported_and_fall(towers: Vectors) -> None:
    seen: list[tuple[int, float, float]] = []
    again = two_tower.fit(
        checkerboard(),
        features=features(),
        profiles=[{}] * 120,
        history=8,
        run=Run(on_epoch=lambda epoch, train, valid: seen.append((epoch, train, valid))),
    )
    assert [(train, valid) for _, train, valid in seen] == list(again.losses)
    assert [epoch for epoch, _, _ in seen] == list(range(len(again.losses)))
    assert again.losses[-1][0] < again.losses[0][0]


def test_a_seed_gives_the_same_network(towers: Vectors) -> None:
    again, other = fit(), fit(seed=1)
    np.testing.assert_array_equal(again.items, towers.items)
    for name, value in towers.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value)
    assert again.losses == towers.losses
    assert not np.array_equal(other.items, towers.items)


@pytest.mark.parametrize("size", [1, 2, 33])
def test_the_exported_encoder_is_the_encoder(towers: Vectors, size: int, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt2"
    save_program(towers.export(), path)
    rows = [[index % 40, (index * 7) % 40][: index % 3] for index in range(size)]
    given = inputs(rows, towers)
    with torch.inference_mode():
        torch.testing.assert_close(load_program(path, torch.device("cpu"))(*given), towers.encoder(*given))


@pytest.mark.parametrize("events", [0, 1])
def test_too_little_to_learn_from_still_gives_vectors(events: int) -> None:
    past = checkerboard()
    towers = two_tower.fit(
        past.where(np.arange(len(past.user)) < events), features=features(), profiles=[{}], history=8
    )
    assert np.isfinite(towers.items).all() and len(towers.items) == 2 * GROUP


def test_impressions_teach_nothing() -> None:
    past = checkerboard()
    past.kind[:] = EventType.VIEW_ITEM_LIST
    towers = two_tower.fit(past, features=features(), profiles=[{}] * 120, history=8)
    assert towers.losses == ()


def sets(size: int = 6) -> Interactions:
    """Users who bought some of the items of their group at once, a millisecond apart."""
    past = checkerboard(length=size)
    rng = np.random.default_rng(2)
    some = [rng.permutation(GROUP)[:size] + user % 2 * GROUP for user in range(120)]
    return past._replace(row=np.concatenate(some).astype(np.int32), ts_ms=np.tile(np.arange(size), 120))


def test_sets_without_an_order_teach_who_goes_with_whom() -> None:
    past, nothing = sets(), np.zeros((2 * GROUP, 8), np.float32)
    towers = two_tower.fit(past, features=nothing, profiles=[{}] * 120, history=8)
    best = np.argsort(-scores([[1, 2, 3], [GROUP + 1, GROUP + 2, GROUP + 3]], towers), axis=1)[:, : GROUP // 2]
    assert (best[0] < GROUP).all() and (best[1] >= GROUP).all()
    times = np.bincount(past.row, minlength=2 * GROUP)
    np.testing.assert_allclose(np.linalg.norm(towers.items, axis=1), (times / times.mean()) ** 0.05, rtol=1e-4)
    assert towers.encoder.state_dict()["scale"] * two_tower.WIDTH**0.5 == pytest.approx(10.0)


def test_an_order_makes_no_sets() -> None:
    assert _manner(sets()) == SETS
    assert _manner(checkerboard()) == SEQUENCES
    assert _manner(sets(size=1)) == SEQUENCES, "single events are no sets"
    assert _manner(sets().where(np.zeros(720, bool))) == SEQUENCES
