"""What the ranks run. Each function is called on all four; those outside of its mesh return at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import pomona
from pomona import distributed
from pomona.distributed import local, shards_of
from pomona.score import Score
from pomona.selection import NonFiniteError, kth_largest
from pomona.selection.groups import check_fits, violations
from pomona.selection.top_k import select, top_k
from pomona.weight import Weight
from tests import oracles
from tests.problems import batches, bits, loss_of, net, sparse_net
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


# Each rank has the whole already; torch 2.6 cannot be told so, and sends it around.
_EACH_ITS_OWN: dict[str, Any] = (
    {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
)


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    names = ("dp", "tp")[: len(shape)]
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)


def is_on(mesh: DeviceMesh) -> bool:
    return mesh.get_coordinate() is not None


def lay_out(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    fitting = [Replicate() if isinstance(p, Shard) and p.dim >= whole.ndim else p for p in placements]
    return distribute_tensor(whole, mesh, fitting, **_EACH_ITS_OWN)


def part(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor, as a DTensor is laid out."""
    return local(distribute_tensor(whole, like.device_mesh, like.placements, **_EACH_ITS_OWN))


def weights_of(tensors: Sequence[DTensor]) -> list[Weight]:
    shards = shards_of({str(i): t for i, t in enumerate(tensors)})
    return [Weight(str(i), local(t), local(t), {}, {}, shard=shards[str(i)]) for i, t in enumerate(tensors)]


def selects_as_a_full_sort(
    layout: str,
    arrays: list[np.ndarray],
    factors: list[np.ndarray | None],
    k: int,
    dtype: torch.dtype,
    changed: dict[str, Any],
) -> None:
    """With constants of the selection changed: the ways for few numbers and for many, for a CPU and for others."""
    shape, placements = LAYOUTS[layout]
    mesh = mesh_of(shape)
    if not is_on(mesh):
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(f"pomona.selection.{name}", value)
        _select(mesh, placements, arrays, factors, k, dtype)


def groups_as_on_one_process(layout: str, arrays: list[np.ndarray], k: int, granularity: str, allocation: str) -> str:
    """The masks of this rank's blocks are parts of those of the whole; or why these groups cannot be had."""
    shape, placements = LAYOUTS[layout]
    mesh = mesh_of(shape)
    if not is_on(mesh):
        return "not there"
    ws = [torch.from_numpy(a).float() for a in arrays]
    tensors = [lay_out(w, mesh, placements) for w in ws]
    weights = weights_of(tensors)
    try:
        check_fits(weights, granularity)
    except ValueError as error:
        return str(error)
    how: Any = {"allocation": allocation, "granularity": granularity, "min_density": 0.1}
    masks = top_k([Score(local(t)) for t in tensors], k, of=weights, **how)
    for got, mask, like in zip(masks, top_k([Score(w) for w in ws], k, **how), tensors, strict=True):
        assert torch.equal(got, part(mask, like)), (got, mask)
    # What is whole on all ranks together is no violation; what one rank changes is, and all tell the same.
    pruned = [~mask for mask in masks]
    if allocation == "global" and k * 2 == sum(w.numel() for w in ws):
        assert violations(granularity, pruned, weights) == []
    return "as one"


def on_a_device(scores: Sequence[Score]) -> bool:
    return False


