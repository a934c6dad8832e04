"""Which optimizers take part in a step: the one that moves the weights, and those around it that move them further."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import LBFGS, Optimizer


def chain_of(optimizer: Any) -> list[Optimizer]:
    """The optimizers of a step, the outermost first and last the one that computes the update.

    Usually there is one. Lookahead and schedule-free wrappers move the weights after the inner optimizer's step, and
    sharpness-aware ones before it, so that the hooks of one optimizer alone would come too early or too late. What only
    hands calls on (Accelerate's and Lightning's optimizers) is left out.

    Raises:
        TypeError: there is no ``torch.optim.Optimizer``, or it cannot have hooks.
        ValueError: the optimizer has no single gradient per step, or its hooks would not be called.
    """
    outermost = optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", None)
    if not isinstance(outermost, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. (A wrapper must subclass "
            f"it and call its __init__; otherwise Pomona cannot know when a step is over)"
        )
    found = list(_inwards(outermost))
    if isinstance(found[-1], LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure several times a step, so there is no one gradient to prune by; use SGD "
            "or another optimizer that evaluates it once"
        )
    chain = [one for one in found if _has_hooks(one)]
    if not chain or chain[-1] is not found[-1]:
        name = type(found[-1]).__name__
        raise TypeError(
            f"{name} has no step hooks, because its __init__ does not call torch.optim.Optimizer.__init__; let it do so"
        )
    for one in chain:
        _fire_hooks(one)
    return chain


def _inwards(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, the one that it holds for the same parameters, and so on."""
    seen: list[Optimizer] = []
    one: Optimizer | None = optimizer
    while one is not None and all(one is not other for other in seen):
        yield one
        seen.append(one)
        mine = _parameters(one)
        held = [value for value in vars(one).values() if isinstance(value, Optimizer)]
        one = next((inner for inner in held if mine <= _parameters(inner)), None)


def _parameters(optimizer: Optimizer) -> set[int]:
    groups = getattr(optimizer, "param_groups", ())  # of a wrapper that hands on no more than calls
    return {id(p) for group in groups for p in group["params"]}


def _has_hooks(optimizer: Optimizer) -> bool:
    return "_optimizer_step_pre_hooks" in vars(optimizer)


def _fire_hooks(optimizer: Optimizer) -> None:
    """See to it that ``step()`` calls the hooks; ``Optimizer.__init__`` does, which some wrappers leave out."""
    if getattr(type(optimizer).step, "hooked", False):
        return
    optimizer._patch_step_function()
    if "step" in vars(optimizer):  # made of the function without hooks
        name = type(optimizer).__name__
        raise ValueError(
            f"the step() of this {name} has been replaced, as a learning rate scheduler does, before its hooks could "
            f"be seen to; make the Pruner first, then the scheduler"
        )
