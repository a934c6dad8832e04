"""In which rounds to prune: the search of progressive ADMM (arXiv 1810.07378). It knows nothing of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar


class Node(Protocol):
    """A trained model, dense or pruned, or a handle to one, such as the path of its checkpoint."""

    @property
    def accuracy(self) -> float:
        """Larger is better, in any unit. NaN, of a run that diverged, is worse than all else."""

    @property
    def compression(self) -> float:
        """Total over non-zero weights, counted from the dense model."""


N = TypeVar("N", bound=Node)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[N]):
    """One pruning that was tried.

    Attributes:
        round: 1, 2, ...; one target of compression a round.
        target: the compression that was asked for.
        parent: the kept candidate that it was started from; None: the dense model.
        node: what ``prune`` returned.
        kept: whether it is the most accurate of its round and so was held as a partial model.
    """

    round: int
    target: float
    parent: Candidate[N] | None
    node: N
    kept: bool

    @property
    def path(self) -> tuple[float, ...]:
        """The targets by which it came from the dense model, its own the last."""
        return (*(self.parent.path if self.parent else ()), self.target)


def progressive(
    dense: N, compressions: Sequence[float], prune: Callable[[N, float], N], *, width: int = 3
) -> list[Candidate[N]]:
    """Prune in rounds, each from whichever of the last ``width`` partial models leads to the best accuracy.

    The first ``width`` compressions are reached directly from the dense model. From then on each next one is tried
    from all partial models that are held; the most accurate result is kept and replaces the one that it was started
    from. The paper holds three; a width of 1 is the plain chain, each round from the one before. A rate counts from
    the dense model, never from the parent. Of n compressions ``n`` prunings are
    tried up to the width, and ``width`` for each one beyond it.

    Deterministic: parents are tried from the least to the most compressed, and of equal accuracies the first is kept.
    A search that was interrupted therefore resumes by itself if ``prune`` looks up what it has finished already,
    e.g. by ``(parent.compression, compression)``. The result holds all nodes, so let them be light, such as paths.

    Args:
        dense: where it starts; it may itself be pruned already, to less than the first compression.
        compressions: targets, total over non-zero weights; > 1, each larger than the one before.
        prune: from a parent and a compression makes a new node, e.g. by masked ADMM, the cut and masked retraining;
            it leaves the parent as it is.
        width: how many partial models are held, >= 1.

    Returns:
        All that was tried, in this order. The last one with ``kept`` is the result at the highest compression.

    Example:
        >>> from typing import NamedTuple
        >>> class Model(NamedTuple):
        ...     accuracy: float
        ...     compression: float
        >>> def prune(parent, compression):  # steep steps cost more
        ...     return Model(parent.accuracy - (compression / parent.compression - 1) ** 2, compression)
        >>> tried = progressive(Model(99.0, 1.0), [2, 4], prune, width=1)
        >>> [(candidate.path, candidate.node.accuracy) for candidate in tried]
        [((2,), 98.0), ((2, 4), 97.0)]

    References:
        Ye, Zhang, Zhang, Li, Xu, Yang, Yu, Tang, Fardad, Liu, Chen, Lin, Wang: Progressive Weight Pruning of Deep
        Neural Networks using ADMM. 2018, arXiv 1810.07378, section 2.
    """
    compressions = list(compressions)
    _check(dense, compressions, width)
    tried: list[Candidate[N]] = []
    held: list[Candidate[N]] = []  # partial models, the least compressed first
    for number, target in enumerate(compressions, start=1):
        is_full = len(held) == width
        parents: Sequence[Candidate[N] | None] = tuple(held) if is_full else (None,)
        nodes = [prune(dense if parent is None else parent.node, target) for parent in parents]
        if any(node is None for node in nodes):
            raise TypeError("prune must return the new node, with accuracy and compression, got None")
        best = max(range(len(nodes)), key=lambda i: _rank(nodes[i]))  # the first of equals
        this_round = [
            Candidate(number, target, parent, node, kept=i == best)
            for i, (parent, node) in enumerate(zip(parents, nodes, strict=True))
        ]
        if is_full:
            del held[best]
        held.append(this_round[best])
        tried += this_round
    return tried


def _rank(node: Node) -> float:
    return -math.inf if math.isnan(node.accuracy) else node.accuracy


def _check(dense: Node, compressions: Sequence[float], width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be a whole number of models, got {width!r}")
    if width < 1:
        raise ValueError(f"width must be >= 1 model, got {width}")
    if not compressions:
        raise ValueError("compressions must name at least one target, e.g. [15, 18, 21]; got none")
    for compression in compressions:
        if isinstance(compression, bool) or not isinstance(compression, (int, float)):
            raise TypeError(f"compressions must be numbers, got {compression!r}")
        if not 1.0 < compression < math.inf:
            raise ValueError(f"compressions must be > 1 and finite, total over non-zero weights, got {compression}")
    for low, high in pairwise(compressions):
        if low >= high:
            raise ValueError(f"compressions must rise from round to round, got {low} before {high}; sort them")
    if compressions[0] <= dense.compression:
        raise ValueError(
            f"compressions must begin above that of the model that is given, {dense.compression:g}, got "
            f"{compressions[0]}"
        )
