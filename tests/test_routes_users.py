import json
from pathlib import Path

import pytest
import redis

from app.main import create_app
from app.settings import Settings
from tests.engines import ConstantEngine
from tests.live import serving


def test_attributes_are_replaced_and_erased(valkey: redis.Redis, valkey_url: str, tmp_path: Path) -> None:
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        for attributes in ({"country": "France", "age": "25-34"}, {"country": "Spain"}):
            assert client.put("/users/Zoë%20%26%20co", json={"attributes": attributes}).status_code == 204
            assert json.loads(valkey.hget("millirec:u:Zoë & co", "p") or "") == attributes
        assert client.delete("/users/Zoë%20%26%20co").status_code == 204
        assert client.delete("/users/nobody").status_code == 204
    assert not valkey.exists("millirec:u:Zoë & co")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "attributes"),
        ({"attributes": {"age": 7}}, "attributes.age"),
        ({"attributes": {"age": "x" * 257}}, "attributes.age"),
        ({"attributes": {str(number): "x" for number in range(101)}}, "attributes"),
        ({"attributes": {}, "more": 1}, "more"),
    ],
)
def test_attributes_that_cannot_be_are_refused(
    valkey_url: str, tmp_path: Path, body: dict[str, object], field: str
) -> None:
    with serving(create_app(Settings(redis_url=valkey_url, home=tmp_path), ConstantEngine())) as client:
        response = client.put("/users/u", json=body)
        assert client.put(f"/users/{'u' * 257}", json={"attributes": {}}).status_code == 422
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["errors"]] == [field]


def test_without_redis_the_caller_is_told_to_come_back(tmp_path: Path) -> None:
    with serving(create_app(Settings(redis_url="redis://127.0.0.1:1", home=tmp_path), ConstantEngine())) as client:
        for response in (client.put("/users/u", json={"attributes": {}}), client.delete("/users/u")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
