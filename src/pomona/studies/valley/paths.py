"""Paths between two points, and the barrier on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from pomona.studies.valley.curvature import Parameters

MOMENTUM = 0.9  # of the training of the curve


def segment(a: Parameters, b: Parameters, t: float) -> Parameters:
    """``a`` at t = 0, ``b`` at t = 1, both exactly."""
    return {name: torch.lerp(a[name], b[name], t) for name in a}


def bezier(a: Parameters, c: Parameters, b: Parameters, t: float) -> Parameters:
    """The curve from ``a`` to ``b``, bent towards the control point ``c``; the segment if ``c`` is the middle."""
    return {name: (1 - t) ** 2 * a[name] + 2 * t * (1 - t) * c[name] + t**2 * b[name] for name in a}


def train_control(
    loss: Callable[[Parameters, int], Tensor],
    a: Parameters,
    b: Parameters,
    *,
    num_steps: int,
    lr: float,
    generator: Generator,
) -> Parameters:
    """The control point that SGD with momentum 0.9 finds from the middle, with one uniform t in each step.

    Args:
        loss: loss of some parameters in step 0, 1, ...; it may depend on the step, for example by a minibatch.
        a, b: the ends, which stay.
        num_steps: at least 1.
        lr: learning rate of the first half of the steps; in the second half it falls linearly to zero.
        generator: generates t.

    Raises:
        ValueError: the training diverged.
    """
    c = {name: middle.requires_grad_() for name, middle in segment(a, b, 0.5).items()}
    optimizer = torch.optim.SGD(c.values(), lr=lr, momentum=MOMENTUM)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / num_steps))
        t = float(torch.rand((), generator=generator, dtype=torch.float64))
        optimizer.zero_grad()
        loss(bezier(a, c, b, t), step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not all(bool(value.isfinite().all()) for value in c.values()):
        raise ValueError(f"the training of the curve diverged with a learning rate of {lr:g}; lower it")
    return {name: value.detach() for name, value in c.items()}


def barrier(ts: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """How far the loss rises above its larger end value between t = 0 and t = 1, both in ``ts``, and at which t.

    Example:
        >>> barrier([-0.5, 0.0, 0.5, 1.0], [9.0, 1.0, 4.0, 2.0])
        (2.0, 0.5)
    """
    inside = {t: loss for t, loss in zip(ts, losses, strict=True) if 0 <= t <= 1}
    top = max(inside, key=lambda t: inside[t])
    return inside[top] - max(inside[0.0], inside[1.0]), top
