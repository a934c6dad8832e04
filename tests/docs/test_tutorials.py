"""The tutorials run from top to bottom and print what they show, except for the numbers."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs/tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", flags=re.DOTALL | re.MULTILINE)
PAGES = sorted(path.name for path in FOLDER.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))

# Edits that make a tutorial short enough for the default suite: (original, replacement).
SHORTER = {
    "cifar.md": [("num_images, epochs = 10_000, 12\n", "num_images, epochs = 128, 4\n")],
    "transformer.md": [
        ("num_held_out, num_sentences, epochs = 300, 1_000, 6\n", "num_held_out, num_sentences, epochs = 8, 16, 1\n")
    ],
    "mnist.md": [  # fewer epochs, with so much decay that passive weights can still vanish
        ("epochs = 30\n", "epochs = 1\n"),
        ("epochs = 200\n", "epochs = 8\n"),
        ("momentum=0.99, weight_decay=5e-4", "momentum=0.9, weight_decay=0.2"),
    ],
}


def shape_of(printed: str) -> str:
    """Remove numbers, and the spaces and rules whose lengths depend on them."""
    return re.sub(r"\s+", " ", re.sub(r"-{4,}", "-", re.sub(r"[-+]?\d+([,.]\d+)*(e[-+]\d+)?", "#", printed))).strip()


def run(page: str, edits: list[tuple[str, str]]) -> None:
    text = (FOLDER / page).read_text(encoding="utf-8")
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    blocks = BLOCK.findall(text)
    assert blocks
    namespace: dict[str, object] = {"__name__": "tutorial"}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec", dont_inherit=True), namespace)
        if expected:
            assert shape_of(printed.getvalue()) == shape_of(expected)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.check
@pytest.mark.parametrize("page", PAGES)
def test_it_runs_when_shortened(page: str) -> None:
    with warnings.catch_warnings():
        if page in SHORTER:  # too short to succeed, so it warns
            warnings.filterwarnings("ignore", message="decay exponent|harden")
        run(page, SHORTER.get(page, []))


@pytest.mark.slow
@pytest.mark.parametrize("page", SHORTER)
def test_it_runs_as_it_stands(page: str) -> None:
    run(page, [])
