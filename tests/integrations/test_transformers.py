"""The callback for the Trainer: it prunes as a Pruner by hand does, and a run that was stopped goes on bit for bit."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import pomona
from pomona.integrations.transformers import FILE, PrunerCallback
from tests.distributed.world import World
from tests.problems import bits

DATA = [
    {"input_ids": words, "labels": int(words.sum() % 2)}
    for words in torch.randint(50, (64, 8), generator=torch.Generator().manual_seed(0))
]
SPARSITY = 0.75
MAGNITUDE = pomona.Magnitude(pomona.Linear(0.0, SPARSITY, steps=7), every=2)  # cuts after steps 1, 3, 5, 7
GSM = pomona.GSM(sparsity=SPARSITY)
STEPS = 12


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts: half of the time of these tests, among all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
        )
    )


def sparse_bert() -> nn.Module:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pomona.Pruner(model, optimizer, pomona.Magnitude(SPARSITY)).harden(one_shot=True)
    return model


def trainer_of(
    folder: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    sgd: bool = False,
    **options: Any,
) -> Trainer:
    model = model or bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.98, weight_decay=0.7) if sgd else None
    defaults = {"save_steps": 4, "logging_steps": 2, "learning_rate": 1e-3, "weight_decay": 0.01}
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    return Trainer(
        model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks), optimizers=(optimizer, None)
    )


class Killed(RuntimeError):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def end_of(trainer: Trainer, callback: PrunerCallback) -> Any:
    """Weights, masks and everything else that a Pruner remembers, and the optimizer's state; as bits."""
    return bits(
        [dict(trainer.model.state_dict()), callback.pruner.state_dict(), trainer.optimizer.state_dict()["state"]]
    )


CASES: dict[str, tuple[pomona.Method | None, Callable[[], nn.Module], dict[str, Any]]] = {
    "magnitude": (MAGNITUDE, bert, {}),
    "accumulated": (MAGNITUDE, bert, {"gradient_accumulation_steps": 3}),
    "gsm": (GSM, bert, {"sgd": True}),
    "bf16": (MAGNITUDE, bert, {"bf16": True}),
    "hold": (None, sparse_bert, {}),
}


@pytest.mark.parametrize("method", [MAGNITUDE, pomona.Feather(SPARSITY), pomona.ADMM(SPARSITY, every=3)], ids=str)
def test_a_model_that_was_trained_without_a_schedule_is_saved_with_its_zeros(
    method: pomona.Method, tmp_path: Path
) -> None:
    # The Trainer puts the optimizer's second copy of the weights into the model for evaluating and saving.
    callback = PrunerCallback(method)
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    trainer = trainer_of(tmp_path, callback, **options)
    trainer.train()
    assert callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-3)
    for turn in (trainer.evaluate, trainer.optimizer.train, trainer.optimizer.eval):
        turn()
        assert callback.pruner.verify().sparsity == callback.report.sparsity
    trainer.save_model(str(tmp_path / "saved"))
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert pomona.report(saved).sparsity == callback.report.sparsity


