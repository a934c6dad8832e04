"""Keeping the zeros of any sparse model while it is fine-tuned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from pomona.distributed import local
from pomona.method import Method
from pomona.pages.text import few
from pomona.pruner.pruner import Pruner
from pomona.reporting import Report
from pomona.scope import Scope
from pomona.weight import Weight, Weights


@dataclass(frozen=True, slots=True)
class _Zeros(Method):
    """What is zero now stays zero."""

    takes_frozen: ClassVar[bool] = True

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return [w.value != 0 for w in weights]

    def starved(self, layers: Sequence[Weight], kept: Sequence[int]) -> str:
        return ""  # hold() itself says what is zero throughout

    def why(self, w: Weight, kept: int, density: float) -> str:
        return "what was not zero when hold() was called"


def hold(model: nn.Module, optimizer: Optimizer, *, scope: Scope | None = None) -> Pruner:
    """Keep the zeros that ``model`` has now while ``optimizer`` trains the rest, whoever made them.

    At each step the gradients of zero weights are dropped and, after the step, exact zeros are written again, so
    that neither momentum nor Adam's moments nor weight decay can revive a weight. Works with every optimizer that
    evaluates its gradients once a step. One byte per weight.

    Args:
        model: a sparse model.
        optimizer: the one that trains it.
        scope: where zeros count; default: every weight that a layer multiplies with and that the optimizer holds. One
            that is frozen now, as in a model that was loaded for inference, keeps its zeros when it trains later.

    Returns:
        The Pruner that holds them; its ``verify()`` proves it and its ``state_dict()`` resumes it.

    A tensor that is zero throughout, such as a head initialised to zero, will stay so: this is warned of. So are zeros
    in what the default scope leaves out, such as an embedding, which are not held.

    Raises:
        ValueError: there is not one zero in scope. (When resuming, load the model's state first.)

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> model.weight.data = torch.tensor([[0.5, 0.0, 2.0]])
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = hold(model, optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 1].item()
        0.0
    """
    pruner = Pruner(model, optimizer, _Zeros(), scope=scope)
    report = pruner.harden(one_shot=True)
    if report.nonzero == report.total:
        pruner.detach()
        raise ValueError(
            "hold() found no zero in the weights in scope; prune the model first (when "
            "resuming: load its state first), or widen the scope"
        )
    if scope is None:
        _warn_of_sparse_outside(model, report)
    empty = [layer.name for layer in report.layers if not layer.nonzero]
    if empty:
        warnings.warn(
            f"{', '.join(empty)} is zero throughout and will stay so; Scope(exclude=[...]) lets it train",
            stacklevel=2,
        )
    return pruner


_SPARSE = 0.1  # from this share of zeros on they are hardly there by chance


def _warn_of_sparse_outside(model: nn.Module, report: Report) -> None:
    parameters = dict(model.named_parameters())
    outside = {name: parameters[name] for name in report.outside if name in parameters}
    sparse = []
    for name, p in outside.items():
        if p.ndim >= 2 and p.is_floating_point() and p.requires_grad and p.numel():
            density = int(local(p).count_nonzero()) / max(1, local(p).numel())
            if 0.0 < density < 1.0 - _SPARSE:
                sparse.append(name)
    if sparse:
        have, them = ("has", "it") if len(sparse) == 1 else ("have", "them")
        warnings.warn(
            f"{few(sparse)} {have} zeros that hold() does not keep, because no layer multiplies with {them}. "
            f"To hold {them} too, pass scope=Scope(also={sparse})",
            stacklevel=3,
        )
