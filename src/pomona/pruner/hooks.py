"""Around ``optimizer.step()``: hooks, closures, loss scales, and steps that must not be taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pomona.distributed import local
from pomona.ops import all_finite
from pomona.pruner.placement import Placement
from pomona.selection import NonFiniteError
from pomona.weight import Weights


class StepHooks:
    """Calls ``before`` and ``after`` around each real step of the optimizer, with final gradients.

    A step with a gradient that is not finite is skipped as a whole and counted. A step with all learning rates and all
    gradients zero is not a step (distributed checkpointing makes such ones). A subclass that calls ``super().step()``
    fires the hooks twice; the second time is passed over.

    Where an optimizer steps inside another one (:func:`pomona.pruner.chain.chain_of`), ``before`` comes with the inner
    one, which gets the final gradients, and ``after`` with the outer one, which may write the weights last.

    Args:
        optimizers: whose steps are meant, the outermost first.
        placement: knows which parameters are in scope, and asks the other ranks.
        before: called with the weights and the step's number when gradients are final and finite. If
            ``checks_gradients()`` is True, it checks those of the weights in scope itself and raises NonFiniteError
            before it has changed anything.
        after: called after each step, with True if it was a real one. (A subclass that calls ``super().step()`` ends
            twice, the second time with False.)
        checks_gradients: see ``before``.

    Attributes:
        num_steps: real steps so far.
        num_skipped: steps skipped so far.
        refusal: if not empty, a step is an error with this message.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        placement: Placement,
        *,
        before: Callable[[Weights, int], None],
        after: Callable[[bool], None],
        checks_gradients: Callable[[], bool],
    ) -> None:
        self.num_steps = 0
        self.num_skipped = 0
        self.refusal = ""
        self._optimizers = list(optimizers)
        self._optimizer = self._optimizers[-1]  # which computes the update
        self._under_way: Optimizer | None = None  # the outermost one whose step has begun
        self._start: Tensor | None = None  # where a weight was when the outer step began
        self._placement = placement
        self._before, self._after, self._checks_gradients = before, after, checks_gradients
        self._in_step = False
        self._prepared = (0, 0)  # id and version of the first gradient of the step under way
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    # On and off

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are still on the optimizer; copies and pickles of an optimizer lose theirs."""
        return bool(self._handles) and all(handle.id in _hooks(handle) for handle in self._handles)

    def attach(self) -> None:
        """Put the hooks on; ValueError if they are on, or if another Pruner prunes one of these weights."""
        if self.is_attached:
            raise ValueError(
                "this Pruner is attached already; copy it together with the others: "
                "copy.deepcopy((model, optimizer, pruner))"
            )
        before = [optimizer.register_step_pre_hook(self._on_step) for optimizer in self._optimizers]
        after = [optimizer.register_step_post_hook(self._on_stepped) for optimizer in self._optimizers]
        self._handles = [*before, *after]
        for hook in [hook for handle in before for hook in _hooks(handle).values()]:
            other = getattr(hook, "__self__", None)
            if isinstance(other, StepHooks) and other is not self:
                theirs = {id(p) for p in other._placement.parameters().values()}
                shared = [name for name, p in self._placement.parameters().items() if id(p) in theirs]
                if shared:
                    self.detach()
                    raise ValueError(
                        f"{shared[0]} is already pruned by another Pruner on this optimizer; call its "
                        f"detach() first, or give the two scopes that do not overlap"
                    )

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        # Hooks do not survive deepcopy and pickle; a copied Pruner attaches itself to its copied optimizer.
        return {**self.__dict__, "_handles": [], "_under_way": None, "_start": None}

    # Before the step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._begin(optimizer)
        if optimizer is not self._optimizer:
            return None
        self._check_start()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None
        pruning = self._wrap(closure)
        if len(args) > 1:
            return (args[0], pruning, *args[2:]), kwargs
        return args, {**kwargs, "closure": pruning}

    def _begin(self, optimizer: Optimizer) -> None:
        """Note which step is under way: this one, unless it happens inside that of an outer optimizer."""
        places = [id(one) for one in self._optimizers]
        if self._under_way is None or places.index(id(optimizer)) <= places.index(id(self._under_way)):
            is_outer = optimizer is not self._optimizer
            self._start = local(self._placement.first()).clone() if is_outer else None
            self._under_way = optimizer

    def _check_start(self) -> None:
        """RuntimeError if an outer optimizer has left the weights elsewhere than where the gradient was taken."""
        start, self._start = self._start, None
        if start is None:
            return
        rounding = 8 * torch.finfo(start.dtype).eps  # of w + e - e, by which sharpness-aware optimizers return
        now = local(self._placement.first())
        if not torch.allclose(now, start.to(now.device), rtol=rounding, atol=rounding, equal_nan=True):
            outer, inner = type(self._under_way).__name__, type(self._optimizer).__name__
            raise RuntimeError(
                f"{outer} moves the weights before the step of the {inner} inside, so that the gradient does not "
                f"belong to them, and Pomona cannot prune with it; use an optimizer that does without one inside "
                f"(schedulefree.SGDScheduleFree and AdamWScheduleFree instead of a schedule-free wrapper)"
            )

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """With ``step(closure)`` the gradients do not exist before the closure has run."""
        num_calls = 0
        version = self._placement.first()._version

        def pruning_closure() -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1 and self._placement.first()._version != version:
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} moves the weights before it calls its closure, as "
                    f"sharpness-aware optimizers do, so the gradient is not that of the weights; use one that steps "
                    f"by an optimizer inside, such as SAM(..., base_optimizer=SGD)"
                )
            if num_calls > 1:
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} called its closure twice in one step; Pomona prunes by the one "
                    f"gradient of a step and cannot work with it"
                )
            loss = closure()
            self._prepare()
            return loss

        return pruning_closure

    @torch.no_grad()
    def _prepare(self) -> None:
        """Look at the gradients, then call ``before``, or skip the step."""
        if self.refusal:
            raise RuntimeError(self.refusal)
        pairs = [(p, grad) for p in self._all_parameters() if (grad := p.grad) is not None]
        grads = [grad for _, grad in pairs]
        if self._in_step and self._prepared == _version_of(grads):
            return
        self._in_step = False
        self._placement.refresh()
        if self._is_phantom(grads):
            return
        # Over ranks the gradients are checked here, because all ranks have to go the same way.
        is_left = self._checks_gradients() and not self._placement.shards
        ours = self._placement.ids if is_left else ()
        checked = [grad for p, grad in pairs if id(p) not in ours or not p.is_cpu] if ours else grads
        if not self._are_usable(grads, checked):
            self._skip()
            return
        try:
            self._before(self._placement.weights_in_step(self.num_steps + 1), self.num_steps + 1)
        except NonFiniteError:
            if not is_left or all_finite(grads):
                raise
            self._skip()
            return
        self.num_steps += 1
        self._in_step = True
        left = (p.grad for p in self._all_parameters() if p.grad is not None)  # what is frozen has none any more
        self._prepared = _version_of([next(left, grads[0])])

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _is_phantom(self, grads: Sequence[Tensor]) -> bool:
        if not grads:
            return True
        if any(group["lr"] != 0.0 for group in self._optimizer.param_groups):
            return False
        return not self._placement.on_any_rank(any(bool(local(g).any()) for g in grads))

    def _are_usable(self, grads: Sequence[Tensor], checked: Sequence[Tensor]) -> bool:
        """Undo a loss scale that the optimizer itself would undo; True if the checked gradients are finite."""
        for optimizer in self._optimizers:
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is not None and self._placement.on_any_rank(bool(local(found_inf))):
                return False
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:
                for grad in map(local, grads):
                    grad.div_(local(scale).to(grad.device))
                optimizer.grad_scale = None  # type: ignore[attr-defined]  # set by GradScaler for fused steps
        checked = [local(grad) for grad in checked] if self._placement.shards else checked
        return not self._placement.on_any_rank(not all_finite(checked))

    def _skip(self) -> None:
        if self.num_skipped == 0:
            warnings.warn(
                f"a gradient is not finite at step {self.num_steps + 1}; skipping this step. Later ones are skipped "
                f"silently and counted in Pruner.num_skipped",
                stacklevel=2,
            )
        self.num_skipped += 1
        # An optimizer passes over parameters without a gradient: no update, no decay, no momentum, no step count.
        for parameter in self._all_parameters():
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    # After the step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _on_stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is not self._under_way and self._under_way is not None:
            return  # the outer one goes on
        self._under_way = None
        was_real, self._in_step = self._in_step, False
        if was_real and optimizer is not self._optimizer:
            self._placement.follow()
        hidden, self._hidden = self._hidden, []
        for parameter, grad in hidden:
            parameter.grad = grad
        try:
            self._after(was_real)
        finally:
            self._placement.release()


def _hooks(handle: RemovableHandle) -> Mapping[int, Any]:
    hooks: Mapping[int, Any] | None = handle.hooks_dict_ref()
    return hooks if hooks is not None else {}


def _version_of(grads: Sequence[Tensor]) -> tuple[int, int]:
    """Identity and version of the first gradient; a change means that backward() has run since."""
    return (id(grads[0]), grads[0]._version) if grads else (0, 0)
