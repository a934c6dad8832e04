"""Walls that concern parts of torch; import-linter (pyproject.toml) keeps those between our own modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pomona

SOURCE = Path(pomona.__file__).parent


def imports(path: Path) -> Iterator[str]:
    """What a file imports when it runs: all but what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_a_method_knows_neither_ranks_nor_optimizers_nor_hooks(path: Path) -> None:
    walls = ("torch.distributed", "torch.optim", "torch.utils.hooks", "pomona.distributed", "pomona.pruner")
    assert [name for name in imports(path) if name.startswith(walls)] == []
    assert "hook" not in path.read_text(encoding="utf-8").lower()


def test_collectives_are_in_one_file() -> None:
    found = [p.name for p in SOURCE.rglob("*.py") if any(n.startswith("torch.distributed") for n in imports(p))]
    assert found == ["distributed.py"]


def test_what_a_file_imports_is_seen() -> None:
    assert "torch.optim.Optimizer" in list(imports(SOURCE / "pruner" / "hooks.py"))
    assert "torch.optim.Optimizer" not in list(imports(SOURCE / "methods" / "gsm.py"))
