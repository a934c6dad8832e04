"""The Pruner: attaches a method to a model and its optimizer. It contains no mathematics."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pomona.computed import check_lengths
from pomona.diagnosis import Diagnosed, Diagnosis, rehearse
from pomona.distributed import like, local, refuse_flat, reshard, working_on
from pomona.method import Method
from pomona.ops import count
from pomona.pages.text import few
from pomona.pruner.cautions import caution_of_frozen, caution_of_unfrozen, cautions_of_cut
from pomona.pruner.chain import chain_of
from pomona.pruner.hooks import StepHooks
from pomona.pruner.placement import Placement
from pomona.pruner.saved import check_method_state, collect, describe, restore
from pomona.pruner.watch import Watch
from pomona.pruner.zeros import Frozen, Zeros, same_names, zero_copy_
from pomona.reporting import Report, report_layers, with_multiply_adds
from pomona.schedule import check_count
from pomona.scope import FROZEN, Scope, ScopedParameters
from pomona.selection.groups import violations
from pomona.weight import Weights

_UNFROZEN = "was frozen when the Pruner was made and trains now: make a new Pruner to prune it"


class Pruner:
    """Prunes ``model`` while ``optimizer`` trains it; the training loop stays as it is.

    The method runs inside ``optimizer.step()``, through its hooks. So it works with schedulers, closures, gradient
    accumulation and ``GradScaler`` (fused optimizers included). A step with a gradient that is not finite is skipped as
    a whole, counted in ``num_skipped``, and the first one is warned of; weights, momentum and step count do not change.
    A step with all learning rates and all gradients zero does not count (distributed checkpointing takes such steps).

    What is frozen keeps its values. A weight in scope with ``requires_grad`` False (and no gradient) is taken out of
    the step: no method and no optimizer writes into it. It stays in the ranking, and when it is unfrozen, the method's
    masks apply again from the next step. If it is frozen at ``harden()``, it is left as it is, and a warning says how
    many weights stay that the budget would have cut; ``verify()`` accepts these. A weight that is frozen when the
    Pruner is made is outside of the scope; if it trains at ``harden()``, a warning names it.

    On several ranks, first wrap or shard the model (``DistributedDataParallel``, ``fully_shard``,
    ``parallelize_module``), then make the optimizer and the Pruner, on each rank. All ranks share one budget, and the
    masks equal those of one process. Where weights are sharded, every method of a Pruner except ``detach`` must be
    called on all ranks.

    Args:
        model: parameters are neither renamed nor replaced; its ``state_dict()`` stays plain.
        optimizer: any ``torch.optim`` optimizer that the method accepts and that evaluates its gradients once per
            step (so not LBFGS); it must hold every weight in scope. An optimizer around another one is taken as the
            loop steps it: Lookahead, sharpness-aware ones (with either way to step them), Accelerate's.
        method: how weights are pruned, e.g. ``GSM(sparsity=0.9)``.
        scope: which weights; default: every trainable weight that a layer multiplies with.
        check_every: under ``DistributedDataParallel``, compare the ranks' weights every so many steps, at a few bytes
            per tensor; 0: never.

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
        optimizers = chain_of(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if scope is not None and not isinstance(scope, Scope):
            raise TypeError(f"scope must be a pomona.Scope such as Scope(exclude=['head']), got {scope!r}")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a pomona.Method such as GSM(sparsity=0.9), got {method!r}")
        check_count("check_every", check_every, low=0)
        self.model = model
        self.optimizer = optimizers[-1]
        self.method = method
        self.scope = scope or Scope()
        self.check_every = check_every

        reshard(model)
        selected = self._select(optimizers[-1])
        self._outside = selected.outside
        self._directions = selected.directions
        self._placement = Placement(model, optimizers, selected.inside, selected.layouts)
        for one in reversed(optimizers):
            method.check(one, [self.optimizer.param_groups[i] for i in self._placement.groups()])
        self._check_agreement()
        self._start_method()
        self._zeros = Zeros()
        self._in_step = Weights(())
        self._hardened_at = 0  # step
        self._memory: list[Any] = []  # the optimizers' states, as of when pruned weights were dropped from them
        self._has_warned = False  # of zeros that something revived
        self._accuracy: tuple[float | None, float | None] = (None, None)  # before and after harden()
        self._watch = Watch(self._placement)
        self._hooks = StepHooks(
            optimizers, self._placement, before=self._before, after=self._after, checks_gradients=self._checks_gradients
        )
        self._hooks.attach()

    def __repr__(self) -> str:
        done = "hardened" if self.is_hardened else f"step {self.num_steps:,}"
        return f"Pruner({self.method}, {len(self._placement.names)} tensors, {done})"

    def _select(self, optimizer: Optimizer) -> ScopedParameters:
        selected = self.scope.select(self.model, with_frozen=self.method.takes_frozen)
        if not self.method.takes_frozen:
            return selected
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        resting = [name for name, p in selected.inside.items() if not p.requires_grad and id(p) not in held]
        inside = {name: p for name, p in selected.inside.items() if name not in resting}
        if not inside:
            raise ValueError(
                f"nothing to hold: all weights in scope are frozen ({few(resting)}), and the optimizer holds none of "
                f"them, so nothing moves their zeros. If they train later, give them to the optimizer"
            )
        directions = {name: dim for name, dim in selected.directions.items() if name in inside}
        outside = selected.outside | dict.fromkeys(resting, FROZEN)
        return dataclasses.replace(selected, inside=inside, outside=outside, directions=directions)

    def _check_agreement(self) -> None:
        names = self._placement.names
        for ranks in self._placement.ranks():
            if not ranks.agree(f"{describe(self.method)}, {self._placement.shapes()}"):
                raise ValueError(
                    f"the ranks do not prune alike: this one has {describe(self.method)} for {len(names)} tensors, "
                    f"{', '.join(names[:3])}, ..., and another one has another method, or other weights in scope"
                )

    def _start_method(self) -> None:
        weights = self._weights()
        with working_on(self._placement.shards):
            self.method.check_weights(weights)
            state = {w.name: self.method.init(w) for w in weights}
            self._placement.remember(state, self.method.init_shared(weights))
        check_method_state(self.method, self._weights())

    @property
    def num_steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._hooks.num_steps

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far."""
        return self._hooks.num_skipped

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are still on the optimizer; copies and pickles of an optimizer lose theirs."""
        return self._hooks.is_attached

    @property
    def is_hardened(self) -> bool:
        """Whether ``harden()`` has written the zeros, which are held from then on."""
        return self._zeros.are_written

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter in scope, looked up in the model now."""
        return self._placement.parameters()

    def detach(self) -> None:
        """Take the hooks off the optimizer: nothing is pruned and no zero is held any more.

        ``state_dict()``, ``masks()`` and ``report()`` work as before, e.g. to go on with another optimizer.
        """
        self._hooks.detach()

    # Around optimizer.step()

    def _weights(self) -> Weights:
        return self._placement.weights()

    def _checks_gradients(self) -> bool:
        return self.method.checks_gradients and not self.is_hardened

    def _before(self, weights: Weights, step: int) -> None:
        if self.is_hardened:
            self._warn_if_revived(weights, step)
            self._zeros.drop_gradients_(weights)
        else:
            with working_on(self._placement.shards):
                returned: object = self.method.before_step(weights, step)  # type: ignore[func-returns-value]
            if returned is not None:
                raise TypeError(
                    f"{type(self.method).__name__}.before_step must return nothing; drop gradients with "
                    f"pomona.ops.drop_gradients_(weights, selection)"
                )
        if self.check_every and step % self.check_every == 0:
            self._placement.check_replicas(step)
        self._in_step = weights

    def _after(self, is_real: bool) -> None:
        if self.is_hardened:
            weights = self._in_step if is_real else self._weights()
            self._zeros.write_(weights)
            if self._placement.swaps or not self._has_same_memory():
                self._forget(weights)
        elif is_real:
            with working_on(self._placement.shards):
                self.method.after_step(self._in_step, self.num_steps)
        self._placement.thaw()
        if is_real and self._directions and not self.is_hardened:
            check_lengths({w.name: w.value for w in self._in_step}, self._directions)
        self.mark()

    def _forget(self, weights: Weights) -> None:
        """Nothing that the optimizer remembers can revive a zero; without gradients there it learns nothing new."""
        self._zeros.forget_(weights)
        self._memory = [one.state for one in self._placement.optimizers]

    def _has_same_memory(self) -> bool:
        """False after the optimizer has loaded another state."""
        now = [one.state for one in self._placement.optimizers]
        return len(now) == len(self._memory) and all(map(operator.is_, now, self._memory))

    def _warn_if_revived(self, weights: Weights, step: int) -> None:
        if self._has_warned or not self._watch.is_touched:
            return
        revived = self._zeros.revived(weights)
        if revived:
            self._has_warned = True
            warnings.warn(
                f"{sum(revived.values()):,} of the zeros that harden() wrote ({', '.join(list(revived)[:3])}) were not "
                f"zero any more when step {step:,} began. It writes them again, but a model that is saved in between "
                f"lacks them. What writes weights between two steps? If weights were loaded, call harden() again; if "
                f"it is a wrapper around the optimizer, let it subclass torch.optim.Optimizer and call its __init__",
                stacklevel=2,
            )

    def mark(self) -> None:
        """The weights are as they should be: changes up to here are no reason for a warning.

        Call it after an edit by hand that the Pruner would otherwise take for steps of a copy of the optimizer.
        """
        self._watch.mark()

    def _check_attached(self) -> None:
        """Say so when training goes on without us; to be called from the methods that users call."""
        if not self.is_attached:
            raise RuntimeError(
                "this Pruner is not attached to its optimizer any more (detach() was called, or the optimizer's hooks "
                "were removed); make a new Pruner and load this one's state_dict() into it"
            )
        self._placement.check_in_place()
        if not self._placement.swaps:  # else eval() and train() of the optimizer change the weights, as they should
            self._watch.warn_if_changed(self.num_steps, stacklevel=3)

    # Zeros

    def harden(self, *copies: nn.Module, evaluate: Callable[[], float] | None = None, one_shot: bool = False) -> Report:
        """Write exact zeros outside the method's support, and keep them from here on.

        Every later step of the optimizer trains the survivors only; zeros survive momentum, Adam and weight decay.
        What the optimizer remembers of a pruned weight is cleared, also where it is a copy of the weights that
        ``optimizer.eval()`` swaps in (schedule-free optimizers). Calling it again chooses no new zeros: it writes the
        same ones, also into ``copies`` and into weights that were loaded since, and reports anew.

        Args:
            copies: models with the same parameters that get the same zeros, e.g. an ``AveragedModel``. An average
                that goes on stays zero there.
            evaluate: called before and after the cut, e.g. for the accuracy; both stand in the report.
            one_shot: cut the weights as they are, even if not one step has been taken.

        Returns:
            The report, counted from the tensors.

        Raises:
            RuntimeError: the Pruner has seen no step, and ``one_shot`` is False; it is detached; or a weight has been
                replaced.
        """
        self._check_attached()
        if self._hooks.refusal:
            raise RuntimeError(
                "harden() inside trial_cut() would be undone at the end of the block; call it afterwards"
            )
        for copy in copies:
            same_names(copy, {name: local(p) for name, p in self.parameters().items()})
        if self.is_hardened:
            self._zeros.write_(self._weights())
        else:
            if not self.num_steps and not one_shot:
                raise RuntimeError(self._why_no_step())
            weights = self._weights()
            masks, frozen = self._masks(weights)
            if self._directions:
                check_lengths(dict(zip(self._placement.names, masks, strict=True)), self._directions)
            for caution in cautions_of_cut(self.method, weights, masks, self.num_steps, self._placement):
                warnings.warn(caution, stacklevel=2)
            if names := self._unfrozen():
                warnings.warn(caution_of_unfrozen(names), stacklevel=2)
            before = float(evaluate()) if evaluate else None
            self._zeros = Zeros.cut_(self._weights() if evaluate else weights, masks, frozen)
            if left := {name: one.surplus for name, one in self._zeros.frozen.items() if one.surplus > 0}:
                num_kept = sum(self._zeros.num_kept(self._placement).values())
                warnings.warn(caution_of_frozen(left, 1 - num_kept / weights.numel), stacklevel=2)
            self._accuracy = (before, float(evaluate()) if evaluate else None)
            self._hardened_at = self.num_steps
        self._forget(self._weights())
        self.mark()
        for copy in copies:
            zero_copy_(copy, self._zeros.pruned)
        return self.report()

    def _why_no_step(self) -> str:
        if self.num_skipped:
            return (
                f"harden() before the first step: all {self.num_skipped:,} steps were skipped because a gradient was "
                f"not finite"
            )
        return (
            f"harden() before the first step: this Pruner has seen no step of its {type(self.optimizer).__name__}, "
            f"so {type(self.method).__name__} has pruned nothing. Train with the optimizer that the Pruner was made "
            f"with (not a copy of it); or cut the weights as they are: harden(one_shot=True)"
        )

    @contextmanager
    def trial_cut(self) -> Iterator[Report]:
        """Inside the block the model is as ``harden()`` would make it now; afterwards training goes on unharmed.

        Costs one copy of the weights in scope while it lasts. Yields the report of the cut model.
        """
        saved = [w.value.clone() for w in self._weights()]
        refusal = self._hooks.refusal
        self._hooks.refusal = (
            "optimizer.step() inside trial_cut() would be undone at the end of the block; step outside"
        )
        with self._watch.paused():
            try:
                yield self._report(self._zeros if self.is_hardened else self._cut())
            finally:
                with torch.no_grad():
                    for w, value in zip(self._weights(), saved, strict=True):
                        w.value.copy_(value)
                self._hooks.refusal = refusal

    def _cut(self) -> Zeros:
        weights = self._weights()
        return Zeros.cut_(weights, *self._masks(weights))

    @torch.no_grad()
    def _masks(self, weights: Weights) -> tuple[list[Tensor], dict[str, Frozen]]:
        """What stays: the method's support, or all of a weight that is frozen; and which ones those are.

        The support must not be larger than the budget; it is smaller where scores are zero.
        """
        with working_on(self._placement.shards):
            masks = self.method.support(weights, self.num_steps)
        budget = self.method.budget.num_kept(weights.numel, self.num_steps)
        kept = count(masks, of=weights)
        if sum(kept) > budget:
            raise RuntimeError(f"{self.method} has a budget of {budget} weights, but its support has {sum(kept)}")
        since = self._placement.frozen(self.num_steps)
        if not since:
            return masks, {}
        masks = [w.value != 0 if w.name in since else mask for w, mask in zip(weights, masks, strict=True)]
        left = count(masks, of=weights)
        surplus = {w.name: b - a for w, a, b in zip(weights, kept, left, strict=True)}
        return masks, {name: Frozen(step, surplus[name]) for name, step in since.items()}

    def _unfrozen(self) -> list[str]:
        """What is outside because it was frozen when the Pruner was made, and is not frozen any more."""
        frozen = [name for name, reason in self._outside.items() if reason == FROZEN]
        now = dict(self.model.named_parameters(remove_duplicate=False)) if frozen else {}
        return [name for name in frozen if name in now and now[name].requires_grad]

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
            for name, num in self._zeros.count_revived(model, self._placement.shards).items():
                wrong.append(f"{num} of the zeros of {name} in {type(model).__name__} are not zero any more")
        if self._placement.swaps:
            for name, num in self._zeros.count_remembered(self._weights()).items():
                wrong.append(f"{num} of the zeros of {name} are not zero in the copies that the optimizer swaps in")
        report = self.report()
        budget = self.method.budget.num_kept(report.total, self._hardened_at) + self._zeros.surplus
        num_survivors = sum(self._zeros.num_kept(self._placement).values())
        if num_survivors > budget:
            wrong.append(f"{num_survivors} weights survived, more than the budget of {budget}")
        if report.nonzero > num_survivors:
            wrong.append(f"{report.nonzero} weights are not zero, but only {num_survivors} survived the cut")
        cut = [w for w in self._weights() if w.name not in self._zeros.frozen]
        wrong += violations(self.method.budget.granularity, [self._zeros.pruned[w.name] for w in cut], cut)
        steps = f"{self.num_steps:,} steps, {self.num_skipped:,} skipped, cut after {self._hardened_at:,}"
        wrong += self._placement.disagreements(self._zeros.pruned, steps)
        if wrong:
            raise RuntimeError("the sparsity contract is broken: " + "; ".join(wrong))
        return report

    # Reporting

    def report(self, *, example: Any = None) -> Report:
        """Count the model as it is now.

        Args:
            example: an input of the model; with it also multiply-adds are counted, see :func:`pomona.report`.
        """
        report = self._report(self._zeros)
        if example is None:
            return report
        values = {w.name: w.value for w in self._weights()}
        return with_multiply_adds(report, self.model, values, self._placement.shards, example)

    def _report(self, zeros: Zeros) -> Report:
        weights = self._weights()
        kept = zeros.num_kept(self._placement)
        density = sum(kept.values()) / weights.numel
        reasons = {
            w.name: self.method.why(w, kept[w.name], density) if zeros.are_written else "not cut yet" for w in weights
        }
        since = {name: one.since for name, one in zeros.frozen.items()}
        for name, step in (since if zeros.are_written else self._placement.frozen(self.num_steps)).items():
            reasons[name] = f"frozen since step {step:,}: keeps its values"
        place = self._placement
        values = {w.name: w.value for w in weights}
        layers = report_layers(values, place.shards, layouts=place.layouts, cuts=zeros.cuts, reasons=reasons)
        before, after = self._accuracy
        return Report(
            layers=layers,
            outside=self._outside | dict.fromkeys(self._unfrozen(), _UNFROZEN),
            granularity=str(self.method.budget.granularity),
            accuracy_before=before,
            accuracy_after=after,
            metrics=self._metrics(weights),
            num_steps=self.num_steps,
            num_skipped=self.num_skipped,
        )

    def metrics(self) -> dict[str, float]:
        """The method's own numbers now, such as GSM's ``decay_exponent``; may synchronise with the device."""
        return self._metrics(self._weights())

    def _metrics(self, weights: Weights) -> dict[str, float]:
        with working_on(self._placement.shards):
            return self.method.metrics(weights)

    def density_if_cut(self) -> dict[str, float]:
        """Name -> the share of its weights that ``harden()`` would keep now, or has kept: one selection, no copies."""
        weights = self._weights()
        if self.is_hardened:
            kept = self._zeros.num_kept(self._placement)
        else:
            kept = dict(zip(self._placement.names, count(self._masks(weights)[0], of=weights), strict=True))
        return {w.name: kept[w.name] / w.numel for w in weights}

    def masks(self) -> dict[str, Tensor]:
        """Name -> boolean mask, True = kept: by ``harden()``, or before it what it would keep if it came now.

        New tensors of the weights' shapes, on their devices; those of sharded weights are DTensors. Save them like any
        tensors; ``pomona.apply_masks(model, masks)`` puts them on another model.
        """
        if self.is_hardened:
            kept = {name: ~mask for name, mask in self._zeros.pruned.items()}
        else:
            masks, _ = self._masks(self._weights())
            kept = {name: mask.clone() for name, mask in zip(self._placement.names, masks, strict=True)}
        return {name: like(p, kept[name]) for name, p in self.parameters().items()}

    def diagnose(
        self, num_steps: int, scheduler: LRScheduler | None = None, *, steps_per_update: int = 1
    ) -> Diagnosis | None:
        """Ask before training whether a run of ``num_steps`` can succeed; None if the method does not know.

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
        found = [self.method.forecast(ahead[i]) for i in self._placement.groups()]
        worst = min(found, key=lambda diagnosis: diagnosis.exponent)
        if not worst.is_enough:
            warnings.warn(str(worst), stacklevel=2)
        return worst

    # Saving and copying

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the model's and the optimizer's own: plain values and tensors.

        The tensors are the live ones, as in ``torch.optim``; it loads under ``torch.load(weights_only=True)``. Those of
        sharded weights are DTensors, which ``torch.distributed.checkpoint`` saves, and loads on any number of ranks.
        After ``detach()`` it is the state at that time, for another Pruner to go on with.
        """
        if self.is_attached:
            self._check_attached()
        return {
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "hardened_at": self._hardened_at,
            "accuracy": list(self._accuracy),
            **collect(self.method, self._placement, self._zeros),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; load the model's and the optimizer's own states as well.

        Raises:
            ValueError: the state is of another method, other hyper-parameters, or other weights; names the first
                difference. Nothing has been changed then.
        """
        self._zeros = restore(state, self.method, self._placement)
        self._hooks.num_steps = state["num_steps"]
        self._hooks.num_skipped = state["num_skipped"]
        self._hardened_at = state["hardened_at"]
        self._accuracy = (state["accuracy"][0], state["accuracy"][1])
        self.mark()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_step": Weights(()), "_was_attached": self.is_attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_attached = state.pop("_was_attached")
        self.__dict__.update(state)
        self.mark()
        if was_attached:
            self._hooks.attach()
