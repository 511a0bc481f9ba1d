"""`millirec train`, `evaluate` and `simulate`."""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import faiss
import torch
import typer
from rich.console import Console

from app.bundle import Bundle, BundleError, current, open_bundle
from app.settings import Settings
from models.data import DataError, Tables, online_retail, read_tables
from models.data.simulator import simulate as simulated
from models.evaluate import HEADLINE, judge
from models.evaluate import result as result_of
from models.metrics import markdown
from models.ranking import RANKERS
from models.recall.training import Board, Run
from models.result import sheets
from models.sources import MODELS, STANDARD, Progress
from models.text import sentence_model, with_text_vectors
from models.train import ENOUGH, Trained
from models.train import train as trained_on

Events = Annotated[Path | None, typer.Option(help="CSV, JSON-lines or Parquet file with the events.")]
Items = Annotated[Path | None, typer.Option(help="File with the items; without it they are made from the events.")]
Users = Annotated[Path | None, typer.Option(help="File with the users' attributes.")]
Categories = Annotated[Path | None, typer.Option(help="File with the parent of each category that items name.")]
Retail = Annotated[Path | None, typer.Option("--online-retail", help="The UCI Online Retail invoices, as CSV.")]
Column = Annotated[list[str] | None, typer.Option(help="A column by another name, as user_id=shopper; repeatable.")]
Root = Annotated[Path | None, typer.Option(help="Folder of bundles. Default: MILLIREC_BUNDLES.")]
Seed = Annotated[int, typer.Option(help="Same seed, same data, one thread: same bundle.")]
Windows = Annotated[int, typer.Option(min=1, help="Past windows that the ranker learns from.")]
LabelDays = Annotated[
    float | None, typer.Option(help="Days in a window. Default: an eighth of the history, at most 30.")
]

Models = Annotated[str, typer.Option(help=f"Models to draw on, separated by commas, of {', '.join(MODELS)}.")]
STANDARD_MODELS = ",".join(STANDARD)
TextModel = Annotated[
    str | None,
    typer.Option(help="A sentence-transformers model, by name or folder, that reads titles and descriptions too."),
]
Ranker = Annotated[str, typer.Option(help=f"How candidates are ranked: {', '.join(RANKERS)}.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where networks are learned; auto is the GPU if there is one.")
]

