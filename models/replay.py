"""`millirec replay`: a historical clickstream, sent to a running service as if it happened now."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import httpx
import polars as pl
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.data import DataError, read_tables, retailrocket

MOST_EVENTS = 1_000
"""In one call, by the contract of POST /events."""
MOST_LINES = 10_000
"""In one call; keeps a body of many long orders under what a server reads."""
PATIENCE_S = 60.0
"""How long one batch is offered to a service that cannot be reached or asks to come back later."""

Event = dict[str, Any]


class ReplayError(Exception):
    """The service refused a batch, or could not be reached for `PATIENCE_S`; the message is one line."""


@dataclass(slots=True)
class Sent:
    accepted: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By "field: error"."""
    calls: int = 0
    retries: int = 0


def payloads(events: pl.DataFrame) -> Iterator[Event]:
    """The bodies of POST /events for canonical rows, in their order: rows that share an event_id are one event."""
    rows = events.select("event_id", "type", "user_id", "timestamp", "item_id", "quantity", "value").iter_rows()
    for event_id, lines in groupby(rows, itemgetter(0)):
        (_, kind, user, timestamp, item, quantity, value), *more = lines
        event: Event = {"event_id": event_id, "type": kind, "user_id": user, "timestamp": timestamp}
        if not more and quantity == 1:
            event |= {"item_id": item, "value": value}
        elif kind == "rate":
            event |= {"items": [_line(item, quantity), *(_line(*row[4:6]) for row in more)], "value": value}
        else:
            event |= {"items": [_line(item, quantity, value), *(_line(*row[4:7]) for row in more)]}
        yield event


def _line(item: str, quantity: int, price: float | None = None) -> Event:
    return {"item_id": item, "quantity": quantity, "price": price}


def batches(events: Iterable[Event], speed: float) -> Iterator[list[Event]]:
    """Batches at the moment when they are due, `speed` times as fast as it happened; without pause for 0.

    What has become due while the last batch was on its way goes into the next.
    """
    batch: list[Event] = []
    lines, first_ms, started_s = 0, None, time.monotonic()
    for event in events:
        first_ms = event["timestamp"] if first_ms is None else first_ms
        due_s = started_s + (event["timestamp"] - first_ms) / 1000 / speed if speed else started_s
        size = len(event.get("items", "1"))
        if batch and (due_s > time.monotonic() or len(batch) == MOST_EVENTS or lines + size > MOST_LINES):
            yield batch
            batch, lines = [], 0
        if (wait_s := due_s - time.monotonic()) > 0:
            time.sleep(wait_s)
        batch.append(event)
        lines += size
    if batch:
        yield batch


def send(client: httpx.Client, batch: list[Event], sent: Sent) -> None:
    """Offers the batch until the service has it, and counts what became of it; the event ids make that safe.

    Batches go one after the other, so that no user's events overtake each other. A service that was
    there may go away for `PATIENCE_S`; one that never was is an error at once. Raises `ReplayError`.
    """
    last_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = client.post("/events", json=batch)
        except httpx.TransportError as error:
            why, pause_s = f"{client.base_url} cannot be reached: {error}", 1.0
            if not sent.calls:
                raise ReplayError(why) from None
        else:
            if answer.status_code == 202:
                break
            why, pause_s = (
                f"{client.base_url} answered {answer.status_code}: {answer.text[:300]}",
                _retry_after_s(answer),
            )
            if answer.status_code not in (429, 503):
                raise ReplayError(why)
        if time.monotonic() + pause_s > last_s:
            raise ReplayError(why)
        sent.retries += 1
        time.sleep(pause_s)
    sent.calls += 1
    counts = answer.json()
    sent.accepted += counts["accepted"]
    sent.duplicates += counts["duplicates"]
    sent.rejected.update(f"{refused['field']}: {refused['error']}" for refused in counts["rejected"])


def _retry_after_s(answer: httpx.Response) -> float:
    after = answer.headers.get("retry-after", "")
    return float(after) if after.isdigit() else 1.0


def replay(
    events: Annotated[Path, typer.Argument(help="CSV, JSON-lines or Parquet file with the events.")],
    url: Annotated[str, typer.Option(help="The service.")] = "http://127.0.0.1:8000",
    speed: Annotated[float, typer.Option(min=0, help="Times real time; 0: as fast as the service takes them.")] = 0,
    rocket: Annotated[bool, typer.Option("--retailrocket", help="The file is RetailRocket's.")] = False,
    column: Annotated[
        list[str] | None, typer.Option(help="A column by another name, as user_id=shopper; repeatable.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="MILLIREC_API_KEY", help="API key with the scope events.")] = None,
) -> None:
    """Send a historical clickstream to a running service, in the order in which it happened."""
    console = Console(stderr=True)
    names = dict(each.partition("=")[::2] for each in column or ())
    try:
        tables = retailrocket(events) if rocket else read_tables(events, columns=names)
        console.print(tables.report)
        sent, total = Sent(), tables.events["event_id"].n_unique()
        bar = (TextColumn("events"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        started_s = time.monotonic()
        with (
            httpx.Client(base_url=url, headers=headers, timeout=30) as client,
            Progress(*bar, console=console) as shown,
        ):
            task = shown.add_task("events", total=total)
            for batch in batches(payloads(tables.events), speed):
                send(client, batch, sent)
                shown.advance(task, len(batch))
    except (DataError, ReplayError, httpx.InvalidURL) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for reason, rows in sent.rejected.most_common(5):
        console.print(f"rejected {rows:,}: {reason}", highlight=False, markup=False)
    spent_s = time.monotonic() - started_s
    print(
        f"{sent.accepted:,} accepted, {sent.duplicates:,} duplicates, {sent.rejected.total():,} rejected, "
        f"{sent.retries:,} retries, {total / spent_s:,.0f} events/s"
    )
