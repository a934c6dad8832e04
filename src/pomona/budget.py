"""HOW MUCH stays, and WHERE."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from pomona.granularity import Channel, Granularity, Kind, NOfM, canonical, check_granularity, parse
from pomona.pages.text import few
from pomona.schedule import Value, check_value, highest, value_at
from pomona.score import Score, Scoring, Within, check_scoring, rule_of
from pomona.selection import Everything, MaskSelection, Selection, StackedSelection
from pomona.selection.allocation import Allocation, allocate, check_allocation
from pomona.selection.groups import check_fits, group_size
from pomona.selection.top_k import check_floors, check_min_density, floor_of, select, top_k
from pomona.selection.within import change_within
from pomona.weight import Weight, Weights

_SHOWN = 5  # layers that a message names


@dataclass(frozen=True, slots=True)
class Budget:
    r"""How many weights stay in all, how the layers share them, and what stays together.

    Of :math:`N` weights :math:`\lfloor (1 - \text{sparsity}) N \rfloor` stay. A method has these five as fields of
    its own and gets its budget from them, see :class:`pomona.Method`.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, or a schedule of it; None: nothing is promised,
            and all may stay.
        allocation: ``"global"``: one ranking of all layers together; ``"uniform"``: the same share of every layer;
            ``"erk"``: shares by :func:`pomona.selection.allocation.erk`.
        min_density: with ``"global"``, the least share that stays of each layer, in [0, 1]: of a layer of n weights
            (or groups) at least ``ceil(min_density n)``.
        granularity: what goes together, see :mod:`pomona.granularity`; stored in its canonical spelling.
        score: what the weights are ranked by. ``"magnitude"``: by :math:`|w|`. ``"lamp"``, with ``"global"`` only: by
            :math:`|w|` in relation to the rest of its layer, :func:`pomona.score.lamp`; blocks and channels by the
            score of each in relation to the others. Or a function that is called with each :class:`pomona.Weight` and
            returns scores >= 0 of the shape of its ``value`` (over ranks: of this rank's block). What else it reads is
            its own affair; ``grad`` is empty at ``harden()``. A saved state knows it by its qualified name.

    Example:
        >>> budget = Budget(0.9, min_density=0.01)
        >>> budget.num_kept(1000, step=1)
        100
    """

    sparsity: Value | None = None
    allocation: Allocation = "global"
    min_density: float = 0.0
    granularity: Granularity = "weight"
    score: Scoring = "magnitude"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_value("sparsity", self.sparsity, low=0.0, high=1.0)
        check_allocation(self.allocation)
        check_min_density(self.min_density)
        object.__setattr__(self, "granularity", canonical(self.granularity))
        check_granularity(self.granularity, self.sparsity, self.allocation)
        check_scoring(self.score)
        if rule_of(self.score) is not None and self.allocation != "global":
            raise ValueError(
                f"score={self.score!r} makes layers comparable in one ranking, and allocation={self.allocation!r} "
                f"gives each its share without one; take allocation='global', or leave the score out"
            )

    def num_kept(self, total: int, step: int) -> int:
        """How many of ``total`` weights stay at ``step``."""
        return total if self.sparsity is None else num_kept(value_at(self.sparsity, step), total)

    def check_weights(self, weights: Sequence[Weight]) -> None:
        """ValueError unless the weights fall into groups, and the budget is enough for every layer's floor.

        It looks at the least that the schedule ever keeps. All ranks must call it where weights are sharded.
        """
        check_fits(weights, self.granularity)
        if self.sparsity is None:
            return
        k = num_kept(highest(self.sparsity), _total(weights))
        matrices = [matrix for w in weights for matrix in w.matrices()]
        kind = parse(self.granularity)
        if isinstance(kind, Channel):
            self._check_channels(matrices, k, kind)
        elif self.allocation == "global":
            size = group_size(kind, matrices[0])  # the same for all
            check_floors([w.numel // size for w in matrices], k // size, self.min_density)

    def _check_channels(self, matrices: Sequence[Weight], k: int, kind: Channel) -> None:
        if self.allocation == "global":
            floors = [floor_of(_num_groups(w, kind), self.min_density) for w in matrices]
            needed = sum(floor * group_size(kind, w) for floor, w in zip(floors, matrices, strict=True))
            if needed > k:
                raise ValueError(
                    f"min_density={self.min_density:g} alone keeps {sum(floors)} {kind}s of {needed} weights, more "
                    f"than the budget of {k}; lower min_density or the sparsity"
                )
            return
        for w, share in zip(matrices, allocate(self.allocation, [w.matrix_shape for w in matrices], k), strict=True):
            if share < group_size(kind, w):
                raise ValueError(
                    f"allocation={self.allocation!r} leaves {w.name} {tuple(w.shape)} {share} weights, and a {kind} of "
                    f"it has {group_size(kind, w)}; lower the sparsity, take allocation='global', or leave the layer "
                    f"dense: Scope(exclude=[{w.name.partition('[')[0]!r}])"
                )

    def counts(self, weights: Sequence[Weight], step: int) -> list[int] | None:
        """How many weights each tensor keeps; None if all layers are ranked together."""
        if self.allocation == "global":
            return None
        matrices = [w.matrices() for w in weights]
        shapes = [one.matrix_shape for some in matrices for one in some]
        counts = iter(allocate(self.allocation, shapes, self.num_kept(_total(weights), step)))
        return [sum(islice(counts, len(some))) for some in matrices]

    def scores(self, weights: Sequence[Weight], *, inside: Sequence[Tensor] | None = None) -> list[Score]:
        """What each layer is ranked by within itself: ``|w|``, or what a function of the user's returns.

        Args:
            weights: to be ranked.
            inside: boolean masks, of weights that are zero outside of them: what is outside is never kept, and what is
                inside may be kept even if it is zero. None: everywhere.

        Raises:
            TypeError, ValueError: what the function returned are no scores of these weights.
        """
        if not isinstance(self.score, str):
            found = [_called(self.score, w) for w in weights]
            masks: Sequence[Tensor | None] = [None] * len(found) if inside is None else inside
            return [Score(t, inside=mask) for t, mask in zip(found, masks, strict=True)]
        if inside is None:
            return [Score(w.value) for w in weights]
        scores = []
        for w, mask in zip(weights, inside, strict=True):
            has_zero_inside = bool(w.value.count_nonzero() != mask.count_nonzero())
            scores.append(Score(w.value, inside=mask if has_zero_inside else None))  # otherwise it would cost a pass
        return scores

    def survivors(self, weights: Sequence[Weight], step: int, *, inside: Sequence[Tensor] | None = None) -> Selection:
        """Keep the weights that ``score`` ranks highest: exactly ``num_kept``, fewer where scores are zero.

        Ties are broken by position. Where the budget is all weights, all stay. ``"lamp"`` takes a float32 copy of
        ``|w|``, and for one layer at a time a sort and 40 bytes per weight. All ranks must call it where weights are
        sharded.

        Args:
            weights: to be ranked, and all that the budget is of.
            step: at which the schedule is read.
            inside: as of ``scores``.

        Raises:
            TypeError, ValueError: as ``scores`` and ``keep``.
        """
        return self._select(self.scores(weights, inside=inside), step, weights, rule_of(self.score))

    def keep(self, scores: Sequence[Score | Tensor], step: int, *, of: Sequence[Weight]) -> Selection:
        """Keep the weights with the largest of these scores: exactly ``num_kept``, fewer where scores are zero.

        Ties are broken by position. Where the budget is all weights, all stay, even those with a score of zero. All
        ranks must call it where weights are sharded. ``score`` plays no part here.

        Args:
            scores: one for each weight, of its shape; a tensor ``t`` stands for the scores ``|t|``.
            step: at which the schedule is read.
            of: the weights, in the same order.

        Raises:
            ValueError: a score is NaN. (On a GPU it ranks above all others instead, without a check.)
        """
        return self._select(scores, step, of, None)

    def _select(
        self, scores: Sequence[Score | Tensor], step: int, of: Sequence[Weight], rule: Within | None
    ) -> Selection:
        total = _total(of)
        k = self.num_kept(total, step)
        if k == total:
            return Everything([w.value for w in of], [w.numel for w in of])
        if _are_stacked(of):
            return self._keep_matrices(scores, k, of, rule)
        return self._keep(scores, k, of, rule)

    def _keep(self, scores: Sequence[Score | Tensor], k: int, of: Sequence[Weight], rule: Within | None) -> Selection:
        if self.allocation == "global" and self.granularity == "weight":
            return select(change_within(scores, rule, of), k, of=of, min_density=self.min_density)
        how: Any = {"min_density": self.min_density, "granularity": self.granularity, "within": rule}
        return MaskSelection(top_k(scores, k, self.allocation, of=of, **how), [w.shard for w in of])

    def _keep_matrices(
        self, scores: Sequence[Score | Tensor], k: int, of: Sequence[Weight], rule: Within | None
    ) -> Selection:
        """Each matrix is a layer."""
        matrices = [w.matrices() for w in of]
        rows = [[one.num_rows for one in some] for some in matrices]
        asked = [score if isinstance(score, Score) else Score(score) for score in scores]
        parts = [part for score, sizes in zip(asked, rows, strict=True) for part in score.split(sizes)]
        return StackedSelection(self._keep(parts, k, [one for some in matrices for one in some], rule), rows)

    def floor(self, w: Weight) -> int:
        """How many weights of a layer stay at least."""
        if self.allocation != "global":
            return 0
        kind = parse(self.granularity)
        return sum(floor_of(_num_groups(m, kind), self.min_density) * group_size(kind, m) for m in w.matrices())

    @property
    def _by(self) -> str:
        """What the choice goes by, as the user wrote it."""
        if self.score == "magnitude":
            return f"allocation={self.allocation!r}"
        return f"score={self.score if isinstance(self.score, str) else _name_of(self.score)!r}"

    def starved(self, weights: Sequence[Weight], kept: Sequence[int], *, options: Collection[str]) -> str:
        """One sentence about the layers that a cut leaves next to nothing of, and the ways out; "" if there are none.

        These are the emptied ones, and those at the floor of ``min_density`` if this is below a tenth of the share that
        the network keeps (in the end, where the schedule is still on its way). Vectors are no layers here, and a
        network without a single weight is not what it is about.

        Args:
            weights: the layers.
            kept: how many weights of each stay.
            options: the names of the settings of a budget that the user may choose.
        """
        share = sum(kept) / max(1, _total(weights))
        if self.sparsity is not None:
            share = min(share, 1.0 - highest(self.sparsity))
        found = [(w, num) for w, num in zip(weights, kept, strict=True) if self._is_starved(w, num, share)]
        if not found or not share:
            return ""
        are_empty = all(num == 0 for _, num in found)
        how = "none" if are_empty else f"no more than the floor min_density={self.min_density:g}"
        shown = few([f"{w.name} {num:,} of {w.numel:,}" for w, num in found], _SHOWN)
        keep, their = ("keeps", "its") if len(found) == 1 else ("keep", "their")
        names = list(dict.fromkeys(w.name.partition("[")[0] for w, _ in found))  # of tensors
        ways = self._ways_out(names, options)
        return f"{len(found)} of {len(weights)} layers {keep} {how} of {their} weights: {shown}; {ways}"

    def _is_starved(self, w: Weight, kept: int, share: float) -> bool:
        if len(w.shape) < 2 or w.numel == 0:
            return False  # a bias without a weight cuts no network in two
        return kept == 0 or (kept / w.numel < share / 10 and kept <= self.floor(w))

    def _ways_out(self, names: Sequence[str], options: Collection[str]) -> str:
        is_n_of_m = isinstance(parse(self.granularity), NOfM)  # whose shares are equal
        is_fair = self.allocation != "global" or self.score != "magnitude"
        ways = {
            "score": "" if is_fair else "score='lamp'",
            "allocation": "" if is_fair else "allocation='uniform'" if is_n_of_m else "allocation='erk'",
            "min_density": "a higher min_density" if self.allocation == "global" else "",
            "sparsity": "a lower sparsity" if self.sparsity is not None else "",
        }
        chosen = ", ".join(way for name, way in ways.items() if way and name in options)
        reason = "" if is_fair else "one ranking on magnitudes is unfair to layers of small weights; "
        dense = f"leave {'it' if len(names) == 1 else 'them'} dense: Scope(exclude={list(names[:_SHOWN])})"
        return f"{reason}{f'take {chosen}, or ' if chosen else ''}{dense}"

    def why(self, w: Weight, kept: int, density: float, *, by: str = "") -> str:
        """One clause: why a layer keeps ``kept`` of its weights.

        Args:
            w: the layer.
            kept: how many stay.
            density: the share that the network keeps.
            by: what the choice went by; default: the allocation.
        """
        if self.sparsity is None and not by:
            return ""
        kind, by = parse(self.granularity), by or self._by
        if isinstance(kind, NOfM) and kept * kind.m == w.numel * kind.n:
            return f"{kind}, as every layer"
        if kept == 0:
            return f"emptied by {by}"
        if kept == self.floor(w):
            return f"held at the floor min_density={self.min_density:g}"
        return f"{kept / w.numel / density:.2g}x the network's share, by {by}"


def num_kept(sparsity: float, total: int) -> int:
    """``floor((1 - sparsity) total)``, GSM's Q; 0.9 of 1,000 keeps 100 although 1 - 0.9 < 0.1 in floating point."""
    check_value("sparsity", sparsity, low=0.0, high=1.0)
    return math.floor(round((1.0 - sparsity) * total, 6))


def _called(score: Callable[[Weight], Tensor], w: Weight) -> Tensor:
    """What a user's function returns for a weight; TypeError or ValueError if these are no scores."""
    name = _name_of(score)
    found: object = score(w)
    if not isinstance(found, Tensor):
        raise TypeError(f"score={name} must return a tensor of scores for {w.name}, got {found!r}")
    if found.shape != w.value.shape or found.device != w.value.device:
        raise ValueError(
            f"score={name} must return scores of the shape of w.value, {tuple(w.value.shape)} for {w.name}, and on its "
            f"device {w.value.device}, got {tuple(found.shape)} on {found.device}"
        )
    found = found.detach()
    if not bool((found >= 0).all()):
        raise ValueError(
            f"score={name} must return scores >= 0, got {float(found.min()):g} for {w.name}; the largest survive"
        )
    return found


def _name_of(score: Callable[..., Any]) -> str:
    return str(getattr(score, "__qualname__", type(score).__qualname__))


def _total(weights: Sequence[Weight]) -> int:
    return weights.numel if isinstance(weights, Weights) else sum(w.numel for w in weights)


def _are_stacked(weights: Sequence[Weight]) -> bool:
    """Whether several matrices lie in one of the tensors."""
    if isinstance(weights, Weights):
        return weights.are_stacked
    return any(w.num_matrices > 1 for w in weights)


def _num_groups(w: Weight, kind: Kind) -> int:
    """How many groups a matrix has."""
    return w.numel // max(1, group_size(kind, w))
