"""RigL: Rigging the Lottery (Evci et al., ICML 2020, arXiv 1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from pomona.budget import check_budget, num_kept, tell_share, top_k
from pomona.granularity import Granularity, NOfM, canonical, check_granularity, parse
from pomona.method import Method, Weight
from pomona.ops import (
    among,
    count,
    drop_buffers_,
    drop_gradients_,
    drop_weights_,
    masks_of,
    random_scores,
    sparsity_of,
)
from pomona.schedule import Every, Schedule, check_count, check_value
from pomona.score import Score, magnitude
from pomona.selection.groups import num_in_groups, top_n_of_m

Distribution: TypeAlias = Literal["uniform", "erk"]  # WHERE the budget goes, layer by layer


@dataclass(frozen=True, slots=True)
class RigL(Method):
    r"""A sparse network from the first step on, whose weakest weights now and then make room for promising ones.

    At step 1 each layer gets a random mask with its share of the budget. At the steps :math:`t = \Delta T, 2 \Delta T,
    \dots \le T_{\mathrm{end}}`, in each layer with :math:`n` active weights,

    .. math::
        f_t &= \tfrac{\alpha}{2} (1 + \cos(\pi t / T_{\mathrm{end}})) \\
        \text{drop} &: \text{the } \lfloor f_t n \rfloor \text{ active weights with the smallest } |w| \\
        \text{grow} &: \text{as many weights, not among the remaining, with the largest } |\partial L / \partial w|

    and grown weights start at zero. Gradients outside the mask are dropped otherwise, so the number of active weights
    is the same in each layer at every step.

    Needs of the optimizer: none. Memory: one byte a weight. Exact zeros: after every step. The gradients are dense, as
    in every training with PyTorch: this saves neither time nor memory while training.

    Differences from the paper: the optimizer makes a step at the update iterations too, with the new mask, where
    Algorithm 1 makes none; the gradients of step 1 are those of the dense network, because the masks are drawn once
    they are known; a weight that is dropped and grown at once keeps its value, as in the authors' code, where
    Algorithm 1 sets all grown weights to zero; what the optimizer remembers of a new weight is cleared, as in the
    authors' code; ``"uniform"`` does not keep the first layer dense (leave it out of the scope for that). The authors'
    code adds a little noise to :math:`|w|`; here ties are broken by position. A layer without a gradient at an update
    is left as it is.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, at every step. Paper: 0.8, 0.9, 0.95, 0.965.
        every: steps :math:`\Delta T` from one update to the next, >= 1. Paper: 100.
        end: last step :math:`T_{\mathrm{end}}` at which there may be an update, >= ``every``; None: there is no last
            one, and the fraction stays ``drop``. Paper: 25,000 of 32,000 steps.
        drop: fraction :math:`\alpha` of each layer's active weights that the first update replaces, in [0, 1); 0 keeps
            the first masks. Paper: 0.3.
        allocation: ``"erk"``: small layers denser, by the Erdos-Renyi kernel rule, :func:`pomona.budget.erk`;
            ``"uniform"``: the same sparsity in each layer. Paper: both.
        seed: of the random masks, >= 0.
        granularity: what is dropped and grown together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity`` must
            then be ``1 - n/m`` and the allocation ``"uniform"``; each group grows as many as it dropped), a block such
            as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input channel"``; see :mod:`pomona.granularity`. Paper:
            single weights.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> pruner = pomona.Pruner(model, optimizer, RigL(sparsity=0.9, end=750))

    References:
        Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery: Making All Tickets Winners. ICML 2020,
        arXiv 1911.11134.
    """

    sparsity: float
    _: KW_ONLY
    every: int = 100
    end: int | None = None
    drop: float = 0.3
    allocation: Distribution = "erk"
    seed: int = 0
    granularity: Granularity = "weight"

    def __post_init__(self) -> None:
        check_settings(self.sparsity, self.every, self.end, self.drop, self.allocation, self.seed)
        object.__setattr__(self, "granularity", canonical(self.granularity))
        check_granularity(self.granularity, self.sparsity, self.allocation)

    def check_weights(self, weights: Sequence[Weight]) -> None:
        check_layers(weights, self.sparsity, self.allocation, self.granularity)

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"mask": torch.ones_like(w.value, dtype=torch.bool)}

    def before_step(self, weights: Sequence[Weight], step: int) -> None:
        if step == 1:
            draw_masks_(weights, self)
        elif Every(self.every, start=self.every, end=self.end)(step):
            for w in weights:
                if w.moves:
                    drop_and_grow_(w, self._fraction(step), w.grad.abs(), self.granularity)
        drop_gradients_(weights, masks_of(weights))

    def _fraction(self, step: int) -> float:
        if self.end is None:
            return self.drop
        return self.drop / 2 * (1 + math.cos(math.pi * step / self.end))

    def after_step(self, weights: Sequence[Weight], step: int) -> None:
        drop_weights_(weights, masks_of(weights))

    def support(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        if step == 0:
            return magnitude_masks(weights, self)
        return masks_of(weights)

    def budget(self, total: int, step: int) -> int:
        return num_kept(self.sparsity, total)

    def unfinished(self, weights: Sequence[Weight], step: int) -> str:
        return tell_unchanged(self.every, self.drop, step)

    def why(self, total: int, kept: int, density: float) -> str:
        return tell_share(total, kept, density, self.allocation, self.granularity)

    def metrics(self, weights: Sequence[Weight]) -> dict[str, float]:
        return {"sparsity": sparsity_of(weights)}


class _Settings(Protocol):
    """What decides how many weights each layer keeps, and in which groups."""

    @property
    def sparsity(self) -> float: ...
    @property
    def allocation(self) -> Distribution: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def seed(self) -> int: ...


def drop_and_grow_(w: Weight, fraction: float, growth: Tensor, granularity: Granularity = "weight") -> None:
    """Replace ``fraction`` of the active weights: the smallest go, and the largest in ``growth`` come at zero."""
    kind = parse(granularity)
    active = w.state["mask"]
    (num_active,) = count([active], of=[w])
    size = kind.size(w.shape)
    num = math.floor(round(fraction * (num_active // size), 6)) * size
    if isinstance(kind, NOfM):
        (remaining,) = top_k([among(magnitude(w.value).tensor(), active)], num_active - num, of=[w])
        grown = top_n_of_m(among(growth.float(), ~remaining), kind, kind.n - num_in_groups(remaining, kind))
    else:
        scores = [among(magnitude(w.value).tensor(), active)]
        (remaining,) = top_k(scores, num_active - num, of=[w], granularity=granularity)
        (grown,) = top_k([among(growth, ~remaining)], num, of=[w], granularity=granularity)
    set_mask_(w, remaining | grown)


def draw_masks_(weights: Sequence[Weight], method: _Settings) -> None:
    """Random masks, of exactly as many weights in each layer as the allocation gives it."""
    scores = list(random_scores(weights, method.seed, step=1))
    for w, mask in zip(weights, _top_k(weights, scores, method), strict=True):
        set_mask_(w, mask)


def magnitude_masks(weights: Sequence[Weight], method: _Settings) -> list[Tensor]:
    """What a cut would keep before the first step, when no masks are drawn yet."""
    return _top_k(weights, [magnitude(w.value) for w in weights], method)


def _top_k(weights: Sequence[Weight], scores: Sequence[Score | Tensor], method: _Settings) -> list[Tensor]:
    k = budget_of(weights, method.sparsity)
    return top_k(scores, k, method.allocation, of=weights, granularity=method.granularity)


def set_mask_(w: Weight, mask: Tensor) -> None:
    """Only what was active and stays active keeps its value and its momentum."""
    staying = w.state["mask"] & mask
    drop_weights_([w], [staying])
    drop_buffers_([w], [staying])
    w.state["mask"].copy_(mask)


def tell_unchanged(every: int, drop: float, step: int) -> str:
    """That no mask has been updated yet, if that is so and was not asked for."""
    if step >= every or drop == 0.0:
        return ""
    return f"the masks are still the random ones of step 1; their first update is at step every={every:,}"


def budget_of(weights: Sequence[Weight], sparsity: float) -> int:
    return num_kept(sparsity, sum(w.numel for w in weights))


def check_layers(
    weights: Sequence[Weight], sparsity: float, allocation: Distribution, granularity: Granularity
) -> None:
    k = budget_of(weights, sparsity)
    if k < sum(parse(granularity).size(w.shape) for w in weights):
        what = "" if granularity == "weight" else f", one {granularity} each"
        raise ValueError(
            f"sparsity={sparsity:g} leaves {k} weights for {len(weights)} layers{what}; lower the sparsity"
        )
    check_budget(weights, k, allocation, granularity=granularity)


def check_settings(
    sparsity: float, every: int, end: int | None, drop: float, allocation: Distribution, seed: int
) -> None:
    for name, number in (("sparsity", sparsity), ("drop", drop)):
        if isinstance(number, Schedule):
            raise TypeError(f"{name} must be a number, the same at every step, got {number!r}")
        check_value(name, number, low=0.0, high=1.0)
    check_count("every", every)
    if end is not None:
        check_count("end", end)
        if end < every:
            raise ValueError(f"end must be >= every ({every}), the first update, got {end}; drop=0 makes no updates")
    if allocation not in get_args(Distribution):
        raise ValueError(
            f"allocation must be one of {', '.join(get_args(Distribution))}, got {allocation!r}: random masks need a "
            f"count for each layer"
        )
    check_count("seed", seed, low=0)
