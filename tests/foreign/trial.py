"""A model's whole life: selected, pruned, held, copied, saved, exported, compiled and run; each claim checked."""

from __future__ import annotations

import ast
import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import pomona
from pomona.runtime import Network
from pomona.runtime import compile as compiling
from pomona.runtime.readers.builder import UnsupportedError
from tests.foreign.models import Tried, call
from tests.problems import bits

BEFORE, RESUMED, AFTER = 3, 2, 2  # steps: up to the checkpoint, from there to harden(), and with exact zeros
SPARSITY = 0.5


@dataclass(frozen=True)
class Way:
    """A method and the optimizer that it trains with."""

    method: pomona.Method
    optimizer: Callable[[Any], Optimizer]
    is_exact: bool = True  # whether harden() leaves exactly its budget


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


WAYS: Mapping[str, Way] = {
    "GSM": Way(pomona.GSM(SPARSITY), _sgd),
    "Magnitude": Way(pomona.Magnitude(pomona.Linear(0.0, SPARSITY, steps=4)), _adamw),
    "Magnitude with SGD": Way(pomona.Magnitude(SPARSITY), lambda parameters: SGD(parameters, lr=1e-3)),
    "Feather": Way(pomona.Feather(SPARSITY), _adamw),
    "RigL": Way(pomona.RigL(SPARSITY, every=2), _adamw, is_exact=False),  # what it grew may still be zero
    "ADMM": Way(pomona.ADMM(SPARSITY, rho=1e-3, every=2), _adamw),
}


@dataclass(frozen=True)
class Found:
    """What the page says about a model."""

    tensors: int  # in scope
    weights: int  # in scope
    parameters: int  # of the model
    methods: tuple[str, ...]
    compiled: str  # layers that can run sparsely, of those looked at
    runtime: str  # "yes", or what is missing
    said: str = ""  # of the default scope: an error, or a warning


def attempt(tried: Tried, folder: Path) -> Found:
    """Take the model through all of it.

    Raises:
        AssertionError: something is not as the table or the promise has it.
    """
    said = check_default(tried)
    if tried.scope is None:
        return Found(0, 0, _count(_made(tried)), (), "-", "-", said)
    if tried.refused:
        tried = replace(tried, scope=advised(said))
    check_scope(tried)
    for way in tried.ways:
        model = live(tried, WAYS[way])
    check_file(model, tried, folder)
    compiled = check_compile(model, tried)
    runtime = check_runtime(model, tried)
    with _their_warnings():
        inside = tried.scope.select(_made(tried)).inside.values()
    weights = sum(parameter.numel() for parameter in inside)
    return Found(len(inside), weights, _count(model), tried.ways, compiled, runtime, said)


