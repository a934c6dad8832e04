"""Ideas beyond the papers, each a method of its own, run by the zoo's trainer with recipes of their own.

    python bench/beyond.py train bench/beyond/fade-magnitude.toml --start FILE --data-dir DIR --out FOLDER

is `pomona train` with these methods beside the library's. What came of them stands in bench/LOG.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pomona import METHODS, Method, Weight, magnitude
from pomona.budget import check_budget, num_kept, top_k
from pomona.ops import drop_buffers_, drop_weights_, masks_of, sparsity_of
from pomona.schedule import Value, check_value, highest, value_at
from pomona.score import saliency


@dataclass(frozen=True, slots=True)
class Fade(Method):
    r"""GSM with a decay that comes to its end on time, whatever the optimizer and its schedule.

    With `s = |w g|` (or `|w|`), averaged over steps, B the floor((1 - sparsity) N) largest s of the whole network, and
    R steps left, this one included,

        g <- B g;   the optimizer's step;   w <- w (R - 1) / R  outside of B

    so that a weight that stays passive goes straight to zero, wherever it began, and is exactly zero after step
    `steps`. From then on the zeros are held.

    Args:
        sparsity: a number, or a schedule.
        steps: the step at which passive weights are zero.
        score: "saliency" or "magnitude".
        average: share of the old score in the new one, in [0, 1); 0: each step's own.
    """

    sparsity: Value
    _: KW_ONLY
    steps: int
    score: str = "saliency"
    average: float = 0.0
    min_density: float = 1e-4

    def __post_init__(self) -> None:
        check_value("sparsity", self.sparsity, low=0.0, high=1.0)
        check_value("average", self.average, low=0.0, high=1.0)

    def check_weights(self, weights: Sequence[Weight]) -> None:
        check_budget(
            weights,
            num_kept(highest(self.sparsity), sum(w.numel for w in weights)),
            "global",
            min_density=self.min_density,
        )

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"mask": torch.ones_like(w.value, dtype=torch.bool), "s": torch.zeros_like(w.value, dtype=torch.float32)}

    def before_step(self, weights: Sequence[Weight], step: int) -> None:
        if step <= self.steps:
            for w in weights:
                now = magnitude(w.value) if self.score == "magnitude" else saliency(w.value, w.grad)
                w.state["s"].mul_(self.average).add_(now.tensor(), alpha=1.0 - self.average)
            scores = [magnitude(w.state["s"]) for w in weights]
            for w, mask in zip(weights, self._top(weights, scores, step), strict=True):
                w.state["mask"].copy_(mask)
        for w in weights:
            w.grad.masked_fill_(~w.state["mask"], 0.0)
        if step == self.steps + 1:
            drop_buffers_(weights, masks_of(weights))

    def after_step(self, weights: Sequence[Weight], step: int) -> None:
        left = self.steps - step + 1
        if left <= 1:
            drop_weights_(weights, masks_of(weights))
            return
        for w in weights:
            w.value.mul_(torch.where(w.state["mask"], 1.0, (left - 1) / left))

    def _top(self, weights: Sequence[Weight], scores: Sequence[object], step: int) -> list[Tensor]:
        k = num_kept(value_at(self.sparsity, step), sum(w.numel for w in weights))
        return top_k(scores, k, of=weights, min_density=self.min_density)  # type: ignore[arg-type]

    def support(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        if step >= self.steps:
            return masks_of(weights)
        return self._top(weights, [magnitude(w.value) for w in weights], step)

    def budget(self, total: int, step: int) -> int:
        return num_kept(value_at(self.sparsity, step), total)

    def metrics(self, weights: Sequence[Weight]) -> dict[str, float]:
        return {"sparsity": sparsity_of(weights)}


METHODS["fade"] = Fade

if __name__ == "__main__":
    from pomona.cli import main

    sys.exit(main())
