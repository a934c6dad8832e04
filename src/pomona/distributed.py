"""Weights spread over ranks: which rank holds which block, and sums over ranks. All collectives are here.

The rest of the library sees plain tensors, the blocks of this rank. A function that needs a number for the whole
network takes the weights' shards and sums over their ranks; each element counts once, even if several ranks hold a
copy of it.
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
    """Ranks that reduce together; all must make the same calls in the same order.

    Attributes:
        groups: process groups, reduced one after the other; empty if this rank is alone.
        device: where their backend expects tensors.
        size: number of ranks.
        position: index of this rank among them, 0 <= position < size.
    """

    groups: tuple[Any, ...]
    device: torch.device
    size: int
    position: int

    def sum_(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks, in place; exact for int64."""
        return self._reduce_(numbers, dist.ReduceOp.SUM)

    def max_(self, numbers: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        return self._reduce_(numbers, dist.ReduceOp.MAX)

    def sum(self, counts: Sequence[int]) -> list[int]:
        """Elementwise sums over the ranks."""
        sums: list[int] = self.sum_(torch.tensor(counts, dtype=torch.int64)).tolist()
        return sums

    def max(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise maxima over the ranks."""
        maxima: list[float] = self.max_(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return maxima

    def any(self, claim: bool) -> bool:
        """True if ``claim`` is true on any rank."""
        return bool(self.max([claim])[0])

    def agree(self, text: str) -> bool:
        """True if all ranks have the same text."""
        mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        largest, minus_smallest = self.max_(torch.tensor([mine, -mine])).tolist()
        return bool(largest == -minus_smallest)

    def gather(self, numbers: Tensor) -> Tensor:
        """Gather int64 numbers, equally many from each rank; one row per rank."""
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
        shape: shape of the whole tensor.
        start: index of the block's first element in the whole tensor, one per dimension.
        ranks: the ranks that hold the network together.
        counts: whether this copy of the block is the one that counts; each element of the whole has exactly one.
        replicas: the ranks that hold replicas of this block; None if there are no others.
    """

    shape: torch.Size
    start: tuple[int, ...]
    ranks: Ranks
    counts: bool
    replicas: Ranks | None = None

    def places(self, flat: Positions, shape: Sequence[int]) -> Positions:
        """Convert flat indices in the block, of this shape, to flat indices in the whole tensor; keeps their order."""
        if not len(flat) or not shape:
            return flat
        indices = np.unravel_index(flat, tuple(shape))
        moved = tuple(index + start for index, start in zip(indices, self.start, strict=True))
        return np.asarray(np.ravel_multi_index(moved, tuple(self.shape)), dtype=np.int64)

    def block(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        """View of this rank's block, of this shape, in the whole tensor."""
        return whole[tuple(slice(start, start + size) for start, size in zip(self.start, shape, strict=True))]

    def whole(self, block: Tensor) -> Tensor:
        """The whole tensor, of floating-point numbers, from the blocks of all ranks; each rank gets all of it."""
        whole = block.new_zeros(self.shape)
        if self.counts:
            self.block(whole, block.shape).copy_(block)
        return self.ranks.sum_(whole)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. (isinstance would need an import that takes two seconds in every process.)"""
    if type(tensor) in _PLAIN:  # the fast path for most tensors
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's block of a DTensor, as a plain tensor that shares its memory; other tensors are returned as is."""
    if not is_sharded(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    sharded: Any = tensor.detach()
    with torch.no_grad():
        block: Any = sharded.to_local()
    result: Tensor = block.wait() if hasattr(block, "wait") else block
    return result


def like(parameter: Tensor, block: Tensor) -> Tensor:
    """Wrap this rank's block as a DTensor with the parameter's layout; unchanged if the parameter is not a DTensor."""
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
    """This rank's block of a tensor of the parameter's shape, which may be whole or have another layout."""
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
    """Within this context, refuse selections that do not name their weights (``of=``), if there are shards."""
    token = _is_sharded.set(bool(shards))
    try:
        yield
    finally:
        _is_sharded.reset(token)


def is_working_on_shards() -> bool:
    return _is_sharded.get()


# Which rank holds what


def shards_of(parameters: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Name -> shard; empty if no parameter is a DTensor. All ranks must call it.

    The largest mesh is taken as the mesh of the network. A DTensor on a part of it, and a plain tensor, count as
    replicated along the other dimensions.

    Raises:
        ValueError: the meshes are not parts of one mesh, or a tensor has an unsupported layout; names the tensor.
    """
    meshes: dict[str, Any] = {name: p.device_mesh for name, p in parameters.items() if is_sharded(p)}  # type: ignore[attr-defined]  # of DTensor
    if not meshes:
        return {}
    mesh = max(meshes.values(), key=lambda mesh: (mesh.ndim, mesh.size()))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not part of {mesh}, which holds the weights")
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
            f"{scattered or 'a weight, named on another rank,'} is placed as {placed}, so that a rank does not hold "
            f"one contiguous block of it; make its sizes divisible by the mesh's, or exclude it: "
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
    """Where this rank's block starts (None if it is not contiguous), and the mesh dimensions that split the tensor."""
    start = [0] * parameter.ndim
    if not is_sharded(parameter):
        return tuple(start), []
    dims = _dims(name, parameter.device_mesh, mesh)
    coordinate = mesh.get_coordinate()
    rows = [torch.arange(size) for size in parameter.shape]  # indices in the whole tensor that this rank holds
    split = []
    for d, placement in zip(dims, parameter.placements, strict=True):
        if placement.is_replicate():
            continue
        num_parts = getattr(placement, "split_factor", 1 if placement.is_shard() else 0)
        if placement.is_partial() or not num_parts:
            raise ValueError(
                f"{name} is placed as {placement}; only weights placed as Shard or Replicate can be pruned"
            )
        # FSDP over tensor parallelism takes its piece of each part that tensor parallelism makes.
        parts = [_piece(rows[placement.dim], num_parts, i) for i in range(num_parts)]
        rows[placement.dim] = torch.cat([_piece(part, mesh.size(d), coordinate[d]) for part in parts])
        split.append(d)
    for i, (here, size) in enumerate(zip(rows, local(parameter).shape, strict=True)):
        start[i] = int(here[0]) if len(here) else 0
        if len(here) != size or (size and int(here[-1]) - start[i] != size - 1):
            return None, split
    return tuple(start), split


def _piece(rows: Tensor, num: int, i: int) -> Tensor:
    """The i-th of ``num`` pieces as ``torch.chunk`` cuts them (it makes fewer if there are few rows)."""
    size = -(-len(rows) // num)
    return rows[i * size : (i + 1) * size]


def _dims(name: str, part: Any, mesh: Any) -> list[int]:
    """The dimensions of ``mesh`` that make up the submesh ``part``."""
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
        f"{name} is on {part}, which is not part of {mesh}, the largest mesh with weights in scope; a budget "
        f"needs one mesh. Leave one of them out of the scope"
    )


# Numbers for the whole network


def sum_counts(counts: Sequence[int | Tensor], shards: Sequence[Shard | None]) -> list[int]:
    """Turn one number per block into one per whole tensor, in one reduction; no reduction if nothing is sharded."""
    if not shards or shards[0] is None:
        return [int(count) for count in counts]
    mine = [int(count) * _counts(shard) for count, shard in zip(counts, shards, strict=True)]
    return shards[0].ranks.sum(mine)


def _counts(shard: Shard | None) -> bool:
    return shard is not None and shard.counts


def sum_vectors(vectors: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    """Like ``sum_counts``, for int64 vectors; each must have the same length on all ranks."""
    if not shards or shards[0] is None:
        return list(vectors)
    mine = [v * _counts(shard) for v, shard in zip(vectors, shards, strict=True)]
    return list(torch.split(shards[0].ranks.sum_(torch.cat(mine)), [len(v) for v in vectors]))


def max_over(numbers: Sequence[float], shards: Sequence[Shard | None]) -> list[float]:
    """Elementwise maxima over the ranks."""
    if not shards or shards[0] is None:
        return list(numbers)
    return shards[0].ranks.max(numbers)


# Whether replicas still agree


def checksum(tensor: Tensor) -> Tensor:
    """An int64 checksum of a plain tensor's bits that does not depend on the order of its elements."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64)


def differing(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of the plain tensors that are not equal on all ranks that should hold replicas. One reduction."""
    if not tensors:
        return []
    sums = torch.stack([checksum(t).to("cpu") for t in tensors.values()])
    largest = ranks.max_(torch.cat([sums, ~sums]))  # ~x is -x - 1: its maximum is the minimum of x, and never overflows
    return list(itertools.compress(tensors, (largest[: len(sums)] != ~largest[len(sums) :]).tolist()))


def replicas(model: nn.Module) -> Ranks | None:
    """The ranks of a DistributedDataParallel, each with a replica of the model; None for any other model."""
    plain: Any = getattr(model, "_orig_mod", model)  # the model inside torch.compile
    if not isinstance(plain, nn.parallel.DistributedDataParallel):
        return None
    group: Any = plain.process_group
    if dist.get_world_size(group) == 1:
        return None
    return Ranks((group,), plain.device, dist.get_world_size(group), dist.get_rank(group))


# Engines


def reshard(model: nn.Module) -> None:
    """Make FSDP2 restore its shards where a forward pass has left whole weights in their place."""
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            put_back: Any = module.reshard
            put_back()


def refuse_flat(model: object, optimizer: object) -> None:
    """Refuse engines that flatten the weights, because no weight can then be pruned by name.

    Raises:
        ValueError: names the engine and what to use instead.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for one in (*modules, model, optimizer):
        kinds = [kind for kind in type(one).__mro__ if kind is not object]
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the weights, so none is left to prune; use its "
                "successor, torch.distributed.fsdp.fully_shard, which Pomona supports"
            )
        if any("DeepSpeed" in kind.__name__ or kind.__module__.partition(".")[0] == "deepspeed" for kind in kinds):
            raise ValueError(
                f"{type(one).__name__} belongs to DeepSpeed, which flattens the weights, so none is left to prune; "
                f"use torch.distributed.fsdp.fully_shard or DistributedDataParallel with a torch optimizer"
            )
