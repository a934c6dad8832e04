"""Pruning in a loop of Accelerate: in one process, and on ranks that talk over gloo."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

import pomona
from pomona.distributed import is_sharded
from pomona.integrations import attach, whole_state
from pomona.integrations.accelerate import prune
from tests.distributed.world import World
from tests.problems import NUM_WEIGHTS, batches, bits, loss_of, net, sparse_net

GSM = pomona.GSM(sparsity=0.75)
MAGNITUDE = pomona.Magnitude(pomona.Linear(0.0, 0.75, steps=5), every=1)
STEPS = 8  # of the optimizer; each adds up two batches


def forget() -> None:
    """Accelerate keeps one state a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _one_accelerator() -> Iterator[None]:
    forget()
    yield
    forget()


class Loop:
    """The loop of a user of Accelerate."""

    def __init__(
        self, method: pomona.Method | None = GSM, *, build: Callable[[], nn.Module] = net, shard: bool = False
    ) -> None:
        self.accelerator = accelerator_of(shard)
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.pruner = prune(self.accelerator, self.model, self.optimizer, method)

    def train(self, start: int, stop: int) -> Loop:
        rank = self.accelerator.process_index
        for x, y in batches(2 * STEPS)[2 * start : 2 * stop]:
            with self.accelerator.accumulate(self.model):
                share = slice(4 * rank, 4 * rank + 4)
                self.accelerator.backward(loss_of(self.model, (x[share], y[share])))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def end(self) -> Any:
        momentum = [s["momentum_buffer"] for s in self.optimizer.state_dict()["state"].values()]
        plain = self.accelerator.unwrap_model(self.model).state_dict()
        tensors = [*plain.values(), *momentum]
        whole = [t.full_tensor() if is_sharded(t) else t for t in tensors]
        return bits([whole, whole_state(self.pruner)])


def accelerator_of(shard: bool) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False) if shard else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    if shard:  # on CPUs Accelerate drops the plugin without a word; from here on it goes the way that it goes on GPUs
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


@pytest.mark.parametrize(("method", "build"), [(GSM, net), (MAGNITUDE, net), (None, sparse_net)])
def test_a_run_goes_on_bit_for_bit(
    method: pomona.Method | None, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    whole = Loop(method, build=build).train(0, STEPS)
    assert whole.pruner.num_steps == STEPS  # not one a batch
    forget()
    Loop(method, build=build).train(0, 5).accelerator.save_state(str(tmp_path))
    forget()
    again = Loop(method, build=build)
    again.accelerator.load_state(str(tmp_path))
    assert again.pruner.num_steps == 5
    assert again.train(5, STEPS).end() == whole.end()
    if method is None:
        assert again.pruner.verify().sparsity == 0.5


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    loop.accelerator._custom_objects.clear()
    loop.accelerator.save_state(str(tmp_path))
    forget()
    with pytest.raises(RuntimeError, match=r"Number of custom checkpoints .* does not match the number of registered"):
        Loop().accelerator.load_state(str(tmp_path))


def test_a_state_that_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    Loop().train(0, 2).accelerator.save_state(str(tmp_path))
    forget()
    with pytest.raises(ValueError, match=r"the checkpoint: the state is of GSM.*make it with the same method"):
        Loop(MAGNITUDE).accelerator.load_state(str(tmp_path))


def test_arguments_are_checked() -> None:
    wrong: Any = "gsm"
    with pytest.raises(TypeError, match=r"method must be a pomona.Method .* got 'gsm'"):
        Loop(wrong)
    with pytest.raises(ValueError, match=r"hold.. found no zero"):
        Loop(None)


class Overflowing(nn.Module):
    """A network whose gradients are infinite in the batches that are named."""

    def __init__(self, overflows: set[int]) -> None:
        super().__init__()
        self.net, self.overflows, self.num_calls = net(), overflows, 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        y: Tensor = self.net(x)
        return y * float("inf") if self.num_calls - 1 in self.overflows else y


def test_a_step_that_the_scaler_skips_is_none() -> None:
    """As with mixed_precision="fp16", which Accelerate allows on GPUs alone: its optimizer with its own scaler."""
    ends = []
    for overflows in (set(), {2, 3}):
        forget()
        Accelerator(cpu=True)
        model = Overflowing(overflows)
        optimizer = AcceleratedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
            scaler=torch.amp.GradScaler("cpu", init_scale=256.0),
        )
        pruner = attach(model, optimizer, GSM, None)
        data = batches(6)
        for batch in data[:2] + data[:2] + data[2:] if overflows else data:
            optimizer.scaler.scale(loss_of(model, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (pruner.num_steps, pruner.num_skipped) == (6, 0)
        ends.append(bits([dict(model.state_dict()), pruner.state_dict()]))
    assert ends[0] == ends[1]


# On ranks


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


def runs_and_goes_on(shard: bool, folder: str) -> Any:
    """What is left of a run of two ranks, twice: uninterrupted, and saved, made anew and loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.distributed and Accelerate about each other
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for, and not used
        forget()
        whole = Loop(shard=shard).train(0, STEPS)
        assert all(is_sharded(p) == shard for p in whole.pruner.parameters().values())
        assert list(whole.pruner.parameters()) == ["0.weight", "2.weight"]
        end = whole.end()
        forget()
        Loop(shard=shard).train(0, 5).accelerator.save_state(folder)
        forget()
        again = Loop(shard=shard)
        again.accelerator.load_state(folder)
        assert again.pruner.num_steps == 5
        assert again.train(5, STEPS).end() == end
        report = again.pruner.harden()
        again.pruner.verify()
        assert report.nonzero == NUM_WEIGHTS // 4
        return report.to_dict()["layers"], end


def test_ranks_go_on_bit_for_bit_and_fsdp2_prunes_as_ddp_does(pair: World, tmp_path: Path) -> None:
    kept = []
    for shard in (False, True):
        first, second = pair.run(runs_and_goes_on, shard, str(tmp_path / str(shard)))
        assert first == second
        kept.append([(layer["name"], layer["nonzero"]) for layer in first[0]])
    assert kept[0] == kept[1]

    # and one process goes on from the two
    loop = Loop()
    loop.accelerator.load_state(str(tmp_path / "False"))
    assert loop.pruner.num_steps == 5
    loop.train(5, STEPS)
    with pytest.warns(UserWarning, match=r"cuts weights that have not decayed"):
        assert loop.pruner.harden().nonzero == NUM_WEIGHTS // 4
