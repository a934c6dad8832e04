"""Do two trained networks lie in one flat valley of the training loss?

``paths`` and ``curvature`` are mathematics for any loss of named tensors: paths between two points, and the curvature
along a direction. ``landscape`` is the loss of a network, and this file applies both to the networks of two runs.

    segment            w(t) = A + t (B - A)
    curve              w(t) = (1 - t)^2 A + 2 t (1 - t) C + t^2 B,  C trained to lower the mean loss over uniform t
    barrier of a path  max over t in [0, 1] of L(w(t)), minus the larger of L(A) and L(B)
    projection         |V u| with u = (B - A) / |B - A|; the rows of V are the top eigenvectors of the Hessian of L at A

References:
    Chao, Wang, Xing and Cheng, Directional pruning of deep neural networks, 2020 (arXiv:2006.09358): the claim.
    Garipov, Izmailov, Podoprikhin, Vetrov and Wilson, Loss surfaces, mode connectivity, and fast ensembling of DNNs,
    2018 (arXiv:1802.10026): the curve.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor

from pomona._version import __version__
from pomona.studies.valley.curvature import (
    TOLERANCE,
    Parameters,
    coordinates,
    flat,
    hessian_product,
    pruned_like,
    top_eigenpairs,
)
from pomona.studies.valley.landscape import Landscape
from pomona.studies.valley.paths import MOMENTUM, barrier, bezier, segment, train_control
from pomona.studies.valley.picture import draw_valley
from pomona.train.checkpoint import write_atomically
from pomona.train.finished import FinishedRun, open_finished
from pomona.train.folder import commit_of_source
from pomona.train.progress import Progress
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model

_DRAWS = 5  # number of random prunings


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a survey.

    Args:
        points: number of points on each path from t = 0 to t = 1, both included; at least 3.
        examples: number of training examples for the loss; None: 10,000, or all if there are fewer.
        hessian: number of top eigenvectors of the Hessian.
        curve_epochs: length of the training of the curve, on the whole training set.
        curve_lr: its learning rate.
        seed: seed for the choice of examples, the training of the curve, the start of Lanczos and random pruning.
    """

    points: int = 21
    examples: int | None = None
    hessian: int = 10
    curve_epochs: int = 5
    curve_lr: float = 0.05
    seed: int = 0


