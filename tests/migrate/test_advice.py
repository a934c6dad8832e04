"""What a message advises works: code in backquotes, in every message of `pomona.migrate`, runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pomona
import pomona.migrate
from pomona.migrate.sparseml import _INSTEAD
from tests.messages import messages_of

SOURCES = sorted(Path(pomona.migrate.__file__).parent.glob("*.py"))
CODE = [
    (path.name, code) for path in SOURCES for message in messages_of(path) for code in re.findall(r"`([^`]+)`", message)
]


def names(folder: Path) -> dict[str, Any]:
    """What the code in messages speaks of."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model[2].weight.data[0] = 0.0  # for hold()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    return {
        "pomona": pomona,
        "torch": torch,
        "prune": prune,
        "model": model,
        "optimizer": optimizer,
        "pruner": pomona.Pruner(model, other, pomona.Magnitude(0.5)),
        "parameter": model[0].weight,
        "example": torch.zeros(1, 1, 8, 8),
        "mask": torch.ones(4, 1, 3, 3),
        "path": folder / "x.pomona.safetensors",
        "steps": 100,
    }


def is_given(code: str) -> bool:
    """Whether a message fills parts of it in, so that it has to be raised to be run."""
    return "{}" in code


def test_there_is_code_to_run() -> None:
    assert {"sparseml.py", "torch_prune.py"} == {name for name, _ in CODE}
    assert sum(not is_given(code) for _, code in CODE) >= 8


@pytest.mark.parametrize("code", sorted({code for _, code in CODE if not is_given(code)}))
def test_the_code_of_a_message_runs(code: str, tmp_path: Path) -> None:
    eval(compile(ast.parse(code, mode="eval"), "message", "eval"), names(tmp_path))


def test_all_code_in_advice_stands_in_backquotes() -> None:
    """Otherwise it would not be run."""
    for advice in _INSTEAD.values():
        assert "(" not in re.sub(r"`[^`]+`", "", advice) and "pomona." not in re.sub(r"`[^`]+`", "", advice), advice


def test_ignoring_what_a_message_says_to_ignore_is_enough() -> None:
    text = (
        "modifiers:\n  - !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n  - !QuantizationModifier\n    a: 1\n"
    )
    with pytest.raises(ValueError, match="leave them out") as error:
        pomona.from_sparseml(text, nn.Linear(3, 2), steps_per_epoch=1)
    (argument,) = re.findall(r"`(ignore=[^`]+)`", str(error.value))
    options = eval(f"dict({argument})")
    assert pomona.from_sparseml(text, nn.Linear(3, 2), steps_per_epoch=1, **options).parts


def test_masking_both_names_of_a_tied_weight_as_a_message_says_is_enough() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    mask = torch.eye(3)
    prune.custom_from_mask(model[0], "weight", mask)
    with pytest.raises(ValueError, match="share one tensor") as error:
        pomona.from_torch_prune(model)
    (code,) = re.findall(r"`(prune[^`]+)`", str(error.value))
    eval(code, {"prune": prune, "model": model, "mask": mask})
    assert sorted(pomona.from_torch_prune(model)) == ["0.weight", "1.weight"]