VARIANTS: list[dict[str, Any]] = [
    {},
    {"ranks._GATHERED": 0},
    {"ranks._GATHERED": 16, "keys.CHUNK": 8, "cpu.CHUNK": 8, "ranks.CHUNK": 8},
    {"ranks.are_on_cpu": on_a_device},
    {"ranks.are_on_cpu": on_a_device, "ranks._GATHERED": 0, "device._DEVICE_CHUNK": 8},
]


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
    floor = 0.3
    if sum(math.ceil(round(floor * w.numel(), 6)) for w in ws) <= k:
        alone = select([Score(w, g) for w, g in zip(ws, gs, strict=True)], k, min_density=floor)
        shared = select(scores, k, min_density=floor, of=weights)
        assert shared.counts == alone.counts
        for got, mask, like in zip(shared.masks(), alone.masks(), tensors, strict=True):
            assert torch.equal(got, part(mask, like))
    if k:
        one = kth_largest([Score(w, g) for w, g in zip(ws, gs, strict=True)], k)
        assert kth_largest(scores, k, of=weights) == one
        assert k < len(whole) or kth_largest(scores, sum(w.numel() for w in ws) + 1, of=weights) == 0.0


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
    "fsdp over 4, biases too": Way((4,), shard_, scope=pomona.Scope(also="*")),
    "fsdp over 2, two copies": Way((2, 2), shard_),
    "fsdp over 1": Way((1,), shard_),
    "tensor parallel over 2": Way((2,), tensor_parallel, normed_net, False, pomona.Scope(also="*")),
    "fsdp and tensor parallel": Way((2, 2), both, normed_net, scope=pomona.Scope(also="*")),
}


def has_plain_layers(way: str) -> bool:
    """Whether what is in scope is what the contract table prunes."""
    return WAYS[way].build is net and WAYS[way].scope == pomona.Scope()


def keeps_pairs_of_inputs(way: str) -> bool:
    """Whether two neighbouring inputs of a layer are on one rank, in all layers."""
    return has_plain_layers(way) and WAYS[way].share is not split_columns


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
            return self.pruner.harden(one_shot=True), self.alone.harden(one_shot=True)


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
    assert run.pruner.density_if_cut() == run.alone.density_if_cut()
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


# One thing each


def learns_zeros_as_on_one_process(way: str) -> None:
    """GSM, of a network with a layer that begins as zeros on all ranks."""
    run = both_of(way, "gsm")
    if run is None:
        return
    with torch.no_grad():
        for model in (run.model, run.reference):
            next(p for p in reversed(list(model.parameters())) if p.ndim == 2).zero_()
    run.train(data_of(run.way, 6))
    assert bool(run.alone.state_dict()["shared"]["began_zero"].any())
    assert all(bool(p.any()) for p in run.alone.parameters().values())


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def traffic_of_gsm() -> list[list[int]]:
    """The bytes of each reduction, step by step; of the same run on two ranks and on a mesh of two by two."""
    sent: list[int] = []
    plain = distributed._all_reduce

    def counting(numbers: Tensor, operation: Any, group: Any) -> None:
        sent.append(numbers.numel() * numbers.element_size())
        plain(numbers, operation, group)

    steps = []
    for way in ("fsdp over 2", "fsdp over 2, two copies"):
        run = both_of(way, "gsm")
        if run is None:
            continue
        distributed._all_reduce = counting
        try:
            for batch in data_of(run.way, 5):
                sent.clear()
                run.train([batch], check=False)
                steps.append(list(sent))
        finally:
            distributed._all_reduce = plain
    return steps


def a_nan_on_one_rank_is_skipped_on_all() -> tuple[int, int] | None:
    run = both_of("fsdp over 2", "gsm")
    if run is None:
        return None
    run.train(data_of(run.way, 3))
    before = bits(whole([run.model.state_dict(), run.optimizer.state_dict()["state"]]))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    if run.mesh.get_rank() == 1:
        local(next(run.model.parameters()).grad)[0] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.step()
    assert any("not finite at step 4" in str(one.message) for one in caught)
    assert before == bits(whole([run.model.state_dict(), run.optimizer.state_dict()["state"]]))
    return run.pruner.num_steps, run.pruner.num_skipped


def a_step_without_rates_counts_where_one_rank_has_a_gradient() -> int | None:
    run = both_of("fsdp over 2", "magnitude, gradual")
    if run is None:
        return None
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    assert run.pruner.num_steps == 0  # as distributed checkpoints make
    if run.mesh.get_rank() == 1:
        local(next(run.model.parameters()).grad)[0] = 1.0
    run.optimizer.step()
    return run.pruner.num_steps