console = Console(stderr=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line where the input or a bundle is at fault."""
    try:
        yield
    except (DataError, BundleError) as error:
        console.print(f"millirec: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def progress() -> Iterator[Progress]:
    """Shows the step at hand with the time so far; where nobody watches, a line a step."""
    begun = time.monotonic()
    if not console.is_terminal:
        yield lambda step: console.print(f"{time.monotonic() - begun:6.0f} s  {step}", markup=False, highlight=False)
        return
    with console.status("starting") as status:

        def show(step: str) -> None:
            status.update(f"{time.monotonic() - begun:.0f} s  {step}")

        yield show


def tables_of(
    events: Path | None,
    items: Path | None,
    users: Path | None,
    retail: Path | None,
    column: list[str] | None,
    categories: Path | None = None,
    text_model: str | None = None,
) -> Tables:
    """The shop's history as the command line names it, with what was dropped printed."""
    if (events is None) == (retail is None):
        raise DataError("name the history with --events or with --online-retail")
    if retail is not None:
        tables = online_retail(retail)
    else:
        assert events is not None
        named = dict(each.partition("=")[::2] for each in column or ())
        tables = read_tables(events, items, users, named, categories=categories)
    console.print(tables.report)
    return tables if text_model is None else with_text_vectors(tables, sentence_model(text_model))


def written(path: Path, text: str) -> None:
    """Raises `DataError` where the file cannot be written."""
    try:
        # A lone surrogate, which an id of a shop may hold, has no bytes in UTF-8.
        path.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def chosen(models: str, ranker: str) -> tuple[str, ...]:
    """The names in `models`, all of which exist, as does the ranker."""
    names = tuple(name.strip() for name in models.split(","))
    for what, unknown, known in (
        ("model", set(names) - MODELS.keys(), MODELS),
        ("ranker", {ranker} - RANKERS.keys(), RANKERS),
    ):
        if unknown:
            raise DataError(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


def single_threaded() -> None:
    """One thread, so that training is reproducible by its seed."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def device_of(device: str) -> str:
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise DataError("--device cuda: torch finds no GPU here")
    return "cuda" if there and device != "cpu" else "cpu"


@contextmanager
def running(checkpoints: Path | None, resume: bool, tensorboard: Path | None, device: str) -> Iterator[Run]:
    """What the command line says of where networks are learned and what is kept of them."""
    run = Run(device_of(device), checkpoints)
    if resume and checkpoints is None:
        raise DataError("--resume goes on from the folder of --checkpoints, and none is named")
    if run.standing() and not resume:
        raise DataError(f"{checkpoints} holds checkpoints: go on from them with --resume, or remove them")
    board = None if tensorboard is None else Board(tensorboard)
    try:
        yield replace(run, board=board)
    finally:
        if board is not None:
            board.close()


def report(bundle: Bundle, trained: Trained) -> None:
    spent = ", ".join(f"{name} {seconds} s" for name, seconds in trained.seconds.items())
    console.print(f"seconds: {spent}", markup=False, highlight=False)
    for name, recall in trained.candidate_recall.items():
        console.print(f"candidate recall for {name}: {recall:.3f}", highlight=False)
    for name, on in trained.validation.items():
        line = f"validation of {name}: NDCG@20 {on['ndcg@20']:.4f}, popularity {on['popularity']:.4f}"
        few = "" if on["users"] >= ENOUGH else ", too few to tell"
        console.print(f"{line}, on {on['users']:.0f} users{few}", style="bold red" if few else None, highlight=False)
    for line in trained.missing:
        console.print(line, style="bold red", markup=False, highlight=False)
    # Linux counts in KiB, macOS in bytes.
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    console.print(f"peak memory: {peak_mb:,} MB", highlight=False)
    print(bundle.version)


def train(
    events: Events = None,
    items: Items = None,
    users: Users = None,
    categories: Categories = None,
    retail: Retail = None,
    column: Column = None,
    bundles: Root = None,
    windows: Windows = 4,
    label_days: LabelDays = None,
    models: Models = STANDARD_MODELS,
    ranker: Ranker = "mlp",
    text_model: TextModel = None,
    seed: Seed = 0,
    device: Device = "auto",
    checkpoints: Annotated[
        Path | None, typer.Option(help="Keep how far each network is here after every epoch, until the bundle is out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints that stand there.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Write losses and seconds here, for TensorBoard.")] = None,
) -> None:
    """Train on a shop's history, publish the bundle and make it the one to serve; prints its version."""
    single_threaded()
    with one_line_errors():
        names = chosen(models, ranker)
        with progress() as shown, running(checkpoints, resume, tensorboard, device) as run:
            bundle, trained = trained_on(
                tables_of(events, items, users, retail, column, categories, text_model),
                bundles or Settings().bundles,
                seed=seed,
                windows=windows,
                label_days=label_days,
                models=names,
                ranker=ranker,
                progress=shown,
                run=run,
            )
        report(bundle, trained)


def evaluate(
    cut: Annotated[datetime, typer.Option(help="Train before this moment (UTC), judge on the days after.")],
    days: Annotated[float, typer.Option(help="Days judged.")] = 30,
    events: Events = None,
    items: Items = None,
    users: Users = None,
    categories: Categories = None,
    retail: Retail = None,
    column: Column = None,
    bundles: Annotated[
        Path | None, typer.Option(help="Keep the bundle here; one that stands there for this cut is judged again.")
    ] = None,
    windows: Windows = 4,
    label_days: LabelDays = None,
    models: Models = STANDARD_MODELS,
    ranker: Ranker = "mlp",
    text_model: TextModel = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Write all that was found here, for `millirec report`.")] = None,
) -> None:
    """Judge every source, every fusion mode and the whole pipeline through the engine, beside implicit's models."""
    single_threaded()
    cut_ms = int(cut.replace(tzinfo=UTC).timestamp() * 1000)
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        names = chosen(models, ranker)
        tables = tables_of(events, items, users, retail, column, categories, text_model)
        root = bundles or Path(temporary)
        version = current(root)
        bundle = open_bundle(root / version) if version else None
        with progress() as shown:
            if bundle is None or bundle.manifest.provenance.get("cut_ms") != cut_ms:
                bundle, trained = trained_on(
                    tables,
                    root,
                    seed=seed,
                    windows=windows,
                    label_days=label_days,
                    models=names,
                    ranker=ranker,
                    cut_ms=cut_ms,
                    progress=shown,
                    run=Run(device_of(device)),
                )
                report(bundle, trained)
            views = judge(bundle, tables, cut_ms, days, shown, seed)
        found = result_of(bundle, views, cut_ms, days)
    for view, stored in zip(views, found.views, strict=True):
        best = view.rows[-1].scores[HEADLINE]
        print(f"\n### {view.name}: {view.users} users, candidate recall {view.candidate_recall:.3f}\n")
        print(markdown(view.rows))
        name, (low, high) = min(view.leads.items(), key=lambda lead: lead[1][0])
        print(f"\npipeline {best:.4f}; its narrowest lead is over {name}, by {low:.4f} .. {high:.4f} (95 %, paired)")
        for sheet in sheets(stored):
            print(f"\n{sheet.markdown()}")
    if out is not None:
        with one_line_errors():
            written(out, found.model_dump_json(indent=1))


def simulate(
    folder: Annotated[Path, typer.Argument(help="Where events.parquet, items.parquet and users.parquet go.")],
    items: Annotated[int, typer.Option(min=10)] = 5_000,
    users: Annotated[int, typer.Option(min=10)] = 5_000,
    events: Annotated[int, typer.Option(min=100)] = 200_000,
    days: Annotated[int, typer.Option(min=2)] = 60,
    seed: Seed = 0,
) -> None:
    """Write the history of a simulated storefront."""
    tables = simulated(items=items, users=users, events=events, seed=seed, days=days)
    folder.mkdir(parents=True, exist_ok=True)
    tables.events.write_parquet(folder / "events.parquet")
    tables.items.write_parquet(folder / "items.parquet")
    tables.users.write_parquet(folder / "users.parquet")
    console.print(tables.report)
