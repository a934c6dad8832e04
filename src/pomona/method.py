"""HOW weights move: what a pruning method is.

The life of a method, driven by the Pruner::

    check(optimizer, groups)                      once, at construction: refuse what cannot work
    check_weights(weights)                        likewise for the weights
    init(weight), init_shared(weights)            once: the state of each weight, and of the whole network
    loop:
        before_step(weights, step)                gradients are final; step = 1, 2, ...
        <optimizer.step() itself>
        after_step(weights, step)                 weights have moved
    support(weights, step)                        what survives harden()

A method is a frozen dataclass of hyper-parameters and never holds state. What it must remember lives in
``Weight.state`` and ``Weights.shared``, which the Pruner saves and restores. A method does not import
``torch.distributed``, ``torch.optim`` or hooks.

What only reports is optional: ``why``, ``starved``, ``unfinished`` and ``metrics`` here, and the two methods of
:class:`pomona.diagnosis.Diagnosed` for a method that can say whether a run will succeed.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from pomona.budget import Budget
from pomona.granularity import Granularity
from pomona.ops import count, split_matrices
from pomona.weight import Weight, Weights

_BUDGET = ("sparsity", "allocation", "min_density", "granularity", "score")  # fields of Budget


@lru_cache(maxsize=64)
def _budget_of(options: tuple[tuple[str, Any, str], ...]) -> Budget:
    """Reports ask every layer for it; how a value is written is there because True equals 1.0."""
    return Budget(**{name: value for name, value, _ in options})


class Method(ABC):
    """A way to prune. Subclasses are frozen dataclasses, one paper and one file each.

    Fields named ``sparsity``, ``allocation``, ``min_density``, ``granularity`` and ``score`` make up the method's
    ``budget``, which checks them; a method has those of the five that its user may choose. A subclass with a
    ``__post_init__`` of its own calls ``Method.__post_init__(self)`` in it.

    Attributes:
        granularity: what goes together, see :mod:`pomona.granularity`.
        checks_gradients: True if ``before_step`` itself raises NonFiniteError for a gradient that is not finite, before
            it changes anything. It saves the Pruner one pass over the gradients.
        takes_frozen: True if weights are in scope too that are frozen (``requires_grad`` is False) when the Pruner is
            made, provided that the optimizer holds them: for a method that keeps what is there, such as ``hold``'s.
    """

    __slots__ = ()
    granularity: Granularity = "weight"
    checks_gradients: ClassVar[bool] = False
    takes_frozen: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if callable(cls.__dict__.get("budget")) or callable(cls.__dict__.get("checks_gradients")):
            raise TypeError(
                f"{cls.__name__}: budget is a property that returns a pomona.Budget, and checks_gradients an "
                f"attribute, not functions of the step"
            )

    def __post_init__(self) -> None:
        canonical = self.budget.granularity
        if self.granularity != canonical and "granularity" in self.__class__.__dict__.get("__dataclass_fields__", ()):
            object.__setattr__(self, "granularity", canonical)

    @property
    def budget(self) -> Budget:
        """How many weights may survive ``harden()`` at most, and where; all of them if the method has no sparsity."""
        options = tuple((name, value, repr(value)) for name in self._options() for value in [getattr(self, name)])
        try:
            return _budget_of(options)
        except TypeError:  # a value that cannot be hashed, or that the budget refuses
            return Budget(**{name: value for name, value, _ in options})

    def _options(self) -> list[str]:
        """The settings of a budget that the user of this method may choose."""
        fields = getattr(self, "__dataclass_fields__", ())  # a method of this name is no setting
        return [name for name in _BUDGET if hasattr(self, name) and (name != "score" or name in fields)]

    def check(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if ``optimizer`` cannot drive this method; ``groups`` are those with weights in scope."""

    def check_weights(self, weights: Weights) -> None:
        """Raise ValueError if the method cannot prune these weights with its settings."""
        self.budget.check_weights(weights)

    def init(self, w: Weight) -> dict[str, Tensor]:
        """State of one weight: tensors of the shape of ``w.value``, which are resharded with it, or of no dimension.

        Values that depend on the weights are filled in at step 1, because weights may be loaded after construction.
        """
        return {}

    def init_shared(self, weights: Weights) -> dict[str, Tensor]:
        """State of the whole network, such as a threshold or a multiplier: tensors of any shape, equal on all ranks.

        The states of single weights are still empty when it is called.
        """
        return {}

    def before_step(self, weights: Weights, step: int) -> None:
        """Gradients are final, weights have not moved. ``pomona.ops.drop_gradients_`` drops gradients."""

    def after_step(self, weights: Weights, step: int) -> None:
        """Weights have moved."""

    @abstractmethod
    def support(self, weights: Weights, step: int) -> list[Tensor]:
        """Boolean masks of what survives ``harden()``, True = kept. ``grad`` is empty here.

        The masks are new tensors, which the Pruner may change in place, or parts of ``w.state`` or ``weights.shared``.
        """

    # What only reports

    def why(self, w: Weight, kept: int, density: float) -> str:
        """One clause: why a layer keeps ``kept`` of its weights; ``density`` is the share that the network keeps."""
        return self.budget.why(w, kept, density)

    def starved(self, layers: Sequence[Weight], kept: Sequence[int]) -> str:
        """If a cut that keeps ``kept`` of each layer empties some, or nearly so, say it in a sentence; otherwise "".

        Where several matrices lie in one tensor, each is a layer.
        """
        return self.budget.starved(layers, kept, options=self._options())

    def unfinished(self, weights: Weights, step: int) -> str:
        """If the method has not finished at ``step``, say why in one sentence; otherwise return ""."""
        return ""

    def metrics(self, weights: Weights) -> dict[str, float]:
        """Numbers worth watching while training; ``grad`` is empty here; may synchronise with the device."""
        return {}


def starved_by(method: Method, weights: Weights, kept: Sequence[Tensor]) -> str:
    """What the method says of the layers that these masks (True = kept) leave next to nothing of."""
    layers, masks = split_matrices(weights, kept)
    return method.starved(layers, count(masks, of=layers))


def warn_of_starved(
    method: Method, weights: Weights, kept: Sequence[Tensor], *, before: Sequence[Tensor] | None = None
) -> None:
    """Warn if a cut leaves next to nothing of some layers, see :meth:`pomona.Budget.starved`.

    Args:
        method: whose cut it is.
        weights: all of them.
        kept: the masks after the cut, True = kept.
        before: the masks before it. If some layers had next to nothing then, this has been said already.
    """
    said = starved_by(method, weights, kept)
    if said and not (before is not None and starved_by(method, weights, before)):
        warnings.warn(f"this cut starves layers: {said}", stacklevel=3)