def survey(
    a: Path,
    b: Path,
    out: Path,
    options: Options,
    *,
    data_dir: str | None = None,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Compare the networks of two finished runs, where A is not pruned; deterministic for given options and threads.

    Args:
        a, b: folders of runs of the same model on the same data.
        out: receives ``valley.json`` and ``valley.png`` at the end.
        options: settings.
        data_dir: the folder of the data.
        threads: number of torch's threads.
        progress: receives status messages.

    Returns:
        The content of ``valley.json``.
    """
    began = time.monotonic()
    torch.set_num_threads(threads)
    trained = {"A": open_finished(a), "B": open_finished(b)}
    _check_same(trained)
    recipe = trained["A"].recipe
    start, end = (_parameters(run) for run in trained.values())
    if torch.equal(flat(start), flat(end)):
        raise ValueError(f"A and B must be two networks, got the same one in {a} and {b}")
    data = trained["A"].load_data(data_dir)
    for name, run in trained.items():
        _check_data(name, run, data)
    num_examples = _num_examples(options, data)
    out.mkdir(parents=True, exist_ok=True)

    for name, run in trained.items():
        progress.line(f"{name}: {run.facts['title']}, seed {run.facts['seed']} ({run.folder})")
    progress.line(f"data: {data.description}; loss on {num_examples:,} training examples")
    seeds = [run.facts["seed"] for run in trained.values()]
    if len(set(seeds)) > 1:
        progress.line(f"WARNING: the seeds are {seeds}, so A and B did not start from the same weights")

    examples = torch.randperm(len(data.train_labels), generator=_generator(options, 0))[:num_examples]
    land = Landscape(build_model(recipe["model"], seed=0), data, examples)
    result = {
        "pomona": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": threads,
        "commit": commit_of_source(),
        "options": asdict(options) | {"examples": num_examples},
        "data": data.description,
        "checksum": data.checksum,
        "A": _facts(trained["A"], start),
        "B": _facts(trained["B"], end),
        "parameters": sum(value.numel() for value in start.values()),
        "distance": float(_between(start, end).norm()),
        "segment": _along_segment(land, start, end, options, progress),
        "curve": _along_curve(land, start, end, options, recipe["batch_size"], progress),
        **_curvature(land, start, end, options, progress),
        "seconds": round(time.monotonic() - began, 3),
    }
    picture = io.BytesIO()
    draw_valley(result, picture)
    write_atomically(out / "valley.json", json.dumps(result, indent=2).encode())
    write_atomically(out / "valley.png", picture.getvalue())
    return result


def _along_segment(
    land: Landscape, a: Parameters, b: Parameters, options: Options, progress: Progress
) -> dict[str, Any]:
    intervals = options.points - 1
    beyond = intervals // 5
    ts = [i / intervals for i in range(-beyond, intervals + beyond + 1)]
    return _measured("segment", land, lambda t: segment(a, b, t), ts, progress)


def _along_curve(
    land: Landscape, a: Parameters, b: Parameters, options: Options, batch_size: int, progress: Progress
) -> dict[str, Any]:
    num_train = len(land.data.train_labels)
    per_epoch = max(1, num_train // batch_size)
    num_steps = options.curve_epochs * per_epoch
    orders, times = _generator(options, 1), _generator(options, 2)
    order = torch.empty(0, dtype=torch.int64)

    def loss(parameters: Parameters, step: int) -> Tensor:
        nonlocal order
        position = step % per_epoch * batch_size
        if position == 0:
            order = torch.randperm(num_train, generator=orders)
        if progress.is_due:
            progress.status(f"curve: training, step {step:,} of {num_steps:,}")
        return land.loss(parameters, order[position : position + batch_size])

    c = train_control(loss, a, b, num_steps=num_steps, lr=options.curve_lr, generator=times)
    ts = [i / (options.points - 1) for i in range(options.points)]
    return _measured("curve", land, lambda t: bezier(a, c, b, t), ts, progress) | {
        "steps": num_steps,
        "batch_size": batch_size,
        "momentum": MOMENTUM,
    }


def _measured(
    name: str, land: Landscape, path: Callable[[float], Parameters], ts: list[float], progress: Progress
) -> dict[str, Any]:
    points: list[dict[str, float]] = []
    for t in ts:
        if progress.is_due:
            progress.status(f"{name}: point {len(points) + 1} of {len(ts)}")
        points.append(asdict(land.measure(path(t))))
    series = {key: [point[key] for point in points] for key in points[0]}
    height, top = barrier(ts, series["loss"])
    dip, bottom = barrier(ts, [-accuracy for accuracy in series["test_accuracy"]])
    progress.line(f"{name}: barrier {height:.4g} at t = {top:g}")
    return {
        "t": ts,
        **series,
        "barrier": height,
        "barrier_at": top,
        "test_accuracy_dip": dip,
        "test_accuracy_dip_at": bottom,
    }


def _curvature(land: Landscape, a: Parameters, b: Parameters, options: Options, progress: Progress) -> dict[str, Any]:
    """The top of the Hessian at ``a``, and how ``b`` and prunings of ``a`` lie relative to it."""
    vector = flat(a)
    max_steps = max(50, 10 * options.hessian)
    generator = _generator(options, 3)
    multiply = hessian_product(land.losses(), a)
    num_products = 0

    def product(v: Tensor) -> Tensor:
        nonlocal num_products
        num_products += 1
        if progress.is_due:
            progress.status(f"Hessian: product {num_products}, of at most {max_steps}")
        return multiply(v)

    start = torch.randn(vector.numel(), dtype=vector.dtype, generator=generator)
    top = top_eigenpairs(product, start, options.hessian, max_steps=max_steps, generator=generator)
    progress.line(f"Hessian at A: top eigenvalues {', '.join(f'{value:.4g}' for value in top.values)}")
    if not top.is_converged:
        progress.line(f"WARNING: the eigenvectors have not converged after {top.steps} products; see their residuals")

    draws = _generator(options, 4)
    ends = {"B": [b]}
    if any(bool((value == 0).any()) for value in b.values()):
        ends["random pruning of A"] = [
            pruned_like(a, b, lambda value: torch.rand(value.shape, generator=draws)) for _ in range(_DRAWS)
        ]
        ends["magnitude pruning of A"] = [pruned_like(a, b, torch.abs)]
    return {
        "hessian": {
            "values": top.values.tolist(),
            "residuals": top.residuals.tolist(),
            "tolerance": TOLERANCE,
            "is_converged": top.is_converged,
            "products": top.steps,
        },
        "random_projection": math.sqrt(options.hessian / vector.numel()),
        "directions": {
            name: _mean([_direction(land, a, end, top.vectors, multiply) for end in several])
            for name, several in ends.items()
        },
    }


def _direction(
    land: Landscape, a: Parameters, end: Parameters, vectors: Tensor, multiply: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The direction from ``a`` to ``end``: its part in the top eigenvectors, and the curvature of the loss along it."""
    way = _between(a, end)
    unit = way / way.norm()
    inside = coordinates(way, vectors)
    return {
        "length": float(way.norm()),
        "projection": float(inside.norm()),
        "coordinates": inside.abs().tolist(),
        "curvature": float(unit @ multiply(unit)),
        **asdict(land.measure(end)),
    }


def _mean(several: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over several draws."""
    mean: dict[str, Any] = {"draws": len(several)}
    for key, value in several[0].items():
        values = [one[key] for one in several]
        mean[key] = (
            [fmean(column) for column in zip(*values, strict=True)] if isinstance(value, list) else fmean(values)
        )
    return mean


def _between(a: Parameters, b: Parameters) -> Tensor:
    return flat(b) - flat(a)


def _generator(options: Options, stream: int) -> Generator:
    """Independent streams of random numbers."""
    return Generator().manual_seed(options.seed * 1_000 + stream)


def _parameters(run: FinishedRun) -> Parameters:
    return {key: value.detach().clone() for key, value in run.make_model().named_parameters()}


def _facts(run: FinishedRun, parameters: Parameters) -> dict[str, Any]:
    keys = ("title", "source", "seed", "commit", "torch", "threads", "data", "recipe")
    known = {key: run.facts.get(key) for key in keys}
    return known | {"folder": str(run.folder), "sparsity": _sparsity(parameters)}


def _sparsity(parameters: Parameters) -> float:
    """Share of zeros among the weights, without biases and norms."""
    weights = [value for value in parameters.values() if value.ndim > 1]
    return sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)


def _check_same(trained: dict[str, FinishedRun]) -> None:
    for key in ("model", "data", "validation"):
        here, there = (run.recipe.get(key) for run in trained.values())
        if (here or None) != (there or None):
            raise ValueError(f"A and B must have the same {key}, got {here!r} and {there!r}")


def _check_data(name: str, run: FinishedRun, data: Dataset) -> None:
    if run.checksum not in (None, data.checksum):
        raise ValueError(
            f"{name} was trained on other data: {run.facts['data']!r} in {run.folder}, but "
            f"{data.description!r} here; name their folder with --data-dir"
        )


def _num_examples(options: Options, data: Dataset) -> int:
    num = len(data.train_labels)
    if options.examples is None:
        return min(10_000, num)
    if not 1 <= options.examples <= num:
        raise ValueError(
            f"--examples must be in [1, {num:,}], the training examples of {data.name}, got {options.examples}"
        )
    return options.examples
