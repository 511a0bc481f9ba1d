"""The README names what there is."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from app.__main__ import PLUGINS, cli
from app.settings import Settings

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
