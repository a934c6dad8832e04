"""Weights that several ranks hold together: which block is whose, and sums over the ranks. All collectives are here.

The rest of the library sees plain tensors, the blocks of this rank. A function that needs a number of the whole network
takes the weights' shards and sums over their ranks, each element once, however many ranks hold a copy of it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

Positions = NDArray[np.int64]

_PLAIN = (Tensor, nn.Parameter)

_is_sharded: ContextVar[bool] = ContextVar("_is_sharded", default=False)


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Those who sum together; each of them must make the same calls in the same order.

    Attributes:
        groups: process groups, reduced one after the other; none where this rank is alone.
        device: where their backend takes tensors.
        size: how many they are.
        position: of this rank among them, 0 <= position < size.
    """

    groups: tuple[Any, ...]
    device: torch.device
    size: int
    position: int

    def sum_(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, in place; of int64 it is exact."""
        return self._reduce_(numbers, dist.ReduceOp.SUM)

    def max_(self, numbers: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        return self._reduce_(numbers, dist.ReduceOp.MAX)

    def sum(self, counts: Sequence[int]) -> list[int]:
        """The sums over the ranks, one for each place."""
        sums: list[int] = self.sum_(torch.tensor(counts, dtype=torch.int64)).tolist()
        return sums

    def max(self, numbers: Sequence[float]) -> list[float]:
        """The maxima over the ranks, one for each place."""
        maxima: list[float] = self.max_(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return maxima

    def any(self, claim: bool) -> bool:
        """Whether it is true on a rank."""
        return bool(self.max([claim])[0])

    def agree(self, text: str) -> bool:
        """Whether all have the same text."""
        mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        largest, minus_smallest = self.max_(torch.tensor([mine, -mine])).tolist()
        return bool(largest == -minus_smallest)

    def gather(self, numbers: Tensor) -> Tensor:
        """The int64 numbers of all ranks, as many of each, one row a rank."""
        rows = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        rows[self.position] = numbers
        return self.sum_(rows)

    def _reduce_(self, numbers: Tensor, operation: Any) -> Tensor:
        if not self.groups or not numbers.numel():
            return numbers
        there = numbers.to(self.device)
        for group in self.groups:
            _all_reduce(there, operation, group)
        return there if there is numbers else numbers.copy_(there)


def _all_reduce(numbers: Tensor, operation: Any, group: Any) -> None:
    dist.all_reduce(numbers, op=operation, group=group)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The block of a tensor that this rank holds.

    Attributes:
        shape: of the whole tensor.
        start: in each dimension, the place of the block's first element in the whole tensor.
        ranks: those who hold the network together.
        counts: whether this copy of the block is the one that counts; each element of the whole has one such copy.
        replicas: the ranks that hold copies of this block; None where it is the only one.
    """

    shape: torch.Size
    start: tuple[int, ...]
    ranks: Ranks
    counts: bool
    replicas: Ranks | None = None

    def places(self, flat: Positions, shape: Sequence[int]) -> Positions:
        """Flat indices in the whole tensor, of flat indices in the block, which has this shape; rising as they do."""
        if not len(flat) or not shape:
            return flat
        indices = np.unravel_index(flat, tuple(shape))
        moved = tuple(index + start for index, start in zip(indices, self.start, strict=True))
        return np.asarray(np.ravel_multi_index(moved, tuple(self.shape)), dtype=np.int64)

    def block(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        """This rank's block, of this shape, of the whole tensor: a view."""
        return whole[tuple(slice(start, start + size) for start, size in zip(self.start, shape, strict=True))]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. (To ask by its class would import two seconds of torch into every process.)"""
    if type(tensor) in _PLAIN:  # a quick answer for most
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's block of a DTensor, a plain tensor that shares its memory; any other tensor is its own block."""
    if not is_sharded(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    sharded: Any = tensor.detach()
    with torch.no_grad():
        block: Any = sharded.to_local()
    result: Tensor = block.wait() if hasattr(block, "wait") else block
    return result


def like(parameter: Tensor, block: Tensor) -> Tensor:
    """A block of this rank as the DTensor that is laid out as the parameter; as it is, if that is none."""
    if not is_sharded(parameter):
        return block
    from torch.distributed.tensor import DTensor

    layout: Any = parameter
    return DTensor.from_local(
        block,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def take(tensor: Tensor, parameter: Tensor, shard: Shard | None) -> Tensor:
    """This rank's block of a tensor of the parameter's shape, which may be whole, or laid out in another way."""
    if shard is None or tensor.ndim == 0:
        return _whole(tensor) if is_sharded(tensor) else tensor
    if not is_sharded(tensor):
        return shard.block(tensor, local(parameter).shape)
    if _layout(tensor) == _layout(parameter):
        return local(tensor)
    return shard.block(_whole(tensor), local(parameter).shape)


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tuple(tensor.placements)


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor()
    return whole


@contextmanager
def working_on(shards: Mapping[str, Shard]) -> Iterator[None]:
    """Inside, a selection that is not told of which weights is refused, if there are shards."""
    token = _is_sharded.set(bool(shards))
    try:
        yield
    finally:
        _is_sharded.reset(token)


def is_working_on_shards() -> bool:
    return _is_sharded.get()


# Who holds what


def shards_of(parameters: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Name -> shard; empty if there is no DTensor among the parameters. All ranks must call it.

    The largest mesh is that of all. A DTensor on a part of it, and a plain tensor, count as copies along the rest.

    Raises:
        ValueError: the meshes are not parts of one, or a tensor is laid out in a way that is not known; names it.
    """
    meshes: dict[str, Any] = {name: p.device_mesh for name, p in parameters.items() if is_sharded(p)}  # type: ignore[attr-defined]  # of DTensor
    if not meshes:
        return {}
    mesh = max(meshes.values(), key=lambda mesh: (mesh.ndim, mesh.size()))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not on {mesh}, on which the weights are")
    ranks = _ranks(mesh, range(mesh.ndim))
    copies: dict[tuple[int, ...], Ranks | None] = {}
    shards = {}
    scattered = ""
    for name, parameter in parameters.items():
        start, split = _block(name, parameter, mesh)
        if start is None:
            scattered = scattered or name
            continue
        copied = tuple(d for d in range(mesh.ndim) if d not in split)
        if copied not in copies:
            copies[copied] = _ranks(mesh, copied) if math.prod(mesh.size(d) for d in copied) > 1 else None
        counts = not any(coordinate[d] for d in copied)
        shards[name] = Shard(parameter.shape, start, ranks, counts, copies[copied])
    if ranks.any(bool(scattered)):
        placed: Any = parameters[scattered].placements if scattered else ""  # type: ignore[attr-defined]  # of DTensor
        raise ValueError(
            f"{scattered or 'a weight, named on another rank,'} is placed as {placed} so that a rank's block is not "
            f"one block of neighbours; make its sizes divisible by the mesh's, or exclude it: "
            f"Scope(exclude=[{scattered!r}])"
        )
    return shards


def _ranks(mesh: Any, dims: Sequence[int]) -> Ranks:
    sizes = [mesh.size(d) for d in dims]
    size = math.prod(sizes)
    coordinate = mesh.get_coordinate()
    position = 0
    for d, extent in zip(dims, sizes, strict=True):
        position = position * extent + coordinate[d]
    if size == dist.get_world_size():
        groups: tuple[Any, ...] = (dist.group.WORLD,) if size > 1 else ()
    else:
        groups = tuple(mesh.get_group(d) for d, extent in zip(dims, sizes, strict=True) if extent > 1)
    return Ranks(groups, torch.device(mesh.device_type), size, position)


def _block(name: str, parameter: Any, mesh: Any) -> tuple[tuple[int, ...] | None, list[int]]:
    """Where this rank's block starts, None if it is scattered, and the mesh's dimensions that split the tensor."""
    start = [0] * parameter.ndim
    if not is_sharded(parameter):
        return tuple(start), []
    dims = _dims(name, parameter.device_mesh, mesh)
    coordinate = mesh.get_coordinate()
    rows = [torch.arange(size) for size in parameter.shape]  # of the whole, those that are here
    split = []
    for d, placement in zip(dims, parameter.placements, strict=True):
        if placement.is_replicate():
            continue
        num_parts = getattr(placement, "split_factor", 1 if placement.is_shard() else 0)
        if placement.is_partial() or not num_parts:
            raise ValueError(
                f"{name} is placed as {placement}; weights can be pruned that are placed as Shard or Replicate"
            )
        # FSDP over tensor parallelism takes its piece of each of the parts that the latter makes.
        parts = [_piece(rows[placement.dim], num_parts, i) for i in range(num_parts)]
        rows[placement.dim] = torch.cat([_piece(part, mesh.size(d), coordinate[d]) for part in parts])
        split.append(d)
    for i, (here, size) in enumerate(zip(rows, local(parameter).shape, strict=True)):
        start[i] = int(here[0]) if len(here) else 0
        if len(here) != size or (size and int(here[-1]) - start[i] != size - 1):
            return None, split
    return tuple(start), split


def _piece(rows: Tensor, num: int, i: int) -> Tensor:
    """The i-th of ``num`` pieces as ``torch.chunk`` cuts them, which are fewer where there are few rows."""
    size = -(-len(rows) // num)
    return rows[i * size : (i + 1) * size]


def _dims(name: str, part: Any, mesh: Any) -> list[int]:
    """The dimensions of the mesh that make up a part of it."""
    if part == mesh:
        return list(range(mesh.ndim))
    names, all_names = part.mesh_dim_names or (), mesh.mesh_dim_names or ()
    if names and set(names) <= set(all_names):
        dims = [all_names.index(one) for one in names]
        coordinate = mesh.get_coordinate()
        here = tuple(slice(None) if d in dims else coordinate[d] for d in range(mesh.ndim))
        if sorted(dims) == dims and torch.equal(mesh.mesh[here], part.mesh):
            return dims
    raise ValueError(
        f"{name} is on {part}, which is no part of {mesh}, the largest on which there are weights in scope; a budget "
        f"needs one mesh. Leave one of them out of the scope"
    )


# Numbers of the whole network


def sum_counts(counts: Sequence[int | Tensor], shards: Sequence[Shard | None]) -> list[int]:
    """One number of each block -> one of each whole tensor. One reduction for all; none where nothing is sharded."""
    if not shards or shards[0] is None:
        return [int(count) for count in counts]
    mine = [int(count) * _counts(shard) for count, shard in zip(counts, shards, strict=True)]
    return shards[0].ranks.sum(mine)


def _counts(shard: Shard | None) -> bool:
    return shard is not None and shard.counts


def sum_vectors(vectors: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    """As ``sum_counts``, of int64 vectors; those of one place have one length on all ranks."""
    if not shards or shards[0] is None:
        return list(vectors)
    mine = [v * _counts(shard) for v, shard in zip(vectors, shards, strict=True)]
    return list(torch.split(shards[0].ranks.sum_(torch.cat(mine)), [len(v) for v in vectors]))


def max_over(numbers: Sequence[float], shards: Sequence[Shard | None]) -> list[float]:
    """The largest that any rank has, for each place."""
    if not shards or shards[0] is None:
        return list(numbers)
    return shards[0].ranks.max(numbers)


# Whether copies are still copies


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that follows from the bits of a plain tensor, and not from the order of its elements."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64)


def differing(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of those plain tensors that are not the same on all ranks that should hold copies. One reduction."""
    if not tensors:
        return []
    sums = torch.stack([checksum(t).to("cpu") for t in tensors.values()])
    largest = ranks.max_(torch.cat([sums, ~sums]))  # ~x is -x - 1: its maximum is the minimum of x, and never overflows
    return list(itertools.compress(tensors, (largest[: len(sums)] != ~largest[len(sums) :]).tolist()))


def replicas(model: nn.Module) -> Ranks | None:
    """The ranks of a DistributedDataParallel, which hold a copy of the model each; None for any other model."""
    plain: Any = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(plain, nn.parallel.DistributedDataParallel):
        return None
    group: Any = plain.process_group
    if dist.get_world_size(group) == 1:
        return None
    return Ranks((group,), plain.device, dist.get_world_size(group), dist.get_rank(group))


# Engines


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put back its shards where a forward pass has left whole weights in their place."""
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            put_back: Any = module.reshard
            put_back()


def refuse_flat(model: object, optimizer: object) -> None:
    """ValueError for engines that flatten the weights, so that none is left to prune by name."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for one in (*modules, model, optimizer):
        kinds = [kind for kind in type(one).__mro__ if kind is not object]
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the weights, so that there is none to prune; use its "
                "successor, torch.distributed.fsdp.fully_shard, which Pomona works with"
            )
        if any("DeepSpeed" in kind.__name__ or kind.__module__.partition(".")[0] == "deepspeed" for kind in kinds):
            raise ValueError(
                f"{type(one).__name__} is of DeepSpeed, which flattens the weights, so that there is none to prune; "
                f"use torch.distributed.fsdp.fully_shard or DistributedDataParallel with a torch optimizer"
            )
