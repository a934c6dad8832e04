"""Hostile graphs: whatever is changed in one, all refuse it with a ValueError, or all compute the same.

``python -m tests.fuzz.graph --cases 100000`` makes that many. Case n of seed s is always the same graph: ``--seed s
--only n`` repeats it. What ``Graph.shapes`` refuses the core must refuse too, which believes nothing either; what it
takes must run, folded and not, and the core's outputs must be those of the literal executor.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from typing import Any

import numpy as np

from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine
from pomona.runtime.fold import fold, pad_weight
from pomona.runtime.graph import Graph
from pomona.runtime.operations import DTYPES, OPERATIONS
from tests.fuzz import fuzzing

MAX_BYTES = 1 << 22
SECONDS = 5.0
"""No case may take more of a processor."""

_GRAPH = {
    "inputs": [[2, 6, 6], [5], [3, 5], [2, 3, 4, 2], {"shape": [7], "dtype": "int64"}],
    "nodes": [
        ["conv", [0], {"weight": "pad", "padding": [1, 0], "groups": 2}],
        ["conv", [5], {"weight": "conv", "bias": "four", "padding": [1, 1]}],
        ["scale", [6], {"weight": "four", "bias": "four"}],
        ["clip", [7], {"low": 0.0, "high": 6.0}],
        ["max_pool", [8], {"kernel": [2, 2], "stride": [2, 2], "ceil": True}],
        ["avg_pool", [9], {"kernel": [3, 3], "padding": [1, 1], "count_padding": True}],
        ["mean", [10]],
        ["sigmoid", [11]],
        ["mul", [10, 12]],
        ["concat", [13, 10]],
        ["flatten", [14]],
        ["linear", [1], {"weight": "linear"}],
        ["concat", [15, 16]],
        ["gelu", [17]],
        ["add", [18, 17]],
        ["linear", [2], {"weight": "linear", "bias": "three"}],
        ["hardswish", [20]],
        ["tanh", [3]],
        ["mul", [22, 3]],
        ["flatten", [23]],
        ["upsample", [10], {"stride": [2, 3]}],
    ],
    "outputs": [19, 13, 21, 24, 25],
}

_PLACES = [0, 1, 2, 3, 4, 5, 7, 19, 20, 255, 65_536, 2**31 - 1, 2**31, 2**63, -1, True, None, 1.5]
_PARTS = [[], [1], [0, 1], [1, 1], [2, 2], [3, 1], {}, {"weight": "pad"}, {"kernel": [2, 3]}, {"low": 7.0},
          {"shape": [2, 3], "dtype": "int32"}, {"shape": [5], "dtype": "float32"}, [2, 3, 2, 2]]  # fmt: skip
_ATTRIBUTES = ["weight", "bias", "groups", "stride", "padding", "dilation", "kernel", "ceil", "low", "high", *DTYPES]


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * (rng.random(shape) < 0.5)).astype(np.float32)

    dense = {"conv": draw(4, 2, 3, 3), "pad": pad_weight(2, 0, 0, 0, 1)[0], "four": draw(4), "linear": draw(3, 5)}
    return {**dense, "conv": Sparse.from_dense(dense["conv"]), "three": draw(3)}


def mutated(seed: int, case: int) -> Any:
    """The graph, with what case number `case` changes in it."""
    chance = random.Random(f"{seed}/{case}")
    data = json.loads(json.dumps(_GRAPH))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _change(chance, data)
    return data


def _change(chance: random.Random, data: Any) -> Any:
    """Change one thing in it."""
    if isinstance(data, list) and data and chance.random() < 0.8:
        place, kind = chance.randrange(len(data)), chance.random()
        if kind < 0.1:
            del data[place]
        elif kind < 0.2:
            data.insert(place, _anything(chance))
        else:
            data[place] = _change(chance, data[place])
        return data
    if isinstance(data, dict) and data and chance.random() < 0.9:
        name = chance.choice(list(data))
        if chance.random() < 0.2:
            data[chance.choice(_ATTRIBUTES)] = _anything(chance)
        else:
            data[name] = _change(chance, data[name])
        return data
    if isinstance(data, int) and chance.random() < 0.8:
        return data + chance.choice((-1, 1, 2))
    if isinstance(data, str) and chance.random() < 0.8:
        return chance.choice([*OPERATIONS, *tensors(), *DTYPES])
    return _anything(chance)


def _anything(chance: random.Random) -> Any:
    kind = chance.choice([_PLACES, _PARTS, [*OPERATIONS, *_ATTRIBUTES]])
    return json.loads(json.dumps(chance.choice(kind)))


def check(data: Any, weights: dict[str, Any]) -> str:
    """What became of this graph: "not read", "refused" or "run". Raises an error if that is wrong."""
    try:
        graph = Graph.from_json(data)
    except ValueError:
        return "not read"
    try:
        graph.shapes(weights, max_bytes=MAX_BYTES)
    except ValueError:
        return _refused(graph, weights)
    rng = np.random.default_rng(0)
    inputs = [
        (rng.normal(size=(2, *shape)) * (1 if dtype == "float32" else 100)).astype(dtype)
        for shape, dtype in zip(graph.inputs, graph.dtypes, strict=True)
    ]
    expected = reference.run(graph, weights, *inputs, dtype=np.float64)
    smaller, made = fold(graph, weights)
    _compare(reference.run(smaller, made, *inputs, dtype=np.float64), expected)
    if library.is_available():
        _compare(Engine(smaller, made, max_bytes=16 * MAX_BYTES)(*inputs), expected)
    return "run"


def _refused(graph: Graph, weights: dict[str, Any]) -> str:
    if library.is_available():
        try:
            Engine(graph, weights, max_bytes=MAX_BYTES)
        except ValueError:
            return "refused"
        raise AssertionError("the core takes what Graph.shapes refuses")
    return "refused"


def _compare(found: list[Any], expected: list[Any]) -> None:
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape, f"shape {y.shape}, not {z.shape}"
        assert np.abs(y - z).max(initial=0) <= 1e-4 * max(1.0, np.abs(z).max(initial=0)), "another output"


def run(cases: range, seed: int) -> Counter[str]:
    """Check these cases; an error names the first that is wrong."""
    weights = tensors()

    def once(case: int) -> str:
        return check(mutated(seed, case), weights)

    return fuzzing.run(cases, seed, once, seconds=SECONDS, clock=time.process_time)


def main() -> None:
    options = fuzzing.parser(__doc__).parse_args()
    if options.only is not None:
        print(json.dumps(mutated(options.seed, options.only)))
    cases = fuzzing.cases_of(options)
    start = time.perf_counter()
    tally = run(cases, options.seed)
    print(
        json.dumps({"seed": options.seed, "cases": len(cases), **tally, "seconds": round(time.perf_counter() - start)})
    )


if __name__ == "__main__":
    main()
