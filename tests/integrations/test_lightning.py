"""The Lightning callback against the plain loop: the same bits, by whatever way Lightning takes its steps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import pomona
from pomona.integrations.lightning import PrunerCallback
from tests.integrations.loggers import read_events
from tests.problems import Batch, batches, bits, loss_of, net, sparse_net

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
    pytest.mark.filterwarnings("ignore:decay exponent"),
    pytest.mark.filterwarnings("ignore:harden.. at step .* comes early"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the callback that saved need not load
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

ROOT = Path(__file__).parents[2]
NUM_BATCHES = 8  # an epoch; runs have two
SGD_ = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.5)
GSM, HALF = pomona.GSM(sparsity=0.75), pomona.Magnitude(sparsity=0.5)
METHODS: dict[str, tuple[pomona.Method | None, Callable[..., Optimizer]]] = {
    "gsm": (GSM, SGD_),
    "admm": (pomona.ADMM(sparsity=0.75, rho=0.1, every=6), partial(AdamW, lr=0.02, weight_decay=0.1)),
    "magnitude": (pomona.Magnitude(sparsity=pomona.Cubic(0.0, 0.75, steps=12), every=3), SGD_),
    "rigl": (pomona.RigL(sparsity=0.75, every=4, end=12), SGD_),
    "hold": (None, SGD_),
}
each_method = pytest.mark.parametrize(("method", "optimizer"), METHODS.values(), ids=METHODS)


class Module(lightning.pytorch.LightningModule):
    """`net` as users write it."""

    def __init__(self, optimizer: Callable[..., Optimizer] = SGD_, *, sparse: bool = False) -> None:
        super().__init__()
        self.net = sparse_net() if sparse else net()
        self.make_optimizer = optimizer

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class ByHand(Module):
    """Manual optimization, with a closure in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.net, batch)
            self.manual_backward(loss)
            return loss

        if index % 2:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


class Loader:
    """Batches that go on in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.position, self.resumed = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        start, self.resumed = self.resumed, 0
        for self.position, batch in enumerate(batches(NUM_BATCHES)[start:], start + 1):
            yield batch

    def __len__(self) -> int:
        return NUM_BATCHES

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state["position"] % NUM_BATCHES


def trainer(*callbacks: Any, module: Any = lightning.pytorch, max_epochs: int = 2, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return module.Trainer(
        callbacks=list(callbacks), max_epochs=max_epochs, enable_model_summary=False, **(quiet | options)
    )


def plain(
    method: pomona.Method | None, optimizer: Callable[..., Optimizer], step: Callable[..., None] | None = None
) -> Any:
    """What a loop without Lightning ends with."""
    model = Module(sparse=method is None)
    opt = optimizer(model.parameters())
    pruner = pomona.Pruner(model, opt, method) if method else pomona.hold(model, opt)
    for _ in range(2):
        for index, batch in enumerate(batches(NUM_BATCHES)):
            if step:
                step(model.net, opt, batch, index)
            else:
                opt.zero_grad()
                loss_of(model.net, batch).backward()
                opt.step()
    pruner.harden()
    return end(pruner)


def end(pruner: pomona.Pruner | None) -> Any:
    """All that training changed, bit for bit."""
    assert pruner is not None
    return bits([pruner.model.state_dict(), pruner.optimizer.state_dict()["state"], pruner.state_dict()])


def fit(callback: PrunerCallback, module: Any = None, **options: Any) -> Any:
    trainer(callback, **options).fit(module or Module(), Loader())
    return end(callback.pruner)


# The same bits as the plain loop


@each_method
def test_fit_ends_where_the_plain_loop_does(method: pomona.Method | None, optimizer: Callable[..., Optimizer]) -> None:
    callback = PrunerCallback(method)
    assert fit(callback, Module(optimizer, sparse=method is None)) == plain(method, optimizer)
    assert callback.report is not None and callback.pruner is not None
    assert callback.report.num_steps == 2 * NUM_BATCHES
    assert callback.report.nonzero == callback.pruner.verify().nonzero == (18 if method else 36)


def test_manual_optimization_with_and_without_closures_ends_there_too() -> None:
    assert fit(PrunerCallback(GSM), ByHand()) == plain(GSM, SGD_)


def test_accumulation_and_clipping_are_done_before_a_gradient_counts() -> None:
    def step(model: nn.Module, optimizer: Optimizer, batch: Batch, index: int) -> None:
        (loss_of(model, batch) / 4).backward()
        if index % 4 == 3:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()

    callback = PrunerCallback(GSM)
    assert fit(callback, accumulate_grad_batches=4, gradient_clip_val=0.05) == plain(GSM, SGD_, step)
    assert callback.report is not None and callback.report.num_steps == 4


def test_bfloat16_by_autocast_ends_where_the_plain_loop_does() -> None:
    def step(model: nn.Module, optimizer: Optimizer, batch: Batch, index: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()

    assert fit(PrunerCallback(GSM), precision="bf16-mixed") == plain(GSM, SGD_, step)


def test_a_step_that_the_loss_scale_overflows_in_is_not_counted() -> None:
    class Overflows(Module):
        def training_step(self, batch: Batch, index: int) -> Tensor:
            return super().training_step(batch, index) * (torch.inf if index == 3 else 1.0)

    callback = PrunerCallback(GSM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fit(callback, Overflows(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.pruner is not None and callback.pruner.num_steps == 2 * NUM_BATCHES - 2
    assert scaler.get_scale() == 2.0**8
    assert callback.pruner.verify().nonzero == 18


def test_a_batch_that_gives_no_loss_is_not_a_step() -> None:
    class Passes(Module):
        def training_step(self, batch: Batch, index: int) -> Any:
            return None if index == 3 else super().training_step(batch, index)

    callback = PrunerCallback(GSM)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(callback, Passes())
    assert callback.report is not None and callback.report.num_steps == 2 * NUM_BATCHES - 2


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_both_packages_take_it_and_resume(package: Any, tmp_path: Path) -> None:
    class Plain(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        training_step = Module.training_step
        make_optimizer = staticmethod(SGD_)
        configure_optimizers = Module.configure_optimizers

    first = trainer(PrunerCallback(GSM, harden=False), module=package, max_epochs=1)
    first.fit(Plain(), Loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    callback = PrunerCallback(GSM)
    assert isinstance(callback, package.Callback)
    trainer(callback, module=package).fit(Plain(), Loader(), ckpt_path=tmp_path / "half.ckpt")
    assert end(callback.pruner) == plain(GSM, SGD_)


# Resuming


class Killed(lightning.pytorch.Callback):
    """Ends the run by an error after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


