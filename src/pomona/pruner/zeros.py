"""Exact zeros, and keeping them: through momentum, Adam, weight decay and copies of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pomona.distributed import Shard, local, max_over, reshard, sum_counts
from pomona.native import core
from pomona.ops import PIECE
from pomona.pruner.placement import Placement
from pomona.torch_compile import plain_names
from pomona.weight import Weights


class Frozen(NamedTuple):
    """A weight that ``harden()`` has left as it was, because it was frozen.

    Attributes:
        since: the step after which it was frozen.
        surplus: how many more of its weights stay than the method's budget would have left; may be negative.
    """

    since: int
    surplus: int


class Zeros:
    """What ``harden()`` has zeroed, and holds at zero.

    Attributes:
        pruned: name -> True where the weight is held at zero; empty before ``harden()``.
        cuts: name -> largest magnitude that the cut removed, on all ranks.
        frozen: name -> why no more was cut, of weights that were frozen.
    """

    def __init__(
        self,
        pruned: Mapping[str, Tensor] | None = None,
        cuts: Mapping[str, float] | None = None,
        frozen: Mapping[str, Frozen] | None = None,
    ) -> None:
        self.pruned = dict(pruned or {})
        self.cuts = dict(cuts or {})
        self.frozen = dict(frozen or {})

    @classmethod
    @torch.no_grad()
    def cut_(cls, weights: Weights, masks: Sequence[Tensor], frozen: Mapping[str, Frozen]) -> Zeros:
        """Zero all but the masks (True = kept), which must not be used afterwards."""
        pruned = all_but(masks, [*weights.shared.values(), *(t for w in weights for t in w.state.values())])
        largest = max_over(cut_([w.value for w in weights], pruned), [w.shard for w in weights])
        names = [w.name for w in weights]
        return cls(dict(zip(names, pruned, strict=True)), dict(zip(names, largest, strict=True)), frozen)

    @property
    def are_written(self) -> bool:
        return bool(self.pruned)

    def drop_gradients_(self, weights: Weights) -> None:
        """Before a step: pruned weights get no gradient."""
        zero_all_([w.grad for w in weights], [self.pruned[w.name] for w in weights])

    def write_(self, weights: Weights) -> None:
        """After a step: undo what momentum, moments or weight decay did to pruned weights."""
        zero_all_([w.value for w in weights], [self.pruned[w.name] for w in weights])

    @property
    def surplus(self) -> int:
        """How many more weights stay than the budget allows, because they were frozen."""
        return sum(one.surplus for one in self.frozen.values())

    def forget_(self, weights: Weights) -> None:
        """Zero what the optimizer remembers of pruned weights: moments, and copies of the weights that it swaps in."""
        pairs = [(buffer, self.pruned[w.name]) for w in weights for buffer in w.buffers]
        zero_all_([buffer for buffer, _ in pairs], [mask for _, mask in pairs])

    def num_kept(self, placement: Placement) -> dict[str, int]:
        """Name -> how many survive in the whole tensor; empty before ``harden()``."""
        return placement.sum_counts({name: mask.numel() - mask.count_nonzero() for name, mask in self.pruned.items()})

    def count_revived(self, copy: nn.Module, shards: Mapping[str, Shard]) -> dict[str, int]:
        """Name -> number of weights of ``copy`` that should be zero and are not, on all ranks; only where any are."""
        found = same_names(copy, self.pruned)
        here = [(value[self.pruned[name].to(value.device)] != 0).sum() for name, value in found.items()]
        counts = sum_counts(here, [shards.get(name) for name in found])
        return {name: count for name, count in zip(found, counts, strict=True) if count}

    def count_remembered(self, weights: Weights) -> dict[str, int]:
        """Name -> how much of what the optimizer remembers of pruned weights is not zero; only where any is."""
        here = [_count_at(w.buffers, self.pruned[w.name]) for w in weights]
        counts = sum_counts(here, [w.shard for w in weights])
        return {w.name: count for w, count in zip(weights, counts, strict=True) if count}

    def revived(self, weights: Weights) -> dict[str, int]:
        """Name -> number of pruned weights that are not zero, on this rank; only where any are."""
        counts = {w.name: _count_at([w.value], self.pruned[w.name]) for w in weights}
        return {name: count for name, count in counts.items() if count}


def _count_at(values: Sequence[Tensor], chosen: Tensor) -> int:
    return sum(int((value[chosen] != 0).sum()) for value in values)


@torch.no_grad()
def zero_(value: Tensor, pruned: Tensor) -> Tensor:
    """Write exact +0.0 where ``pruned`` is True, in place, even over NaN."""
    return value.masked_fill_(pruned, 0.0)


@torch.no_grad()
def zero_all_(values: Sequence[Tensor], pruned: Sequence[Tensor]) -> None:
    """Apply ``zero_`` to each tensor, without device-to-host synchronization."""
    if _fit_core(values, pruned):
        core.zero_(values, pruned)
        return
    for value, mask in zip(values, pruned, strict=True):
        zero_(value, mask)


@torch.no_grad()
def cut_(values: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[float]:
    """Apply ``zero_`` to each tensor; return the largest magnitude that each lost, 0 if nothing of it is pruned."""
    if _fit_core(values, pruned):
        return core.zero_(values, pruned)
    largest = []
    for value, mask in zip(values, pruned, strict=True):
        largest.append(largest_among(value, mask))
        zero_(value, mask)
    return largest


@torch.no_grad()
def all_but(kept: Sequence[Tensor], remembered: Iterable[Tensor]) -> list[Tensor]:
    """The masks of what is pruned from those of what is kept, which must not be used afterwards.

    They are inverted in place, so that a cut needs one byte per weight and not two, unless a mask is one of those that
    are remembered, or occurs twice, or is a view that repeats its elements.
    """
    seen = Counter(_storage(t) for t in (*remembered, *kept))
    return [m.logical_not_() if seen[_storage(m)] == 1 and m.is_contiguous() else ~m for m in kept]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _fit_core(values: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    return core.is_available() and all(core.fits_mask(v, mask) for v, mask in zip(values, masks, strict=True))


@torch.no_grad()
def largest_among(value: Tensor, chosen: Tensor) -> float:
    """Return the largest magnitude where ``chosen`` is True, or 0 if it is True nowhere; looks piece by piece."""
    pieces = zip(torch.split(value.reshape(-1), PIECE), torch.split(chosen.reshape(-1), PIECE), strict=True)
    maxima = [piece.abs().masked_fill_(~mask, 0.0).max() for piece, mask in pieces if piece.numel()]
    return float(torch.stack(maxima).max()) if maxima else 0.0


@torch.no_grad()
def zero_copy_(copy: nn.Module, pruned: Mapping[str, Tensor]) -> None:
    """Write the zeros of a pruned model into a copy of it, such as an exponential moving average.

    An average of zeros stays zero, so once is enough. Parameters are found by name, with or without the
    ``module.`` that ``AveragedModel`` and ``DistributedDataParallel`` put in front. If the model is sharded, the copy
    must be sharded alike, and each rank zeroes its blocks.
    """
    for name, value in same_names(copy, pruned).items():
        zero_(value, pruned[name].to(value.device))


def same_names(copy: nn.Module, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's blocks of the copy's weights, by the names in the pruned model. Raises if names or shapes differ."""
    reshard(copy)
    parameters = plain_names(dict(copy.named_parameters(remove_duplicate=False)))  # tied ones under each of their names
    found = {}
    for name, mask in pruned.items():
        parameter = next(
            (parameters[n] for n in (name, f"module.{name}", name.removeprefix("module.")) if n in parameters), None
        )
        if parameter is None or local(parameter).shape != mask.shape:
            have = "no such parameter" if parameter is None else f"shape {tuple(local(parameter).shape)}"
            raise ValueError(
                f"{type(copy).__name__} is not a copy of the pruned model: {name} has shape {tuple(mask.shape)} "
                f"there and {have} here"
            )
        found[name] = local(parameter)
    return found
