"""WHAT is pruned together: single weights, n of every m, blocks, or whole channels.

Unstructured zeros make a small file. Kernels for 2:4, block kernels and smaller dense layers want zeros that lie
together, and ``granularity=`` says how:

``"weight"``
    Each weight by itself.
``"n:m"``, such as ``"2:4"``
    At most ``n`` of every ``m`` neighbouring inputs of an output are kept, those with the largest scores.
``"RxC"`` or ``(R, C)``, such as ``"1x4"``
    Blocks of R neighbouring outputs by C neighbouring inputs are kept or pruned as a whole.
``"channel"``
    All weights of an output are kept or pruned together.
``"input channel"``
    All weights that read an input are kept or pruned together.

Which dimension is outputs and which inputs follows from the module that owns the weight, see :mod:`pomona.layout`:
``(outputs, inputs, *kernel)`` in ``Linear`` and ``Conv``, the two exchanged in ``ConvTranspose`` and in the ``Conv1D``
of transformers, ``(experts, outputs, inputs)`` in most mixtures of experts. A weight of an unknown module is refused by
name, unless the granularity is ``"weight"``. A weight is seen as one matrix of outputs and inputs for each expert and
each place of the kernel. So groups run along the inputs and never from one place of a kernel into the next, which is
what the 2:4 format of ``pomona.export`` and GPU kernels for channels_last layers expect.

**The score of a block or a channel** is the root of the mean of its squared scores. Keeping the blocks with the largest
scores changes the weights least, and the mean makes channels of different layers comparable. The squares are summed as
integers, each score rounded to 2^-18 of the largest in its group. So the score does not depend on the order of
summation: it is the same on every device, however the weights are sharded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from pomona.pages.text import few
from pomona.schedule import FAR_AWAY, Value, highest, value_at

Granularity: TypeAlias = str | tuple[int, int]


# The kinds see a tensor as its Layout.view does: (batch, outputs, inputs, *kernel).


@dataclass(frozen=True, slots=True)
class Single:
    """Each weight by itself."""

    def __str__(self) -> str:
        return "weight"

    def size(self, shape: Sequence[int]) -> int:
        """How many weights a group has in a view of this shape."""
        return 1


@dataclass(frozen=True, slots=True)
class NOfM:
    """At most ``n`` of every ``m`` neighbouring inputs are kept."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def size(self, shape: Sequence[int]) -> int:
        return 1  # each weight is kept or pruned by itself

    def view(self, tensor: Tensor) -> Tensor:
        """View of a tensor with its groups in the last dimension."""
        rows = tensor.movedim(2, -1)
        return rows.view(*rows.shape[:-1], rows.shape[-1] // self.m, self.m)


@dataclass(frozen=True, slots=True)
class Block:
    """``rows`` outputs by ``columns`` inputs together."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def size(self, shape: Sequence[int]) -> int:
        return self.rows * self.columns

    def view(self, tensor: Tensor) -> Tensor:
        """View of a tensor with the weights of a block in dimensions 2 and 4, and the grid of blocks in the others."""
        batch, down, across, *kernel = self.grid(tensor.shape)
        return tensor.view(batch, down, self.rows, across, self.columns, *kernel)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many blocks there are in each dimension."""
        return (shape[0], shape[1] // self.rows, shape[2] // self.columns, *shape[3:])


@dataclass(frozen=True, slots=True)
class Channel:
    """All weights of one output of one matrix, or of one input."""

    dim: int  # of the view

    def __str__(self) -> str:
        return "channel" if self.dim == 1 else "input channel"

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // math.prod(self.grid(shape)) if math.prod(shape) else 1

    def view(self, tensor: Tensor) -> Tensor:
        """The weights, one row per channel."""
        rows = tensor.movedim(self.dim, 1)
        return rows.reshape(rows.shape[0] * rows.shape[1], math.prod(rows.shape[2:]))

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many channels there are: of each matrix of the batch."""
        return shape[0], shape[self.dim]


Kind: TypeAlias = Single | NOfM | Block | Channel
_NAMED: dict[str, Kind] = {str(kind): kind for kind in (Single(), Channel(1), Channel(2))}


def parse(granularity: Granularity) -> Kind:
    """The kind of groups that a granularity names.

    Raises:
        TypeError: it is neither text nor a pair of integers.
        ValueError: it is not a granularity; the message lists them.

    Example:
        >>> parse("2:4"), parse((1, 4)), parse("1x4")
        (NOfM(n=2, m=4), Block(rows=1, columns=4), Block(rows=1, columns=4))
    """
    known = '"weight", "n:m" such as "2:4", a block such as "1x4" or (1, 4), "channel" or "input channel"'
    if isinstance(granularity, (tuple, list)) and len(granularity) == 2:
        if any(isinstance(size, bool) or not isinstance(size, int) for size in granularity):
            raise TypeError(f"granularity must be {known}, got {granularity!r}")
        granularity = f"{granularity[0]}x{granularity[1]}"
    if not isinstance(granularity, str):
        raise TypeError(f"granularity must be {known}, got {granularity!r}")
    if granularity in _NAMED:
        return _NAMED[granularity]
    if found := re.fullmatch(r"(\d+):(\d+)", granularity):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f'granularity="n:m" keeps n of every m with 0 < n < m, got {granularity!r}')
        return NOfM(n, m)
    if found := re.fullmatch(r"(-?\d+)x(-?\d+)", granularity):
        rows, columns = map(int, found.groups())
        if rows < 1 or columns < 1:
            raise ValueError(f"a block has at least one output and one input, got granularity={granularity!r}")
        return Block(rows, columns) if rows * columns > 1 else Single()
    raise ValueError(f"granularity must be {known}, got {granularity!r}")


def canonical(granularity: Granularity) -> str:
    """The one way to write it, by which saved states are compared: ``"1x4"`` for ``(1, 4)``."""
    return str(parse(granularity))


def check_granularity(granularity: Granularity, sparsity: Value | None, allocation: str = "global") -> None:
    """Raise ValueError if n:m, which gives every layer the same share, contradicts a method's other settings."""
    kind = parse(granularity)
    if not isinstance(kind, NOfM):
        return
    if sparsity is None:
        raise ValueError(f"granularity={granularity!r} needs sparsity={_share(kind)}, and no shares by layer")
    end = value_at(sparsity, FAR_AWAY)
    if abs(end - (1 - kind.n / kind.m)) > 1e-9 or highest(sparsity) > end:
        when = "" if value_at(sparsity, 0) == end else " at its end, and highest there"
        raise ValueError(
            f"granularity={granularity!r} keeps {kind.n} of every {kind.m} weights, so that sparsity must be "
            f"{_share(kind)}{when}, got {sparsity}; change one of the two"
        )
    if allocation == "erk":
        raise ValueError(
            f"granularity={granularity!r} keeps the same share of every layer, which allocation='erk' does not; take "
            f"allocation='uniform'"
        )


def _share(kind: NOfM) -> str:
    share = 1 - kind.n / kind.m
    return f"{share:g}" if float(f"{share:g}") == share else f"1 - {kind.n}/{kind.m}"


def check_shapes(kind: Kind, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, with the names, unless matrices of these shapes, (outputs, inputs, ...), fall into groups."""
    unfit = {name: tuple(shape) for name, shape in shapes.items() if not _fits(kind, shape)}
    if not unfit:
        return
    steps = group_steps(kind)
    wanted = {
        NOfM: f"a number of inputs divisible by {steps[1]}",
        Block: f"a number of outputs divisible by {steps[0]} and a number of inputs divisible by {steps[1]}",
        Channel: "outputs and inputs" if isinstance(kind, Channel) and kind.dim == 2 else "a dimension",
    }[type(kind)]
    shown = few([f"{name} {_sizes(shape)}" for name, shape in unfit.items()])
    does, it = ("do", "them") if len(unfit) > 1 else ("does", "it")
    raise ValueError(
        f"granularity='{kind}' needs {wanted}, which {shown} {does} not have; leave {it} dense: "
        f"Scope(exclude={list(unfit)})"
    )


def _sizes(shape: Sequence[int]) -> str:
    if len(shape) < 2:
        return f"({', '.join(map(str, shape))})"
    kernel = f", kernel {'x'.join(map(str, shape[2:]))}" if len(shape) > 2 else ""
    return f"({shape[0]} outputs, {shape[1]} inputs{kernel})"


def group_steps(kind: Kind) -> tuple[int, int]:
    """The size of a group along the outputs and along the inputs."""
    if isinstance(kind, NOfM):
        return 1, kind.m
    return (kind.rows, kind.columns) if isinstance(kind, Block) else (1, 1)


def _fits(kind: Kind, shape: Sequence[int]) -> bool:
    if isinstance(kind, Single):
        return True
    if isinstance(kind, Channel):
        return len(shape) >= kind.dim
    return len(shape) >= 2 and all(size % step == 0 for size, step in zip(shape, group_steps(kind), strict=False))
