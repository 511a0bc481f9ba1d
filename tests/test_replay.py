"""A replayed history is the same history."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import httpx
import polars as pl
import pytest
import typer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner, Result

from app.main import create_app
from app.settings import Settings
from app.state.events import UserState
from app.state.store import Store
from models.data import Tables, read_tables
from models.data.log import Log
from models.data.simulator import simulate
from models.data.times import instant_ms
from models.replay import MOST_EVENTS, MOST_LINES, ReplayError, Sent, batches, payloads, replay, send
from tests.engines import ConstantEngine
from tests.live import serving

WINDOW = 20


COMMANDS = typer.Typer(pretty_exceptions_enable=False)
COMMANDS.command()(replay)


def run(*arguments: str, **variables: str) -> Result:
    """The command with these MILLIREC_* variables and no others."""
    variables = {"MILLIREC_API_KEY": "", "COLUMNS": "200"} | variables
    return CliRunner().invoke(COMMANDS, arguments, env=variables)


def address(client: httpx.Client) -> str:
    return str(client.base_url)


def mixed(folder: Path) -> Path:
    """A simulated shop and what it never does: ratings, unknown types, no ids, one unit of something dear."""
    day = instant_ms("2026-01-05")
    rows = [
        ("u1", "p01", "rate", day, 4.5, 1, None),
        ("u1", "p02", "rate", day + 1, 2.0, 1, "r"),
        ("u1", "p03", "rate", day + 1, 2.0, 3, "r"),
        ("u2", "p01", "view_item", day, 9.99, 1, None),
        ("u2", "p01", "view_item_list", day, None, 1, None),
        ("u2", "p02", "Teleport", day, None, 1, None),
        ("u2", "p03", "hide", day, None, 1, None),
        ("u2", "p04", "purchase", day, 0.1, 70_000, None),
        ("ünique", "p05", "dislike", day + 3, None, 1, "é"),
    ]
    simulated = simulate(items=60, users=30, events=2_500, days=10).events.drop("position")
    path = folder / "events.parquet"
    pl.concat([simulated, pl.DataFrame(rows, schema=simulated.schema, orient="row")]).write_parquet(path)
    return path


def states_in(valkey_url: str, users: Sequence[str]) -> list[UserState]:
    async def read() -> list[UserState]:
        async with Store(valkey_url, window=WINDOW) as store:
            return await store.read([(user, None) for user in users])

    return asyncio.run(read())


def test_service_ends_in_the_states_that_training_computes(tmp_path: Path, valkey_url: str) -> None:
    path = mixed(tmp_path)
    log = Log.from_tables(read_tables(path))
    settings = Settings(redis_url=valkey_url, home=tmp_path, state_window=WINDOW)
    with serving(create_app(settings, ConstantEngine())) as client:
        first = run(str(path), "--url", address(client))
        second = run(str(path), "--url", address(client))
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    events = read_tables(path).events["event_id"].n_unique()
    assert first.stdout.startswith(f"{events:,} accepted, 0 duplicates, 0 rejected, 0 retries")
    assert second.stdout.startswith(f"0 accepted, {events:,} duplicates, 0 rejected")
    offline = log.states(2**62, WINDOW)
    for expected, state in zip(offline, states_in(valkey_url, log.users), strict=True):
        assert state.events.tobytes() == expected.events.tobytes()
        assert sorted(state.exclusions.tolist()) == sorted(expected.exclusions.tolist())
    assert max(len(state.events) for state in offline) == WINDOW


class Shop:
    """Answers as told, in turn, and then as a service does; remembers what it took, in the order in which it came."""

    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.taken: dict[str, dict[str, object]] = {}
        self.keys: set[str | None] = set()

    async def events(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        if self.answers:
            return self.answers.pop(0)
        batch = await request.json()
        new = {event["event_id"]: event for event in batch if event["event_id"] not in self.taken}
        self.taken |= new
        return JSONResponse({"accepted": len(new), "duplicates": len(batch) - len(new), "rejected": []}, 202)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/events", self.events, methods=["POST"])])


def busy(status: int) -> Response:
    return Response("busy", status, {"Retry-After": "0"})


@pytest.fixture(scope="module")
def history() -> Tables:
    return simulate(items=100, users=50, events=3_000, days=10)


def test_busy_service_gets_everything_once_and_in_order(history: Tables, tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    history.events.write_parquet(path)
    shop = Shop(busy(503), busy(429), busy(503))
    with serving(shop.app()) as client:
        ended = run(str(path), "--url", address(client), MILLIREC_API_KEY="secret")
    assert ended.exit_code == 0, ended.stderr
    expected = list(payloads(read_tables(path).events))
    assert list(shop.taken.values()) == expected
    assert [event["timestamp"] for event in expected] == sorted(event["timestamp"] for event in expected)
    assert f"{len(expected):,} accepted, 0 duplicates, 0 rejected, 3 retries" in ended.stdout
    assert shop.keys == {"Bearer secret"}


def test_rejected_events_are_counted_by_reason(tmp_path: Path, valkey_url: str) -> None:
    (tmp_path / "e.csv").write_text(f"user,item,time\na,1,2024-05-01\n{'x' * 257},1,2024-05-01\n")
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        ended = run(str(tmp_path / "e.csv"), "--url", address(client))
    assert ended.exit_code == 0
    assert "1 accepted, 0 duplicates, 1 rejected" in ended.stdout
    assert "rejected 1: user_id" in ended.stderr


@pytest.mark.parametrize("status", [400, 401, 500])
def test_refusal_ends_the_replay(status: int) -> None:
    refusing = serving(Shop(Response("no such luck", status)).app())
    with refusing as client, pytest.raises(ReplayError, match=f"answered {status}: no such luck"):
        send(client, [{"event_id": "e"}], Sent())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "absent.csv: no such file"),
        (["one.csv"], "one.csv: no column for item_id, timestamp among user"),
        (["good.csv", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
        (["good.csv", "--url", "127.0.0.1:1"], "127.0.0.1:1"),
        (["good.csv", "--column", "user_id=nobody"], "no column nobody"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "one.csv").write_text("user\na\n")
    (tmp_path / "good.csv").write_text("user,item,time\na,1,2024-05-01\n")
    ended = run(str(tmp_path / arguments[0]), *arguments[1:])
    assert ended.exit_code == 1
    assert message in ended.stderr.splitlines()[-1]
    assert isinstance(ended.exception, SystemExit)


def test_calls_stay_within_the_contract(history: Tables) -> None:
    events = list(payloads(history.events)) * 2
    assert len(events) > MOST_EVENTS
    sent = list(batches(events, speed=0))
    assert [event for batch in sent for event in batch] == events
    assert {len(batch) for batch in sent[:-1]} == {MOST_EVENTS}
    order = {"event_id": "o", "timestamp": 0, "items": [{"item_id": "i"}] * (MOST_LINES // 4)}
    assert [len(batch) for batch in batches([order] * 9, speed=0)] == [4, 4, 1]


def test_pauses_part_batches_and_nothing_is_reordered() -> None:
    events = [{"event_id": str(n), "timestamp": 1_000 * (n // 3)} for n in range(9)]
    assert list(batches(events, speed=20)) == [events[:3], events[3:6], events[6:]]
    assert list(batches(events, speed=0)) == [events]
    assert json.dumps(list(batches([], speed=1))) == "[]"
