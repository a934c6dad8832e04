"""A text table is aligned, and imports nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pomona.pages.text import table


def test_columns_align_and_lines_have_no_trailing_space() -> None:
    rows = [["a", "long head", ""], ["longer", "1", "why"], ["b", "", ""]]
    assert table(rows, right=[1]).splitlines() == [
        "a       long head",
        "longer          1  why",
        "b",
    ]


def test_a_row_of_another_length_is_a_defect() -> None:
    with pytest.raises(ValueError):
        table([["a", "b"], ["c"]])


def test_it_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, pomona.pages.text; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
