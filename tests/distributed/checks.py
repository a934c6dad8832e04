"""What the ranks run. Each function is called on all four; those outside of its mesh return at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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


# Models, whole and shared


def odd_net(seed: int = 0) -> nn.Sequential:
    """7 -> 131 -> 1: rows that no number of ranks divides, and one row for all of them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 131), nn.Tanh(), nn.Linear(131, 1))


def normed_net(seed: int = 0) -> nn.Sequential:
    """With a layer that tensor parallelism leaves alone."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def shard_(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for module in model.children():
        if not isinstance(module, nn.Tanh):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def split_columns(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return shard_(model, mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] == 6 else None)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    first, last = (name for name, module in model.named_children() if isinstance(module, nn.Linear))
    return parallelize_module(model, mesh, {first: ColwiseParallel(), last: RowwiseParallel()})


def both(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return shard_(tensor_parallel(model, mesh["tp"]), mesh["dp"])


@dataclass(frozen=True)
class Way:
    """To share a model among ranks."""

    shape: tuple[int, ...]
    share: Callable[[nn.Module, DeviceMesh], nn.Module]
    build: Callable[[int], nn.Sequential] = net
    splits_batch: bool = True  # along the first dimension of the mesh; else along both
    scope: pomona.Scope = field(default_factory=pomona.Scope)


WAYS = {
    "fsdp over 2": Way((2,), shard_),
    "fsdp over 2, columns": Way((2,), split_columns),
    "fsdp over 2, uneven": Way((2,), shard_, odd_net),
    "fsdp over 3, uneven": Way((3,), shard_, odd_net),
    "fsdp over 4, biases too": Way((4,), shard_, scope=pomona.Scope(min_ndim=1)),
    "fsdp over 2, two copies": Way((2, 2), shard_),
    "fsdp over 1": Way((1,), shard_),
    "tensor parallel over 2": Way((2,), tensor_parallel, normed_net, False, pomona.Scope(min_ndim=1)),
    "fsdp and tensor parallel": Way((2, 2), both, normed_net, scope=pomona.Scope(min_ndim=1)),
}


def data_of(way: Way, num: int, seed: int = 0) -> list[Any]:
    if way.build is not odd_net:
        return batches(num, seed)
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(12, 7, generator=generator), torch.randn(12, 1, generator=generator)) for _ in range(num)]


def my_share(way: Way, mesh: DeviceMesh, batch: Any) -> Any:
    """This rank's part of a batch; ranks that compute one thing together share one."""
    if not way.splits_batch:
        return batch
    if way.share is both:
        rank, size = mesh.get_local_rank("dp"), mesh["dp"].size()
    else:
        rank, size = mesh.get_coordinate()[0], mesh.size(0)
        if mesh.ndim == 2:
            rank, size = rank * mesh.size(1) + mesh.get_coordinate()[1], mesh.size()
    return batch[0][rank::size], batch[1][rank::size]


def give_gathered(reference: nn.Module, model: nn.Module) -> None:
    """The gradients of the shared model to one that is whole, on every rank."""
    for theirs, mine in zip(reference.parameters(), model.parameters(), strict=True):
        theirs.grad = whole(mine.grad).clone() if mine.grad is not None else None


def whole(tree: Any) -> Any:
    """DTensors put together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(one) for one in tree] if isinstance(tree, (list, tuple)) else tree


@dataclass
class Both:
    """A model that is shared, and one that is whole and gets the gradients of the other."""

    way: Way
    mesh: DeviceMesh
    method: pomona.Method
    make: Callable[..., Any]

    def __post_init__(self) -> None:
        self.reference = self.way.build(0)
        self.reference_optimizer = self.make(self.reference.parameters())
        self.alone = pomona.Pruner(self.reference, self.reference_optimizer, self.method, scope=self.way.scope)
        self.begin(seed=0)

    def begin(self, seed: int) -> None:
        self.model = self.way.share(self.way.build(seed), self.mesh)
        self.optimizer = self.make(self.model.parameters())
        self.pruner = pomona.Pruner(self.model, self.optimizer, self.method, scope=self.way.scope)

    def train(self, data: list[Any], check: bool = True) -> None:
        for i, batch in enumerate(data):
            self.optimizer.zero_grad()
            loss_of(self.model, my_share(self.way, self.mesh, batch)).backward()
            give_gathered(self.reference, self.model)
            self.optimizer.step()
            self.reference_optimizer.step()
            if check:
                self.compare(f"step {i}")

    def compare(self, when: str) -> None:
        mine, theirs = whole(self.pruner.state_dict()), self.alone.state_dict()
        for key in theirs:
            assert bits(mine[key]) == bits(theirs[key]), (when, key, mine[key], theirs[key])
        for name, parameter in self.alone.parameters().items():
            assert bits(whole(self.pruner.parameters()[name].detach())) == bits(parameter.detach()), (when, name)
        assert self.pruner.metrics() == self.alone.metrics()

    def harden(self) -> tuple[pomona.Report, pomona.Report]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these runs are short
            return self.pruner.harden(), self.alone.harden()


def both_of(way: str, name: str) -> Both | None:
    case = next(case for case in METHODS if case.name == name)
    mesh = mesh_of(WAYS[way].shape)
    return Both(WAYS[way], mesh, case.method, OPTIMIZERS[case.optimizers[0]]) if is_on(mesh) else None


def prunes_as_on_one_process(way: str, name: str, steps: int, budget: int | None) -> None:
    """With the gradients that the shared model gives, everything is compared at every step, bit for bit."""
    run = both_of(way, name)
    if run is None:
        return
    data = data_of(run.way, 2 * steps)
    run.train(data[:steps])
    with run.pruner.trial_cut() as tried, run.alone.trial_cut() as tried_alone:
        assert tried == tried_alone
        with torch.no_grad():
            loss_of(run.model, my_share(run.way, run.mesh, data[0]))  # leaves whole weights in the root of FSDP
    run.compare("after a trial")
    states = run.model.state_dict(), run.optimizer.state_dict(), run.pruner.state_dict()
    run.begin(seed=1)
    for one, state in zip((run.model, run.optimizer, run.pruner), states, strict=True):
        one.load_state_dict(state)
    run.train(data[steps : steps + 4])
    with torch.no_grad():
        loss_of(run.model, my_share(run.way, run.mesh, data[0]))
    reports = run.harden()
    assert reports[0] == reports[1]
    if budget is not None:
        assert sum(int((~mask).sum()) for mask in run.alone.state_dict()["pruned"].values()) == budget
    run.compare("harden")
    run.train(data[steps + 4 : steps + 8])
    assert run.pruner.verify() == run.alone.verify()
    assert pomona.report(run.model, run.way.scope).layers == pomona.report(run.reference, run.way.scope).layers
