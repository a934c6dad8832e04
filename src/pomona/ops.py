"""Operations on tensors that more than one method is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pomona.method import Weight


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
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    dense = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in dense]
    sums = [g.sum(dtype=torch.float32).to(dense[0].device) for g in dense]
    return bool(torch.stack(sums).isfinite().all()) or all(bool(g.isfinite().all()) for g in dense)


def drop_gradients_(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks (True = kept)."""
    for w, mask in zip(weights, masks, strict=True):
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


def masks_of(weights: Sequence[Weight]) -> list[Tensor]:
    """The masks in the weights' states."""
    return [w.state["mask"] for w in weights]


def sparsity_of(weights: Sequence[Weight]) -> float:
    """Fraction of zeros among the weights, as the report counts them."""
    return sum(int((w.value == 0).sum()) for w in weights) / max(1, sum(w.value.numel() for w in weights))


def among(score: Tensor, mask: Tensor) -> Tensor:
    """``score`` to rank by inside ``mask`` only, a new tensor: zero outside, and above zero inside.

    A selection never keeps a zero, so it keeps nothing from outside, and from inside as many as it is asked for, be
    their scores zero.
    """
    return score.clamp(min=torch.finfo(score.dtype).tiny).masked_fill_(~mask, 0.0)


def random_scores(weights: Sequence[Weight], seed: int, step: int) -> Iterator[Tensor]:
    """For each weight scores in (0, 1], which follow from ``seed``, ``step`` and its place among the weights."""
    for i, w in enumerate(weights):
        device = w.value.device
        yield 1.0 - torch.rand(w.value.shape, generator=generator(seed, step, device, layer=i), device=device)


def generator(seed: int, step: int, device: torch.device, *, layer: int = 0) -> torch.Generator:
    """Random numbers that follow from seed, step and layer alone, so that a resumed run draws the same ones."""
    # Hashed, because on a CPU torch uses the low 32 bits only: 2^32 would be the seed 0.
    digest = hashlib.sha256(f"{seed}, {step}, {layer}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
