import asyncio
from typing import Any

import pytest
import redis
from prometheus_client import REGISTRY

from app.engine import Query, Slate
from app.impressions import Impressions
from app.state.store import Store


def dropped() -> float:
    return REGISTRY.get_sample_value("millirec_impressions_dropped_total") or 0


def slates(count: int) -> list[tuple[Query, Slate]]:
    return [(Query(f"r{number}"), Slate(f"r{number}", "home", (), "b")) for number in range(count)]


def test_every_slate_is_written_in_order_also_those_that_wait_at_the_end(valkey: redis.Redis, valkey_url: str) -> None:
    async def write() -> None:
        async with Store(valkey_url, impressions_maxlen=10_000) as store, Impressions(store) as impressions:
            for query, slate in slates(600):
                impressions.put(query, slate)
            await asyncio.sleep(0.2)
            assert valkey.xlen("millirec:impressions") == 600
            for query, slate in slates(1200)[600:]:
                impressions.put(query, slate)

    before = dropped()
    asyncio.run(write())
    impressions: Any = valkey.xrange("millirec:impressions")
    assert [shown[b"request_id"].decode() for _, shown in impressions] == [f"r{number}" for number in range(1200)]
    assert dropped() == before


def test_what_redis_does_not_take_is_counted_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    async def write() -> None:
        async with Store("redis://127.0.0.1:1") as store, Impressions(store) as impressions:
            for query, slate in slates(600):
                impressions.put(query, slate)

    before = dropped()
    asyncio.run(write())
    assert dropped() == before + 600
    assert capsys.readouterr().out.count("dropping impressions") == 1


def test_no_more_wait_than_there_is_room_for(valkey: redis.Redis, valkey_url: str) -> None:
    async def write() -> None:
        async with Store(valkey_url, impressions_maxlen=1_000_000) as store, Impressions(store) as impressions:
            for query, slate in slates(10_007):
                impressions.put(query, slate)

    before = dropped()
    asyncio.run(write())
    assert dropped() == before + 7
    assert valkey.xlen("millirec:impressions") == 10_000
