"""`python -m tests.bench`: what one core of the service carries, against a floor and a naive service.

One core is the server's; Valkey and the load generator share the other, in production they are other
machines. All contestants run at once, idle but the one under load, and take turns for several rounds, so
that whatever else the machine does falls on all of them. Shown is the median of the rounds.
"""

import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.bench.every import FEWER, SCENES, Compared, compare
from tests.bench.measure import (
    EVENTS_A_CALL,
    LIMIT,
    LOADED,
    NAMES,
    SATURATED,
    SINGLE,
    Cores,
    Pace,
    Result,
    Rounds,
    Swapped,
    make,
    measure,
    swap,
)

SIZES = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000}
FULL = Pace(rounds=3, saturated_s=5, single_s=4, loaded_s=8, swapping_s=30)
QUICK = Pace(rounds=1, saturated_s=3, single_s=2, loaded_s=4, swapping_s=10)

console = Console()
if not console.is_terminal:
    console = Console(width=110)


def bench(
    sizes: Annotated[
        str | None,
        typer.Option(help=f"Catalogs to measure. Default: {','.join(SIZES)}; with --quick, --swap or --every 10k."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short round, as a check.")] = False,
    swapping: Annotated[bool, typer.Option("--swap", help="Only this: swap bundles under full load.")] = False,
    every: Annotated[bool, typer.Option("--every", help="Only this: every source against fewer.")] = False,
    retail: Annotated[
        Path | None,
        typer.Option("--online-retail", exists=True, help="The UCI invoices, as CSV: the shop of --every."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the made-up shops are kept.")] = Path("build/bench"),
    out: Annotated[Path, typer.Option(help="Where all rounds go as JSON.")] = Path("build/bench/results.json"),
) -> None:
    """Measure the service, a floor and a naive service over HTTP."""
    usable = sorted(os.sched_getaffinity(0))
    small = quick or swapping or every
    chosen = [size.strip() for size in sizes.split(",")] if sizes else ["10k"] if small else [*SIZES]
    if unknown := set(chosen) - SIZES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(SIZES)}", param_hint="--sizes")
    if retail and (sizes or not every):
        raise typer.BadParameter("goes with --every and without --sizes", param_hint="--online-retail")
    if len(usable) < 2:
        console.print("Two cores are needed: one for the server, one for the client.")
        raise typer.Exit(2)
    cores, pace = Cores(*usable[:2]), QUICK if quick else FULL
    folder = folder.absolute()
    # Without this, SIGTERM would end this process and leave the servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console.print(f"{processor()}, {platform.system()} {platform.release()}, Python {platform.python_version()}")
    console.print(f"server on core {cores.server}; client and Valkey on core {cores.client}, in production elsewhere")
    if every:
        os.sched_setaffinity(0, {cores.client})
        with console.status("") as status, tempfile.TemporaryDirectory(prefix="millirec-bench-") as work:
            compared = compare(Path(work), SIZES[chosen[0]], retail, cores, pace, status.update)
        show_every(compared)
        raise typer.Exit(int(bool(compared.failed)))
    with console.status("") as status:
        roots = {}
        for size in chosen:
            # The ids of two bundles to swap must tell them apart.
            roots[size] = {p: folder / f"{p}{size}" for p in (("a-", "b-") if swapping else ("",))}
            for prefix, root in roots[size].items():
                status.update(f"making a shop of {size} items")
                make(root, SIZES[size], prefix)
        os.sched_setaffinity(0, {cores.client})
        results = []
        for size in chosen:

            def progress(step: str, size: str = size) -> None:
                status.update(f"{size} items: {step}")

            if swapping:
                found: Result | Swapped = swap(roots[size], SIZES[size], cores, pace, progress)
            else:
                found = measure(roots[size][""], SIZES[size], cores, pace, progress)
            results.append(found)
            show(size, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "system": platform.platform(), "python": platform.python_version()}
    measured = {"machine": machine, "finished_at": time.time(), "results": [asdict(result) for result in results]}
    out.write_text(json.dumps(measured, indent=1))
    console.print(f"all rounds: {out}")
    raise typer.Exit(int(any(map(failed, results))))


def failed(result: Result | Swapped) -> bool:
    if isinstance(result, Swapped):
        return bool(result.failures) or not result.swaps
    return any(rounds.failed for rounds in result.contestants.values())


def show(size: str, result: Result | Swapped) -> None:
    if isinstance(result, Swapped):
        report = result.report
        console.print(
            f"{size} items, {report.elapsed_s:.0f} s of full load, {result.swaps} swaps:"
            f" {report.achieved_per_s:,.0f} slates/s, p50 {report.p50_ms:.1f} ms, p99 {report.p99_ms:.1f} ms,"
            f" worst {report.max_ms:.0f} ms"
        )
        console.print(
            f"{report.answered:,} whole slates of one bundle, {report.failures.get('degraded', 0):,} degraded"
        )
        console.print(f"failures: {result.failures or 'none'}")
        return
    console.print(table(size, result))
    for goal, reached in goals(size, result):
        console.print(f"{'reached' if reached else '[red]missed[/red] '}  {goal}", highlight=False)


def show_every(compared: Compared) -> None:
    for name in SCENES:
        asked = f"{compared.sources[name]} sources, {compared.candidates[name]:.0f} candidates a request"
        per_s = median(compared.per_s[name])
        console.print(f"{compared.items:,} items, {asked}: {per_s:,.0f} slates/s", highlight=False)
    for name in FEWER:
        ratio, number = compared.ratio(name), compared.sources[name]
        reached = "reached" if ratio >= 0.5 else "[red]missed[/red] "
        console.print(f"{reached}  every source against {number} {ratio:.3f}, at least 0.5", highlight=False)


def table(size: str, result: Result) -> Table:
    contestants = [result.contestants[name] for name in NAMES]
    shown = Table(
        title=f"{size} items, {result.candidates:.0f} candidates a request, limit {LIMIT}",
        title_justify="left",
        caption=f"POST /events, {EVENTS_A_CALL} a call: {result.events_per_s:,.0f} events/s",
        caption_justify="left",
    )
    others = NAMES[:-1]
    for heading in ("", *NAMES, *(f"ours / {name}" for name in others)):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)

    def add(label: str, form: str, figure: Callable[[Rounds], float | None], *against: str) -> None:
        """`against`: the contestants to give the ratio to."""
        values = [figure(each) for each in contestants]
        cells = ["" if value is None else form.format(value) for value in values]
        for name, other in zip(others, values, strict=False):
            cells.append(f"{values[-1] / other:.2f}" if name in against and values[-1] and other else "")
        shown.add_row(label, *cells)

    def typical(phase: str, figure: str) -> Callable[[Rounds], float]:
        return lambda each: each.typical(phase, figure)

    add(f"requests/s, {SATURATED}", "{:,.0f}", typical(SATURATED, "achieved_per_s"), *others)
    add(f"server CPU ms, {SATURATED}", "{:.3f}", lambda each: each.cpu_ms(SATURATED), *others)
    add(f"p50 ms, {SINGLE}", "{:.2f}", typical(SINGLE, "p50_ms"), "naive")
    add(f"p99 ms, {SINGLE}", "{:.2f}", typical(SINGLE, "p99_ms"), "naive")
    add(f"requests/s, {LOADED}", "{:,.0f}", typical(LOADED, "achieved_per_s"))
    add(f"p50 ms, {LOADED}", "{:.2f}", typical(LOADED, "p50_ms"))
    add(f"p99 ms, {LOADED}", "{:.2f}", typical(LOADED, "p99_ms"))
    add(f"batch, {SATURATED}", "{:.1f}", lambda each: each.batch(SATURATED))
    add(f"batch, {LOADED}", "{:.1f}", lambda each: each.batch(LOADED))
    add("resident MB", "{:,.0f}", lambda each: each.memory_bytes["Rss"] / 1e6)
    add("not mapped files MB", "{:,.0f}", lambda each: each.memory_bytes["Anonymous"] / 1e6)
    add("proportional MB", "{:,.0f}", lambda each: each.memory_bytes["Pss"] / 1e6)
    add("cold start s, files cached", "{:.1f}", lambda each: each.cold_start_s)
    add("body bytes", "{:,.0f}", typical(SATURATED, "body_bytes"))
    add("server core busy", "{:.0%}", lambda each: each.busy(SATURATED))
    add("client core busy", "{:.0%}", typical(SATURATED, "client_busy"))
    add("failed requests", "{:,.0f}", lambda each: each.failed)
    return shown


def goals(size: str, result: Result) -> Iterator[tuple[str, bool]]:
    """What the project promises of this size, and whether it was reached."""
    floor, _, naive, ours = (result.contestants[name] for name in NAMES)
    if size == "100k":
        share, times = (ours.throughput_per_s / other.throughput_per_s for other in (floor, naive))
        yield f"throughput against the floor {share:.2f}, at least 0.25", share >= 0.25
        yield f"throughput against the naive service {times:.1f}x, at least 3x", times >= 3
        for figure in ("p50_ms", "p99_ms"):
            mine, its = (each.typical(SINGLE, figure) for each in (ours, naive))
            yield f"{figure[:3]} at 1 in flight {mine:.2f} ms, at most the naive service's {its:.2f} ms", mine <= its
        yield f"cold start {ours.cold_start_s:.1f} s, under 10 s", ours.cold_start_s < 10
    if size == "1M":
        resident_mb = ours.memory_bytes["Rss"] / 1e6
        yield f"resident memory {resident_mb:,.0f} MB, under 2,500 MB", resident_mb < 2500
    yield f"{result.events_per_s:,.0f} events/s, at least 10,000", result.events_per_s >= 10_000
    yield f"{result.candidates:.0f} candidates a request, at least 300", result.candidates >= 300


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    typer.run(bench)
