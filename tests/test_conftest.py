"""What conftest.py promises of the suite itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = """
import pytest

def test_passes(): pass

@pytest.mark.check
def test_is_for_make_check(): pass

def test_says_what_holds(): pytest.skip("needs a machine without CUDA" if CUDA else "needs CUDA")
"""
MISSING = """
def test_lacks_a_program(): pytest.skip("needs a program")
def test_says_what_does_not_hold(): pytest.skip("needs CUDA" if CUDA else "needs a machine without CUDA")
"""


def run(folder: Path, text: str, *options: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text("import torch\nCUDA = torch.cuda.is_available()\n" + text)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.check
def test_a_skip_without_a_reason_that_is_known_and_holds_is_a_failure(tmp_path: Path) -> None:
    status, printed = run(tmp_path, FILE, "--no-skips")
    assert status == 0 and "1 passed, 1 skipped, 1 deselected" in printed, printed
    assert run(tmp_path, FILE + MISSING)[0] == 0
    status, printed = run(tmp_path, FILE + MISSING, "--no-skips")
    assert status == 1 and "1 passed, 3 skipped, 1 deselected" in printed, printed
    told = printed.partition("skipped, and not in MAY_SKIP of conftest.py")[2].partition("short test summary")[0]
    assert [line.partition("::")[2].partition(":")[0] for line in told.splitlines() if "::" in line] == [
        "test_lacks_a_program",
        "test_says_what_does_not_hold",
    ]
