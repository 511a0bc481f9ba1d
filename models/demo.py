"""`millirec demo`: from nothing, or from a shop's files, to a running service."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import httpx
import polars as pl
import torch
import typer

from app.bundle import BundleError, current, open_bundle
from app.engine.pipeline import Pipeline
from app.engine.recorded import replay
from app.settings import Settings
from models.commands import Column, Events, Items, Users, console, one_line_errors, progress, single_threaded, tables_of
from models.data import Tables
from models.data.simulator import simulate
from models.replay import Sent, batches, payloads, send
from models.train import train

MARKER = "demo.json"
ITEMS, USERS, EVENTS = 5_000, 4_000, 200_000
LOADED = 60_000
"""So many of the last events are given to the service, so that it knows its shoppers."""
START_S = 60.0


def demo(
    events: Events = None,
    items: Items = None,
    users: Users = None,
    column: Column = None,
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8000,
) -> None:
    """Train on a simulated storefront, or on your own files, and serve it; a second run reuses what stands."""
    single_threaded()
    home = Settings().home / "demo"
    bundles = home / "bundles"
    asked = _fingerprint([path for path in (events, items, users) if path], column or [])
    standing = _standing(home)
    with one_line_errors():
        if standing and standing["asked"] == asked and _serves(bundles, standing["version"]):
            console.print(f"using what stands in {home}", highlight=False)
            _serve(home, port, standing)
            return
        if events:
            tables = tables_of(events, items, users, None, column)
        else:
            console.print(
                f"simulating a storefront: {ITEMS:,} items, {USERS:,} shoppers, {EVENTS:,} events", highlight=False
            )
            tables = _until_now(simulate(items=ITEMS, users=USERS, events=EVENTS))
        home.mkdir(parents=True, exist_ok=True)
        with progress() as shown:
            bundle, _ = train(tables, bundles, windows=1, progress=shown)
        last = tables.events.tail(1)
        marker = {"asked": asked, "version": bundle.version, "user": last["user_id"][0], "item": last["item_id"][0]}
    _serve(home, port, marker, tables)


def _fingerprint(paths: Sequence[Path], columns: Sequence[str]) -> str:
    """Changes when another history is asked for, or another version of the same files."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    return hashlib.sha256(json.dumps([stats, list(columns), ITEMS, USERS, EVENTS]).encode()).hexdigest()


def _serves(bundles: Path, version: str) -> bool:
    """Whether the bundle is the current one and this code still answers its recorded queries."""
    if current(bundles) != version:
        return False
    try:
        replay(Pipeline(open_bundle(bundles / version), torch.device("cpu"), 32))
    except BundleError as error:
        console.print(f"training anew: {error}", markup=False, highlight=False)
        return False
    return True


def _standing(home: Path) -> dict[str, str] | None:
    try:
        standing: dict[str, str] = json.loads((home / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return standing


def _until_now(tables: Tables) -> Tables:
    """The same history, ending a moment ago instead of when the simulator's year says, so that clicks go on from it."""
    latest = tables.events["timestamp"].max()
    assert isinstance(latest, int)
    shift = time.time_ns() // 1_000_000 - 60_000 - latest
    return replace(
        tables,
        events=tables.events.with_columns(pl.col("timestamp") + shift),
        items=tables.items.with_columns(pl.col("created_at") + shift),
    )


def _serve(home: Path, port: int, marker: dict[str, str], tables: Tables | None = None) -> None:
    """Runs the service until it is interrupted; with `tables`, tells it of their shoppers first."""
    # Without this, SIGTERM would end this process and leave the service running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    environment = os.environ | {"MILLIREC_HOME": str(home), "MILLIREC_BUNDLES": str(home / "bundles")}
    server = subprocess.Popen([sys.executable, "-m", "app", "serve", "--port", str(port)], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            _wait_until_ready(server, client)
            if tables is not None:
                _introduce(client, tables)
                (home / MARKER).write_text(json.dumps(marker))
        _invite(url, marker["user"], marker["item"])
        # Polars has signals restart the system call they interrupt: Ctrl-C would not end `server.wait()`.
        while server.poll() is None:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait()
    if server.returncode not in (0, -signal.SIGINT, -signal.SIGTERM):
        raise typer.Exit(server.returncode)


def _wait_until_ready(server: subprocess.Popen[bytes], client: httpx.Client) -> None:
    last = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < last:
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    # The server has said why on stderr.
    raise typer.Exit(server.poll() or 1)


def _introduce(client: httpx.Client, tables: Tables) -> None:
    """Sends the last events and the profiles of those who did them."""
    recent = tables.events.tail(LOADED)
    sent = Sent()
    with progress() as shown:
        for number, batch in enumerate(batches(payloads(recent), 0)):
            if not number % 10:
                shown(f"telling the service what {recent['user_id'].n_unique():,} shoppers did lately")
            send(client, batch, sent)
        known = tables.users.join(recent.select("user_id").unique(), on="user_id", how="semi")
        shown("and who they are")
        for user, attributes in known.select("user_id", "attributes").iter_rows():
            if attributes != "{}":
                client.put(
                    f"/users/{quote(user, safe='')}", json={"attributes": json.loads(attributes)}
                ).raise_for_status()


def _invite(url: str, user: str, item: str) -> None:
    event = json.dumps({"type": "view_item", "user_id": user, "item_id": item})
    print(
        f"""
Millirec serves on {url}. Try, in another terminal:

  curl -s '{url}/recommend?user_id={quote(user)}&limit=5&fields=title&explain=true'
  curl -s -X POST '{url}/events' -H 'Content-Type: application/json' -d '{event}'
  curl -s '{url}/recommend?user_id={quote(user)}&limit=5&fields=title&explain=true'
  curl -s '{url}/recommend?scene=detail&item_id={quote(item)}&limit=5&fields=title,price'
  curl -s '{url}/health/ready'

Ctrl-C ends it.""",
        flush=True,
    )
