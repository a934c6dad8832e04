"""What was pruned, counted from the tensors themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pomona.distributed import Shard, local, max_over, reshard, shards_of, sum_vectors
from pomona.layout import ROWS, Layout
from pomona.multiply_adds import count_multiply_adds
from pomona.native import core
from pomona.ops import PIECE
from pomona.pages.text import few, table
from pomona.scope import Scope

_MOST_REASONS = 8  # for leaving parameters out, in the text of a report


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One pruned tensor.

    Attributes:
        name: full parameter name.
        shape: its shape.
        total: number of weights.
        nonzero: number of weights that are not exactly zero.
        channels: number of outputs, those of all experts together (0 for a scalar, or if the layout is unknown).
        dead_channels: number of outputs whose weights are all zero.
        largest_cut: largest magnitude that was cut to zero, if there was a cut.
        smallest_kept: smallest magnitude that is not zero, if any.
        reason: why the layer kept this share.
        multiply_adds: products in one pass of one sample, if the report was made with an example; see
            :func:`report`. None also if the weight goes into an operator whose products cannot be counted.
        kept_multiply_adds: the same without weights that are zero.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    nonzero: int
    channels: int
    dead_channels: int
    largest_cut: float | None = None
    smallest_kept: float | None = None
    reason: str = ""
    multiply_adds: int | None = None
    kept_multiply_adds: int | None = None

    @property
    def density(self) -> float:
        """Fraction of the weights that are not zero."""
        return self.nonzero / self.total if self.total else 0.0


@dataclass(frozen=True)
class Report:
    """Sparsity of a model, per layer and in total; ``str(report)`` is a table.

    Every number counts the weights in scope only: biases and other parameters are listed in ``outside`` and not
    counted.

    Attributes:
        layers: one entry for each tensor in scope.
        outside: name -> why it is not pruned.
        granularity: what the method cuts together, see :mod:`pomona.granularity`; ``Pruner.verify`` checks it.
        accuracy_before: what the caller's ``evaluate`` returned before the cut, if there was one.
        accuracy_after: what it returned after the cut.
        metrics: the method's own numbers, such as GSM's ``decay_exponent``.
        num_steps: number of optimizer steps.
        num_skipped: number of optimizer steps that were skipped because a gradient was not finite.
        other_multiply_adds: products of one pass of one sample that are not by weights in scope, such as by layers that
            were left out, or of attention; None without an example.
    """

    layers: tuple[LayerReport, ...]
    outside: Mapping[str, str] = field(default_factory=dict)
    granularity: str = "weight"
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0
    num_skipped: int = 0
    other_multiply_adds: int | None = None

    @property
    def total(self) -> int:
        """Number of weights in scope."""
        return sum(layer.total for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Number of weights in scope that are not exactly zero."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def density(self) -> float:
        """Non-zero over total."""
        return self.nonzero / self.total if self.total else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return (self.total - self.nonzero) / self.total if self.total else 1.0

    @property
    def compression(self) -> float:
        """Total over non-zero; infinite if nothing is left."""
        return self.total / self.nonzero if self.nonzero else float("inf")

    @property
    def dead_channels(self) -> int:
        """Number of outputs whose weights are all zero, over all layers."""
        return sum(layer.dead_channels for layer in self.layers)

    @property
    def largest_cut(self) -> float | None:
        """Largest magnitude that the cut removed; far below ``smallest_kept`` if the weights had separated."""
        return max((cut for layer in self.layers if (cut := layer.largest_cut) is not None), default=None)

    @property
    def smallest_kept(self) -> float | None:
        """Smallest magnitude that survived."""
        return min((kept for layer in self.layers if (kept := layer.smallest_kept) is not None), default=None)

    @property
    def multiply_adds(self) -> int | None:
        """Products by weights in scope in one pass of one sample, were none of them zero; None without an example."""
        return None if self.other_multiply_adds is None else sum(layer.multiply_adds or 0 for layer in self.layers)

    @property
    def kept_multiply_adds(self) -> int | None:
        """Those by weights that are not zero."""
        return None if self.other_multiply_adds is None else sum(layer.kept_multiply_adds or 0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values only, ready for JSON, including derived totals."""
        layers = [{**asdict(layer), "shape": list(layer.shape), "density": layer.density} for layer in self.layers]
        return {
            "of": f"the {self.total:,} weights in scope ({len(self.layers)} tensors)",
            "total": self.total,
            "nonzero": self.nonzero,
            "sparsity": self.sparsity,
            "density": self.density,
            "compression": self.compression if self.nonzero else None,
            "dead_channels": self.dead_channels,
            "granularity": self.granularity,
            "largest_cut": self.largest_cut,
            "smallest_kept": self.smallest_kept,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "metrics": dict(self.metrics),
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "multiply_adds": self.multiply_adds,
            "kept_multiply_adds": self.kept_multiply_adds,
            "other_multiply_adds": self.other_multiply_adds,
            "layers": layers,
            "outside": dict(self.outside),
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    def __str__(self) -> str:
        counted = self.multiply_adds is not None
        columns = ("multiply-adds", "kept") if counted else ()
        rows = [("layer", "shape", "weights", "non-zero", "density", "dead channels", *columns, "why")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.total:,}",
                    f"{layer.nonzero:,}",
                    f"{100 * layer.density:.2f} %",
                    f"{layer.dead_channels} of {layer.channels}" if layer.channels or not layer.shape else "-",
                    *(map(_or_dash, (layer.multiply_adds, layer.kept_multiply_adds)) if counted else ()),
                    layer.reason,
                )
            )
        rows.append(
            (
                "total",
                "",
                f"{self.total:,}",
                f"{self.nonzero:,}",
                f"{100 * self.density:.2f} %",
                str(self.dead_channels),
                *(map(_or_dash, (self.multiply_adds, self.kept_multiply_adds)) if counted else ()),
                f"{self.compression:.1f}x compression" if self.nonzero else "nothing left",
            )
        )
        head, *body, total = table(rows, right=range(2, 6 + len(columns))).splitlines()
        rule = "-" * max(map(len, (head, *body, total)))
        return "\n".join([head, rule, *body, rule, total, *self._notes()])

    def _notes(self) -> Iterable[str]:
        if self.accuracy_before is not None and self.accuracy_after is not None:
            gap = self.accuracy_after - self.accuracy_before
            yield f"accuracy {self.accuracy_before:.2f} before the cut, {self.accuracy_after:.2f} after ({gap:+.2f})"
        if self.largest_cut is not None and self.smallest_kept is not None:
            yield f"largest weight cut {self.largest_cut:.2g}, smallest kept {self.smallest_kept:.2g}"
        if self.granularity != "weight":
            yield f"granularity {self.granularity}"
        for name, value in self.metrics.items():
            yield f"{name.replace('_', ' ')} {value:,.6g}"
        if self.other_multiply_adds is not None:
            yield f"multiply-adds of one sample; {self.other_multiply_adds:,} more are not by weights in scope"
        if self.num_skipped:
            yield f"{self.num_skipped} steps were skipped because a gradient was not finite"
        if self.outside:
            yield f"not pruned and not counted: {_grouped(self.outside)}"