def _made(tried: Tried, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with _their_warnings():
        return tried.make()


@contextmanager
def _their_warnings() -> Iterator[None]:
    """What other people's models and torch.export warn of is not what we are after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# What is selected

# By an eye on 90 models: what is no weight of a layer is called one of these, or belongs to one of those.
_NO_WEIGHT = re.compile(
    r"bias|gain|gamma|beta|scale|token|pos|relative|table|temperature|A_log|seg_embed|mask_emb", re.IGNORECASE
)
_NO_LAYER = re.compile(r"norm|embedding|grn|scale", re.IGNORECASE)


def check_scope(tried: Tried) -> None:
    """As many tensors as the table says; no vector, norm, scale, token, position, table or embedding among them."""
    model = _made(tried)
    assert tried.scope is not None
    with _their_warnings() if tried.warned else nullcontext():
        selected = tried.scope.select(model)
    assert len(selected.inside) == tried.tensors, list(selected.inside)
    owners = dict(getattr(model, "_orig_mod", model).named_modules(remove_duplicate=False))
    for name in selected.inside:
        owner, _, leaf = name.rpartition(".")
        kind = type(owners[owner]).__name__
        assert not _NO_WEIGHT.search(leaf), name
        assert not _NO_LAYER.search(kind), f"{name} of {kind}"
    for name, reason in selected.outside.items():
        owner, _, leaf = name.rpartition(".")
        assert reason, name
        if leaf == "weight" and isinstance(owners[owner], nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            assert re.search("tied|frozen|exclude", reason), f"{name}: {reason}"


def check_default(tried: Tried) -> str:
    """What the Pruner says of the default scope: nothing, a refusal, or a warning, as the table has it."""
    model, way = _made(tried), WAYS[tried.ways[0]]
    optimizer = way.optimizer([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if tried.refused:
            with pytest.raises(ValueError, match=tried.refused) as refusal:
                pomona.Pruner(model, optimizer, way.method)
            return str(refusal.value)
        pomona.Pruner(model, optimizer, way.method)
    messages = [str(w.message) for w in caught]
    if not tried.warned:
        assert not messages
        return ""
    (message,) = messages
    assert re.search(tried.warned, message), message
    return message


def advised(message: str) -> pomona.Scope:
    """The scope that an error advises, as one would copy it."""
    advice = re.search(r"Scope\(exclude=(\[.*?\])\)", message)
    assert advice, message
    return pomona.Scope(exclude=ast.literal_eval(advice[1]))


# What training does


class Run:
    """A model, its optimizer and its Pruner."""

    def __init__(self, tried: Tried, way: Way, seed: int = 0) -> None:
        self.tried = tried
        self.told: list[str] = []  # warnings of the cuts
        self.model = _made(tried, seed).train()
        self.optimizer = way.optimizer([p for p in self.model.parameters() if p.requires_grad])
        with warnings.catch_warnings():
            if tried.scope == pomona.Scope():
                warnings.simplefilter("ignore")  # check_default has read them
            self.pruner = pomona.Pruner(self.model, self.optimizer, way.method, scope=tried.scope)

    @property
    def parts(self) -> tuple[nn.Module, Optimizer, pomona.Pruner]:
        return self.model, self.optimizer, self.pruner

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            torch.manual_seed(self.pruner.num_steps)  # of dropout
            with _their_warnings():
                found = call(self.model, self.tried.example)
            loss_of(found).backward()
            with self._listening():
                self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def harden(self) -> pomona.Report:
        with self._listening():
            return self.pruner.harden()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        self.told += [str(w.message) for w in caught if not _EARLY.match(str(w.message))]

    def save(self) -> bytes:
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> Run:
        for part, state in zip(self.parts, torch.load(io.BytesIO(saved), weights_only=True), strict=True):
            part.load_state_dict(state)
        return self

    def copy(self) -> Run:
        other = copy.copy(self)
        other.model, other.optimizer, other.pruner = copy.deepcopy(self.parts)
        return other

    def end(self) -> Any:
        return bits([dict(self.model.state_dict()), self.optimizer.state_dict()["state"], self.pruner.state_dict()])


def live(tried: Tried, way: Way) -> nn.Module:
    """Train, harden, train on, verify; the same again from a checkpoint, and in a copy: bit for bit."""
    run = Run(tried, way).train(BEFORE)
    saved = run.save()
    harden(run.train(RESUMED), way)
    copied = run.copy() if tried.copies else None
    report = run.train(AFTER).pruner.verify()
    assert report.num_skipped == 0
    end = run.end()
    if copied:
        assert copied.train(AFTER).end() == end

    resumed = Run(tried, way, seed=1).load(saved).train(RESUMED)
    harden(resumed, way)
    assert resumed.train(AFTER).end() == end
    return run.model.eval()


# These runs are far too short for passive weights to vanish, which is not what they are about.
_EARLY = re.compile(r"harden\(\) (cuts weights that have not decayed|at step .* comes early)")


def harden(run: Run, way: Way) -> None:
    """As many weights stay as the budget says, and a layer that is emptied is named in a warning."""
    report = run.harden()
    budget = way.method.budget.num_kept(report.total, run.pruner.num_steps)
    assert report.nonzero == budget if way.is_exact else report.nonzero <= budget
    empty = [layer.name for layer in report.layers if layer.nonzero <= 1 < layer.total]
    assert run.told or not empty, f"emptied without a warning: {empty}"
    assert all("starves layers" in text for text in run.told), run.told


# What leaves torch


def check_file(model: nn.Module, tried: Tried, folder: Path) -> None:
    """The file gives back every tensor bit for bit, and another model takes them."""
    plain = getattr(model, "_orig_mod", model)
    pomona.export(model, folder / "model.pomona.safetensors")
    loaded = pomona.load(folder / "model.pomona.safetensors")
    assert bits(loaded) == bits(dict(plain.state_dict()))
    other = _made(tried, seed=1)
    getattr(other, "_orig_mod", other).load_state_dict(loaded)


def check_compile(model: nn.Module, tried: Tried) -> str:
    """With every layer sparse that can be, whatever it gains, the outputs are torch's up to rounding."""
    if not tried.copies:
        with pytest.raises(RuntimeError, match="deepcopy"):
            pomona.compile(model, tried.example)
        return "cannot be copied"
    with _every_layer():
        compiled = pomona.compile(model, tried.example)
    with torch.no_grad():
        expected, found = (outputs(call(m, tried.example)) for m in (model, compiled))
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **_tolerance(e))
    choices = compiled.compilation.layers
    return f"{sum(choice.is_sparse for choice in choices)} of {len(choices)}"


def check_runtime(model: nn.Module, tried: Tried) -> str:
    """The whole network without torch: the same up to rounding, or an error that names what is missing."""
    if tried.runtime:
        with _their_warnings(), pytest.raises(UnsupportedError, match=re.escape(tried.runtime)):
            Network.from_model(model, tried.example)
        return tried.runtime
    inputs = tried.example if isinstance(tried.example, tuple) else (tried.example,)
    with _their_warnings():
        network = Network.from_model(model, tried.example)
    found = network.run(*(x.float().numpy() for x in inputs))
    with torch.no_grad():
        expected = outputs(call(model, tried.example))
    for f, e in zip([found] if isinstance(found, np.ndarray) else found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(f), e.float(), **_tolerance(e))
    return "yes"


def _tolerance(expected: Tensor) -> dict[str, float]:
    """Of sums in another order, relative to the largest output; bfloat16 rounds activations too."""
    relative = 2e-2 if expected.dtype == torch.bfloat16 else 1e-4
    return {"rtol": relative, "atol": relative * float(expected.float().abs().max())}


@contextmanager
def _every_layer() -> Iterator[None]:
    """Every layer with zeros is replaced, however long it takes: outcomes of races are no business of these tests."""
    before = compiling._GAIN, compiling._MOST_ROUNDS
    compiling._GAIN, compiling._MOST_ROUNDS = float("inf"), 1
    try:
        yield
    finally:
        compiling._GAIN, compiling._MOST_ROUNDS = before


def outputs(tree: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a model returns."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    parts = list(tree.values()) if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else []
    return [t for part in parts for t in outputs(part)]


def loss_of(tree: Any) -> Tensor:
    """Mean squared distance from one, of each output that has a gradient."""
    return torch.stack([(t.float() - 1).square().mean() for t in outputs(tree) if t.requires_grad]).sum()
