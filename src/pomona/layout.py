"""What the dimensions of a parameter are, and whether its module multiplies with it.

A parameter is pruned by default if the module that owns it multiplies its input with it. Which modules do, and which
dimension is what, is in one table here; :func:`register` adds a layer to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True, slots=True)
class Layout:
    """Which dimension of a tensor is the outputs, which the inputs, and how many matrices lie in it.

    The other dimensions are places of a kernel. If neither the outputs nor the inputs are dimension 0, each index of
    dimension 0 has a matrix of its own, as a tensor ``(experts, outputs, inputs)`` has.

    Args:
        outputs: dimension of the outputs, >= 0.
        inputs: dimension of the inputs, >= 0 and not ``outputs``.
        matrices: number of equal parts of dimension 0, each of which is a matrix by itself, >= 1: 3 for the packed
            projection of ``nn.MultiheadAttention``, 4 for the gates of ``nn.LSTM``.

    A vector is a layout of outputs with one input each.

    Example:
        >>> Layout(outputs=1, inputs=2).view(torch.zeros(8, 128, 64)).shape  # eight experts
        torch.Size([8, 128, 64])
    """

    outputs: int = 0
    inputs: int = 1
    matrices: int = 1

    def __post_init__(self) -> None:
        for name, least in (("outputs", 0), ("inputs", 0), ("matrices", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Layout({name}=...) must be an integer >= {least}, got {value!r}")
        if self.outputs == self.inputs:
            raise ValueError(f"Layout(outputs={self.outputs}, inputs={self.inputs}): the two must differ")

    def why_not(self, shape: Sequence[int]) -> str:
        """Why a tensor of this shape cannot have this layout; "" if it can."""
        if len(shape) >= 2 and max(self.outputs, self.inputs) >= len(shape):
            return f"{self} needs dimension {max(self.outputs, self.inputs)}, and the shape is {tuple(shape)}"
        if len(shape) >= 2 and shape[0] % self.matrices:
            return f"{self} needs a dimension 0 divisible by {self.matrices}, and the shape is {tuple(shape)}"
        return ""

    def num_matrices(self, shape: Sequence[int]) -> int:
        """Number of matrices in a tensor of this shape."""
        if len(shape) < 2:
            return 1
        return self.matrices if 0 in (self.outputs, self.inputs) else shape[0]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one matrix in a whole tensor of this shape: (outputs, inputs, \\*kernel); a vector's own shape."""
        if len(shape) < 2:
            return tuple(shape)
        _, outputs, inputs, *kernel = self.view_shape(shape)
        parts = self.matrices if self.outputs == 0 else 1
        return (outputs // parts, inputs, *kernel)

    def view_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of ``view`` of a tensor of this shape."""
        if len(shape) < 2:
            return (1, *shape, *(1,) * (2 - len(shape)))
        order, split = self._order(len(shape)), self._split(shape)
        return tuple(split[d] for d in order)

    def view(self, tensor: Tensor) -> Tensor:
        """View of a tensor, or of a rank's block of it, as (batch, outputs, inputs, \\*kernel).

        Matrices that lie along the outputs stay there; others are the batch.
        """
        if tensor.ndim < 2:
            return tensor.view(self.view_shape(tensor.shape))
        return tensor.reshape(self._split(tensor.shape)).permute(self._order(tensor.ndim))

    def back(self, view: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose ``view`` is equal to ``view``."""
        if len(shape) < 2:
            return view.reshape(tuple(shape))
        order = self._order(len(shape))
        return view.permute([order.index(d) for d in range(len(order))]).reshape(tuple(shape))

    def view_start(self, start: Sequence[int]) -> tuple[int, ...]:
        """Where in the ``view`` of the whole tensor the ``view`` of a block begins that begins at ``start``."""
        if len(start) < 2:
            return (0, *start, *(0,) * (2 - len(start)))
        split = (0, *start) if 0 in (self.outputs, self.inputs) else tuple(start)
        return tuple(split[d] for d in self._order(len(start)))

    def _split(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape with a dimension for the matrices in front."""
        if self.outputs == 0:
            return (1, *shape)
        if self.inputs == 0:
            return (self.matrices, shape[0] // self.matrices, *shape[1:])
        return tuple(shape)

    def _order(self, ndim: int) -> list[int]:
        """Which dimensions of the split shape are batch, outputs, inputs and kernel."""
        added = 1 if 0 in (self.outputs, self.inputs) else 0
        first = [0, self.outputs + added, self.inputs + added]
        return [*first, *(d for d in range(ndim + added) if d not in first)]


ROWS = Layout(0, 1)  # of most layers, and of vectors

# Which modules multiply, and with what

Found: TypeAlias = Layout | Callable[[Any], Layout] | None  # None: it multiplies, and no one layout describes how
_COLUMNS = Layout(1, 0)


def _gates(cell: Any) -> Layout:
    gates = {"LSTM": 4, "GRU": 3}.get(str(getattr(cell, "mode", "")))
    return Layout(0, 1, gates or {nn.LSTMCell: 4, nn.GRUCell: 3}.get(type(cell), 1))


# Class, or its full name -> pattern of the parameter's own name -> layout. The first class in the method resolution
# order that is here decides.
_LAYERS: dict[type[nn.Module] | str, Mapping[str, Found]] = {
    nn.Linear: {"weight": ROWS},
    nn.Bilinear: {"weight": ROWS},
    _ConvNd: {"weight": ROWS},
    _ConvTransposeNd: {"weight": lambda conv: Layout(1, 0, conv.groups)},
    nn.RNNBase: {"weight_ih_l*": _gates, "weight_hh_l*": _gates, "weight_hr_l*": ROWS},
    nn.RNNCellBase: {"weight_ih": _gates, "weight_hh": _gates},
    nn.MultiheadAttention: {"in_proj_weight": Layout(0, 1, 3), "[qkv]_proj_weight": ROWS},
    nn.Embedding: {"weight": _COLUMNS},
    nn.EmbeddingBag: {"weight": _COLUMNS},
    "transformers.pytorch_utils.Conv1D": {"weight": _COLUMNS},
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": {
        "gate_up_proj": Layout(2, 1),
        "down_proj": Layout(2, 1),
    },
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": {"[qkvor]": None},  # (model, heads, head)
}
_LOOK_UP = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def register(layer: type[nn.Module], **weights: Found) -> None:
    """Declare which parameters a layer multiplies with, and how they lie: they are pruned by default from now on.

    Args:
        layer: the class; its subclasses are covered too. A class that is known already gets these instead.
        weights: name of the parameter in the module, or a wildcard for several -> its layout, a function from the
            module to it, or None if no one layout describes it: it is then pruned weight by weight only.

    Raises:
        TypeError: ``layer`` is no subclass of ``nn.Module``, or a layout is none.
        ValueError: no parameter is named.

    Example:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.randn(4, 16, 8))  # (experts, outputs, inputs)
        >>> register(Experts, up=Layout(outputs=1, inputs=2))
        >>> list(pomona.Scope().select(Experts()).inside)
        ['up']
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"register() takes a subclass of nn.Module, got {layer!r}")
    if not weights:
        raise ValueError(f"register({layer.__name__}, ...) needs the parameters, e.g. weight=Layout(0, 1)")
    for name, found in weights.items():
        if found is not None and not isinstance(found, Layout) and not callable(found):
            raise TypeError(f"register({layer.__name__}, {name}=...) takes a Layout, got {found!r}")
    _LAYERS[layer] = weights
    _found.clear()