@each_method
@pytest.mark.parametrize("after", [3, NUM_BATCHES, 13, 2 * NUM_BATCHES])
def test_a_run_that_was_killed_ends_with_the_same_bits(
    method: pomona.Method | None, optimizer: Callable[..., Optimizer], after: int, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=after, save_top_k=-1)
    killed = trainer(PrunerCallback(method), saves, Killed(after), enable_checkpointing=True)
    if after < 2 * NUM_BATCHES:
        with pytest.raises(InterruptedError):
            killed.fit(Module(optimizer, sparse=method is None), Loader())
    else:  # between the last checkpoint and harden(): Lightning itself has nothing left to do
        killed.fit(Module(optimizer, sparse=method is None), Loader())
    (path,) = tmp_path.glob("*.ckpt")
    callback = PrunerCallback(method)
    fresh = Module(optimizer)  # whose zeros, if they are to be held, come from the checkpoint
    trainer(callback).fit(fresh, Loader(), ckpt_path=path)
    assert end(callback.pruner) == plain(method, optimizer)
    assert callback.report is not None and callback.report.nonzero == (18 if method else 36)


def test_zeros_of_a_hardened_checkpoint_are_held(tmp_path: Path) -> None:
    callback = PrunerCallback(GSM)
    done = trainer(callback)
    done.fit(Module(), Loader())
    done.save_checkpoint(tmp_path / "sparse.ckpt")
    zeros = bits([p == 0 for p in callback.pruner.parameters().values()])  # type: ignore[union-attr]
    again = PrunerCallback(GSM)
    trainer(again, max_epochs=4).fit(Module(), Loader(), ckpt_path=tmp_path / "sparse.ckpt")
    assert again.pruner is not None and again.pruner.num_steps == 4 * NUM_BATCHES
    assert bits([p == 0 for p in again.pruner.parameters().values()]) == zeros


