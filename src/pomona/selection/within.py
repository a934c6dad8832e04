"""Scores that compare between layers, from those that compare within one: each layer's changed by a rule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pomona.distributed import Shard
from pomona.score import Score, Within
from pomona.selection.ranks import find_shards

if TYPE_CHECKING:
    from pomona.weight import Weight


def change_within(
    scores: Sequence[Score | Tensor], rule: Within | None, of: Sequence[Weight] | None
) -> list[Score | Tensor]:
    """Apply ``rule`` to the scores of each layer; None leaves all as they are.

    Where a layer is sharded, each rank gets the whole of it, one layer at a time, and takes its block of the result.

    Args:
        scores: as of ``select``.
        rule: from the whole scores of one layer, float32 and >= 0, to new ones of their shape, such as
            :func:`pomona.score.lamp`.
        of: the weights that the scores are of; required if weights are sharded over ranks.
    """
    if rule is None:
        return list(scores)
    asked = [score if isinstance(score, Score) else Score(score) for score in scores]
    shards: Sequence[Shard | None] = find_shards(asked, of) or [None] * len(asked)
    return [_changed(score.tensor(), rule, shard) for score, shard in zip(asked, shards, strict=True)]


def _changed(score: Tensor, rule: Within, shard: Shard | None) -> Tensor:
    if shard is None:
        return rule(score)
    return shard.block(rule(shard.whole(score)), score.shape).contiguous()
