"""`millirec benchmark quality`: public data that others have figures for, through the serving engine.

A split without times is given some: sequences a day an event, sessions a minute, and sets a millisecond in random
order, so that decay means distance, or nothing. The ranker learns from a part of training that the sources did not
see; what the test part holds is looked at once, in the end.
"""

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import typer
from torch import Tensor

from app.bundle import seal
from app.engine import Query
from app.engine.merge import ABSENT
from app.engine.ordering import best_first
from app.engine.pipeline import Pipeline, Prepared
from app.engine.ranking import FUSIONS
from app.scenes import Scene
from app.state.events import EVENT, EventType, item_key
from models.commands import (
    STANDARD_MODELS,
    Device,
    Ranker,
    chosen,
    device_of,
    one_line_errors,
    progress,
    single_threaded,
)
from models.commands import evaluate as evaluate_shop
from models.data import DataError
from models.data.log import Log
from models.data.tables import ITEMS
from models.data.times import DAY_MS
from models.metrics import Row, Scores, bootstrap, evaluate, markdown
from models.ranking import RANKERS, weights
from models.recall.training import Run
from models.sources import MODELS, WINDOW, Fitted, Progress, Width, fit
from models.train import Learned, examples, with_learned

BATCH = 32
LIMIT = 20
NOW_MS = 1_700_000_000_000
MINUTE_MS = 60_000
HELD_OUT = 0.2
"""Share of each user's set that the ranker learns from."""
SESSIONS_DAYS = 131
"""What the sessions span."""
LEARNED_FROM = 5_000
"""Users whose candidates the ranker sees, at most."""
K = 100
"""Candidates of each source."""
WIDTH = Width(
    neighbours=200, likest=200, two_tower=128, lightgcn=256, spectral=512, ease=400, ease_long=800, ease_gb=6.0
)


@dataclass(frozen=True, slots=True)
class Stage:
    """What the sources are fitted on, and whom the engine then answers when."""

    log: Log
    fit_ms: int
    """Sources know the events before it."""
    now_ms: int
    """States hold the events before it."""
    wanted: Mapping[int, npt.NDArray[np.int64]]
    """By user of the log: the keys of the items to be found."""


@dataclass(frozen=True, slots=True)
class Split:
    """One public data set in its published split."""

    items: pl.DataFrame
    learn: Stage
    judge: Stage
    metrics: tuple[str, str]
    repeats: bool = False


def gowalla(folder: Path, seed: int) -> Split:
    """Sets of places; a fifth of each user's training set teaches the ranker.

    The published test part is not the random fifth that it is said to be: its items are more popular, the share of an
    item that lies in it varies far more than chance would have it, and what it has of one user is more alike than it is
    like the rest of them, most of all what stands side by side: a stretch of time. So parts cut from training, whose
    order is lost, do not foretell it to the per cent.
    """
    train, test = (_lines(folder / "gowalla" / f"{part}.txt.gz") for part in ("train", "test"))
    rng = np.random.default_rng(seed)
    held = [rng.permutation(len(row)) < int(HELD_OUT * len(row)) for row in train]
    n_items = 1 + max(int(row.max(initial=0)) for row in (*train, *test))

    def stage(past: Sequence[npt.NDArray[np.int64]], wanted: Sequence[npt.NDArray[np.int64]]) -> Stage:
        # In any order, but one after the other: what happens at once is nobody's history of anything.
        log = _log(past, [NOW_MS - rng.permutation(len(row)) for row in past], EventType.PURCHASE)
        return Stage(log, NOW_MS + 1, NOW_MS + 1, _keys(wanted))

    learn = stage(
        [row[~out] for row, out in zip(train, held, strict=True)],
        [row[out] for row, out in zip(train, held, strict=True)],
    )
    return Split(_items(n_items), learn, stage(train, test), ("recall@20", "ndcg@20"))