def test_a_second_fit_goes_on_where_the_first_ended() -> None:
    callback, module = PrunerCallback(GSM), Module()
    one = trainer(callback)
    one.fit(module, Loader())
    zeros = bits([p == 0 for p in callback.pruner.parameters().values()])  # type: ignore[union-attr]
    one.fit_loop.max_epochs = 3
    one.fit(module, Loader())
    assert callback.report is not None and callback.report.num_steps == 3 * NUM_BATCHES
    assert bits([p == 0 for p in callback.pruner.parameters().values()]) == zeros  # type: ignore[union-attr]
    trainer(callback).fit(Module(), Loader())  # of another module it starts anew
    assert callback.report.num_steps == 2 * NUM_BATCHES


def test_a_dense_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    dense = trainer(max_epochs=1)
    dense.fit(Module(), Loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    callback = PrunerCallback(GSM)
    trainer(callback).fit(Module(), Loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.report is not None and callback.report.num_steps == NUM_BATCHES


def test_a_checkpoint_of_another_callback_or_method_is_refused(tmp_path: Path) -> None:
    first = trainer(PrunerCallback(GSM), max_epochs=1)
    first.fit(Module(), Loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resume = partial(trainer().__class__.fit, ckpt_path=tmp_path / "half.ckpt")
    other = PrunerCallback(GSM, scope=pomona.Scope(exclude=["net.2"]))
    with pytest.raises(ValueError, match=r"state of PrunerCallback\(optimizer=None.*but this callback is .*net\.2"):
        resume(trainer(other), Module(), Loader())
    with pytest.raises(ValueError, match=r"the state is of GSM.*this Pruner has GSM\(sparsity=0\.5"):
        resume(trainer(PrunerCallback(pomona.GSM(sparsity=0.5))), Module(), Loader())


# Several optimizers


class Two(Module):
    """One optimizer for each layer, stepped in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, index: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD_(self.net[0].parameters()), SGD_(self.net[2].parameters())]


def test_of_several_optimizers_each_gets_its_own_callback(tmp_path: Path) -> None:
    def pair(**options: Any) -> list[PrunerCallback]:
        return [
            PrunerCallback(GSM, optimizer=0, scope=pomona.Scope(include=["net.0"]), **options),
            PrunerCallback(HALF, optimizer=1, scope=pomona.Scope(include=["net.2"]), **options),
        ]

    whole = pair()
    trainer(*whole).fit(Two(), Loader())
    assert [callback.report and callback.report.nonzero for callback in whole] == [12, 12]
    half = trainer(*pair(harden=False), max_epochs=1)
    half.fit(Two(), Loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = pair()
    trainer(*resumed).fit(Two(), Loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [end(callback.pruner) for callback in resumed] == [end(callback.pruner) for callback in whole]


def test_which_of_several_optimizers_has_to_be_said() -> None:
    with pytest.raises(ValueError, match=r"returned 2 optimizers; choose one: PrunerCallback\(..., optimizer=0\)"):
        fit(PrunerCallback(GSM), Two())
    with pytest.raises(ValueError, match="optimizer must be below 2, the number of optimizers, got 2"):
        fit(PrunerCallback(GSM, optimizer=2), Two())
    with pytest.raises(ValueError, match=r"the optimizer does not hold net\.2\.weight"):
        fit(PrunerCallback(GSM, optimizer=0), Two())


# The example


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")  # the folder is not empty
def test_the_example_prunes_and_goes_on(tmp_path: Path) -> None:
    source = importlib.util.spec_from_file_location("example", ROOT / "examples/lightning_prune.py")
    assert source is not None and source.loader is not None
    source.loader.exec_module(example := importlib.util.module_from_spec(source))
    assert (ROOT / "examples/lightning_prune.py").read_text().count("\n") < 80
    digits = example.load()  # reading their text takes longer than training
    example.load = lambda: digits
    report = example.main(tmp_path, epochs=3)
    assert report.nonzero == 13_310
    state = torch.load(tmp_path / "sparse.pt", weights_only=True)
    assert sum(int(t.count_nonzero()) for t in state.values() if t.ndim > 1) == 13_310
    logged = read_events(tmp_path / "log")
    assert logged["pomona/sparsity"][-1] == (105, pytest.approx(0.95))
    assert example.main(tmp_path, epochs=3) == report  # the same command again: nothing is left to do


# Several ranks


@pytest.mark.check
def test_two_ranks_keep_one_budget_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    """DistributedDataParallel, and FSDP2 by ModelParallelStrategy: weights alike on both ranks, broken off or not."""
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "tests.integrations.lightning_ranks", str(tmp_path)]
    done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {path.name for path in tmp_path.iterdir() if path.suffix != ".ckpt"}
    assert found == {"ddp-0", "ddp-1", "fsdp2-0", "fsdp2-1"}


# What goes wrong is told


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(
        TypeError, match=r"method must be a pomona.Method such as GSM\(sparsity=0.9\), or None to hold.*got 0.9"
    ):
        PrunerCallback(0.9)  # type: ignore[arg-type]
    for wrong in (-1, True, "sgd"):
        with pytest.raises(ValueError, match="optimizer must be an index in configure_optimizers, >= 0"):
            PrunerCallback(GSM, optimizer=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize("schedule", [None, "step", "epoch"])
def test_whether_a_run_can_succeed_is_foretold(
    schedule: str | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate falls to zero after four steps, or after the first epoch."""

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = SGD_(self.parameters())
            if schedule is None:
                return optimizer
            ends = 4 if schedule == "step" else 1
            scheduler = LambdaLR(optimizer, lambda count: float(count < ends))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": schedule}}

    callback, told = PrunerCallback(GSM), []
    seen = pomona.Pruner.diagnose

    def note(pruner: pomona.Pruner, *args: Any, **how: Any) -> Any:
        told.append(seen(pruner, *args, **how))
        return told[-1]

    monkeypatch.setattr(pomona.Pruner, "diagnose", note)
    fit(callback, Scheduled(), **options)
    assert callback.pruner is not None
    assert [one.exponent for one in told] == [pytest.approx(callback.pruner.metrics()["decay_exponent"])]


def test_there_must_be_zeros_to_hold() -> None:
    with pytest.raises(ValueError, match="found no zero"):
        fit(PrunerCallback())


@pytest.mark.parametrize("is_first", [True, False])
def test_an_average_that_is_written_after_the_cut_is_noticed(is_first: bool) -> None:
    callback, average = PrunerCallback(GSM), WeightAveraging()
    run = trainer(*((average, callback) if is_first else (callback, average)))
    if is_first:
        run.fit(Module(), Loader())
        assert callback.pruner is not None and callback.pruner.verify().nonzero == 18
        return
    with (
        pytest.warns(UserWarning, match="the weights were changed since the last optimizer step"),
        pytest.raises(RuntimeError, match=r"contract is broken.*must come before PrunerCallback in callbacks="),
    ):
        run.fit(Module(), Loader())


def test_a_run_with_an_average_resumes_too(tmp_path: Path) -> None:
    def averaged() -> list[Any]:
        return [WeightAveraging(), PrunerCallback(GSM)]

    whole = averaged()
    trainer(*whole).fit(Module(), Loader())
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=NUM_BATCHES, save_top_k=-1)
    with pytest.raises(InterruptedError):
        trainer(*averaged(), saves, Killed(NUM_BATCHES), enable_checkpointing=True).fit(Module(), Loader())
    (path,) = tmp_path.glob("*.ckpt")
    resumed = averaged()
    trainer(*resumed).fit(Module(), Loader(), ckpt_path=path)
    assert end(resumed[1].pruner) == end(whole[1].pruner)


def test_without_harden_nothing_is_cut() -> None:
    callback = PrunerCallback(GSM, harden=False)
    fit(callback)
    assert callback.report is not None and callback.report.sparsity == 0.0
    assert callback.pruner is not None and callback.pruner.harden().nonzero == 18


def test_testing_after_fit_uses_the_sparse_module() -> None:
    class Tested(Module):
        def test_step(self, batch: Batch, index: int) -> None:
            self.log("zeros", float((self.net[0].weight == 0).sum()), batch_size=8)

    callback, module = PrunerCallback(GSM), Tested()
    run = trainer(callback)
    run.fit(module, Loader())
    (found,) = run.test(module, Loader(), verbose=False)
    assert callback.report is not None and found["zeros"] == 48 - callback.report.layers[0].nonzero


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    source = importlib.util.find_spec("pomona.integrations.lightning")
    assert source is not None and source.loader is not None
    with pytest.raises(ImportError, match="pip install lightning"):
        source.loader.exec_module(importlib.util.module_from_spec(source))
