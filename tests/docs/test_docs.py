"""The code in the docs runs, their links lead somewhere, and every method has a page."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from pomona.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = {"tutorials": "tests/docs/test_tutorials.py", "ultralytics.md": "tests/foreign/test_ultralytics.py"}
WITH_CODE = [
    page
    for page in PAGES
    if not {page.name, page.parent.name} & ELSEWHERE.keys() and "```python" in page.read_text("utf-8")
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.check
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in torch.compile
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}  # shared by the whole page, which runs from top to bottom
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, page.name, "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_the_same_sections(name: str) -> None:
    text = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
    for heading in ("## When it shines", "## When not", "## What matters", "## Cost"):
        assert heading in text, heading
    assert "```python" in text


def test_lines_and_seconds_are_those_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    first = importlib.import_module("first")
    text = (ROOT / "docs/tutorials/first-sparse-model.md").read_text(encoding="utf-8")
    rows = json.loads(first.RESULT.read_text(encoding="utf-8"))["rows"]
    assert first.table(rows) in text
    for row in rows:
        lines = first.WAYS[row["way"]][1].strip()
        assert row["lines"] == first.added(lines) and (lines == "run(10)" or lines in text)
