"""A YOLO in its own trainer: what a user ships has the zeros, and a run that was stopped goes on with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import pomona
from pomona.integrations.ultralytics import KEY, PrunerCallback, num_steps

pytestmark = pytest.mark.check
ultralytics = pytest.importorskip("ultralytics")

PAGE = Path(__file__).parents[2] / "docs/integrations/ultralytics.md"
IMAGES, BATCH, EPOCHS, SPARSITY = 16, 4, 4, 0.8


def gradually(steps: int) -> pomona.Method:
    """Dense to 80 % zeros of each layer, at the cut. One ranking of all starves the head of a new YOLO."""
    return pomona.Magnitude(pomona.Cubic(0.0, SPARSITY, steps=steps), every=1, allocation="uniform")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    logging.getLogger("ultralytics").setLevel(logging.ERROR)


def draw(folder: Path) -> None:
    """Sixteen images of wide and of tall rectangles."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for i in range(IMAGES):
        kind, left, top = i % 2, 4 + i, 20 - i
        width, height = (24, 12) if kind else (12, 24)
        image = Image.new("RGB", (64, 64), "gray")
        ImageDraw.Draw(image).rectangle((left, top, left + width, top + height), fill=("red", "blue")[kind])
        image.save(folder / "images" / f"{i}.png")
        box = f"{(left + width / 2) / 64} {(top + height / 2) / 64} {width / 64} {height / 64}"
        (folder / "labels" / f"{i}.txt").write_text(f"{kind} {box}\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [tall, wide]\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, and a YOLOv8 an eighth as wide as the smallest one."""
    folder = tmp_path_factory.mktemp("drawn") / "rectangles"
    draw(folder)
    full = (Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8.yaml").read_text()
    (folder / "yolov8.yaml").write_text(full.replace("n: [0.33, 0.25, 1024]", "n: [0.33, 0.0625, 256]"))
    return folder


def train(folder: Path, run: Path, callback: PrunerCallback | None, weights: Path | None = None, **options: Any) -> Any:
    """``YOLO(...).train(...)`` as a user writes it; returns the YOLO, which then holds the best model."""
    model = ultralytics.YOLO(weights or folder / "yolov8.yaml")
    if callback:
        callback.add_to(model)
    for event, function in options.pop("callbacks", {}).items():
        model.add_callback(event, function)
    defaults = dict(epochs=EPOCHS, batch=BATCH, nbs=BATCH, imgsz=64, workers=0, plots=False, exist_ok=True)
    model.train(data=folder / "data.yaml", project=run.parent, name=run.name, device="cpu", **{**defaults, **options})
    return model


def saved(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(file, weights_only=False)
    return loaded


def zeros(model: nn.Module, callback: PrunerCallback) -> dict[str, Tensor]:
    """Where each weight in scope is zero."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] == 0 for name in callback.pruner.parameters()}


def zeros_held(callback: PrunerCallback) -> dict[str, Tensor]:
    return zeros(callback.pruner.model, callback)


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def sparsity(found: dict[str, Tensor]) -> float:
    return sum(int(z.sum()) for z in found.values()) / sum(z.numel() for z in found.values())


class Killed(RuntimeError):
    pass


def killed_after(epoch: int) -> dict[str, Callable[[Any], None]]:
    def kill(trainer: Any) -> None:
        if trainer.epoch == epoch:
            raise Killed

    return {"on_fit_epoch_end": kill}


def test_what_is_shipped_has_the_zeros_and_no_state(folder: Path, tmp_path: Path) -> None:
    callback = PrunerCallback(gradually)
    model = train(folder, tmp_path / "run", callback)
    total = num_steps(IMAGES, epochs=EPOCHS, batch=BATCH, nbs=BATCH)
    assert callback.report.num_steps == callback.pruner.num_steps == total == 16
    assert callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-4)
    pruned = zeros_held(callback)
    assert same(zeros(model.model, callback), pruned)
    for name in ("best", "last"):
        checkpoint = saved(tmp_path / "run" / "weights" / f"{name}.pt")
        assert checkpoint["epoch"] == -1 and checkpoint["optimizer"] is None  # stripped, ready to ship
        assert same(zeros(checkpoint["model"], callback), pruned)
        assert not hasattr(checkpoint["model"], KEY)
        assert pomona.report(checkpoint["model"].float()).sparsity == pytest.approx(SPARSITY, abs=1e-4)


def test_the_best_is_the_best_after_the_cut(folder: Path, tmp_path: Path) -> None:
    """An epoch before the cut that scored higher is forgotten, and no early stop is counted from it."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    scores = [0.9, 0.8, 0.3, 0.5, 0.4]

    class Scored(DetectionTrainer):
        def validate(self) -> tuple[Any, float]:
            before = self.best_fitness
            metrics, _ = super().validate()
            self.best_fitness = max(scores[self.epoch], before or 0.0)
            return metrics, scores[self.epoch]

    best: list[int] = []
    look = {"on_model_save": lambda trainer: best.append(saved(trainer.best)["epoch"])}
    callback = PrunerCallback(gradually, sparse_epochs=3)
    train(folder, tmp_path / "run", callback, epochs=5, patience=3, trainer=Scored, callbacks=look)
    assert best == [0, 0, 2, 3, 3]
    assert same(zeros(saved(tmp_path / "run" / "weights" / "best.pt")["model"], callback), zeros_held(callback))


@pytest.mark.parametrize("epoch", [0, 1, 2], ids=["before the cut", "at its eve", "after it"])
def test_a_run_that_was_killed_goes_on(epoch: int, folder: Path, tmp_path: Path) -> None:
    """The cut follows epoch 1; what was pruned stays pruned, and no step is counted twice or lost."""
    first = PrunerCallback(gradually, sparse_epochs=2)
    with pytest.raises(Killed):
        train(folder, tmp_path / "run", first, callbacks=killed_after(epoch))
    last = tmp_path / "run" / "weights" / "last.pt"
    state = vars(saved(last)["ema"])[KEY]
    assert state["num_steps"] == 4 * (epoch + 1) and state["is_hardened"] == (epoch == 2)
    if epoch == 2:
        assert same(zeros(saved(last)["ema"], first), state["pruned"])

    second = PrunerCallback(gradually, sparse_epochs=2)
    train(folder, tmp_path / "run", second, weights=last, resume=True)
    assert second.report.num_steps == 4 * EPOCHS
    assert second.report.sparsity == pytest.approx(SPARSITY, abs=1e-4)
    if epoch == 2:
        assert same(zeros_held(second), state["pruned"])
    for name in ("best", "last"):
        assert same(zeros(saved(last.with_name(f"{name}.pt"))["model"], second), zeros_held(second))


def test_an_early_stop_is_cut_validated_and_saved(folder: Path, tmp_path: Path) -> None:
    def stop(trainer: Any) -> None:
        trainer.stop = trainer.epoch == 1

    callback = PrunerCallback(pomona.Magnitude(SPARSITY, allocation="uniform"))
    train(folder, tmp_path / "run", callback, callbacks={"on_train_batch_end": stop})
    assert callback.report.num_steps == 5  # and not 16
    for name in ("best", "last"):
        model = saved(tmp_path / "run" / "weights" / f"{name}.pt")["model"]
        assert same(zeros(model, callback), zeros_held(callback))
    assert sparsity(zeros_held(callback)) == pytest.approx(SPARSITY, abs=1e-4)


@pytest.mark.parametrize("epoch", [1, 3], ids=["before the cut", "after it"])
def test_an_epoch_that_is_done_again_is_counted_once(epoch: int, folder: Path, tmp_path: Path) -> None:
    """The trainer goes back to last.pt when the loss is not finite."""

    def spoil(trainer: Any) -> None:
        if trainer.epoch == epoch and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(torch.nan)

    callback = PrunerCallback(gradually, sparse_epochs=2)
    train(folder, tmp_path / "run", callback, callbacks={"on_train_epoch_end": spoil})
    assert callback.report.num_steps == 4 * EPOCHS
    assert same(zeros(saved(tmp_path / "run" / "weights" / "last.pt")["model"], callback), zeros_held(callback))
    assert callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-4)


def test_existing_zeros_are_held(folder: Path, tmp_path: Path) -> None:
    first = PrunerCallback(gradually)
    train(folder, tmp_path / "first", first)
    second = PrunerCallback()
    train(folder, tmp_path / "second", second, weights=tmp_path / "first" / "weights" / "best.pt", epochs=2)
    model = saved(tmp_path / "second" / "weights" / "best.pt")["model"]
    now = zeros(model, second)
    assert all(bool((now[name] | ~before).all()) for name, before in zeros_held(first).items())
    assert second.report.sparsity == pytest.approx(SPARSITY, abs=1e-3)


@pytest.mark.parametrize(
    ("batch", "nbs", "warmup", "expected"), [(4, 64, 3.0, 1), (4, 8, 0.0, 6), (8, 16, 1.0, 3)], ids=str
)
def test_steps_are_counted_as_the_trainer_makes_them(
    batch: int, nbs: int, warmup: float, expected: int, folder: Path, tmp_path: Path
) -> None:
    """Batches are accumulated up to the nominal batch, fewer of them in the warm-up."""
    given: list[int] = []

    def method(steps: int) -> pomona.Method:
        given.append(steps)
        return gradually(steps)

    callback = PrunerCallback(method, sparse_epochs=0)
    options = dict(epochs=3, batch=batch, nbs=nbs, warmup_epochs=warmup)
    train(folder, tmp_path / "run", callback, val=False, **options)
    assert callback.pruner.num_steps == given[0] == num_steps(IMAGES, **options) == expected


def test_one_callback_serves_two_runs(folder: Path, tmp_path: Path) -> None:
    callback = PrunerCallback(gradually)
    for name in ("first", "second"):
        train(folder, tmp_path / name, callback, epochs=2, val=False)
        assert callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-4)


@pytest.mark.filterwarnings("ignore:harden.. starves layers")
def test_gsm_with_sgd(folder: Path, tmp_path: Path) -> None:
    """It says before training that so few steps are not enough, and leaves as many weights as it should."""
    callback = PrunerCallback(pomona.GSM(SPARSITY))
    with pytest.warns(UserWarning, match="passive weights"):
        train(folder, tmp_path / "run", callback, optimizer="SGD", epochs=2)
    assert callback.report.sparsity == pytest.approx(SPARSITY, abs=1e-4)


def test_a_checkpoint_without_a_state_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(folder, tmp_path / "run", None, callbacks=killed_after(0))
    last = tmp_path / "run" / "weights" / "last.pt"
    with pytest.raises(ValueError, match=r"no Pruner state in .*last\.pt: it was saved without PrunerCallback"):
        train(folder, tmp_path / "run", PrunerCallback(gradually), weights=last, resume=True)


def test_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(folder, tmp_path / "run", PrunerCallback(gradually), callbacks=killed_after(0))
    last = tmp_path / "run" / "weights" / "last.pt"
    with pytest.raises(ValueError, match=r"last\.pt: the state is of Magnitude"):
        train(folder, tmp_path / "run", PrunerCallback(pomona.SET(0.5)), weights=last, resume=True)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="method must be"):
        PrunerCallback(0.8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparse_epochs must be a number of epochs, >= 0, got -1"):
        PrunerCallback(gradually, sparse_epochs=-1)
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        num_steps(16, batch=0)


def test_runs_that_cannot_be_pruned_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparse_epochs=2 of 2 epochs leaves none"):
        train(folder, tmp_path / "run", PrunerCallback(gradually, sparse_epochs=2), epochs=2)
    with pytest.raises(ValueError, match="time= leaves open"):
        train(folder, tmp_path / "run", PrunerCallback(gradually), time=0.01)
    with pytest.raises(TypeError, match=r"must return a pomona\.Method, got 16"):
        train(folder, tmp_path / "run", PrunerCallback(lambda steps: 16))  # type: ignore
    with pytest.raises(ValueError, match="on one device, and this run has 2"):
        PrunerCallback(gradually).on_pretrain_routine_end(SimpleNamespace(world_size=2))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "rectangles")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, PAGE.name, "exec", dont_inherit=True), names)