@pytest.mark.filterwarnings("ignore:.*passive weights shrink")  # of GSM: twelve steps are not enough
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(case: str, tmp_path: Path) -> None:
    method, model, options = CASES[case]
    callback = PrunerCallback(method)
    trainer = trainer_of(tmp_path / "whole", callback, model=model(), **options)
    trainer.train()
    assert callback.pruner.num_steps == STEPS
    assert callback.pruner.verify().sparsity == callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-3)

    with pytest.raises(Killed):
        trainer_of(tmp_path / "cut", PrunerCallback(method), KillAt(10), model=model(), **options).train()
    resumed = PrunerCallback(method)
    again = trainer_of(tmp_path / "cut", resumed, model=model(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    assert end_of(again, resumed) == end_of(trainer, callback)


def test_a_run_that_cannot_succeed_is_warned_of_before_it_begins(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"over 12 steps: passive weights shrink .* NOT enough"), pytest.raises(Killed):
        trainer_of(tmp_path, PrunerCallback(GSM), KillAt(0), sgd=True, save_strategy="no").train()


def test_it_prunes_as_a_pruner_made_by_hand(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE, harden=False)
    trainer = trainer_of(tmp_path / "callback", callback)
    trainer.train()
    by_hand = trainer_of(tmp_path / "by hand")
    pruner = pomona.Pruner(by_hand.model, by_hand.create_optimizer(), MAGNITUDE)
    by_hand.train()
    assert not callback.pruner.is_hardened
    assert bits(dict(trainer.model.state_dict())) == bits(dict(by_hand.model.state_dict()))
    assert bits(callback.pruner.state_dict()) == bits(pruner.state_dict())


def test_zeros_that_are_there_are_held(tmp_path: Path) -> None:
    model = sparse_bert()
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    trainer_of(tmp_path / "without", model=model, save_strategy="no").train()
    assert pomona.report(model).sparsity < 0.1
    model = sparse_bert()
    before = {name: p.clone() for name, p in model.named_parameters()}
    callback = PrunerCallback(scope=pomona.Scope(exclude=["classifier"]))
    trainer_of(tmp_path / "with", callback, model=model, save_strategy="no").train()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]) or name not in zeros
        if name in zeros and name != "classifier.weight":
            assert torch.equal(p == 0, zeros[name]), name
    with pytest.raises(ValueError, match=r"found no zero"):
        scope = pomona.Scope(exclude=["*embeddings*"])  # where a row of zeros stands for padding
        trainer_of(tmp_path / "dense", PrunerCallback(scope=scope)).train()


def test_every_checkpoint_that_is_kept_has_the_state(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE)
    trainer_of(tmp_path, callback, save_total_limit=2).train()
    assert sorted(path.parent.name for path in tmp_path.rglob(FILE)) == ["checkpoint-12", "checkpoint-8"]
    saved = torch.load(tmp_path / "checkpoint-8" / FILE, weights_only=True)
    assert saved["pruner"]["num_steps"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]


def test_the_best_model_gets_the_masks_of_its_own_checkpoint(tmp_path: Path) -> None:
    losses = iter([0.5, 0.1, 0.9])  # step 8 is the best; the schedule has ended there
    callback = PrunerCallback(MAGNITUDE)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "scripted", "greater_is_better": False}
    trainer = trainer_of(tmp_path, callback, eval_strategy="steps", eval_steps=4, **options)
    trainer.compute_metrics = lambda prediction: {"scripted": next(losses)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    best = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    mask = torch.load(tmp_path / "checkpoint-8" / FILE, weights_only=True)["pruner"]["state"]
    assert callback.pruner.num_steps == 8
    for name, p in trainer.model.named_parameters():
        expected = best.get_parameter(name)
        if name in mask:
            expected = expected * mask[name]["mask"]
        assert torch.equal(p, expected), name
    assert callback.pruner.verify().sparsity == pytest.approx(SPARSITY, abs=1e-3)


def test_a_best_model_from_before_the_end_of_the_schedule_is_warned_of(tmp_path: Path) -> None:
    losses = iter([0.1, 0.5, 0.9])
    callback = PrunerCallback(MAGNITUDE)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "scripted", "greater_is_better": False}
    trainer = trainer_of(tmp_path, callback, eval_strategy="steps", eval_steps=4, save_total_limit=1, **options)
    trainer.compute_metrics = lambda prediction: {"scripted": next(losses)}
    with pytest.warns(UserWarning, match=r"in the middle of a schedule: sparsity is 0.428571 at step 4"):
        trainer.train()
    assert callback.report.sparsity < SPARSITY - 0.2
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no Pruner state in .*checkpoint-4"):
        callback.on_train_end(trainer.args, trainer.state, trainer.control)


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-12: the checkpoint was saved without PrunerCallback"):
        trainer_of(tmp_path, PrunerCallback(MAGNITUDE)).train(resume_from_checkpoint=True)


def test_a_state_that_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    for name, method in (("a", MAGNITUDE), ("b", pomona.Magnitude(0.5))):
        trainer_of(tmp_path / name, PrunerCallback(method)).train()
    with pytest.raises(ValueError, match=r"pruner.pt: the state is of Magnitude.*make it with the same method"):
        trainer_of(tmp_path / "a", PrunerCallback(pomona.Magnitude(0.5))).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"belongs to other weights than the model has now"):
        other = PrunerCallback(pomona.Magnitude(0.5))
        trainer_of(tmp_path / "b", other).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-8"))
    torch.save({"some": "dict"}, tmp_path / "a/checkpoint-12" / FILE)
    with pytest.raises(ValueError, match=r"pruner.pt does not hold the state of a Pruner"):
        trainer_of(tmp_path / "a", PrunerCallback(MAGNITUDE)).train(resume_from_checkpoint=True)


