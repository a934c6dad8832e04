"""Operations on tensors that more than one method is made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pomona.distributed import sum_counts, sum_vectors
from pomona.native import core
from pomona.score import rank_inside_
from pomona.selection import NonFiniteError, Selection
from pomona.selection.kinds import split_rows
from pomona.weight import Weight

PIECE = 1 << 20
"""How many elements of a tensor are processed together, so that no temporary has its size."""


def soft_threshold(v: Tensor, threshold: float) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, a new tensor: the proximal operator of ``threshold |v|``.

    Exact zeros (+0.0) wherever ``|v| <= threshold``; a NaN stays one. ``threshold >= 0``, and 0 copies ``v``.
    """
    if threshold == 0.0:
        return v.clone()
    return torch.where(v.abs() <= threshold, 0.0, v - threshold * v.sign())


def all_finite(grads: Sequence[Tensor]) -> bool:
    """One cheap pass; a finite sum has finite terms, and only a sum that is not needs a second look."""
    if not grads:
        return True
    if core.is_available() and all(map(core.fits, grads)):
        return core.num_nonfinite(grads) == 0
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    dense = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in dense]
    sums = [g.sum(dtype=torch.float32).to(dense[0].device) for g in dense]
    return bool(torch.stack(sums).isfinite().all()) or all(bool(g.isfinite().all()) for g in dense)


def check_finite(weights: Sequence[Weight], selection: Selection) -> None:
    """NonFiniteError if a gradient on a CPU is not finite; for ``Method.checks_gradients``.

    Args:
        weights: whose gradients are checked.
        selection: from scores of these gradients. If it has seen no infinite score, there is nothing to look at again.
    """
    if selection.num_infinite != 0 and not all_finite([w.grad for w in weights if w.grad.is_cpu]):
        raise NonFiniteError("a gradient is not finite")


def drop_gradients_(weights: Sequence[Weight], kept: Selection | Sequence[Tensor]) -> None:
    """Zero the gradients outside a selection, or outside masks (True = kept)."""
    if not isinstance(kept, Sequence):
        kept.multiply_([w.grad for w in weights])
        return
    for w, mask in zip(weights, kept, strict=True):
        w.grad.masked_fill_(~mask, 0.0)


def drop_weights_(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Write exact zeros outside the masks; undoes what momentum, moments or weight decay did there in a step."""
    for w, mask in zip(weights, masks, strict=True):
        w.value.masked_fill_(~mask, 0.0)


def drop_buffers_(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Zero what the optimizer remembers of the weights outside the masks, such as momentum or Adam's moments."""
    for w, mask in zip(weights, masks, strict=True):
        for buffer in w.buffers:
            buffer.masked_fill_(~mask, 0.0)


def split_matrices(weights: Sequence[Weight], tensors: Sequence[Tensor]) -> tuple[list[Weight], list[Tensor]]:
    """All matrices that lie in the weights, each a layer, and the parts that they have of one tensor per weight."""
    layers: list[Weight] = []
    parts: list[Tensor] = []
    for w, tensor in zip(weights, tensors, strict=True):
        matrices = w.matrices()
        layers += matrices
        parts += split_rows(tensor, [one.num_rows for one in matrices])
    return layers, parts


def masks_of(weights: Sequence[Weight]) -> list[Tensor]:
    """The masks in the weights' states."""
    return [w.state["mask"] for w in weights]


def count(masks: Sequence[Tensor], *, of: Sequence[Weight]) -> list[int]:
    """How many are True, or not zero, in each tensor; on all ranks together where the weights are sharded."""
    return sum_counts([mask.count_nonzero() for mask in masks], [w.shard for w in of])


def sum_of(counts: Sequence[int | Tensor]) -> Tensor:
    """The sum of a selection's counts, without waiting for the device that has them."""
    on_device = [count.view(1) for count in counts if isinstance(count, Tensor)]
    rest = sum(int(count) for count in counts if not isinstance(count, Tensor))
    return torch.cat(on_device).sum() + rest if on_device else torch.tensor(rest)


def total(tensors: Sequence[Tensor], *, of: Sequence[Weight]) -> list[float]:
    """The sum of each tensor of float32 numbers >= 0, on all ranks together where the weights are sharded.

    It is rounded once, at the end, and so does not depend on how the numbers are laid out.
    """
    digits = sum_vectors([_sum_by_exponent(t) for t in tensors], [w.shard for w in of])
    return [_add_up(numbers.tolist()) for numbers in digits]


def _sum_by_exponent(numbers: Tensor) -> Tensor:
    """Sum of the mantissas for each of the 256 exponents of float32, as integers; exact up to 2^39 numbers."""
    sums = torch.zeros(256, dtype=torch.int64, device=numbers.device)
    for piece in torch.split(numbers.detach().reshape(-1), PIECE):
        bits = piece.view(torch.int32) & 0x7FFFFFFF
        exponent = bits >> 23
        mantissa = (bits & 0x7FFFFF) + (exponent > 0) * (1 << 23)
        sums.scatter_add_(0, exponent.long(), mantissa.long())
    return sums.cpu()


def _add_up(sums: Sequence[int]) -> float:
    if sums[255]:
        return math.nan  # an infinity or a NaN was among them
    return math.ldexp(sum(one << max(exponent - 1, 0) for exponent, one in enumerate(sums)), -149)


def sparsity_of(weights: Sequence[Weight]) -> float:
    """Fraction of zeros among the weights, as the report counts them."""
    num = sum(w.numel for w in weights)
    return (num - sum(count([w.value for w in weights], of=weights))) / max(1, num)


def among(score: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of ``score`` for ranking within ``mask``: zero outside, positive inside.

    A selection never keeps a zero. So it keeps nothing from outside, and from inside as many as it is asked for, even
    if their scores are zero.
    """
    return rank_inside_(score.clone(), mask)


def random_scores(weights: Sequence[Weight], seed: int, step: int) -> Iterator[Tensor]:
    """For each weight scores in (0, 1], which follow from ``seed``, ``step`` and its place among the weights.

    Where ranks share a tensor, each draws the whole of it and takes its block, so that the numbers are the same however
    it is sharded; this takes the time and, one tensor at a time, the memory of the whole.
    """
    for i, w in enumerate(weights):
        device = w.value.device
        drawn = 1.0 - torch.rand(w.shape, generator=generator(seed, step, device, layer=i), device=device)
        yield drawn if w.shard is None else w.shard.block(drawn, w.value.shape).clone()


def generator(seed: int, step: int, device: torch.device, *, layer: int = 0) -> torch.Generator:
    """Random numbers that follow from seed, step and layer alone, so that a resumed run draws the same ones."""
    # Hashed, because on a CPU torch uses the low 32 bits only: 2^32 would be the seed 0.
    digest = hashlib.sha256(f"{seed}, {step}, {layer}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
