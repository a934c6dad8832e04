"""Where the weights in scope are: in which module, in which parameter group, and on which ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pomona.distributed import (
    Ranks,
    differing,
    is_sharded,
    local,
    replicas,
    reshard,
    shards_of,
    sum_counts,
)
from pomona.layout import Layout
from pomona.pages.text import few
from pomona.weight import Weight, Weights


class Placement:
    """Finds the weights in scope anew at every step, by name, and the ranks that hold them together.

    Args:
        model: where the modules are.
        optimizers: those of a step, the outermost first; the last one must hold every weight in scope.
        inside: name -> parameter in scope.
        layouts: name -> its layout, None if that is unknown.

    Attributes:
        shards: name -> this rank's block; empty if nothing is sharded.
        group_of: name -> index of its parameter group.
        state: name -> what the method remembers about the weight.
        shared: what the method remembers about the network.
        ids: the ids of the parameters, as of the latest ``refresh()``.
        frozen_since: name -> the step after which a weight has been frozen (``requires_grad`` is False), as of the
            latest step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        inside: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout | None],
    ) -> None:
        self.model = model
        self.layouts = dict(layouts)
        self.optimizers = list(optimizers)
        self.optimizer = self.optimizers[-1]
        self.shards = shards_of(inside)
        self.group_of = _find_groups(self.optimizer, inside)
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in inside}
        self.shared: dict[str, Tensor] = {}
        self._owners = {name: _owner(model, name) for name in inside}
        self._is_sharded = [is_sharded(p) for p in inside.values()]
        self._shapes = [p.shape for p in inside.values()]
        self._known: list[nn.Parameter] = []  # what `_in_step` was made of
        self.ids: frozenset[int] = frozenset()
        self._in_step: Weights | None = None
        self.frozen_since: dict[str, int] = {}
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []  # what is frozen: values, gradient

    @property
    def swaps(self) -> bool:
        """Whether the optimizer has a second copy of the weights, which its ``eval()`` brings in (schedule-free)."""
        return any(callable(getattr(one, "eval", None)) for one in self.optimizers)

    @property
    def names(self) -> list[str]:
        return list(self._owners)

    def groups(self) -> list[int]:
        """Indices of the parameter groups that hold weights in scope."""
        return sorted(set(self.group_of.values()))

    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape of the whole tensor."""
        return {name: list(p.shape) for name, p in self.parameters().items()}

    # Looking up

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter in scope, looked up in the model now."""
        found = self._look_up()
        if self.shards and self._changed(found):
            reshard(self.model)  # a forward pass without a backward pass leaves whole weights in the root module
            found = self._look_up()
        if (i := self._changed(found)) is not None:
            raise RuntimeError(
                f"{self.names[i]} was {'a DTensor' if self._is_sharded[i] else 'no DTensor'} when the Pruner was made "
                f"and has been replaced since: shard first (fully_shard, parallelize_module), then make the optimizer, "
                f"then the Pruner"
            )
        return dict(zip(self._owners, found, strict=True))

    def _look_up(self) -> list[nn.Parameter]:
        return [getattr(module, leaf) for module, leaf in self._owners.values()]

    def _changed(self, found: Sequence[nn.Parameter]) -> int | None:
        """The place of the first that was sharded, or put together, since the Pruner was made."""
        pairs = enumerate(zip(found, self._is_sharded, strict=True))
        return next((i for i, (p, was_sharded) in pairs if is_sharded(p) != was_sharded), None)

    def first(self) -> Tensor:
        """The first weight of which this rank has a part; every step of an optimizer moves it."""
        first: Tensor | None = None
        for module, leaf in self._owners.values():
            parameter: Tensor = getattr(module, leaf)
            if local(parameter).numel():
                return parameter
            first = parameter if first is None else first
        assert first is not None  # a scope is never empty
        return first

    def check_in_place(self) -> None:
        """RuntimeError if a weight has been replaced: in the model, under the optimizer, or by one of another shape."""
        parameters = self.parameters()
        for name, (module, _) in self._owners.items():
            self._check_module(name, module)
        held = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for (name, p), shape in zip(parameters.items(), self._shapes, strict=True):
            if p.shape != shape:
                raise RuntimeError(
                    f"{name} has the shape {tuple(p.shape)} now, and had {tuple(shape)} when the Pruner was made; make "
                    f"the optimizer and the Pruner anew, after what cuts or replaces layers"
                )
            if id(p) not in held:
                raise RuntimeError(
                    f"{name} was replaced in the model after the Pruner was made, and the "
                    f"{type(self.optimizer).__name__} does not hold the new parameter, so it does not train. Write "
                    f"into the old one (p.data.copy_(), load_state_dict() without assign=True), or make optimizer and "
                    f"Pruner anew"
                )
        self.group_of = {name: held[id(p)] for name, p in parameters.items()}

    def _check_module(self, name: str, module: nn.Module) -> None:
        path, _, leaf = name.rpartition(".")
        try:
            now = getattr(self.model.get_submodule(path), leaf)
        except AttributeError:
            now = None
        if now is not getattr(module, leaf) and all(module is not one for one in self.model.modules()):
            raise RuntimeError(
                f"{name} was replaced in the model after the Pruner was made; make optimizer and Pruner anew"
            )

    def weights(self) -> Weights:
        """The weights as a method sees them, without gradients."""
        return self._make(list(self.parameters().values()))

    def refresh(self) -> None:
        """Look the parameters up for a step; RuntimeError if one has been replaced that must not be."""
        if self._in_step is not None and self._is_known():
            return
        self._known = list(self.parameters().values())
        ids = frozenset(map(id, self._known))
        if ids != self.ids or not self.shards:  # sharded ones are looked up at every step
            self.check_in_place()
        self.ids = ids
        self._in_step = self._make(self._known)

    def weights_in_step(self, step: int) -> Weights:
        """The weights with the gradients of this step, after ``refresh``.

        They are the same objects at every step, because to make each anew would cost more than the optimizer's own
        step. ``thaw`` and ``release`` them when the step is over.
        """
        assert self._in_step is not None
        self._freeze(step)
        for w, p in zip(self._in_step, self._known, strict=True):
            grad = p.grad
            if grad is None and w.has_grad:  # the first step without one: has its module been replaced?
                self._check_module(w.name, self._owners[w.name][0])
            w.renew(local(p), gradient(w.name, p, grad), grad is not None)
        return self._in_step

    def _freeze(self, step: int) -> None:
        """Take what is frozen out of the step, and remember its values: a method may write into all weights.

        A torch optimizer moves whatever has a gradient. So a weight that has one, as where a loop calls ``backward``,
        then freezes and then steps, is not frozen in this step.
        """
        self._kept = []
        places = [i for i, p in enumerate(self._known) if not p.requires_grad]
        if places or self.frozen_since:
            moves = [(grad := self._known[i].grad) is not None and bool(local(grad).any()) for i in places]
            if self.shards and places:
                moves = [bool(most) for most in next(iter(self.shards.values())).ranks.max(moves)]
            places = [i for i, does_move in zip(places, moves, strict=True) if not does_move]
            names = self.names
            self.frozen_since = {names[i]: self.frozen_since.get(names[i], step - 1) for i in places}
        for i in places:
            p = self._known[i]
            self._kept.append((p, local(p).clone(), p.grad))
            p.grad = None

    def thaw(self) -> None:
        """After a step: what is frozen is as it was before."""
        kept, self._kept = self._kept, []
        for p, value, grad in kept:
            local(p).copy_(value)
            p.grad = grad

    def frozen(self, step: int) -> dict[str, int]:
        """Name -> the step after which a weight was frozen, of those that are frozen now, after ``step``."""
        now = [name for name, p in self.parameters().items() if not p.requires_grad]
        return {name: self.frozen_since.get(name, step) for name in now}

    def follow(self) -> None:
        """After the step of an optimizer around another one, which may have given parameters new tensors."""
        for w, p in zip(self._in_step or (), self._known, strict=True):
            w.renew(local(p), w.grad, w.has_grad)

    def release(self) -> None:
        """After a step: hold neither weights nor gradients."""
        for w in self._in_step or ():
            w.release()

    def remember(self, state: dict[str, dict[str, Tensor]], shared: dict[str, Tensor]) -> None:
        """From now on this is what the method remembers."""
        self.state, self.shared = state, shared
        self._in_step = None

    def _make(self, parameters: Sequence[nn.Parameter]) -> Weights:
        weights = []
        for name, p in zip(self._owners, parameters, strict=True):
            value, group = local(p), self.optimizer.param_groups[self.group_of[name]]
            weight = Weight(
                name=name,
                value=value,
                grad=value.new_empty(0),
                group=group,
                state=self.state[name],
                has_grad=p.grad is not None,
                optimizer_state=OptimizerState(self.optimizers, p),
                shard=self.shards.get(name),
                layout=self.layouts[name],
            )
            weights.append(weight)
        return Weights(weights, self.shared)

    def _is_known(self) -> bool:
        """Whether parameters and their groups are those of the step before: a quick yes for most steps."""
        if self._in_step is None or self.shards:
            return False
        groups = self.optimizer.param_groups
        places = zip(self._owners.values(), self.group_of.values(), self._known, self._in_step, strict=True)
        return all(module._parameters.get(leaf) is p and groups[i] is w.group for (module, leaf), i, p, w in places)

    # Over ranks

    def on_any_rank(self, claim: bool) -> bool:
        """Whether it is true on any rank that holds a part of the weights."""
        return next(iter(self.shards.values())).ranks.any(claim) if self.shards else claim

    def ranks(self) -> list[Ranks]:
        """All with whom this process shares one budget: by shards, by copies, or by both."""
        by_shards = [shard.ranks for shard in self.shards.values()][:1]
        by_copies = replicas(self.model)
        return by_shards + ([by_copies] if by_copies else [])

    def sum_counts(self, counts: Mapping[str, Tensor | int]) -> dict[str, int]:
        """Name -> the count of the whole tensor, from the counts of this rank's blocks."""
        sums = sum_counts(list(counts.values()), [self.shards.get(name) for name in counts])
        return dict(zip(counts, sums, strict=True))

    def check_replicas(self, num_steps: int) -> None:
        """RuntimeError if the weights of data-parallel ranks differ: the ranks would then prune different weights."""
        copies = replicas(self.model)
        drifted = differing({name: local(p) for name, p in self.parameters().items()}, copies) if copies else []
        if drifted:
            raise RuntimeError(
                f"{', '.join(drifted[:3])} {'differ' if len(drifted) > 1 else 'differs'} between the ranks of "
                f"DistributedDataParallel at step {num_steps:,}, so the ranks would prune different weights. "
                f"Something changes them on some ranks only, such as an edit by hand, an optimizer state that was "
                f"loaded on one rank, or gradients that are not synchronised (no_sync)"
            )

    def disagreements(self, pruned: Mapping[str, Tensor], steps: str) -> list[str]:
        """What ranks that hold copies of a weight, or share the state of the network, do not agree on."""
        values = {name: local(p) for name, p in self.parameters().items()}
        copies: dict[Ranks | None, list[str]] = {replicas(self.model): list(values)}
        for name, shard in self.shards.items():
            copies.setdefault(shard.replicas, []).append(name)
        wrong = []
        for ranks, names in copies.items():
            masks = {f"what is pruned of {name}": pruned[name] for name in names}
            ours = {name: values[name] for name in names} | masks
            wrong += [f"{name} is not the same on all ranks" for name in (differing(ours, ranks) if ranks else ())]
        for ranks in self.ranks():
            shared = {f"the method's {key}": t.reshape(-1) for key, t in self.shared.items()}
            wrong += [f"{name} is not the same on all ranks" for name in differing(shared, ranks)]
            if not ranks.agree(steps):
                wrong.append(f"another rank does not have {steps}")
        return wrong

    def __getstate__(self) -> dict[str, Any]:
        # Process groups cannot be copied; shards are found anew.
        return {**self.__dict__, "shards": {}, "_known": [], "ids": frozenset(), "_in_step": None, "_kept": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.shards = shards_of(dict(zip(self._owners, self._look_up(), strict=True)))


class OptimizerState(Mapping[str, Any]):
    """What the optimizers of a step remember about a parameter, looked up when it is asked for."""

    def __init__(self, optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> None:
        self._optimizers, self._parameter = optimizers, parameter

    def _now(self) -> Mapping[str, Any]:
        found: list[Mapping[str, Any]] = [one.state.get(self._parameter, {}) for one in self._optimizers]
        return found[0] if len(found) == 1 else {key: value for state in found for key, value in state.items()}

    def __getitem__(self, key: str) -> Any:
        return self._now()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


def _find_groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in group_of]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {few(missing)}, which the scope wants pruned. Give "
            f"these parameters to {type(optimizer).__name__}, or leave them out: "
            f"Scope(exclude=[{missing[0]!r}]). (If the model was moved or wrapped after the optimizer was made, "
            f"make the optimizer afterwards.)"
        )
    return {name: group_of[id(p)] for name, p in parameters.items()}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def gradient(name: str, parameter: nn.Parameter, grad: Tensor | None) -> Tensor:
    """The gradient, or this rank's block of it; zeros for a weight that took no part in this step."""
    if type(grad) is Tensor and grad.layout is torch.strided and not grad.requires_grad:
        if type(parameter) is nn.Parameter:
            return grad
    if grad is None:
        return torch.zeros_like(local(parameter))
    if grad.layout is not torch.strided:
        raise ValueError(f"{name} has a sparse gradient; make its module with sparse=False, or exclude it")
    if not is_sharded(grad) and not is_sharded(parameter):
        return grad.detach() if grad.requires_grad else grad
    laid_out, wanted = (getattr(t, "placements", None) for t in (grad, parameter))
    if laid_out != wanted:
        raise ValueError(
            f"the gradient of {name} is placed as {laid_out} and the weight as {wanted}; before optimizer.step(), "
            f"bring it there: p.grad = p.grad.redistribute(placements=p.placements)"
        )
    return local(grad)