@dataclass(frozen=True, slots=True)
class Role:
    """What a module does with a parameter.

    Attributes:
        multiplies: whether it multiplies with it.
        layout: how the parameter lies, if that is known.
        is_table: whether rows are looked up in it, as in an embedding.
        why: what it is, where it does not multiply with it; a noun phrase that ends a sentence.
        is_known: whether the module is one that Pomona knows.
    """

    multiplies: bool
    layout: Layout | None = None
    is_table: bool = False
    why: str = ""
    is_known: bool = True


def role_of(module: nn.Module, leaf: str, parameter: Tensor) -> Role:
    """What ``module`` does with its parameter, whose own name is ``leaf``."""
    kind = type(module).__name__
    plain = ROWS if parameter.ndim < 2 else None
    if isinstance(module, _NORMS):
        return Role(False, plain, why=f"of a norm, {kind}")
    patterns = _patterns_of(type(module))
    for pattern, found in (patterns or {}).items():
        if fnmatchcase(leaf, pattern):
            layout = found(module) if callable(found) else found
            if layout is not None and (reason := layout.why_not(parameter.shape)):
                raise ValueError(f"{leaf} of {kind}: {reason}; say how it lies: pomona.layout.register({kind}, ...)")
            if isinstance(module, _LOOK_UP):
                return Role(False, layout, is_table=True, why=f"an embedding ({kind})")
            return Role(True, layout)
    declared = _declared(module, parameter.shape) if patterns is None else None
    if declared is not None:
        return declared
    if parameter.ndim < 2 or _num_long(parameter.shape) < 2:
        return Role(False, plain, why="a vector")
    if patterns is not None:
        return Role(False, why=f"not what {kind} multiplies with")
    return Role(False, why=f"of {kind}, which is no layer that Pomona knows", is_known=False)


_found: dict[type[nn.Module], Mapping[str, Found] | None] = {}  # by class, as looked up before


def _patterns_of(kind: type[nn.Module]) -> Mapping[str, Found] | None:
    """What the table has for a class, or for the nearest class that it is made from."""
    if kind not in _found:
        rows = (_LAYERS.get(base) or _LAYERS.get(f"{base.__module__}.{base.__qualname__}") for base in kind.__mro__)
        _found[kind] = next((row for row in rows if row is not None), None)
    return _found[kind]


# The names under which other libraries' layers state their sizes.
_INPUTS = ("in_features", "in_channels", "input_size", "input_dim")
_OUTPUTS = ("out_features", "out_channels", "output_size", "output_dim")


def _declared(module: nn.Module, shape: torch.Size) -> Role | None:
    """The role that follows from what the module says about itself: its sizes, or how its experts lie."""
    experts = getattr(module, "num_experts", None)
    is_transposed = getattr(module, "is_transposed", None)  # of the experts of transformers
    if len(shape) == 3 and isinstance(is_transposed, bool) and shape[0] == experts:
        return Role(True, Layout(2, 1) if is_transposed else Layout(1, 2))
    inputs, outputs = _first_of(module, _INPUTS), _first_of(module, _OUTPUTS)
    if inputs is None or outputs is None or len(shape) < 2:
        return None
    if len(shape) == 3 and shape == (experts, outputs, inputs) and inputs != outputs:
        return Role(True, Layout(1, 2))
    groups = getattr(module, "groups", 1)
    rows = (outputs, inputs // groups if isinstance(groups, int) and groups > 0 else inputs)
    if shape[:2] == rows and min(rows) > 1:
        # Of a square matrix nobody can say which way round it lies.
        return Role(True, None if len(shape) == 2 and inputs == outputs else ROWS)
    if shape == (inputs, outputs) and min(shape) > 1:
        return Role(True, _COLUMNS)
    return None


def _first_of(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _num_long(shape: Sequence[int]) -> int:
    """Number of dimensions of more than one element."""
    return sum(size != 1 for size in shape) if math.prod(shape) else 0
