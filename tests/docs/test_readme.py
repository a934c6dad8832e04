"""The code in the README runs, and what it says about the tree and the command line is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pomona.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_prune(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    loader = [(torch.randn(32, 1, 28, 28), torch.randint(10, (32,))) for _ in range(4)]
    with pytest.warns(UserWarning, match="harden.. cuts weights that have not decayed"):  # four steps are not enough
        exec(code, {"loader": loader})
    printed = capsys.readouterr().out
    assert "10.0x compression" in printed


def test_the_ten_lines_ask_for_a_run_that_can_succeed() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    before_training = code.split("for images")[0]
    exec(before_training, {})  # diagnose() would warn


def test_links_and_files_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("https://")]
    assert targets and "RESULTS_TABLE" not in README
    tree = README.split("## The tree")[1]
    targets += [
        f"src/pomona/{name}" for name in re.findall(r"[\w/]+\.py|(?<=^  )\w+/", tree.split("tests/")[0], re.MULTILINE)
    ]
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^pomona (\w+)", README, flags=re.MULTILINE))))
def test_commands_of_the_readme_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"pomona {command}" in capsys.readouterr().out
