"""Exact selection: the ``k`` largest of all scores together, without ever holding all of them.

Float32 numbers >= 0 order like their bits, read as int32: these are the *keys*. On a CPU a random sample of the scores
brackets the k-th largest key; one pass over all scores counts those above the bracket and gathers those inside; the
answer is an order statistic of the few that were gathered. If the sample was misleading, histograms find the key. Where
the compiled core (:mod:`pomona.native.core`) was built, it does the same faster. On other devices histograms are used
from the start: their number of passes is fixed, so that the host never waits. The result depends on the scores alone,
never on the sample.

Scratch memory on a CPU: a few MiB, or up to a sixteenth of the scores if there are many; on other devices: a few times
the largest tensor.

The keys and passes over them are in ``keys``, selection on one machine in ``cpu`` and ``device``, selection over ranks
in ``ranks``, and what all selections have in common in ``kinds``. Selection of groups is in ``groups``, the shares of
layers are in ``allocation``, scores that compare between layers in ``within``, and ``top_k`` puts all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pomona.score import Score
from pomona.selection.cpu import CPUSelection as CPUSelection
from pomona.selection.cpu import find_threshold, resolve
from pomona.selection.device import DeviceSelection, select_on_device
from pomona.selection.keys import NonFiniteError as NonFiniteError
from pomona.selection.keys import as_float
from pomona.selection.kinds import Everything as Everything
from pomona.selection.kinds import JoinedSelection as JoinedSelection
from pomona.selection.kinds import MaskSelection as MaskSelection
from pomona.selection.kinds import Selection as Selection
from pomona.selection.kinds import StackedSelection as StackedSelection
from pomona.selection.ranks import find_shards as find_shards
from pomona.selection.ranks import find_threshold_over_ranks
from pomona.selection.ranks import select_over_ranks as select_over_ranks

if TYPE_CHECKING:
    from pomona.weight import Weight


def select_largest(scores: Sequence[Score], k: int) -> CPUSelection | DeviceSelection:
    """Select the ``k`` largest scores, but never a zero.

    Ties are broken by position: the earlier tensor, then the smaller flat index, is kept.

    Args:
        scores: on one device.
        k: how many to keep in all, 0 <= k <= number of scores.

    Raises:
        NonFiniteError: a score is NaN. On other devices than a CPU NaNs are kept instead, because looking for them
            would make the host wait.
    """
    if not all(score.w.is_cpu for score in scores):
        return select_on_device(scores, k)
    return resolve(scores, find_threshold(scores, k), k)


def kth_largest(scores: Sequence[Score], k: int, *, of: Sequence[Weight] | None = None) -> float:
    """Return the ``k``-th largest score, k >= 1, or 0 if fewer scores are not zero. The host waits for it.

    Args:
        scores: on one device.
        k: which one, counted from 1.
        of: the weights that the scores belong to; required if weights are sharded over ranks.
    """
    shards = find_shards(scores, of)
    if shards is not None:
        over = find_threshold_over_ranks(scores, shards, k)
        return as_float(over.key) if sum(over.greater) + sum(over.equal) >= k else 0.0
    if k > sum(score.numel() for score in scores):
        return 0.0
    if any(score.device.type != "cpu" for score in scores):
        selection = select_on_device(scores, k)
        found, is_short = selection.key.view(torch.float32), selection.quota == torch.iinfo(torch.int64).max
        return 0.0 if bool(is_short) else float(found)
    threshold = find_threshold(scores, k)
    if sum(threshold.greater) + sum(threshold.equal) < k:
        return 0.0
    return as_float(threshold.key)