def test_a_checkpoint_may_lie_elsewhere_if_the_arguments_say_so(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE)
    trainer = trainer_of(tmp_path / "old", callback)
    trainer.train()
    moved = shutil.move(tmp_path / "old/checkpoint-8", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"set TrainingArguments.resume_from_checkpoint=FOLDER"):
        trainer_of(tmp_path / "new", PrunerCallback(MAGNITUDE)).train(resume_from_checkpoint=str(moved))
    resumed = PrunerCallback(MAGNITUDE)
    again = trainer_of(tmp_path / "new", resumed, resume_from_checkpoint=str(moved))
    again.train(resume_from_checkpoint=str(moved))
    assert end_of(again, resumed) == end_of(trainer, callback)


def test_the_numbers_are_in_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    callback = PrunerCallback(MAGNITUDE)
    board = tmp_path / "board"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(board)
    try:
        trainer = trainer_of(tmp_path / "run", callback, TensorBoardCallback(), save_strategy="no")
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["pomona/sparsity"] == pytest.approx(SPARSITY, abs=1e-3)
    assert rows[0]["pomona/sparsity"] < 0.2 and rows[0]["pomona/num_skipped"] == 0
    assert "'pomona/sparsity': '0.75" in capsys.readouterr().out
    events = EventAccumulator(str(board)).Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("train/pomona/sparsity")]
    assert drawn == [(row["step"], pytest.approx(row["pomona/sparsity"])) for row in rows]


def test_a_reporter_that_would_not_see_the_numbers_is_warned_of(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, PrunerCallback(MAGNITUDE), report_to="tensorboard", save_strategy="no")
    with pytest.warns(UserWarning, match=r"report_to=\['tensorboard'\] will not show Pomona's numbers"):
        trainer.train()


def test_training_again_begins_anew(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE)
    trainer = trainer_of(tmp_path, callback, save_strategy="no")
    trainer.train()
    first = callback.pruner
    trainer.train()
    assert callback.pruner is not first and not first.is_attached
    assert callback.pruner.num_steps == STEPS and callback.pruner.verify().nonzero == callback.report.nonzero


def test_a_compiled_model_is_pruned_under_plain_names(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE)
    trainer = trainer_of(tmp_path, callback, torch_compile=True, torch_compile_backend="eager", save_strategy="no")
    trainer.train()
    assert callback.pruner.num_steps == STEPS and callback.pruner.verify().sparsity > SPARSITY - 1e-3
    assert not any("_orig_mod" in name for name in callback.pruner.parameters())


def test_a_folder_that_is_not_the_trainers_is_an_error(tmp_path: Path) -> None:
    callback = PrunerCallback(MAGNITUDE)
    trainer = trainer_of(tmp_path, callback, save_strategy="no")
    trainer.train()
    with pytest.raises(RuntimeError, match=r"but not in .*checkpoint-12"):
        callback.on_save(trainer.args, trainer.state, trainer.control)


def test_arguments_are_checked() -> None:
    wrong: Any = 0.9
    with pytest.raises(TypeError, match=r"method must be a pomona.Method such as GSM.* or None .* got 0.9"):
        PrunerCallback(wrong)
    with pytest.raises(TypeError, match=r"scope must be a pomona.Scope such as .* got 0.9"):
        PrunerCallback(scope=wrong)


def on_ranks(folder: str) -> Any:
    """The end of a run of all ranks, and of the same that goes on from a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.distributed about its own ways
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for, and not used
        ends = []
        for resume in (None, f"{folder}/checkpoint-8"):
            callback = PrunerCallback(MAGNITUDE)
            trainer = trainer_of(Path(folder), callback)
            trainer.train(resume_from_checkpoint=resume)
            assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
            ends.append(end_of(trainer, callback))
        return ends


def test_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    world = World(2)
    try:
        (whole, resumed), (other, _) = world.run(on_ranks, str(tmp_path))
    finally:
        world.close()
    assert whole == resumed == other
    assert len(list(tmp_path.rglob(FILE))) == 3