@dataclass(frozen=True)
class Forgetful(pomona.Method):
    """Whose author has not heard of ranks."""

    which: str

    def support(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        scores = [pomona.magnitude(w.value) for w in weights]
        if self.which == "kth_largest":
            kth_largest(scores, 3)
        if self.which == "others":
            return pomona.global_top_k(scores, 3, of=weights[:1])
        return pomona.global_top_k(scores, 3)


class Shaped(Forgetful):
    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"rows": torch.zeros(len(w.value) + 1)}


def what_is_refused() -> dict[str, str]:
    """Name -> message, on ranks 0 and 1."""
    mesh = mesh_of((2,))
    square, other = mesh_of((2, 2)), mesh_of((3,))
    if not is_on(mesh):
        return {}
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.5)
    gsm = pomona.GSM(sparsity=0.75)
    messages = {}

    def pruner_of(model: nn.Module, method: pomona.Method = gsm) -> pomona.Pruner:
        return pomona.Pruner(model, sgd(model.parameters()), method)

    for which in ("global_top_k", "kth_largest", "others"):
        pruner = pruner_of(shard_(net(), mesh), Forgetful(which))
        messages[which] = error_of(partial(pruner.harden, one_shot=True))
    messages["shape of state"] = error_of(lambda: pruner_of(shard_(net(), mesh), Shaped("")))

    model = net()
    early = pruner_of(model)
    shard_(model, mesh)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    messages["too early, step"] = error_of(early.optimizer.step)
    messages["too early, harden"] = error_of(early.harden)

    model = net()
    model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh, [Partial()]))
    messages["partial"] = error_of(lambda: pruner_of(model))

    model = net()
    mine = model[0].weight.detach()[[0, 1, 4, 5]] if mesh.get_rank() == 0 else model[0].weight.detach()[[2, 3, 6, 7]]
    every_second = _StridedShard(0, split_factor=2)
    model[0].weight = nn.Parameter(DTensor.from_local(mine, mesh, [every_second], shape=(8, 6), stride=(6, 1)))
    messages["scattered"] = error_of(lambda: pruner_of(model))

    model = net()
    model[0].weight = nn.Parameter(lay_out(model[0].weight.detach(), square, [Shard(0), Replicate()]))
    model[2].weight = nn.Parameter(lay_out(model[2].weight.detach(), other, [Shard(0)]))
    messages["two meshes"] = error_of(lambda: pruner_of(model))

    model = net()
    model[0].weight = nn.Parameter(lay_out(model[0].weight.detach(), mesh, [Shard(0)]))
    pruner = pruner_of(model)
    model[0].weight.grad = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()])
    messages["gradient"] = error_of(pruner.optimizer.step)

    sparsity = 0.75 if mesh.get_rank() else 0.5
    messages["methods"] = error_of(lambda: pruner_of(shard_(net(), mesh), pomona.GSM(sparsity=sparsity)))
    messages["methods"] = messages["methods"].replace("0.75", "0.5")

    class FullyShardedDataParallel(nn.Linear):
        pass

    class DeepSpeedEngine(nn.Linear):
        pass

    messages["fsdp1"] = error_of(lambda: pruner_of(FullyShardedDataParallel(4, 4)))
    messages["deepspeed"] = error_of(lambda: pruner_of(DeepSpeedEngine(4, 4)))
    return messages


def whole_and_shared_weights_in_one_scope() -> pomona.Report | None:
    """A plain tensor among DTensors counts once."""
    mesh = mesh_of((2,))
    if not is_on(mesh):
        return None
    reports = []
    for is_shared in (True, False):
        model = net()
        if is_shared:
            fully_shard(model[0], mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(sparsity=0.75))
        reports.append(pruner.harden(one_shot=True))
        assert pruner.verify().nonzero == 18
    assert reports[0] == reports[1]
    return reports[0]