def _grouped(outside: Mapping[str, str]) -> str:
    """Names by reason, the first few of each; for the whole list there is ``Report.outside``."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in outside.items():
        by_reason.setdefault(reason, []).append(name)
    most = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    shown = [f"{few(names)} ({reason})" for reason, names in most[:_MOST_REASONS]]
    num_left = sum(len(names) for _, names in most[_MOST_REASONS:])
    return "; ".join([*shown, *([f"and {num_left} for other reasons"] if num_left else [])])


def _or_dash(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent (NaN, infinity) with None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_layer(name: str, value: Tensor, *, largest_cut: float | None = None, reason: str = "") -> LayerReport:
    """Count one tensor: zero is ``== 0``, never a tolerance; -0.0 counts as zero."""
    cuts = {} if largest_cut is None else {name: largest_cut}
    return report_layers({name: value}, cuts=cuts, reasons={name: reason})[0]


@torch.no_grad()
def report_layers(
    values: Mapping[str, Tensor],
    shards: Mapping[str, Shard] | None = None,
    *,
    layouts: Mapping[str, Layout | None] | None = None,
    cuts: Mapping[str, float] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> tuple[LayerReport, ...]:
    """Count tensors, or this rank's blocks of them; reports cover the whole tensors and are equal on all ranks.

    Without a layout a tensor is seen as (outputs, inputs, \\*kernel).
    """
    blocks = [(shards or {}).get(name) for name in values]
    seen = [(layouts or {}).get(name, ROWS) for name in values]
    counted = [_count(*each) for each in zip(values.values(), blocks, seen, strict=True)]
    sums = sum_vectors([counts for counts, _ in counted], blocks)
    smallest = [-x for x in max_over([-x for _, x in counted], blocks)]
    layers = []
    for (name, value), shard, layout, counts, kept in zip(values.items(), blocks, seen, sums, smallest, strict=True):
        shape = value.shape if shard is None else shard.shape
        nonzero, *alive = counts.tolist()
        layers.append(
            LayerReport(
                name=name,
                shape=tuple(shape),
                total=shape.numel(),
                nonzero=nonzero,
                channels=len(alive) if layout is not None and shape else 0,
                dead_channels=alive.count(0) if layout is not None and shape.numel() else 0,
                largest_cut=(cuts or {}).get(name),
                smallest_kept=kept if nonzero else None,
                reason=(reasons or {}).get(name, ""),
            )
        )
    return tuple(layers)


def _count(value: Tensor, shard: Shard | None, layout: Layout | None) -> tuple[Tensor, float]:
    """This rank's counts of non-zeros, in total and per output of the whole tensor; and their smallest magnitude."""
    layout = layout or ROWS
    if not value.numel():
        return torch.zeros(1 + _num_channels(value, shard, layout), dtype=torch.int64), math.inf
    # One row per output; the usual layout has them already.
    rows = value if layout.outputs == 0 or value.ndim < 2 else layout.view(value).flatten(2).flatten(0, 1)
    here, smallest = core.survey(rows) if core.is_available() and core.has_rows(rows) else _survey(rows)
    total = here.sum().view(1)
    if not value.ndim:
        return total, smallest
    if shard is not None:
        grid = layout.view_shape(shard.shape)[:2]
        first, second = layout.view_start(shard.start)[:2]
        batch, outputs = layout.view_shape(value.shape)[:2]
        whole = torch.zeros(grid, dtype=torch.int64)
        whole[first : first + batch, second : second + outputs] = here.view(batch, outputs)
        here = whole.view(-1)
    return torch.cat([total, here]), smallest


