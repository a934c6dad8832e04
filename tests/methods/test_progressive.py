"""The search over partial prunings: the paper's example, its order, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pomona.methods.rounds import Candidate, progressive


@dataclass(frozen=True)
class Model:
    accuracy: float
    compression: float


DENSE = Model(80.3, 1.0)

# parent, target -> accuracy. Numbers of ours, made so that the winners are those of the paper's AlexNet example.
ALEXNET = {
    (1, 15): 80.9, (1, 18): 80.8, (1, 21): 80.7,
    (15, 24): 80.6, (18, 24): 80.5, (21, 24): 80.4,
    (18, 27): 80.3, (21, 27): 80.2, (24, 27): 80.1,
    (21, 30): 79.9, (24, 30): 80.1, (27, 30): 80.0,
}  # fmt: skip


def by(table: dict[tuple[int, int], float], calls: list[tuple[float, float]]) -> Callable[[Model, float], Model]:
    def prune(parent: Model, compression: float) -> Model:
        calls.append((parent.compression, compression))
        return Model(table[int(parent.compression), int(compression)], compression)

    return prune


def kept(tried: list[Candidate[Model]]) -> list[tuple[float, ...]]:
    return [candidate.path for candidate in tried if candidate.kept]


def test_the_example_of_the_paper() -> None:
    """15x, 18x and 21x from the dense model; 24x replaces 15x, then 27x replaces 18x; 30x comes from 24x."""
    calls: list[tuple[float, float]] = []
    tried = progressive(DENSE, [15, 18, 21, 24, 27, 30], by(ALEXNET, calls))
    assert calls == list(ALEXNET)  # each once, in this order: no trial from a model that was replaced
    assert kept(tried) == [(15,), (18,), (21,), (15, 24), (18, 27), (15, 24, 30)]
    assert [candidate.round for candidate in tried] == [1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert [candidate.node.accuracy for candidate in tried] == list(ALEXNET.values())
    assert [candidate.target for candidate in tried] == [target for _, target in ALEXNET]


def test_a_width_of_1_is_the_plain_chain() -> None:
    calls: list[tuple[float, float]] = []
    tried = progressive(DENSE, [15, 24, 30], by({(1, 15): 80.9, (15, 24): 80.6, (24, 30): 80.1}, calls), width=1)
    assert calls == [(1, 15), (15, 24), (24, 30)]
    assert kept(tried) == [(15,), (15, 24), (15, 24, 30)]


def test_no_more_compressions_than_width_all_come_from_the_dense_model() -> None:
    calls: list[tuple[float, float]] = []
    tried = progressive(DENSE, [15, 18], by(ALEXNET, calls), width=3)
    assert calls == [(1, 15), (1, 18)]
    assert [candidate.parent for candidate in tried] == [None, None]
    assert all(candidate.kept for candidate in tried)


def test_a_replaced_model_may_be_any_of_those_held() -> None:
    """The most compressed parent wins each time: the two others stay for good."""
    tried = progressive(DENSE, [2, 4, 6, 8, 10], lambda parent, c: Model(parent.compression, c))
    assert kept(tried) == [(2,), (4,), (6,), (6, 8), (6, 8, 10)]
    starts = [candidate.parent.target for candidate in tried if candidate.parent and candidate.round == 5]
    assert starts == [2, 4, 8]


def test_of_equal_accuracies_the_least_compressed_parent_wins() -> None:
    tried = progressive(DENSE, [2, 4, 6, 8, 10], lambda parent, compression: Model(99.0, compression))
    assert kept(tried) == [(2,), (4,), (6,), (2, 8), (4, 10)]


def test_a_run_that_diverged_is_not_kept() -> None:
    def prune(parent: Model, compression: float) -> Model:
        return Model(math.nan if parent.compression == 2 else -parent.compression, compression)

    assert kept(progressive(DENSE, [2, 4, 6], prune, width=2)) == [(2,), (4,), (4, 6)]


def test_an_interrupted_search_goes_on_from_what_is_finished() -> None:
    calls: list[tuple[float, float]] = []
    finished: dict[tuple[float, float], Model] = {}
    train = by(ALEXNET, calls)

    def search(most: int) -> list[Candidate[Model]]:
        def prune(parent: Model, compression: float) -> Model:
            key = parent.compression, compression
            if key not in finished:
                if len(finished) == most:
                    raise KeyboardInterrupt
                finished[key] = train(parent, compression)
            return finished[key]

        return progressive(DENSE, [15, 18, 21, 24, 27, 30], prune)

    with pytest.raises(KeyboardInterrupt):
        search(most=5)  # in the middle of a round
    assert len(calls) == 5
    assert kept(search(most=12))[-1] == (15, 24, 30)
    assert calls == list(ALEXNET)  # nothing was trained twice


def test_the_start_may_be_pruned_already() -> None:
    calls: list[tuple[float, float]] = []
    progressive(Model(80.9, 15.0), [18], by({(15, 18): 80.8}, calls))
    assert calls == [(15, 18)]


@pytest.mark.parametrize(
    ("start", "compressions", "message"),
    [
        (1.0, [], "compressions must name at least one target"),
        (1.0, [1.0, 2.0], "compressions must be > 1 and finite, total over non-zero weights, got 1.0"),
        (1.0, [0.9], "compressions must be > 1 and finite, total over non-zero weights, got 0.9"),
        (1.0, [2.0, math.nan], "compressions must be > 1 and finite, total over non-zero weights, got nan"),
        (1.0, [2.0, math.inf], "compressions must be > 1 and finite, total over non-zero weights, got inf"),
        (1.0, [15, 21, 18], "compressions must rise from round to round, got 21 before 18"),
        (1.0, [15, 15], "compressions must rise from round to round, got 15 before 15"),
        (15.0, [12, 18], "compressions must begin above that of the model that is given, 15, got 12"),
    ],
)
def test_compressions_out_of_order_are_refused(start: float, compressions: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        progressive(Model(99.0, start), compressions, lambda parent, compression: parent)


@pytest.mark.parametrize("compressions", [["15"], [True], [None]])
def test_compressions_that_are_no_numbers_are_refused(compressions: list[object]) -> None:
    with pytest.raises(TypeError, match="compressions must be numbers"):
        progressive(DENSE, compressions, lambda parent, compression: parent)  # type: ignore[arg-type]


def test_a_width_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be >= 1 model, got 0"):
        progressive(DENSE, [2], lambda parent, compression: parent, width=0)


@pytest.mark.parametrize("width", [1.5, "3", True])
def test_a_width_that_is_no_whole_number_is_refused(width: object) -> None:
    with pytest.raises(TypeError, match="width must be a whole number of models"):
        progressive(DENSE, [2], lambda parent, compression: parent, width=width)  # type: ignore[arg-type]
