"""A function of the user's own is found by name, and what it returns is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from pomona.zoo.source import find_function, make_module


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets_of_test_source.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Linear(2, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "nets_of_test_source"


def test_the_function_is_called_and_its_module_returned(nets: str) -> None:
    module = make_module(f"{nets}:make")
    assert isinstance(module, nn.Linear) and module.out_features == 3


@pytest.mark.parametrize("source", ["make", ":make", "module:", ""])
def test_a_source_names_a_module_and_a_function(source: str) -> None:
    with pytest.raises(ValueError, match=rf"MODULE:FUNCTION \(my_package\.nets:make\), got '{source}'"):
        find_function(source)


def test_what_is_missing_is_named(nets: str) -> None:
    with pytest.raises(ValueError, match="cannot take 'make' from module 'no_such_module_here'"):
        find_function("no_such_module_here:make")
    with pytest.raises(ValueError, match=f"cannot take 'made' from module '{nets}'"):
        find_function(f"{nets}:made")


def test_it_must_return_a_torch_module() -> None:
    with pytest.raises(ValueError, match=r"math:gcd must return a torch\.nn\.Module, got int"):
        make_module("math:gcd")
