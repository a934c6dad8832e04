"""What the ranks run. Each function is called on all four; those outside of its mesh return at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pomona
from pomona import selection
from pomona.budget import select
from pomona.distributed import local, shards_of
from pomona.method import Weight
from pomona.score import Score
from pomona.selection import NonFiniteError, kth_largest
from tests import oracles
from tests.problems import batches, bits, loss_of, net
from tests.test_contract import METHODS, OPTIMIZERS

LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows over 2": ((2,), [Shard(0)]),
    "columns over 2": ((2,), [Shard(1)]),
    "rows over 3": ((3,), [Shard(0)]),
    "rows over 4": ((4,), [Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "columns and rows": ((2, 2), [Shard(1), Shard(0)]),
    "rows twice": ((2, 2), [Shard(0), Shard(0)]),
    "rows, two copies": ((2, 2), [Replicate(), Shard(0)]),
    "columns, two copies": ((2, 2), [Shard(1), Replicate()]),
    "four copies": ((4,), [Replicate()]),
    "one rank": ((1,), [Shard(0)]),
}


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    names = ("dp", "tp")[: len(shape)]
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)


def is_on(mesh: DeviceMesh) -> bool:
    return mesh.get_coordinate() is not None


def lay_out(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    fitting = [Replicate() if isinstance(p, Shard) and p.dim >= whole.ndim else p for p in placements]
    return distribute_tensor(whole, mesh, fitting, src_data_rank=None)


def part(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor, as a DTensor is laid out."""
    return local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))


def weights_of(tensors: Sequence[DTensor]) -> list[Weight]:
    shards = shards_of({str(i): t for i, t in enumerate(tensors)})
    return [Weight(str(i), local(t), local(t), {}, {}, shard=shards[str(i)]) for i, t in enumerate(tensors)]


def selects_as_a_full_sort(
    layout: str, arrays: list[np.ndarray], factors: list[np.ndarray | None], k: int, few: int, dtype: torch.dtype
) -> None:
    shape, placements = LAYOUTS[layout]
    mesh = mesh_of(shape)
    if not is_on(mesh):
        return
    selection._GATHERED, gathered = few, selection._GATHERED
    try:
        _select(mesh, placements, arrays, factors, k, dtype)
    finally:
        selection._GATHERED = gathered


def _select(
    mesh: DeviceMesh,
    placements: list[Any],
    arrays: list[np.ndarray],
    factors: list[np.ndarray | None],
    k: int,
    dtype: torch.dtype,
) -> None:
    ws = [torch.from_numpy(a).to(dtype) for a in arrays]
    gs = [None if f is None else torch.from_numpy(f).to(dtype) for f in factors]
    tensors = [lay_out(w, mesh, placements) for w in ws]
    scores = [Score(local(w), None if g is None else part(g, w)) for w, g in zip(tensors, gs, strict=True)]
    weights = weights_of(tensors)
    whole = [Score(w, g).tensor() for w, g in zip(ws, gs, strict=True)]
    if any(bool(t.isnan().any()) for t in whole):
        try:
            select(scores, k, of=weights)
        except NonFiniteError:
            return
        raise AssertionError("a NaN was not refused")
    expected = [torch.from_numpy(m) for m in oracles.top_k_mask([t.numpy() for t in whole], k)]
    chosen = select(scores, k, of=weights)
    assert chosen.counts == [int(m.sum()) for m in expected]
    for got, mask, like in zip(chosen.masks(), expected, tensors, strict=True):
        assert torch.equal(got, part(mask, like)), (got, mask)
    targets = [torch.ones_like(s.w, dtype=torch.float32) for s in scores]
    chosen.multiply_(targets)
    for target, mask, like in zip(targets, expected, tensors, strict=True):
        assert torch.equal(target, part(mask, like).float())
    for floor in (0.1, 0.3):
        if sum(math.ceil(round(floor * w.numel(), 6)) for w in ws) > k:
            continue
        alone = select([Score(w, g) for w, g in zip(ws, gs, strict=True)], k, min_density=floor)
        shared = select(scores, k, min_density=floor, of=weights)
        assert shared.counts == alone.counts
        for got, mask, like in zip(shared.masks(), alone.masks(), tensors, strict=True):
            assert torch.equal(got, part(mask, like))
    if k:
        one = kth_largest([Score(w, g) for w, g in zip(ws, gs, strict=True)], k)
        assert kth_largest(scores, k, of=weights) == one
    assert kth_largest(scores, sum(w.numel() for w in ws) + 1, of=weights) == 0.0


# A whole run


def shard_(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for module in model.children():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def give_gathered(reference: nn.Module, model: nn.Module) -> None:
    """The gradients of the sharded model to one that is whole, on every rank."""
    for theirs, mine in zip(reference.parameters(), model.parameters(), strict=True):
        theirs.grad = mine.grad.full_tensor().clone() if mine.grad is not None else None


def whole(tree: Any) -> Any:
    """DTensors put together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(one) for one in tree] if isinstance(tree, (list, tuple)) else tree


def a_method_prunes_as_on_one_process(name: str, shape: tuple[int, ...], steps: int) -> None:
    """Under fully_shard, with the gradients that it gives; everything is compared at every step, bit for bit."""
    mesh = mesh_of(shape)
    if not is_on(mesh):
        return
    case = next(case for case in METHODS if case.name == name)
    make = OPTIMIZERS[case.optimizers[0]]
    reference, model = net(), shard_(net(), mesh)
    optimizers = make(reference.parameters(), foreach=True), make(model.parameters(), foreach=True)
    alone = pomona.Pruner(reference, optimizers[0], case.method)
    pruner = pomona.Pruner(model, optimizers[1], case.method)
    rank, size = mesh.get_rank(), mesh.size()

    def train(data: list[Any], pruner: pomona.Pruner, model: nn.Module, optimizer: Any) -> None:
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss_of(model, (x[rank::size], y[rank::size])).backward()
            give_gathered(reference, model)
            optimizer.step()
            optimizers[0].step()
            same(alone, pruner, f"step {i}")

    def same(alone: pomona.Pruner, pruner: pomona.Pruner, when: str) -> None:
        mine, theirs = whole(pruner.state_dict()), whole(alone.state_dict())
        for key in theirs:
            assert bits(mine[key]) == bits(theirs[key]), (when, key, mine[key], theirs[key])
        for name, parameter in alone.parameters().items():
            assert bits(whole(pruner.parameters()[name].detach())) == bits(parameter.detach()), (when, name)
        assert pruner.metrics() == alone.metrics()

    data = batches(steps)
    train(data, pruner, model, optimizers[1])
    with pruner.trial_cut() as tried, alone.trial_cut() as tried_alone:
        assert tried == tried_alone
    # A new model, optimizer and Pruner go on from the states.
    second = shard_(net(seed=1), mesh)
    optimizer = make(second.parameters(), foreach=True)
    resumed = pomona.Pruner(second, optimizer, case.method)
    second.load_state_dict(model.state_dict())
    optimizer.load_state_dict(optimizers[1].state_dict())
    resumed.load_state_dict(pruner.state_dict())
    train(data[: steps // 2], resumed, second, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = resumed.harden(), alone.harden()
    assert reports[0] == reports[1]
    if case.budget is not None:
        masks = whole(resumed.state_dict()["pruned"]).values()
        assert sum(int((~mask).sum()) for mask in masks) == case.budget
    same(alone, resumed, "harden")
    train(data[: steps // 2], resumed, second, optimizer)
    assert resumed.verify() == alone.verify()
    assert pomona.report(second).layers == pomona.report(reference).layers
