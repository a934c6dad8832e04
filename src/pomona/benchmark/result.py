"""What `pomona bench` found, as numbers and as tables of text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pomona.benchmark.worker import Timing
from pomona.pages.text import table

TOLERANCE = 1e-3  # relative error of outputs above which a path that computes in float32 is called wrong


@dataclass(frozen=True, slots=True)
class PathResult:
    """The results of one path; numbers are None if it failed before them, and `why_not` then gives the reason."""

    name: str
    timing: Timing | None = None
    error: float | None = None  # relative error of the outputs
    peak_bytes: int | None = None  # of its process
    accuracy: float | None = None  # percent
    why_not: str | None = None

    @property
    def is_int8(self) -> bool:
        return "int8" in self.name

    @property
    def is_mine(self) -> bool:
        return self.name.startswith("pomona")

    @property
    def is_wrong(self) -> bool:
        """Whether it computes in float32 and its outputs differ nevertheless."""
        return self.error is not None and " int" not in self.name and not self.error < TOLERANCE


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A convolution or linear layer together with the operations fused into it."""

    name: str
    shape: tuple[int, ...]  # of the weight
    weights: int
    kept: int
    macs: int  # of one sample
    kept_macs: int
    seconds: float | None  # of one batch, in Pomona's engine
    dense_seconds: float | None  # the same, zeros computed too

    @property
    def is_faster_dense(self) -> bool:
        """Whether a layer with zeros is faster dense, by more than the noise between two measurements."""
        if self.kept == self.weights or self.seconds is None or self.dense_seconds is None:
            return False
        return self.dense_seconds < 0.9 * self.seconds


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that `pomona bench` measures."""

    model: str
    inputs: tuple[tuple[int, ...], ...]  # with the batch
    threads: int
    machine: str
    weights: int  # of convolutions and linear layers
    kept: int
    macs: int  # of one sample
    kept_macs: int
    dense_bytes: int  # of all tensors, zeros included
    file_bytes: int  # of the .pomona.safetensors file
    paths: tuple[PathResult, ...]
    layers: tuple[LayerResult, ...]  # the last one sums all operations without weights

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def path(self, name: str) -> PathResult:
        return next(path for path in self.paths if path.name == name)

    def verdict(self) -> list[str]:
        """Which path is fastest, in plain sentences, including where it is not Pomona."""
        mine = self.path("pomona").timing
        if mine is None:
            return [f"pomona did not run: {self.path('pomona').why_not}"]
        found = []
        for path in self.paths:
            for kind in ("float32", "int8") if path.is_mine and path.timing else ():
                rivals = self._rivals(is_int8=kind == "int8")
                if not rivals and path.name == "pomona":
                    found.append(f"no dense {kind} path ran, so there is nothing to compare with")
                if not rivals:
                    continue
                best = min(rivals, key=lambda path: path.timing.median if path.timing else math.inf)
                assert best.timing is not None and path.timing is not None
                ratio = best.timing.median / path.timing.median
                if ratio >= 1:
                    found.append(f"{path.name} is {ratio:.2f}x as fast as the fastest dense {kind} path, {best.name}")
                else:
                    found.append(f"dense {kind} wins: {best.name} is {1 / ratio:.2f}x as fast as {path.name}")
        slower = [layer for layer in self.layers if layer.is_faster_dense]
        if slower:
            names = ", ".join(layer.name for layer in slower[:5]) + ", ..." * (len(slower) > 5)
            found.append(
                f"{len(slower)} of {len(self.layers) - 1} layers would be faster with their zeros computed: {names}"
            )
        wrong = [path.name for path in self.paths if path.is_wrong]
        if wrong:
            found.append(f"outputs of {', '.join(wrong)} are wrong and do not count")
        return found

    def _rivals(self, *, is_int8: bool) -> list[PathResult]:
        return [
            path
            for path in self.paths
            if not path.is_mine and path.is_int8 == is_int8 and path.timing is not None and not path.is_wrong
        ]

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        lines = [
            f"{self.model}, input {sizes}",
            *(f"{name}: {value}" for name, value in facts(self).items()),
            "",
            _table(path_rows(self)),
            "",
            _table(layer_rows(self)),
            "",
            *self.verdict(),
        ]
        return "\n".join(lines)


def facts(result: BenchResult) -> dict[str, str]:
    """What is reported next to the tables."""
    weights, macs = result.weights, result.macs
    return {
        "weights kept": f"{result.kept:,} of {weights:,} ({_percent(result.kept, weights)})",
        "multiplications": f"{_million(result.kept_macs)} of {_million(macs)} ({_percent(result.kept_macs, macs)})",
        "size": f"{result.file_bytes:,} bytes as a file of pomona, {result.dense_bytes:,} with all zeros "
        f"({result.dense_bytes / result.file_bytes:.1f}x)",
        "threads": str(result.threads),
        "machine": result.machine,
    }


def path_rows(result: BenchResult) -> list[list[str]]:
    """The rows of a table; a heading that begins with `>` aligns its column to the right."""
    mine = result.path("pomona").timing
    has_accuracy = any(path.accuracy is not None for path in result.paths)
    head = ["path", ">median", ">p90", ">CPU time", ">pomona is", ">peak memory"]
    rows = [head + [">accuracy"] * has_accuracy + ["outputs"]]
    for path in result.paths:
        t = path.timing
        cells = [path.name, *(_NONE for _ in head[1:])]
        if t:
            faster = f"{t.median / mine.median:.2f}x" if mine and path.name != "pomona" else ""
            cells = [
                path.name,
                with_unit(t.median),
                with_unit(t.p90),
                with_unit(t.cpu),
                faster,
                _mebibytes(path.peak_bytes),
            ]
        cells += [_NONE if path.accuracy is None else f"{path.accuracy:.2f} %"] * has_accuracy
        rows.append([*cells, _outputs(path)])
    return rows


def _outputs(path: PathResult) -> str:
    if path.why_not:
        return path.why_not
    assert path.error is not None
    return "WRONG: " * path.is_wrong + f"differ by {path.error:.1e}"


def layer_rows(result: BenchResult) -> list[list[str]]:
    """The same for the layers in Pomona's engine."""
    rows = [["layer", ">weight", ">kept", ">multiplications", ">time", ">with zeros", ""]]
    for layer in result.layers:
        times = [_NONE if s is None else with_unit(s) for s in (layer.seconds, layer.dense_seconds)]
        if not layer.weights:
            rows.append([layer.name, "", "", "", *times, ""])
            continue
        faster = "dense is faster" if layer.is_faster_dense else ""
        kept = _percent(layer.kept, layer.weights)
        rows.append([layer.name, "x".join(map(str, layer.shape)), kept, _million(layer.kept_macs), *times, faster])
    return rows


_NONE = "-"


def with_unit(seconds: float) -> str:
    """A time with three digits, such as ``45.7 ms``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else _NONE


def _million(number: int) -> str:
    return f"{number / 1e6:,.4g} M"


def _mebibytes(number: int | None) -> str:
    return _NONE if number is None else f"{number / 2**20:,.0f} MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned as the headings say."""
    right = [i for i, head in enumerate(rows[0]) if head.startswith(">")]
    return table([[head.removeprefix(">") for head in rows[0]], *rows[1:]], right=right)
