"""Commands, options and extras that messages advise exist."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pomona
from pomona.cli import parser
from tests.messages import messages_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(pomona.__file__).parent
MESSAGES = [
    (path, message)
    for path in sorted(PACKAGE.rglob("*.py"))
    for message in messages_of(path)
    if "var(--" not in message and ":root" not in message  # style sheets
]
OTHER_TOOLS = {"exporters/mnn.py", "train/folder.py"}  # these call a converter and git


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(actions.choices)


def found(pattern: str) -> dict[str, list[str]]:
    """What matches in messages -> the files of these messages."""
    places: dict[str, list[str]] = {}
    for path, message in MESSAGES:
        for text in re.findall(pattern, message):
            places.setdefault(text, []).append(str(path.relative_to(PACKAGE)))
    return places


def test_every_option_in_a_message_is_one_of_the_command_line() -> None:
    actions = (action for command in (parser(), *commands().values()) for action in command._actions)
    known = {option for action in actions for option in action.option_strings}
    inside = found(r"(?<![\w-])--[a-z][a-z-]+")
    assert len(inside) > 10
    unknown = {option: places for option, places in inside.items() if option not in known}
    assert {option: places for option, places in unknown.items() if not set(places) <= OTHER_TOOLS} == {}


def test_every_command_in_a_message_exists() -> None:
    inside = found(r"`pomona ([a-z]+)")
    assert inside and inside.keys() <= commands().keys(), inside


def test_every_extra_in_a_message_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    inside = found(r"pomona\[(\w+)\]")
    assert inside and inside.keys() <= project["optional-dependencies"].keys(), inside
