"""The Pruner: attaches a method to a model and its optimizer. It knows hooks, closures and AMP, and no mathematics."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from pomona.diagnosis import Diagnosed, Diagnosis, rehearse
from pomona.distributed import (
    Ranks,
    differing,
    is_sharded,
    like,
    local,
    max_over,
    refuse_flat,
    replicas,
    reshard,
    shards_of,
    sum_counts,
    take,
    working_on,
)
from pomona.method import Method
from pomona.ops import all_finite
from pomona.pruner.saved import FORMAT, check_state, describe, whole_shapes
from pomona.pruner.zeros import count_revived, cut_, largest_among, same_names, zero_all_, zero_copy_
from pomona.reporting import Report, report_layers
from pomona.schedule import FAR_AWAY, Schedule, check_count
from pomona.scope import Scope
from pomona.selection import NonFiniteError
from pomona.selection.groups import violations
from pomona.weight import Weight, Weights


class Pruner:
    """Prunes ``model`` while ``optimizer`` trains it; the training loop stays as it is.

    The method runs inside ``optimizer.step()``, through its hooks, and so works with schedulers, closures, gradient
    accumulation and ``GradScaler`` (also with ``fused=True``). A step with a gradient that is not finite is skipped
    as a whole, counted in ``num_skipped`` and warned of once; weights, momentum and step count stay as they were.
    A step with all learning rates and all gradients zero is not a step (distributed checkpointing makes such ones).

    On several ranks the model is wrapped or sharded first (``DistributedDataParallel``, ``fully_shard``,
    ``parallelize_module``), then come the optimizer and the Pruner, on each rank. The budget is one for all ranks and
    the masks are those of one process. Where weights are sharded, every method of a Pruner but ``detach`` must be
    called on all ranks.

    Args:
        model: parameters are neither renamed nor replaced; its ``state_dict()`` stays plain.
        optimizer: any ``torch.optim`` optimizer that the method accepts and that evaluates its gradients once a
            step (so not LBFGS); it must hold every weight in scope.
        method: how weights are pruned, e.g. ``GSM(sparsity=0.9)``.
        scope: which weights; default: every trainable weight of two or more dimensions.
        check_every: under ``DistributedDataParallel``, steps from one comparison of the ranks' weights to the next, a
            few bytes a tensor; 0: never.

    Attributes:
        num_steps: optimizer steps counted so far.
        num_skipped: steps skipped so far.
        is_hardened: whether ``harden()`` has written the zeros, which are held from then on.

    Raises:
        ValueError: nothing is in scope, the optimizer lacks a weight in scope, or the method refuses the optimizer.

    Example:
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
        >>> pruner = Pruner(model, optimizer, pomona.GSM(sparsity=0.9))
        >>> for _ in range(200):
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> pruner.harden().nonzero
        20
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        scope: Scope | None = None,
        check_every: int = 100,
    ) -> None:
        refuse_flat(model, optimizer)
        optimizer = _unwrap(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if scope is not None and not isinstance(scope, Scope):
            raise TypeError(f"scope must be a pomona.Scope such as Scope(exclude=['head']), got {scope!r}")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a pomona.Method such as GSM(sparsity=0.9), got {method!r}")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates its closure several times a step, so there is no one gradient to prune by; use SGD "
                "or another optimizer that evaluates it once"
            )
        self.model = model
        self.optimizer = optimizer
        self.method = method
        self.scope = scope or Scope()
        check_count("check_every", check_every, low=0)
        self.check_every = check_every
        self.num_steps = 0
        self.num_skipped = 0

        reshard(model)
        selection = self.scope.select(model)
        self._shards = shards_of(selection.inside)
        self._is_sharded = {name: is_sharded(p) for name, p in selection.inside.items()}
        self._outside = selection.outside
        self._places = {name: _owner(model, name) for name in selection.inside}
        self._group_of = self._find_groups(selection.inside)
        groups = [optimizer.param_groups[i] for i in sorted(set(self._group_of.values()))]
        method.check(optimizer, groups)

        self._pruned: dict[str, Tensor] = {}  # after harden(): True = held at zero
        self._cuts: dict[str, float] = {}  # largest magnitude that harden() removed
        self._hardened_at = 0  # step
        self._accuracy: tuple[float | None, float | None] = (None, None)  # before and after harden()
        self._state: dict[str, dict[str, Tensor]] = {}
        self._shared: dict[str, Tensor] = {}
        for ranks in self._ranks():
            if not ranks.agree(f"{describe(method)}, {self._shapes()}"):
                raise ValueError(
                    f"the ranks do not prune alike: this one has {describe(method)} for {len(self._places)} tensors, "
                    f"{', '.join(list(self._places)[:3])}, ..., and another one has another method, or other weights "
                    f"in scope"
                )
        weights = self._weights(with_grad=False)
        with working_on(self._shards):
            method.check_weights(weights)
            self._state = {w.name: method.init(w) for w in weights}
            self._shared = method.init_shared(weights)
        self._check_shapes(weights)
        self._in_step: Weights | None = None
        self._masked = (0, 0)  # id and version of the first gradient of the step under way
        self._is_trying = False
        self._hidden_grads: list[tuple[Tensor, Tensor]] = []
        self._mark()
        self._handles: list[RemovableHandle] = []
        self._attach()

    def __repr__(self) -> str:
        done = "hardened" if self.is_hardened else f"step {self.num_steps:,}"
        return f"Pruner({self.method}, {len(self._places)} tensors, {done})"

    # What is pruned

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter in scope, looked up in the model now."""
        parameters = self._look_up()
        if self._shards and self._changed(parameters):
            reshard(self.model)  # a forward pass without a backward pass leaves whole weights in the root module
            parameters = self._look_up()
        changed = self._changed(parameters)
        if changed:
            raise RuntimeError(
                f"{changed} was {'a DTensor' if self._is_sharded[changed] else 'no DTensor'} when the Pruner was made "
                f"and has been replaced since: shard first (fully_shard, parallelize_module), then make the optimizer, "
                f"then the Pruner"
            )
        return parameters

    def _look_up(self) -> dict[str, nn.Parameter]:
        return {name: getattr(module, leaf) for name, (module, leaf) in self._places.items()}

    def _changed(self, parameters: Mapping[str, nn.Parameter]) -> str:
        """The first that was sharded, or put together, since the Pruner was made."""
        return next((name for name, p in parameters.items() if is_sharded(p) != self._is_sharded[name]), "")

    def _check_shapes(self, weights: Weights) -> None:
        for w in weights:
            for key, t in self._state[w.name].items() if w.shard else ():
                if t.ndim and t.shape != w.value.shape:
                    raise ValueError(
                        f"{type(self.method).__name__} remembers {key} of shape {tuple(t.shape)} for {w.name}, which "
                        f"is sharded over ranks; state that can be saved then is of the shape of w.value "
                        f"({tuple(w.value.shape)} here) or of no dimension"
                    )

    def _find_groups(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
        group_of = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        missing = [name for name, p in parameters.items() if id(p) not in group_of]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"the optimizer does not hold {', '.join(missing[:3])}{more}, which the scope wants pruned. Give "
                f"these parameters to {type(self.optimizer).__name__}, or leave them out: "
                f"Scope(exclude=[{missing[0]!r}]). (If the model was moved or wrapped after the optimizer was made, "
                f"make the optimizer afterwards.)"
            )
        return {name: group_of[id(p)] for name, p in parameters.items()}

    def _weights(self, *, with_grad: bool, parameters: Mapping[str, nn.Parameter] | None = None) -> Weights:
        groups, remembered = self.optimizer.param_groups, self.optimizer.state
        weights = []
        for name, parameter in (parameters or self.parameters()).items():
            value = local(parameter)
            weights.append(
                Weight(
                    name=name,
                    value=value,
                    grad=_gradient(name, parameter) if with_grad else value.new_empty(0),
                    group=groups[self._group_of[name]],
                    state=self._state.get(name, {}),
                    has_grad=parameter.grad is not None,
                    optimizer_state=remembered.get(parameter, {}),
                    shard=self._shards.get(name),
                )
            )
        return Weights(weights, self._shared)

    # Around optimizer.step()

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are still on the optimizer; copies and pickles of an optimizer lose theirs."""
        return bool(self._handles) and all(handle.id in _hooks(handle) for handle in self._handles)

    def _attach(self) -> None:
        pre = self.optimizer.register_step_pre_hook(self._on_step)
        self._handles = [pre, self.optimizer.register_step_post_hook(self._on_stepped)]
        for hook in _hooks(pre).values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Pruner) and other is not self:
                theirs = {id(p) for p in other.parameters().values()}
                shared = [name for name, p in self.parameters().items() if id(p) in theirs]
                if shared:
                    self.detach()
                    raise ValueError(
                        f"{shared[0]} is already pruned by another Pruner on this optimizer; call its "
                        f"detach() first, or give the two scopes that do not overlap"
                    )

    def detach(self) -> None:
        """Take the hooks off the optimizer: nothing is pruned and no zero is held any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_step()
            return None
        pruning = self._wrap(closure)
        if len(args) > 1:
            return (args[0], pruning, *args[2:]), kwargs
        return args, {**kwargs, "closure": pruning}

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """With ``step(closure)`` the gradients do not exist before the closure has run."""
        num_calls = 0

        def pruning_closure() -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls > 1:
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} called its closure twice in one step; Pomona prunes by the one "
                    f"gradient of a step and cannot work with it"
                )
            loss = closure()
            self._before_step()
            return loss

        return pruning_closure

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._is_trying:
            raise RuntimeError(
                "optimizer.step() inside trial_cut() would be undone at the end of the block; step outside"
            )
        if self._in_step is not None and self._masked == self._grad_version():
            return  # a subclass that calls super().step() fires the hooks twice
        self._in_step = None
        parameters = self.parameters()
        grads = self._grads()
        if self._is_phantom(grads):
            return
        # Over ranks it is asked here, for all of them have to go the same way.
        is_left_to_method = not self.is_hardened and not self._shards and self.method.checks_gradients
        if not self._gradients_usable(grads, but_for=parameters.values() if is_left_to_method else ()):
            self._skip()
            return
        weights = self._weights(with_grad=True, parameters=parameters)
        if self.is_hardened:
            zero_all_([w.grad for w in weights], [self._pruned[w.name] for w in weights])
        else:
            try:
                with working_on(self._shards):
                    self.method.before_step(weights, self.num_steps + 1)
            except NonFiniteError:
                if not is_left_to_method or all_finite(self._grads()):
                    raise
                self._skip()
                return
        self.num_steps += 1
        self._check_replicas()
        self._in_step = weights
        self._masked = self._grad_version()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _on_stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weights, self._in_step = self._in_step, None
        hidden, self._hidden_grads = self._hidden_grads, []
        for parameter, grad in hidden:
            parameter.grad = grad
        if weights is not None and not self.is_hardened:
            with working_on(self._shards):
                self.method.after_step(weights, self.num_steps)
        if weights is not None and self.is_hardened:
            zero_all_([w.value for w in weights], [self._pruned[w.name] for w in weights])
        self._mark()

    def _grad_version(self) -> tuple[int, int]:
        """Of the first gradient: another one, or one that was added to, shows that a backward pass has been."""
        grad = next((p.grad for p in self._all_parameters() if p.grad is not None), None)
        return (0, 0) if grad is None else (id(grad), grad._version)

    def _all_parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._all_parameters() if p.grad is not None]

    def _is_phantom(self, grads: list[Tensor]) -> bool:
        if not grads:
            return True
        if any(group["lr"] != 0.0 for group in self.optimizer.param_groups):
            return False
        return not self._on_any_rank(any(bool(local(g).any()) for g in grads))

    def _on_any_rank(self, claim: bool) -> bool:
        return next(iter(self._shards.values())).ranks.any(claim) if self._shards else claim

    def _check_replicas(self) -> None:
        """Data-parallel ranks prune alike because their weights are alike; say so when they have drifted apart."""
        if not self.check_every or self.num_steps % self.check_every:
            return
        twins = replicas(self.model)
        drifted = differing({name: local(p) for name, p in self.parameters().items()}, twins) if twins else []
        if drifted:
            raise RuntimeError(
                f"{', '.join(drifted[:3])} {'differ' if len(drifted) > 1 else 'differs'} between the ranks of "
                f"DistributedDataParallel at step {self.num_steps:,}, so the ranks would prune different weights. "
                f"Something changes them on some ranks only, such as an edit by hand, an optimizer state that was "
                f"loaded on one rank, or gradients that are not synchronised (no_sync)"
            )

    def _gradients_usable(self, grads: list[Tensor], *, but_for: Iterable[Tensor]) -> bool:
        """Undo a loss scale that the optimizer itself would undo, and tell whether all gradients are finite.

        ``but_for``: parameters whose gradients are left to the method.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and self._on_any_rank(bool(local(found_inf))):
            return False
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            for grad in map(local, grads):
                grad.div_(local(scale).to(grad.device))
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # set by GradScaler for fused steps
        left_out = {id(p.grad) for p in but_for if p.is_cpu}
        return not self._on_any_rank(not all_finite([local(g) for g in grads if id(g) not in left_out]))

    def _skip(self) -> None:
        if self.num_skipped == 0:
            warnings.warn(
                f"a gradient is not finite at step {self.num_steps + 1}; the step is skipped, as further ones will be "
                f"without a word (Pruner.num_skipped counts them)",
                stacklevel=2,
            )
        self.num_skipped += 1
        # An optimizer passes over parameters without a gradient: no update, no decay, no momentum, no step count.
        self._hide_gradients(self._all_parameters())

    def _hide_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Until the end of the step."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._hidden_grads.append((parameter, parameter.grad))
                parameter.grad = None

    def _watched(self) -> Tensor:
        """The first weight of which this rank has a part; every step of an optimizer moves it."""
        first: Tensor | None = None
        for module, leaf in self._places.values():
            parameter: Tensor = getattr(module, leaf)
            if local(parameter).numel():
                return parameter
            first = parameter if first is None else first
        assert first is not None  # a scope is never empty
        return first

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """A few values of the weight that is watched; fused optimizers move them without a new version."""
        block = local(self._watched())
        return block[(0,) * (block.ndim - 1)][:8].clone() if block.ndim and block.numel() else block.clone()

    def _mark(self) -> None:
        self._version, self._seen = self._watched()._version, self._sample()

    def _check_attached(self) -> None:
        """Say so when training goes on without us: hooks removed, or the steps made by a copy of the optimizer."""
        if not self.is_attached:
            raise RuntimeError(
                "this Pruner is not attached to its optimizer any more (detach() was called, or the optimizer's hooks "
                "were removed); make a new Pruner and load_state_dict() into it"
            )
        for name, parameter in self.parameters().items():
            module, leaf = _owner(self.model, name)
            if getattr(module, leaf) is not parameter:
                raise RuntimeError(
                    f"{name} was replaced in the model after the Pruner was made; make optimizer and Pruner anew"
                )
        num_changes = self._watched()._version - self._version
        # One change is a load_state_dict or an edit by hand; fused optimizers show as none.
        if num_changes != 1 and not torch.equal(self._sample().to(self._seen.device), self._seen):
            times = f"{num_changes} times " if num_changes else ""
            warnings.warn(
                f"the weights were changed {times}since the last optimizer step that this Pruner saw "
                f"(step {self.num_steps}). If the training loop uses a copy of the optimizer (deepcopy and pickle lose "
                f"hooks), make the Pruner with that copy. If it edits the weights after each step, ignore this.",
                stacklevel=3,
            )

    # Zeros

    @property
    def is_hardened(self) -> bool:
        """Whether ``harden()`` has written the zeros."""
        return bool(self._pruned)

    def harden(self, *copies: nn.Module, evaluate: Callable[[], float] | None = None) -> Report:
        """Write exact zeros outside the method's support, and keep them from here on.

        Every later step of the optimizer trains the survivors only; zeros survive momentum, Adam and weight decay.
        Calling it again writes no new zeros (except into ``copies``) and reports anew.

        Args:
            copies: models with the same parameters that get the same zeros, e.g. an ``AveragedModel``. An average
                that goes on stays zero there.
            evaluate: called before and after the cut, e.g. for the accuracy; both stand in the report.

        Returns:
            The report, counted from the tensors.
        """
        self._check_attached()
        if self._is_trying:
            raise RuntimeError(
                "harden() inside trial_cut() would be undone at the end of the block; call it afterwards"
            )
        for copy in copies:
            same_names(copy, {name: local(p) for name, p in self.parameters().items()})
        if not self.is_hardened:
            masks = self._masks()
            self._warn_of_haste()
            self._warn_of_loss(masks)
            before = float(evaluate()) if evaluate else None
            self._pruned, self._cuts = self._cut(masks)
            self._accuracy = (before, float(evaluate()) if evaluate else None)
            self._hardened_at = self.num_steps
            self._mark()
        for copy in copies:
            zero_copy_(copy, self._pruned)
        return self.report()

    @contextmanager
    def trial_cut(self) -> Iterator[Report]:
        """Inside the block the model is as ``harden()`` would make it now; afterwards training goes on unharmed.

        Costs one copy of the weights in scope while it lasts. Yields the report of the cut model.
        """
        saved = [w.value.clone() for w in self._weights(with_grad=False)]
        version, was_trying = self._watched()._version, self._is_trying
        self._is_trying = True
        try:
            if self.is_hardened:
                yield self.report()
            else:
                pruned, cuts = self._cut(self._masks())
                yield self._report(pruned, cuts)
        finally:
            with torch.no_grad():
                for w, value in zip(self._weights(with_grad=False), saved, strict=True):
                    w.value.copy_(value)
            self._is_trying = was_trying
            self._version += self._watched()._version - version

    @torch.no_grad()
    def _masks(self) -> list[Tensor]:
        """The method's support; it must not be larger than promised. Smaller it is where a layer has too many zeros."""
        weights = self._weights(with_grad=False)
        with working_on(self._shards):
            masks = self.method.support(weights, self.num_steps)
        budget = self.method.budget.num_kept(weights.numel, self.num_steps)
        kept = sum(sum_counts([mask.count_nonzero() for mask in masks], [w.shard for w in weights]))
        if kept > budget:
            raise RuntimeError(f"{self.method} has a budget of {budget} weights, but its support has {kept}")
        return masks

    @torch.no_grad()
    def _cut(self, masks: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Zero all but the support: name -> what is zeroed, name -> largest magnitude lost by it."""
        weights = self._weights(with_grad=False)
        # Inverted in place where the method does not remember the mask itself.
        remembered = {t.data_ptr() for w in weights for t in w.state.values()}
        inverted = [~mask if mask.data_ptr() in remembered else mask.logical_not_() for mask in masks]
        here = cut_([w.value for w in weights], inverted)
        pruned = {w.name: mask for w, mask in zip(weights, inverted, strict=True)}
        return pruned, dict(zip(pruned, max_over(here, [w.shard for w in weights]), strict=True))

    def _warn_of_haste(self) -> None:
        """A method that is not done, or a schedule that has not come to its end, prunes other than its user thinks."""
        with working_on(self._shards):
            why = self.method.unfinished(self._weights(with_grad=False), self.num_steps)
        if why:
            warnings.warn(f"harden() at step {self.num_steps:,} comes early: {why}", stacklevel=3)
        hyper_parameters: Any = self.method
        if not dataclasses.is_dataclass(hyper_parameters):
            return
        names = [field.name for field in dataclasses.fields(hyper_parameters)]
        for name in names:
            value = getattr(self.method, name)
            if isinstance(value, Schedule) and value(self.num_steps) != value(FAR_AWAY):
                warnings.warn(
                    f"harden() in the middle of a schedule: {name} is {value(self.num_steps):g} at step "
                    f"{self.num_steps:,} and goes to {value(FAR_AWAY):g} with {value}",
                    stacklevel=3,
                )

    def _warn_of_loss(self, masks: list[Tensor]) -> None:
        if not isinstance(self.method, Diagnosed):
            return
        with working_on(self._shards):
            diagnosis = self.method.diagnose(self._weights(with_grad=False), self.num_steps)
        if diagnosis.is_enough:
            return
        cut = zip(self.parameters().values(), masks, strict=True)
        if self._on_any_rank(any(largest_among(local(p), ~mask) != 0.0 for p, mask in cut)):
            warnings.warn(f"harden() cuts weights that have not decayed: {diagnosis}", stacklevel=3)

    def verify(self, *copies: nn.Module) -> Report:
        """Prove the contract after ``harden()``: every zero is zero, and no more weights are left than the budget.

        The zeros must also lie as the method's ``granularity`` says: at most n of every m, whole blocks or channels.

        On several ranks it must be called on all; they must also agree on the step, and copies of a weight be equal.

        Args:
            copies: models that were given to ``harden`` and are checked as well.

        Raises:
            RuntimeError: before ``harden()``, or if the contract is broken; the message lists each violation.
        """
        if not self.is_hardened:
            raise RuntimeError("verify() checks the zeros that harden() writes; call harden() first")
        self._check_attached()
        wrong = []
        for model in (self.model, *copies):
            for name, count in count_revived(model, self._pruned, self._shards).items():
                wrong.append(f"{count} of the zeros of {name} in {type(model).__name__} are not zero any more")
        report = self.report()
        budget = self.method.budget.num_kept(report.total, self._hardened_at)
        num_survivors = sum(self._num_kept(self._pruned).values())
        if num_survivors > budget:
            wrong.append(f"{num_survivors} weights survived, more than the budget of {budget}")
        if report.nonzero > num_survivors:
            wrong.append(f"{report.nonzero} weights are not zero, but only {num_survivors} survived the cut")
        wrong += violations(self.method.granularity, self._pruned, self._shards)
        wrong += self._disagreements()
        if wrong:
            raise RuntimeError("the sparsity contract is broken: " + "; ".join(wrong))
        return report

    def _num_kept(self, pruned: Mapping[str, Tensor]) -> dict[str, int]:
        kept = [mask.numel() - mask.count_nonzero() for mask in pruned.values()]
        counts = sum_counts(kept, [self._shards.get(name) for name in pruned])
        return dict(zip(pruned, counts, strict=True))

    def _disagreements(self) -> list[str]:
        """What ranks that hold copies of a weight, or the same step, do not agree on."""
        values = {name: local(p) for name, p in self.parameters().items()}
        copies: dict[Ranks | None, list[str]] = {replicas(self.model): list(values)}
        for name, shard in self._shards.items():
            copies.setdefault(shard.twins, []).append(name)
        wrong = []
        for twins, names in copies.items():
            masks = {f"what is pruned of {name}": self._pruned[name] for name in names}
            ours = {name: values[name] for name in names} | masks
            wrong += [f"{name} is not the same on all ranks" for name in (differing(ours, twins) if twins else ())]
        steps = f"{self.num_steps:,} steps, {self.num_skipped:,} skipped, cut after {self._hardened_at:,}"
        return wrong + [f"another rank does not have {steps}" for one in self._ranks() if not one.agree(steps)]

    def _ranks(self) -> list[Ranks]:
        """All with whom this process shares one budget: by shards, by copies, or by both."""
        by_shards = [shard.ranks for shard in self._shards.values()][:1]
        by_copies = replicas(self.model)
        return by_shards + ([by_copies] if by_copies else [])

    def report(self) -> Report:
        """Count the model as it is now."""
        return self._report(self._pruned, self._cuts)

    def _report(self, pruned: Mapping[str, Tensor], cuts: Mapping[str, float]) -> Report:
        weights = self._weights(with_grad=False)
        kept = self._num_kept(pruned)
        density = sum(kept.values()) / sum(w.numel for w in weights)
        reasons = {w.name: "not cut yet" for w in weights} | {
            w.name: self.method.why(w, kept[w.name], density) for w in weights if w.name in kept
        }
        layers = report_layers({w.name: w.value for w in weights}, self._shards, cuts=cuts, reasons=reasons)
        before, after = self._accuracy
        return Report(
            layers=layers,
            outside=self._outside,
            granularity=str(self.method.granularity),
            accuracy_before=before,
            accuracy_after=after,
            metrics=self.metrics(),
            num_steps=self.num_steps,
            num_skipped=self.num_skipped,
        )

    def metrics(self) -> dict[str, float]:
        """The method's own numbers now, such as GSM's ``decay_exponent``; may synchronise with the device."""
        with working_on(self._shards):
            return self.method.metrics(self._weights(with_grad=False))

    def density_if_cut(self) -> dict[str, float]:
        """Name -> the share of its weights that ``harden()`` would keep now, or has kept: one selection, no copies."""
        weights = self._weights(with_grad=False)
        pruned = self._pruned or {w.name: ~mask for w, mask in zip(weights, self._masks(), strict=True)}
        kept = self._num_kept(pruned)
        return {w.name: kept[w.name] / w.numel for w in weights}

    def diagnose(
        self, num_steps: int, scheduler: LRScheduler | None = None, *, steps_per_update: int = 1
    ) -> Diagnosis | None:
        """Ask before training whether a run of ``num_steps`` can succeed; None if the method cannot tell.

        The scheduler is rehearsed on a copy; neither it nor the optimizer is touched. Of several parameter groups
        the worst counts. Warns if the run cannot succeed.

        Args:
            num_steps: optimizer steps ahead, >= 1.
            scheduler: as the loop will call it; None: constant learning rates.
            steps_per_update: optimizer steps between two calls of ``scheduler.step()``, e.g. ``len(loader)``.
        """
        ahead = rehearse(self.optimizer, num_steps, scheduler, steps_per_update=steps_per_update)
        if not isinstance(self.method, Diagnosed):
            return None
        found = [self.method.forecast(ahead[i]) for i in sorted(set(self._group_of.values()))]
        worst = min(found, key=lambda diagnosis: diagnosis.exponent)
        if not worst.is_enough:
            warnings.warn(str(worst), stacklevel=2)
        return worst

    # Saving and copying

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.parameters().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the model's and the optimizer's own: plain values and tensors.

        The tensors are the live ones, as in ``torch.optim``; it loads under ``torch.load(weights_only=True)``. Those of
        sharded weights are DTensors, which ``torch.distributed.checkpoint`` saves, and loads on any number of ranks.
        """
        self._check_attached()
        parameters = self.parameters()
        # Present from the start: distributed checkpoints restore only the keys that they are shown.
        pruned = self._pruned or {n: torch.zeros_like(local(p), dtype=torch.bool) for n, p in parameters.items()}
        return {
            "format": FORMAT,
            "method": describe(self.method),
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "hardened_at": self._hardened_at,
            "accuracy": list(self._accuracy),
            "is_hardened": self.is_hardened,
            "cuts": {name: self._cuts.get(name, 0.0) for name in self._places},
            "shapes": self._shapes(),
            "state": {
                name: {key: like(parameters[name], t) if t.ndim else t for key, t in state.items()}
                for name, state in self._state.items()
            },
            "shared": dict(self._shared),
            "pruned": {name: like(parameters[name], mask) for name, mask in pruned.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; load the model's and the optimizer's own states as well.

        Raises:
            ValueError: the state is of another method, other hyper-parameters, or other weights; names the first
                difference. Nothing has been changed then.
        """
        weights = {w.name: w for w in self._weights(with_grad=False)}
        shapes_of = {name: whole_shapes(w) for name, w in weights.items()}
        check_state(state, self.method, self._shapes(), shapes_of, {key: t.shape for key, t in self._shared.items()})
        parameters = self.parameters()
        for name, w in weights.items():
            for key, mine in w.state.items():
                mine.copy_(take(state["state"][name][key], parameters[name], w.shard))
        for key, mine in self._shared.items():
            mine.copy_(state["shared"][key])
        pruned = state["pruned"].items() if state["is_hardened"] else ()
        masks = {name: take(mask, parameters[name], weights[name].shard) for name, mask in pruned}
        self._pruned = {name: m.to(weights[name].value.device, torch.bool, copy=True) for name, m in masks.items()}
        self.num_steps = state["num_steps"]
        self.num_skipped = state["num_skipped"]
        self._hardened_at = state["hardened_at"]
        self._accuracy = (state["accuracy"][0], state["accuracy"][1])
        self._cuts = dict(state["cuts"]) if state["is_hardened"] else {}
        self._mark()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Hooks do not survive deepcopy and pickle; a copied Pruner attaches itself to its copied optimizer.
        state["_was_attached"] = self.is_attached
        state["_handles"] = []
        state["_shards"] = {}  # process groups cannot be copied; they are found anew
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_attached = state.pop("_was_attached")
        self.__dict__.update(state)
        self._shards = shards_of(self._look_up())
        self._mark()
        if was_attached:
            self._attach()


def _unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper that does not forward hooks, such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return inner
    if isinstance(optimizer, Optimizer):
        return optimizer
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _hooks(handle: RemovableHandle) -> Mapping[int, Any]:
    hooks: Mapping[int, Any] | None = handle.hooks_dict_ref()
    return hooks if hooks is not None else {}


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    """The gradient, or this rank's block of it; zeros for a weight that took no part in this step."""
    grad = parameter.grad
    if grad is None:
        return torch.zeros_like(local(parameter))
    if grad.layout is not torch.strided:
        raise ValueError(f"{name} has a sparse gradient; make its module with sparse=False, or exclude it")
    laid_out, wanted = (getattr(t, "placements", None) for t in (grad, parameter))
    if laid_out != wanted:
        raise ValueError(
            f"the gradient of {name} is placed as {laid_out} and the weight as {wanted}; before optimizer.step(), "
            f"bring it there: p.grad = p.grad.redistribute(placements=p.placements)"
        )
    return local(grad)
