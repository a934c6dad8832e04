"""What a model is called with, as users write it."""

from __future__ import annotations

import random
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pomona.example import Example, Returned, evaluating, randomness_kept, returning_tensors

X, Y = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, None, Y), (X, None, Y), {}),
        ([X, Y], (X, Y), {}),
        ({"x": X}, (), {"x": X}),
        (UserDict(x=X), (), {"x": X}),  # what tokenizers of transformers return
        ((X, {"y": Y}), (X,), {"y": Y}),
        (({"y": Y}, {}), ({"y": Y},), {}),
        (([X, Y],), ([X, Y],), {}),
        ((), (), {}),
        ({1, 2}, ({1, 2},), {}),
        (Example((X,), {"y": Y}), (X,), {"y": Y}),
    ],
)
def test_one_rule_for_all_that_take_an_example(example: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = Example.of(example)
    assert (found.args, found.kwargs) == (args, kwargs)


def test_a_dictionary_with_other_names_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"one name is 3; .* goes in front of another, empty one: \(\{...\}, \{\}\)"):
        Example.of({3: X})
    assert Example.of(({3: X}, {})).args == ({3: X},)


class Net(nn.Module):
    def forward(self, x: Tensor, y: list[Tensor] | None = None, *, z: Tensor | None = None, **more: Tensor) -> Tensor:
        return x


def test_arguments_have_the_order_of_forward() -> None:
    z, more = torch.full((1,), 2.0), torch.full((1,), 3.0)
    example = Example.of({"more": more, "z": z, "y": [Y], "x": X}).in_order(Net())
    assert list(example.kwargs) == ["x", "y", "z", "more"]
    assert [float(t) for t in example.tensors()] == [0, 1, 2, 3]
    assert [float(t) for t in example.map(lambda t: t + 1).tensors()] == [1, 2, 3, 4]
    with pytest.raises(TypeError, match=r"the example does not fit Net.forward: missing a required argument: 'x'"):
        Example.of({"z": z}).in_order(Net())


def test_a_run_has_no_gradients() -> None:
    assert not Example.of(torch.ones(1, 2)).run(nn.Linear(2, 2)).requires_grad


def test_random_states_and_modes_are_as_before_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(KeyError), randomness_kept(), evaluating(model):
        assert not model[0].training
        torch.rand(1), np.random.rand(), random.random()
        raise KeyError
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert [part.training for part in model.modules()] == [True, True, False]


class Pair(NamedTuple):
    first: Tensor
    second: Any = None


@dataclass
class Output:
    logits: Tensor
    states: tuple[Any, ...] = ()
    cache: object = None


def test_what_a_model_returns_has_names_and_what_is_no_tensor_is_named() -> None:
    returned = Returned.of({"out": Output(X, (Y, Pair(X, Y)), {1}), "loss": None})
    assert list(returned.tensors) == ["out_logits", "out_states_0", "out_states_1_first", "out_states_1_second"]
    assert returned.left_out == {"out_cache": "set"}
    assert Returned.of(X).tensors == {"": X} and list(Returned.of([X, Y]).tensors) == ["0", "1"]


def test_a_model_returns_tensors_for_a_while() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x, (x,), "cache")

    model = Model()
    with returning_tensors(model) as left_out:
        assert model(X) == (X, X) and left_out == {"cache": "str"}
        assert list(Example.of({"x": X}).named(model)) == ["x"]
    assert isinstance(model(X), Output) and "forward" not in vars(model)
    model.forward = lambda x: [x]  # as accelerate and others put it there
    with returning_tensors(model):
        assert model(X) == (X,)
    assert model(X) == [X]
