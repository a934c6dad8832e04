"""Models that torch.compile has wrapped, as a whole and in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pomona.torch_compile import plain, plain_names, unwrapped


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def test_names_are_plain_for_a_while() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(inner[0], wrapped(inner[1]))
    whole = wrapped(model)
    names = list(whole.state_dict())
    assert names[-1] == "_orig_mod.1._orig_mod.0.bias"
    with unwrapped(whole) as found:
        assert found is model and list(found.state_dict()) == list(inner.state_dict())
    assert list(whole.state_dict()) == names
    assert list(plain_names(whole.state_dict())) == list(inner.state_dict())
    assert plain(whole) is model and plain(inner) is inner


def test_a_wrapped_part_at_two_places() -> None:
    part = wrapped(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": part, "b": nn.Sequential(part)})
    before = list(model.state_dict())
    with unwrapped(model) as found:
        assert list(found.state_dict()) == ["a.weight", "a.bias", "b.0.weight", "b.0.bias"]
    assert list(model.state_dict()) == before


def test_two_tensors_of_one_plain_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 'w' twice, once with '_orig_mod' in its name; leave one out"):
        plain_names({"w": torch.zeros(1), "_orig_mod.w": torch.ones(1)})
