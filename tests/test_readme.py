"""The README names what there is."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from app.__main__ import PLUGINS, cli
from app.settings import Settings
from models.data.simulator import simulate
from models.demo import ITEMS, USERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    {
        *entry_points(group=PLUGINS).names,
        *(str(each.callback.__name__) for each in cli.registered_commands if each.callback),
    }
)


@pytest.mark.parametrize("name", [f"MILLIREC_{field.upper()}" for field in Settings.model_fields])
def test_every_setting_is_described(name: str) -> None:
    assert f"| `{name}` |" in README


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_described(name: str) -> None:
    assert f"| `millirec {name}` |" in README


def test_every_link_leads_to_a_file() -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_the_curl_lines_ask_for_what_the_demo_sells() -> None:
    shop = simulate(items=ITEMS, users=USERS, events=20_000)
    lines = re.findall(r"^curl.*(?:\n     .*)?", README, re.MULTILINE)
    assert {item for line in lines for item in re.findall(r'item_id(?:=|": ")(\w+)', line)} <= {*shop.items["item_id"]}
    assert {user for line in lines for user in re.findall(r'user_id(?:=|": ")(\w+)', line)} <= {*shop.events["user_id"]}
    for line in lines:
        for category, price in re.findall(r"category=(\w+)&price_max=(\d+)", line):
            found = shop.items.filter(shop.items["category"].str.starts_with(category))
            assert (found["price"] <= float(price)).any()