def amazon(name: str) -> Callable[[Path, int], Split]:
    """Sequences, leave one out: the last item is the test, the one before it teaches the ranker."""

    def read(folder: Path, seed: int) -> Split:
        rows = _lines(folder / "amazon_s3rec" / f"{name}.txt.gz")
        with gzip.open(folder / "amazon_s3rec" / f"{name}_item2attributes.json.gz", "rt") as file:
            attributes = {int(item): codes for item, codes in json.load(file).items()}
        titles = [" ".join(f"a{code}" for code in attributes.get(item, ())) for item in range(1 + max(map(max, rows)))]
        # The item that teaches the ranker comes at NOW, what was before it a day an event earlier.
        log = _log([row[:-1] for row in rows], [NOW_MS - DAY_MS * np.arange(len(row) - 2, -1, -1) for row in rows])
        learn = Stage(log, NOW_MS, NOW_MS, _keys([row[-2:-1] for row in rows]))
        judge = Stage(log, NOW_MS, NOW_MS + DAY_MS, _keys([row[-1:] for row in rows]))
        return Split(_items(len(titles), titles), learn, judge, ("recall@10", "ndcg@10"))

    return read


def sessions(folder: Path, seed: int) -> Split:
    """Anonymous clicks; what comes next in the last tenth of the sessions, after any two clicks or more, teaches the
    ranker: so are the sessions to be answered cut, and the long ones come up more often."""
    train = pl.read_parquet(folder / "sessions_retailrocket" / "train_sessions.parquet")["items"]
    test = pl.read_parquet(folder / "sessions_retailrocket" / "test.parquet")
    rows = [np.array(items, np.int64) for items in train.to_list()]
    starts = NOW_MS - SESSIONS_DAYS * DAY_MS + np.arange(len(rows)) * (SESSIONS_DAYS * DAY_MS // len(rows))
    times = [start + MINUTE_MS * np.arange(len(row)) for start, row in zip(starts.tolist(), rows, strict=True)]
    rng = np.random.default_rng(seed)
    last = len(rows) - len(rows) // 10
    places = [(row, cut) for row in rows[last:] for cut in range(2, len(row))]
    chosen = [places[place] for place in rng.permutation(len(places))[: len(rows) - last].tolist()]

    def stage(known: int, prefixes: Sequence[npt.NDArray[np.int64]], labels: Sequence[npt.NDArray[np.int64]]) -> Stage:
        fit_ms = int(starts[known - 1]) + DAY_MS
        before = [fit_ms + DAY_MS - MINUTE_MS * np.arange(len(row), 0, -1) for row in prefixes]
        log = _log([*rows[:known], *prefixes], [*times[:known], *before], EventType.VIEW_ITEM)
        return Stage(log, fit_ms, fit_ms + DAY_MS, _keys(labels, first=known))

    learn = stage(
        last,
        [row[:cut] for row, cut in chosen],
        [row[cut : cut + 1] for row, cut in chosen],
    )
    prefixes = [np.array(items, np.int64) for items in test["prefix"].to_list()]
    judge = stage(len(rows), prefixes, [np.array([label]) for label in test["label"].to_list()])
    n_items = 1 + max(int(train.explode().max()), int(test["label"].max()), max(int(row.max()) for row in prefixes))  # type: ignore[arg-type]
    return Split(_items(n_items), learn, judge, ("hr@20", "mrr@20"), repeats=True)


SPLITS: Mapping[str, Callable[[Path, int], Split]] = {
    "gowalla": gowalla,
    "beauty": amazon("Beauty"),
    "sports": amazon("Sports_and_Outdoors"),
    "retailrocket-sessions": sessions,
}
RETAIL = "online-retail"
"""A shop's history with times, which `millirec evaluate` judges as it does any other: fixed here is where it is cut."""
DATASETS = ", ".join((RETAIL, *SPLITS))


def run(
    split: Split, models: Sequence[str], ranker: str, seed: int, note: Progress, device: str = "cpu"
) -> tuple[list[Row], dict[str, float]]:
    """The leaderboard of the split, and the seconds that each model took in its last fit."""
    with tempfile.TemporaryDirectory() as folder:
        fitted, pipeline, scene = _fitted(Path(folder), split, split.learn, models, seed, note, device)
        users = sorted(split.learn.wanted)
        users = np.random.default_rng(seed).permutation(users)[:LEARNED_FROM].tolist()
        note(f"candidates of {len(users):,} users for the ranker")
        stage = split.learn
        chosen = {user: stage.wanted[user] for user in users}
        learned, share = examples(pipeline, scene, stage.log, chosen, fitted.items, stage.now_ms)
        note(f"ranker: {len(learned.label):,} candidates, of what was wanted {share:.3f} among them")
        fitted_ranker = RANKERS[ranker](
            learned, seed=seed, on_epoch=lambda epoch, train, valid: note(f"ranker {epoch}: {train:.4f} {valid:.4f}")
        )
        fitted_weights = weights.fit(learned, [source.name for source in scene.sources], seed=seed)
        del learned, pipeline
        if split.judge.log is not split.learn.log:
            fitted, _, scene = _fitted(Path(folder, "again"), split, split.judge, models, seed, note, device)
        if lost := with_learned(fitted.draft, {"evaluated": Learned(fitted_weights, fitted_ranker)}):
            raise DataError(lost[0])
        pipeline = Pipeline(seal(fitted.draft, "judged"), torch.device("cpu"), BATCH)
        rows = [
            Row(name, scores, bootstrap(scores.per_user[split.metrics[1]], seed=seed))
            for name, scores in _judged(pipeline, split.judge, fitted, note).items()
        ]
    return rows, dict(fitted.seconds)


def _fitted(
    folder: Path, split: Split, stage: Stage, models: Sequence[str], seed: int, note: Progress, device: str
) -> tuple[Fitted, Pipeline, Scene]:
    folder.mkdir(exist_ok=True)
    fitted = fit(folder, split.items, stage.log, stage.fit_ms, seed, note, models=models, width=WIDTH, run=Run(device))
    home = fitted.draft.scenes["home"]
    scene = home.model_copy(
        update={
            "sources": tuple(source.model_copy(update={"k": K}) for source in home.sources),
            "repeats": split.repeats,
        }
    )
    fitted.draft.scenes = {"evaluated": scene}
    return fitted, Pipeline(seal(fitted.draft, "learned from"), torch.device("cpu"), BATCH), scene


def _judged(pipeline: Pipeline, stage: Stage, fitted: Fitted, note: Progress) -> dict[str, Scores]:
    """Every source alone, every fusion and the learned one, from one recall of each user."""
    scene = pipeline.scenes["evaluated"]
    users = sorted(stage.wanted)
    found: dict[str, npt.NDArray[np.int64]] = {}
    for start in range(0, len(users), BATCH):
        if start % (100 * BATCH) == 0:
            note(f"slates of {start:,} of {len(users):,} users")
        chunk = users[start : start + BATCH]
        queries = [Query(str(user), scene="evaluated", limit=LIMIT) for user in chunk]
        with torch.inference_mode():
            prepared = pipeline.prepare(scene, queries, stage.log.states(stage.now_ms, WINDOW, chunk), stage.now_ms)
            for name, score in rankings(pipeline, scene, prepared):
                slates = found.setdefault(name, np.full((len(users), LIMIT), -1, np.int64))
                place, best = best_first(prepared.batch, prepared.candidates.query, score, LIMIT)
                row = prepared.candidates.row[place.clamp(min=0)]
                slates[start : start + len(chunk), : place.shape[1]] = torch.where(best > -torch.inf, row, -1)
    rows = [fitted.items.rows(stage.wanted[user]) for user in users]
    # What training never saw is a code that no slate holds.
    missed = len(fitted.items.key) + np.arange(max(map(len, rows)))
    relevant = [np.where(row >= 0, row, missed[: len(row)]) for row in rows]
    return {name: evaluate(slates, relevant) for name, slates in found.items()}


def rankings(pipeline: Pipeline, scene: Scene, prepared: Prepared) -> Iterator[tuple[str, Tensor]]:
    """Scores float32 [M] of the candidates by every source alone (-inf where it does not propose one), by every fusion
    and by the scene itself."""
    candidates = prepared.candidates
    for source, rank in zip(scene.sources, candidates.rank, strict=True):
        yield f"source {source.name}", torch.where(rank < ABSENT, -rank, -torch.inf)
    weights = torch.tensor([source.weight for source in scene.sources])
    for name, fusion in FUSIONS.items():
        yield f"fusion {name}", fusion(candidates, weights)
    yield "pipeline", pipeline.rank(scene, prepared)


def _lines(path: Path) -> list[npt.NDArray[np.int64]]:
    """The items of each user: a user a line, first the user's number."""
    try:
        with gzip.open(path, "rt") as file:
            return [np.array(line.split()[1:], np.int64) for line in file]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _items(size: int, titles: Sequence[str] | None = None) -> pl.DataFrame:
    given = pl.DataFrame({"item_id": [str(item) for item in range(size)], "title": titles or [""] * size})
    return given.join(pl.DataFrame(schema=ITEMS).drop("title"), on="item_id", how="left")


def _log(
    rows: Sequence[npt.NDArray[np.int64]],
    times: Sequence[npt.NDArray[np.int64]],
    kind: EventType = EventType.PURCHASE,
) -> Log:
    """A user for each of the rows, in their order."""
    row = np.concatenate(rows)
    keys = np.array([item_key(str(item)) for item in range(int(row.max()) + 1)])
    events = np.zeros(len(row), EVENT)
    events["ts"], events["item"], events["type"], events["quantity"] = np.concatenate(times), keys[row], kind, 1
    events["value"] = np.nan
    events["event"] = np.arange(len(row))
    user = np.repeat(np.arange(len(rows), dtype=np.int32), [len(own) for own in rows])
    order = np.lexsort((events["ts"], user))
    return Log([str(number) for number in range(len(rows))], [{}] * len(rows), user, events[order])


def _keys(wanted: Sequence[npt.NDArray[np.int64]], first: int = 0) -> dict[int, npt.NDArray[np.int64]]:
    """The distinct keys that each user wants who wants any; the users are numbered from `first`."""
    return {
        user: np.unique([item_key(str(item)) for item in items.tolist()])
        for user, items in enumerate(wanted, first)
        if len(items)
    }


def benchmark(
    what: Annotated[Literal["quality"], typer.Argument(help="What to measure; speed is `make bench`.")],
    dataset: Annotated[str, typer.Argument(help=f"One of {DATASETS}.")],
    data: Annotated[Path, typer.Option(envvar="MILLIREC_DATASETS", help="Folder of the data sets.")],
    models: Annotated[
        str | None, typer.Option(help=f"As `train` has them. Default: all; for {RETAIL} as `train` chooses.")
    ] = None,
    ranker: Ranker = "blend",
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
) -> None:
    """Judge every model, every fusion and the pipeline on public data that others have figures for."""
    if dataset == RETAIL:
        evaluate_shop(
            cut=datetime(2011, 11, 9),
            days=30,
            label_days=30,
            retail=data / "online_retail" / "online_retail.csv.gz",
            models=models or STANDARD_MODELS,
            ranker=ranker,
            seed=seed,
            device=device,
        )
        return
    single_threaded()
    with one_line_errors(), progress() as shown:
        if dataset not in SPLITS:
            raise DataError(f"no data {dataset}; there are {DATASETS}")
        names = chosen(models or ",".join(MODELS), ranker)
        split = SPLITS[dataset](data, seed)
        begun = time.monotonic()
        rows, seconds = run(split, names, ranker, seed, shown, device_of(device))
        total = time.monotonic() - begun
    columns = (split.metrics[1], split.metrics[0])
    print(f"\n### {dataset}: {len(split.judge.wanted):,} users, {total:,.0f} s\n")
    print(markdown(rows, columns))
    print("\nseconds of the last fit: " + ", ".join(f"{name} {spent}" for name, spent in seconds.items()))
