"""Splits as published, read from small files of the same form."""

import gzip
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.state.events import item_key
from models.benchmark import SPLITS, Stage, run

USERS, ITEMS = 200, 30
LOYAL = 150


def user_items(user: int, rng: np.random.Generator) -> list[int]:
    """Everybody keeps to the items of one half, and walks on by one from each to the next."""
    start = int(rng.integers(ITEMS // 2))
    return [(start + step) % (ITEMS // 2) + (user % 2) * (ITEMS // 2) for step in range(int(rng.integers(6, 11)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("datasets"), np.random.default_rng(0)
    rows = [user_items(user, rng) for user in range(USERS)]
    parts = {
        "gowalla/train": [row[:-2] for row in rows],
        "gowalla/test": [row[-2:] for row in rows],
        "amazon_s3rec/Beauty": rows,
    }
    for name, lines in parts.items():
        path = root / f"{name}.txt.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(lines))
    with gzip.open(root / "amazon_s3rec" / "Beauty_item2attributes.json.gz", "wt") as file:
        json.dump({str(item): [item % 3] for item in range(ITEMS)}, file)
    (root / "sessions_retailrocket").mkdir()
    sessions = pl.DataFrame({"session": range(USERS), "items": rows})
    sessions.write_parquet(root / "sessions_retailrocket" / "train_sessions.parquet")
    labels = pl.DataFrame({"prefix": [row[:-1] for row in rows[:40]], "label": [row[-1] for row in rows[:40]]})
    labels.write_parquet(root / "sessions_retailrocket" / "test.parquet")
    return root


def invoices(folder: Path) -> None:
    """A shop of Online Retail's time: everybody buys of one half every ten days, `LOYAL` customers to the end."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "InvoiceNo": f"{user}-{visit}",
            "StockCode": f"p{item}",
            "Description": f"THING {item}",
            "Quantity": 1,
            "InvoiceDate": datetime(2011, 6, 1) + timedelta(days=10 * visit + user / USERS),
            "UnitPrice": 1.5,
            "CustomerID": user,
            "Country": "United Kingdom",
        }
        for user in range(USERS)
        for visit in range(19 if user < LOYAL else 16)
        for item in rng.choice(ITEMS // 2, 2, replace=False) + (user % 2) * (ITEMS // 2)
    ]
    path = folder / "online_retail" / "online_retail.csv.gz"
    path.parent.mkdir()
    pl.DataFrame(lines).write_csv(path, compression="gzip")


KEYS = {item_key(str(item)): item for item in range(ITEMS)}


def known(stage: Stage, before_ms: int) -> dict[int, list[int]]:
    log = stage.log.before(before_ms)
    return {
        user: [KEYS[key] for key in log.events["item"][log.user == user].tolist()] for user in range(len(log.users))
    }


def wanted(stage: Stage) -> Mapping[int, set[int]]:
    return {user: {KEYS[key] for key in keys.tolist()} for user, keys in stage.wanted.items()}


def test_sets_teach_the_ranker_a_fifth_of_training(folder: Path) -> None:
    split = SPLITS["gowalla"](folder, 0)
    fitted, judged = known(split.learn, split.learn.fit_ms), known(split.judge, split.judge.fit_ms)
    for user, items in wanted(split.learn).items():
        assert not items & set(fitted[user])
        assert items | set(fitted[user]) == set(judged[user])
    for log in (split.learn.log, split.judge.log):
        assert ((np.diff(log.events["ts"]) > 0) | (np.diff(log.user) > 0)).all(), "one after the other"
    for user, items in wanted(split.judge).items():
        assert len(items) == 2 and not items & set(judged[user])


def test_sequences_leave_one_out(folder: Path) -> None:
    split, rng = SPLITS["beauty"](folder, 0), np.random.default_rng(0)
    rows = [user_items(user, rng) for user in range(USERS)]
    fitted, asked = known(split.learn, split.judge.fit_ms), known(split.judge, split.judge.now_ms)
    for user, row in enumerate(rows):
        assert fitted[user] == row[:-2] and wanted(split.learn)[user] == {row[-2]}
        assert asked[user] == row[:-1] and wanted(split.judge)[user] == {row[-1]}


def test_sessions_are_asked_in_their_middle_and_never_fitted(folder: Path) -> None:
    split = SPLITS["retailrocket-sessions"](folder, 0)
    for stage in (split.learn, split.judge):
        fitted, asked = known(stage, stage.fit_ms), known(stage, stage.now_ms)
        for user in stage.wanted:
            assert not fitted[user] and asked[user]
    assert len(split.judge.wanted) == 40


@pytest.mark.parametrize("name", ["gowalla", "beauty", "retailrocket-sessions"])
def test_the_leaderboard_has_every_source_and_the_pipeline_ahead_of_popularity(folder: Path, name: str) -> None:
    split = SPLITS[name](folder, 0)
    rows, seconds = run(split, ["history", "item_cf", "transitions", "popularity"], "linear", 0, lambda step: None)
    scores = {row.name: row.scores[split.metrics[1]] for row in rows}
    assert set(seconds) == {"history", "item_cf", "transitions", "popularity"}
    assert {"source item_cf", "source transitions", "source popular", "fusion reciprocal_rank"} < scores.keys()
    assert scores["pipeline"] > 1.2 * scores["source popular"]


def test_online_retail_is_cut_a_month_before_its_end(tmp_path: Path) -> None:
    arguments = "benchmark quality online-retail --models history,item_cf,popularity --ranker linear".split()
    missing = CliRunner().invoke(cli, [*arguments, "--data", str(tmp_path)])
    assert missing.exit_code == 2 and "online_retail.csv.gz" in missing.stderr
    invoices(tmp_path)
    result = CliRunner().invoke(cli, [*arguments, "--data", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    _, new, everything = result.stdout.split("\n### ")
    assert new.startswith("new: ") and everything.startswith(f"all: {LOYAL} users")
    ndcg = dict(re.findall(r"\n\| (pipeline|source popular) \| \**([.\d]+)", everything))
    assert float(ndcg["pipeline"]) > 1.2 * float(ndcg["source popular"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lastfm"], "no data lastfm; there are online-retail, gowalla"),
        (["gowalla", "--models", "ease,oracle"], "no model oracle; there are history"),
        (["gowalla", "--ranker", "oracle"], "no ranker oracle; there are mlp"),
        (["sports"], "Sports_and_Outdoors.txt.gz cannot be read"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, ["benchmark", "quality", *arguments, "--data", str(folder)])
    assert result.exit_code == 2
    assert says in result.output