def what_is_frozen_is_left() -> tuple[int, int] | None:
    """Survivors, and those of the layer that is frozen."""
    run = both_of("fsdp over 2", "magnitude, gradual")
    if run is None:
        return None
    run.train(data_of(run.way, 3))
    for model in (run.model, run.reference):
        model[0].requires_grad_(False)
    before = bits(local(run.model[0].weight))
    run.train(data_of(run.way, 9)[3:])
    assert bits(local(run.model[0].weight)) == before
    reports = run.harden()
    assert reports[0] == reports[1] and reports[0].layers[0].reason == "frozen since step 3: keeps its values"
    run.compare("after harden")
    run.train(data_of(run.way, 3))
    assert bits(local(run.model[0].weight)) == before
    assert run.pruner.verify() == run.alone.verify()
    again = run.pruner.state_dict()
    run.begin(seed=1)
    run.pruner.load_state_dict(again)
    return reports[0].nonzero, reports[0].layers[0].nonzero


def mixed_precision() -> int | None:
    """Weights in float32, computed with in bfloat16."""
    mesh = mesh_of((2,))
    if not is_on(mesh):
        return None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    way = Way((2,), lambda model, mesh: shard_(model, mesh, mp_policy=policy))
    run = Both(way, mesh, pomona.GSM(sparsity=0.75), OPTIMIZERS["momentum"])
    run.train([(x, y) for x, y in data_of(way, 6)])
    reports = run.harden()
    assert reports[0] == reports[1]
    run.train(data_of(way, 3))
    return run.pruner.verify().nonzero


