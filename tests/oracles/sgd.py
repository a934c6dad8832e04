"""SGD in PyTorch's convention, which most of the papers' methods leave to the optimizer."""

from collections.abc import Sequence

from tests.oracles.masks import Array


def sgd_step(
    weights: list[Array],
    grads: Sequence[Array],
    buffers: list[Array | None],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One step, in place; `grads` are not changed, the entries of `buffers` (None before the first step) replaced.

    d = g + eta w
    z <- beta z + d     (z = d at the first step)
    w <- w - alpha z    (nesterov: w - alpha (d + beta z))
    """
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        d = g + weight_decay * w
        old = buffers[i]
        z = d.copy() if old is None else momentum * old + d
        buffers[i] = z
        w -= lr * (d + momentum * z if nesterov else z)
