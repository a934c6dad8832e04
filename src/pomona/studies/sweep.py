"""How sparse can I go? The highest compression within an allowed loss of accuracy, by bisection."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pomona.studies.compare import Job, falls_short


@dataclass(frozen=True)
class Sweep:
    """What ``pomona sweep`` found.

    Attributes:
        tried: compression -> mean accuracy lost against the dense networks, in percentage points.
        best: the highest compression within the allowed loss; None if even the lowest loses too much.
        limit: the lowest compression that lost too much; None if even the highest did not.
    """

    tried: dict[float, float]
    best: float | None
    limit: float | None


def sweep(lost: Callable[[float], float], *, allowed: float, low: float, high: float, resolution: float = 1.1) -> Sweep:
    """Bisect the logarithm of the compression for the highest one that loses no more than ``allowed``.

    Args:
        lost: compression -> accuracy lost; assumed to rise with the compression (seeds blur this near the answer).
        allowed: the allowed loss in percentage points.
        low: the lowest compression.
        high: the highest compression; 1 <= low < high.
        resolution: stop when the lowest bad compression is at most this times the highest good one; >= 1.02, because
            compressions are rounded to three digits.

    Example:
        >>> found = sweep(lambda c: c / 100, allowed=0.5, low=1, high=1000)
        >>> found.best <= 50 < found.limit
        True
    """
    if not 1 <= low < high < math.inf:
        raise ValueError(f"low and high must be 1 <= low < high, got low {low:g} and high {high:g}")
    if not resolution >= 1.02:
        raise ValueError(f"resolution must be >= 1.02, got {resolution:g}")
    tried: dict[float, float] = {}

    def is_good(compression: float) -> bool:
        tried[compression] = lost(compression)
        return tried[compression] <= allowed

    if not is_good(low):
        return Sweep(tried, None, low)
    if is_good(high):
        return Sweep(tried, high, None)
    while high / low > resolution:
        middle = float(f"{(low * high) ** 0.5:.3g}")
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return Sweep(tried, low, high)


def lost_by(jobs: Sequence[Job], compression: float) -> float:
    """The mean accuracy that these finished runs lost, each against the dense network it started from.

    Raises:
        ValueError: a run did not reach the requested compression.
    """
    lost = []
    for job in jobs:
        result = json.loads((job.folder / "result.json").read_text())
        reached, accuracy = result["report"]["compression"], result["accuracy"]
        if falls_short(reached, compression):
            raise ValueError(
                f"{job.folder.name} reached only {reached:.3g}x; let the method reach its sparsity earlier"
            )
        lost.append(accuracy["base"] - accuracy["final"])
    return float(statistics.mean(lost))
