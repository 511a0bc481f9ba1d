"""From a shop's history to a bundle that serves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from app.__main__ import cli
from app.bundle import Bundle, current, open_bundle, versions
from app.engine import Query
from app.engine.pipeline import Pipeline
from app.engine.recorded import replay
from app.main import create_app
from app.settings import Settings
from models.data import DataError, Tables, canonical
from models.data.log import Log
from models.data.simulator import simulate
from models.data.times import DAY_MS
from models.evaluate import HEADLINE, judge
from models.ranking import RANKERS, Examples
from models.sources import WINDOW
from models.train import Trained, train
from tests.live import serving

DAYS = 20


@pytest.fixture(scope="module", autouse=True)
def single_threaded() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shop() -> Tables:
    return simulate(items=100, users=80, events=3_000, days=DAYS)


@pytest.fixture(scope="module")
def cut_ms(shop: Tables) -> int:
    return int(np.quantile(shop.events["timestamp"].to_numpy(), 0.8))


@pytest.fixture(scope="module")
def trained(shop: Tables, cut_ms: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Trained]:
    return train(undated(shop), tmp_path_factory.mktemp("bundles"), windows=1, cut_ms=cut_ms)


def undated(tables: Tables) -> Tables:
    """A shop that says of every other item only that it was sold."""
    odd = pl.int_range(pl.len()) % 2 == 1
    return replace(tables, items=tables.items.with_columns(pl.when(odd).then("created_at").alias("created_at")))


def answers(bundle: Bundle, log: Log, now_ms: int) -> list[list[tuple[str, float]]]:
    pipeline = Pipeline(bundle, torch.device("cpu"), 32)
    queries = [Query(f"{scene}-{user}", scene=scene) for scene in pipeline.scenes for user in log.users]
    slates = pipeline.run(queries, log.states(now_ms, WINDOW) * len(pipeline.scenes), now_ms)
    return [[(item.item_id, item.score) for item in slate.items] for slate in slates]


def files_of(bundle: Bundle) -> dict[str, str]:
    # Exported programs hold the time of writing.
    return {name: spec.sha256 for name, spec in bundle.manifest.files.items() if not name.endswith(".pt2")}


def test_bundle_is_published_and_keeps_its_word(trained: tuple[Bundle, Trained], shop: Tables, cut_ms: int) -> None:
    bundle, learned = trained
    root = bundle.path.parent
    assert current(root) == bundle.version
    assert versions(root) == [bundle.version]
    opened = open_bundle(bundle.path)
    replay(Pipeline(opened, torch.device("cpu"), 32))
    for name in ("home", "buy_again"):
        scene = opened.manifest.scenes[name]
        assert (scene.fusion, scene.ranker) == ("learned", name)
        assert 0 < learned.candidate_recall[name] <= 1
    assert opened.manifest.provenance["cut_ms"] == cut_ms
    assert opened.manifest.provenance["events"] == shop.events.filter(pl.col("timestamp") < cut_ms).height


def test_bundle_serves(trained: tuple[Bundle, Trained], shop: Tables, tmp_path: Path, valkey_url: str) -> None:
    bundle, _ = trained
    settings = Settings(
        redis_url=valkey_url, home=tmp_path, bundles=bundle.path.parent, redis_timeout_ms=10_000, deadline_ms=10_000
    )
    item = bundle_items(bundle)[0]
    with serving(create_app(settings)) as client:
        for scene in bundle.manifest.scenes:
            asked = {"user_id": shop.users["user_id"][0], "scene": scene, "item_id": item, "fields": "title"}
            answer = client.get("/recommend", params=asked).json()
            assert answer["bundle"] == bundle.version
            assert answer["degraded"] == []
            assert len(answer["items"]) == 20
            assert {item["item_id"] for item in answer["items"]} <= set(bundle_items(bundle))


def bundle_items(bundle: Bundle) -> list[str]:
    catalog = Pipeline(bundle, torch.device("cpu"), 1).catalog
    return catalog.ids(range(catalog.size))


def test_what_comes_after_the_cut_changes_nothing(
    trained: tuple[Bundle, Trained], shop: Tables, cut_ms: int, tmp_path: Path
) -> None:
    """The same seed on the history as it was then learns the same to the last bit."""
    bundle, learned = trained
    known = undated(shop)
    late = pl.col("timestamp") >= cut_ms
    past = known.events.remove(late)
    # An undated item of which there is no event yet was not there to be seen.
    new = known.events.filter(late).join(past, on="item_id", how="anti")
    unseen = pl.col("created_at").is_null() & pl.col("item_id").is_in(new["item_id"].to_list())
    items = known.items.remove(unseen)
    assert items.height < known.items.height
    then, learned_then = train(replace(known, events=past, items=items), tmp_path, windows=1, cut_ms=cut_ms)
    assert then.manifest.provenance["data_sha256"] == bundle.manifest.provenance["data_sha256"]
    assert learned_then.losses == learned.losses
    assert learned_then.candidate_recall == learned.candidate_recall
    assert files_of(then) == files_of(bundle)
    log = Log.from_tables(shop)
    assert answers(then, log, cut_ms) == answers(bundle, log, cut_ms)
    assert then.version != bundle.version


def test_another_seed_learns_something_else(
    trained: tuple[Bundle, Trained], shop: Tables, cut_ms: int, tmp_path: Path
) -> None:
    other, learned = train(undated(shop), tmp_path, windows=1, cut_ms=cut_ms, seed=1)
    bundle, first = trained
    assert other.manifest.provenance["data_sha256"] == bundle.manifest.provenance["data_sha256"]
    assert learned.losses != first.losses


@pytest.mark.slow
def test_pipeline_beats_the_popular_ones(tmp_path: Path) -> None:
    tables = simulate(items=300, users=400, events=15_000, days=40)
    cut_ms = int(tables.events["timestamp"].max()) - 6 * DAY_MS  # type: ignore[arg-type]
    bundle, _ = train(tables, tmp_path, windows=1, label_days=5, cut_ms=cut_ms)
    for view in judge(bundle, tables, cut_ms, 6, lambda step: None):
        found = {row.name: row.scores[HEADLINE] for row in view.rows}
        assert found["pipeline"] > 1.1 * found["source popular"]
        assert view.leads["source popular"].low > 0


DAY_S = 24 * 3600


def written(path: Path, rows: list[tuple[str, str, str, int]]) -> Path:
    lines = ["user_id,item_id,type,timestamp", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def many(users: int, items: int, kinds: tuple[str, ...], step_s: int = DAY_S // 2) -> list[tuple[str, str, str, int]]:
    return [(f"u{n % users}", f"i{n % items}", kinds[n % len(kinds)], 1_700_000_000 + n * step_s) for n in range(60)]


HOPELESS = {
    "one event": [("u", "i", "view", 1_700_000_000)],
    "one moment": many(9, 7, ("view",), 0),
    "one day": many(9, 7, ("view",), 60),
    "only impressions": many(9, 7, ("impression",)),
    "only searches": many(9, 7, ("search",)),
    "only hides": many(9, 7, ("hide",)),
    "only refunds": many(9, 7, ("refund",)),
    "only unknown types": many(9, 7, ("teleport",)),
}
POOR = {
    "two events": [("u", "i", "view", 1_700_000_000), ("u", "j", "view", 1_700_000_000 + 30 * DAY_S)],
    "one user": many(1, 7, ("view", "purchase")),
    "one item": many(9, 1, ("view", "purchase")),
    "one user, one item": many(1, 1, ("view",)),
    "only strangers": many(60, 60, ("view",)),
    "two moments": [*many(9, 7, ("view",), 0), ("u1", "i1", "view", 1_700_000_000 + 2 * DAY_S)],
    "late items": [("u", "a", "view", 1_700_000_000), *many(9, 7, ("view",), 3600)],
}


def command(events: Path, folder: Path) -> tuple[int, list[str], BaseException | None]:
    ended = CliRunner().invoke(
        cli, ["train", "--events", str(events), "--bundles", str(folder / "bundles"), "--windows", "2"]
    )
    return ended.exit_code, ended.stderr.splitlines(), ended.exception


@pytest.mark.parametrize("name", HOPELESS)
def test_what_teaches_nothing_ends_with_one_line(tmp_path: Path, name: str) -> None:
    code, said, error = command(written(tmp_path / "events.csv", HOPELESS[name]), tmp_path)
    assert (code, type(error)) == (2, SystemExit)
    assert said[-1].startswith("millirec: ")
    assert current(tmp_path / "bundles") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("user_id,item_id,timestamp\n", "no rows"),
        ("user_id\na\nb\n", "no column for item_id, timestamp among user_id"),
        ("user_id,item_id,timestamp\na,b,yesterday\n", "none of 1 rows can be used: 1 no time"),
    ],
)
def test_what_is_no_history_is_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "events.csv").write_text(content)
    code, said, error = command(tmp_path / "events.csv", tmp_path)
    assert (code, type(error)) == (2, SystemExit)
    (line,) = said
    assert line.startswith("millirec: ")
    assert reason in line


@pytest.mark.parametrize("name", POOR)
def test_what_teaches_little_ends_in_a_bundle_or_in_one_line(tmp_path: Path, name: str) -> None:
    code, said, error = command(written(tmp_path / "events.csv", POOR[name]), tmp_path)
    if version := current(tmp_path / "bundles"):
        assert (code, error) == (0, None)
        replay(Pipeline(open_bundle(tmp_path / "bundles" / version), torch.device("cpu"), 32))
    else:
        assert (code, type(error)) == (2, SystemExit)
        assert said[-1].startswith("millirec: ")


class Backwards:
    """Ranks what is popular last."""

    calibrated = False

    def __init__(self, examples: Examples, **_: object) -> None:
        self._column = examples.names.index("item.purchases")

    def __call__(self, features: Tensor) -> Tensor:
        return -features[:, self._column]


def test_what_is_no_better_than_popularity_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RANKERS, "mlp", Backwards)
    shop = simulate(items=100, users=600, events=15_000, days=DAYS)
    with pytest.raises(DataError, match=r"for buy_again ranks no better than popularity, NDCG@20 .* is published"):
        train(shop, tmp_path, models=("history", "item_cf", "popularity"))
    assert versions(tmp_path) == []


def test_validation_is_in_the_manifest(trained: tuple[Bundle, Trained]) -> None:
    for scene in ("home", "buy_again"):
        found = trained[0].manifest.metrics["validation"][scene]
        assert 0 <= found["ndcg@20"] <= 1 and 0 <= found["popularity"] <= 1 and found["users"] >= 1


def test_a_model_that_an_early_window_lacks_is_left_to_the_scenes_without_a_ranker(tmp_path: Path) -> None:
    """Two windows, the first of which has too few events for the network."""
    bundle, learned = train(simulate(items=60, users=60, events=1_300, days=20), tmp_path, windows=2, ranker="linear")
    scenes = bundle.manifest.scenes
    assert {"two_tower"} == {one.name for one in scenes["detail"].sources} - {
        one.name for one in scenes["home"].sources
    }
    assert scenes["home"].fusion == "learned"
    assert not learned.missing


def test_scenes_carry_fitted_weights(trained: tuple[Bundle, Trained]) -> None:
    for scene in ("home", "buy_again"):
        weights = [source.weight for source in trained[0].manifest.scenes[scene].sources]
        assert all(0 < weight <= 1 for weight in weights) and max(weights) == 1


def test_what_cannot_be_had_is_said_and_kept(tmp_path: Path) -> None:
    events = pl.DataFrame(many(1, 7, ("view", "purchase")), ["user_id", "item_id", "type", "timestamp"], orient="row")
    tables = canonical(events, source="test", now_ms=1_800_000_000_000)
    bundle, learned = train(tables, tmp_path, windows=1, models=("item_cf", "category", "popularity"))
    assert learned.missing == [
        "no ranker for home: nobody wanted anything in the training windows",
        "no ranker for buy_again: candidates were wanted in one query only, and one more is needed to choose by",
        "no source of category: this history does not allow it",
    ]
    assert bundle.manifest.metrics["missing"] == learned.missing
    assert bundle.manifest.scenes["home"].fusion == "reciprocal_rank"


FOURTH = pl.int_range(pl.len()) == 3
DAMAGED: dict[str, dict[str, pl.Expr]] = {
    "constant columns": {"title": pl.lit("a"), "category": pl.lit("A"), "brand": pl.lit("b"), "price": pl.lit(1.0)},
    "empty columns": dict.fromkeys(("title", "category", "brand", "price", "created_at"), pl.lit(None, pl.String)),
    "prices that are no numbers": {"price": pl.lit(float("nan"))},
    "an endless price": {"price": pl.when(FOURTH).then(float("inf")).otherwise("price")},
    "a vector of another width": {"vector": pl.when(FOURTH).then([1.0]).otherwise([1.0, 2.0])},
    "vectors that are no numbers": {"vector": pl.lit([1.0, float("nan")])},
    "a vector at the end of float32": {"vector": pl.when(FOURTH).then([3e38, 3e38]).otherwise([1.0, 2.0])},
    "a category below itself": {"category": pl.lit("A > B > A")},
    "categories without names": {"category": pl.lit(">>")},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_items_are_learned_from_all_the_same(tmp_path: Path, name: str) -> None:
    shop = simulate(items=40, users=40, events=1_200, days=DAYS)
    items = shop.items.with_columns(**DAMAGED[name])
    tables = canonical(shop.events, items, shop.users, source="test", now_ms=1_800_000_000_000)
    bundle, learned = train(
        tables, tmp_path, windows=1, models=("item_cf", "content", "two_tower", "popularity"), ranker="linear"
    )
    replay(Pipeline(bundle, torch.device("cpu"), 32))
    assert not learned.missing
    assert {scene.fusion for name, scene in bundle.manifest.scenes.items() if scene.ranker} == {"learned"}


def test_a_cycle_among_categories_ends_with_one_line(tmp_path: Path) -> None:
    written(tmp_path / "events.csv", many(9, 7, ("view", "purchase")))
    (tmp_path / "items.csv").write_text("item_id,category\ni1,3\ni2,1\n")
    (tmp_path / "categories.csv").write_text("categoryid,parentid\n1,\n2,3\n3,2\n")
    options = [f"--{name}={tmp_path / name}.csv" for name in ("events", "items", "categories")]
    ended = CliRunner().invoke(cli, ["train", *options, "--bundles", str(tmp_path / "bundles")])
    assert ended.exit_code == 2
    assert ended.stderr == "millirec: categories: column parent_id: a cycle, 2 > 3 > 2, from row 2 on\n"