def holds_zeros_and_those_of_copies() -> int | None:
    mesh = mesh_of((2,))
    if not is_on(mesh):
        return None
    model, copy = shard_(sparse_net(), mesh), shard_(net(1), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = pomona.hold(model, optimizer)
    pruner.harden(copy)
    for x, y in batches(3):
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        optimizer.step()
    assert pomona.report(copy).nonzero == 36
    with torch.no_grad():
        local(copy[0].weight)[:] = 1.0
    assert "24 of the zeros of 0.weight" in error_of(lambda: pruner.verify(copy))
    assert "is not a copy of the pruned model" in error_of(lambda: pruner.verify(net()))
    return pruner.verify().nonzero


def copies_that_differ_are_told() -> str | None:
    run = both_of("fsdp over 2, two copies", "magnitude, gradual")
    assert run is not None
    run.harden()
    run.pruner.verify()
    value = local(run.model[2].weight)
    if run.mesh.get_coordinate()[0] == 1 and len(value):
        value[value != 0] *= 2.0
    if run.mesh.get_coordinate()[0] == 1:
        run.pruner._hooks.num_skipped += 1
    return error_of(run.pruner.verify)


def data_parallel() -> tuple[int, list[str]]:
    """What a run of GSM sends, and what is said when a rank drifts."""
    model = nn.parallel.DistributedDataParallel(net(dist.get_rank()))
    reference = net()
    make = OPTIMIZERS["momentum"]
    runs = []
    for one in (model, reference):
        optimizer = make(one.parameters())
        runs.append((one, optimizer, pomona.Pruner(one, optimizer, pomona.GSM(sparsity=0.75), check_every=8)))
    calls: list[int] = []
    plain = distributed._all_reduce

    def counting(*args: Any) -> None:
        calls.append(1)
        plain(*args)

    distributed._all_reduce = counting
    try:
        num_before = 0
        for i, (x, y) in enumerate(batches(11)):
            mine = slice(dist.get_rank(), None, dist.get_world_size())
            loss_of(model, (x[mine], y[mine])).backward()
            for theirs, p in zip(reference.parameters(), model.parameters(), strict=True):
                theirs.grad = p.grad.clone()
            for _, optimizer, _ in runs:
                optimizer.step()
                optimizer.zero_grad()
            if i == 6:
                num_before = len(calls)
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                assert bits(p.detach()) == bits(q.detach())
    finally:
        distributed._all_reduce = plain
    assert len(calls) == 1  # at step 8
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module[2].weight[0, 0] += 1.0
    errors = []
    for batch in batches(5):
        loss_of(model, batch).backward()
        errors.append(error_of(runs[0][1].step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs[0][2].harden()
    errors.append(error_of(runs[0][2].verify))
    return num_before, errors


# Checkpoints


def go_on(size: int, name: str, start: str, end: str, first: int, num: int) -> Any:
    """Steps ``first``, ... on so many ranks, 0 for a process without ranks, from a checkpoint to a checkpoint."""
    mesh = mesh_of((max(size, 1),))
    if not is_on(mesh):
        return None
    case = next(case for case in METHODS if case.name == name)
    model = odd_net(seed=first)
    if size:
        shard_(model, mesh)
    optimizer = OPTIMIZERS[case.optimizers[0]](model.parameters())
    pruner = pomona.Pruner(model, optimizer, case.method)
    where: dict[str, Any] = {"process_group": mesh.get_group()} if size else {"no_dist": True}
    if start:
        states = states_of(model, optimizer, pruner)
        dcp.load(states, checkpoint_id=start, **where)
        set_model_state_dict(model, states["model"])
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
    assert pruner.num_steps == first
    for step in range(first, first + num):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator)
            p.grad = lay_out(g, p.device_mesh, p.placements) if size else g
        optimizer.step()
        if step == 13:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner.harden()
    if end:
        dcp.save(states_of(model, optimizer, pruner), checkpoint_id=end, **where)
        return None
    return bits(whole({**pruner.state_dict(), "model": dict(model.state_dict()), "steps": pruner.num_steps}))


def states_of(model: nn.Module, optimizer: Any, pruner: pomona.Pruner) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "pruner": pruner,
    }


def a_whole_state_is_taken_apart() -> None:
    """A state of one process, and one that is laid out in another way, load into shards."""
    mesh = mesh_of((2,))
    if not is_on(mesh):
        return
    run = both_of("fsdp over 2", "weightmom")
    assert run is not None
    run.train(data_of(run.way, 10))
    run.harden()
    state = run.alone.state_dict()
    for way in (shard_, split_columns):
        model = way(net(1), mesh)
        fresh = pomona.Pruner(model, OPTIMIZERS["momentum"](model.parameters()), run.method)
        fresh.load_state_dict(state)
        assert bits(whole(fresh.state_dict())) == bits(run.alone.state_dict())
        state = fresh.state_dict()
    run.alone.load_state_dict(state)
    assert bits(run.alone.state_dict()) == bits(whole(state))


def blocks_are_where_they_are_said_to_be(rows: int, columns: int) -> list[str]:
    """Weights that are numbered by their place, laid out by torch itself; what is refused, by name of the layout."""
    refused = []
    numbers = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)

    def numbered() -> nn.Module:
        model = nn.Sequential(nn.Linear(columns, rows, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(numbers)
        return model

    square = mesh_of((2, 2))
    made: dict[str, nn.Module] = {}
    for name, style in (("rows", ColwiseParallel()), ("columns", RowwiseParallel())):
        for under in (False, True):
            model = parallelize_module(numbered(), square["tp"], {"0": style})
            try:
                made[f"{name}{', fsdp' if under else ''}"] = shard_(model, square["dp"]) if under else model
            except NotImplementedError:
                refused.append(f"torch: {name}")
    made["fsdp"] = shard_(numbered(), square)
    for name, model in made.items():
        weight = model[0].weight
        try:
            shard = shards_of({"weight": weight})["weight"]
        except ValueError as error:
            assert "does not hold one contiguous block" in str(error), error
            refused.append(name)
            continue
        block = local(weight)
        places = shard.places(np.arange(block.numel()), block.shape)
        assert block.reshape(-1).tolist() == places.tolist(), (name, block, places)
        assert torch.equal(shard.block(numbers, block.shape), block)
    return refused


def a_loss_scale_and_an_overflow_on_one_rank() -> tuple[int, int, float] | None:
    run = both_of("fsdp over 2", "gsm")
    if run is None:
        return None
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, batch in enumerate(data_of(run.way, 5)):
        run.optimizer.zero_grad()
        x, y = my_share(run.way, run.mesh, batch)
        loss = loss_of(run.model, (x, y))
        if i == 2 and run.mesh.get_rank() == 0:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
    return run.pruner.num_steps, run.pruner.num_skipped, scaler.get_scale()
