"""Models that nobody here wrote, each through a whole life; the table says what is different about it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.foreign.models import MODELS
from tests.foreign.page import PACKAGES, PAGE, row, said, versions
from tests.foreign.trial import attempt

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(find_spec("timm") is None, reason="build/foreign is not there: make build/foreign/.installed"),
]


@pytest.mark.parametrize("name", MODELS)
def test_life(name: str, tmp_path: Path) -> None:
    """The page docs/tried.md has what comes out; `make tried` makes it anew."""
    found = attempt(MODELS[name], tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert row(name, MODELS[name], found) in page.splitlines()
    assert not found.said or said(name, found) in page


def test_the_page_has_these_models_and_versions() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = [name.partition("/")[2] for name in MODELS]
    assert re.findall(r"^\| (.+?)(?: \\\*)? \|", text, flags=re.MULTILINE) == [
        cell for package in PACKAGES for cell in ["model", "---", *named_of(package)]
    ]
    assert len(set(named)) <= len(named) == sum(len(named_of(package)) for package in PACKAGES)
    assert versions() in text


def named_of(package: str) -> list[str]:
    return [name.partition("/")[2] for name in MODELS if name.partition("/")[0] == package]
