"""Models that torch.compile has wrapped, as a whole and in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pomona
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


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # in torch itself
@pytest.mark.parametrize("wrap", [wrapped, lambda model: nn.Sequential(model[0], wrapped(model[1]), model[2])])
def test_scopes_reports_and_states_have_plain_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    inner, scope = layers(), pomona.Scope(exclude=["0"], include=["1.*", "2.weight"])
    model = wrap(inner)
    assert list(scope.select(model).inside) == ["1.0.weight", "2.weight"]
    assert [layer.name for layer in pomona.report(model).layers] == ["0.weight", "1.0.weight", "2.weight"]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.5), scope=scope)
    average = copy.deepcopy(model)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.harden(average).sparsity == pomona.report(average, scope).sparsity == 0.5
    assert pruner.verify().sparsity == 0.5

    other = layers()  # goes on in the plain model
    other.load_state_dict(plain_names(model.state_dict()))
    second = pomona.Pruner(other, torch.optim.SGD(other.parameters(), lr=0.1), pomona.Magnitude(0.5), scope=scope)
    second.load_state_dict(pruner.state_dict())
    assert second.verify().sparsity == 0.5