def _num_channels(value: Tensor, shard: Shard | None, layout: Layout) -> int:
    """Number of outputs of the whole tensor, of all its matrices; 0 for a scalar."""
    shape = value.shape if shard is None else shard.shape
    return math.prod(layout.view_shape(shape)[:2]) if shape else 0


def _survey(value: Tensor) -> tuple[Tensor, float]:
    """As ``core.survey``: the non-zeros of each first index, and their smallest magnitude."""
    rows = value.reshape(len(value) if value.ndim else 1, -1)
    alive, smallest = [], []
    for some in torch.split(rows, max(1, PIECE // rows.shape[1])):
        alive.append(some.count_nonzero(1))
        smallest.append(some.abs().masked_fill_(some == 0, math.inf).min())
    return torch.cat(alive).cpu(), float(torch.stack(smallest).min())


def report(model: nn.Module, scope: Scope | None = None, *, example: Any = None) -> Report:
    """Count the zeros of any model, pruned by any means. If the model is sharded, call this on every rank.

    What is frozen counts like the rest, so a checkpoint that was saved for inference has the same report.

    Args:
        model: any model; not changed.
        scope: which of its weights; by default those that a Pruner would take.
        example: an input of the model with the batch in front, a tuple of inputs, or a dictionary of keyword arguments.
            With it the report also has multiply-adds, of one sample in evaluation mode: for each weight one for each
            time that it is multiplied, so a convolution's once for each place of its output. Biases, norms,
            activations, pooling and lookups do not count. The total is of the weights in scope;
            ``other_multiply_adds`` has the rest of the model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> report(model).sparsity, report(model).dead_channels
        (0.75, 1)
        >>> found = report(model, example=torch.zeros(1, 2))
        >>> found.multiply_adds, found.kept_multiply_adds
        (4, 1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"report() counts the weights of a torch.nn.Module, got {type(model).__name__}; load a state dict into its"
            " model first, or save it and run `pomona report FILE`"
        )
    reshard(model)
    selection = (scope or Scope()).select(model, with_frozen=True, refuse=False)
    values = {name: local(p) for name, p in selection.inside.items()}
    shards = shards_of(selection.inside)
    layers = report_layers(values, shards, layouts=selection.layouts)
    found = Report(layers=layers, outside=selection.outside)
    return found if example is None else with_multiply_adds(found, model, values, shards, example)


def with_multiply_adds(
    report: Report, model: nn.Module, values: Mapping[str, Tensor], shards: Mapping[str, Shard], example: Any
) -> Report:
    """The report with the multiply-adds of these weights."""
    if shards:
        raise ValueError(
            f"example= counts on one process, but {next(iter(shards))} is sharded over several; report the model's"
            " multiply-adds where it is whole"
        )
    counts = count_multiply_adds(model, values, example)
    layers = tuple(
        replace(layer, multiply_adds=counts.dense[layer.name], kept_multiply_adds=counts.kept[layer.name])
        for layer in report.layers
    )
    return replace(report, layers=layers, other_multiply_adds=counts.others)
