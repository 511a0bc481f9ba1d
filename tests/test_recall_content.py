import numpy as np
import polars as pl
import pytest

from models.recall import content

SHOP = pl.DataFrame(
    {
        "title": ["Red cotton shirt", "Blue cotton shirt", "Steel frying pan", "Copper frying pan", "Shirts", None],
        "category": ["Fashion > Tops", "Fashion > Tops", "Kitchen > Pans", "Kitchen > Pans", "Fashion > Tops", None],
        "brand": ["Velmar", "Velmar", "Norden", "Norden", None, None],
        "price": [30.0, 32.0, 55.0, 60.0, None, None],
    }
)


def test_the_likest_item_comes_first() -> None:
    near = content.fit(SHOP, k=3)
    assert near.rows.dtype == np.int32 and near.weights.dtype == np.float32
    assert near.rows[:4, 0].tolist() == [1, 0, 3, 2]
    assert (np.diff(near.weights, axis=1) <= 0).all()


def test_word_forms_are_alike() -> None:
    titles = pl.DataFrame({"title": ["wooden chairs", "chair", "lamp"]})
    assert content.fit(titles, k=1).rows[1, 0] == 0


def test_an_item_without_attributes_has_no_neighbours() -> None:
    near = content.fit(SHOP, k=3)
    assert near.rows[5].tolist() == [-1, -1, -1] and not near.weights[5].any()
    assert not (near.rows == 5).any()


def test_prices_nearby_are_alike_and_far_apart_are_not() -> None:
    near = content.fit(pl.DataFrame({"price": [10.0, 11.0, 100.0, -1.0, None]}), k=2)
    assert near.rows[0].tolist() == [1, -1]
    assert near.rows[2].tolist() == near.rows[3].tolist() == near.rows[4].tolist() == [-1, -1]


@pytest.mark.parametrize("column", SHOP.columns)
def test_every_column_may_be_missing_or_alone(column: str) -> None:
    for frame in (SHOP.drop(column), SHOP.select(column), SHOP.with_columns(pl.lit(None).alias(column))):
        near, features = content.fit(frame, k=2), content.features(frame)
        assert near.rows.shape == (6, 2)
        assert len(features) == 6 and np.isfinite(features).all()


def test_an_empty_catalog() -> None:
    assert content.fit(SHOP.clear(), k=2).rows.shape == (0, 2)
    assert len(content.features(SHOP.clear())) == 0


def test_vectors_tell_apart_what_words_do_not() -> None:
    frame = pl.DataFrame(
        {"title": ["mug"] * 4, "vector": [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], None]},
        schema={"title": pl.String, "vector": pl.List(pl.Float32)},
    )
    near = content.fit(frame, k=3)
    assert near.rows[0, 0] == 1 and near.rows[2, 1] != -1
    assert content.features(frame).shape[1] == content.features(frame.drop("vector")).shape[1] + 2


def test_features_keep_likeness_and_do_not_depend_on_the_order() -> None:
    features = content.features(SHOP)
    unit = features[:, : content.WIDTH]
    likeness = unit @ unit.T
    assert likeness[0, 1] > likeness[0, 2] + 0.2
    assert likeness[2, 3] > likeness[2, 0] + 0.2
    np.testing.assert_allclose(content.features(SHOP.reverse())[::-1], features, atol=1e-6)


def test_inverted_lists_find_what_an_exact_scan_finds() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(3_000)])
    count = content.EXACT_BELOW + 1_000
    themes = rng.integers(0, 300, count)
    picked = (themes[:, None] * 10 + rng.integers(0, 10, (count, 5))) % len(words)
    frame = pl.DataFrame({"title": [" ".join(row) for row in words[picked]]})
    near = content.fit(frame, k=10)
    assert (near.rows >= 0).mean() > 0.99
    assert (themes[near.rows[:, :5]] == themes[:, None]).mean() > 0.95
