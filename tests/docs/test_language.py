"""A language model through `pomona train`: losses beside accuracies, the exact target, no bit lost by a stop."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pomona.studies.valley.landscape import Landscape
from pomona.train.recipe import load_recipe
from pomona.zoo.data import DATA, Dataset, load_shakespeare
from pomona.zoo.models import build_model
from tests.runs import LEFT, Done, Stopping, assert_same_end, command_line, result_of, rows_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
    pytest.mark.filterwarnings("ignore:.* starves layers"),  # after so few steps layers are as small as they began
]

RECIPES = ("gpt-tiny-gsm", "gpt-tiny-magnitude", "gpt-tiny-admm")
# 5 steps an epoch of 10 windows.
TINY = "batch_size=2 base.epochs=2 base.lr_drops=[] base.warmup_epochs=0 prune.epochs=2 prune.lr_drops=[]".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of a small vocabulary, at random."""
    random = np.random.default_rng(0)
    words = ["plum", "pear", "quince", "cherry", "fig"]
    folder = tmp_path_factory.mktemp("text")
    (folder / "input.txt").write_text(" ".join(random.choice(words, 400))[:1_500])
    return folder


def train(text: Path, out: Path, name: str = "gpt-tiny-gsm", *overrides: str) -> Done:
    words = [word for override in (*TINY, *overrides) for word in ("--set", override)]
    paths = ["--data-dir", str(text), "--out", str(out), "--threads", "1", "--no-pictures"]
    return command_line(["train", name, *paths, *words])


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = train(text, folder)
    assert done.status == 0, done.err
    return folder, done


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_prune_four_fifths_of_the_blocks(name: str) -> None:
    recipe = load_recipe(name)
    inside = recipe.make_scope().select(build_model(recipe.model, seed=0)).inside
    assert sum(p.numel() for p in inside.values()) == 442_368 and len(inside) == 16
    assert recipe.make_method(100).budget.num_kept(442_368, 10**6) == 88_473
    assert (recipe.data, recipe.base) == ("shakespeare", load_recipe(RECIPES[0]).base)  # they share a dense network
    assert recipe.epochs == load_recipe(RECIPES[0]).epochs


def test_the_recipe_with_gsm_decays_enough() -> None:
    recipe = load_recipe("gpt-tiny-gsm")
    lrs = recipe.prune.learning_rates(490)
    assert sum(lrs) * recipe.prune.weight_decay / (1 - recipe.prune.momentum) > 7


@pytest.mark.parametrize("name", RECIPES[1:])
def test_each_recipe_reaches_its_target_exactly(text: Path, tmp_path: Path, name: str) -> None:
    retrain = ["retrain.epochs=1", "retrain.lr_drops=[]"] if name == "gpt-tiny-admm" else []
    assert train(text, tmp_path / "run", name, "base.epochs=1", "method.every=5", *retrain).status == 0
    assert result_of(tmp_path / "run")["report"]["nonzero"] == 88_473


def test_a_language_model_learns_and_is_cut_exactly(finished: tuple[Path, Done]) -> None:
    folder, _ = finished
    result, rows = result_of(folder), rows_of(folder)
    report = result["report"]
    assert (report["total"], report["nonzero"], len(report["layers"])) == (442_368, 88_473, 16)
    outside = {entry["name"]: (entry["total"], entry["reason"]) for entry in report["outside"]}
    assert outside["token.weight"] == (6_240, "not in include") and outside["position.weight"][0] == 12_288
    assert outside["head.weight"][0] == 0  # counted as token.weight
    assert rows[1]["test_loss"] == result["loss"]["base"] < math.log(14) - 0.3  # 14 letters and the space, at random
    state = torch.load(folder / "model.pt", weights_only=True)
    assert torch.equal(state["head.weight"], state["token.weight"])


@torch.no_grad()
def test_accuracy_and_loss_are_those_of_model_pt(finished: tuple[Path, Done], text: Path) -> None:
    folder, done = finished
    model, data = build_model("gpt-tiny", seed=5), load_shakespeare(text)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    logits = model(data.test_inputs).double().flatten(0, 1)
    labels = data.test_labels.flatten()
    loss = float(F.cross_entropy(logits, labels))
    accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
    result, last = result_of(folder), rows_of(folder)[-1]
    for found in (result["loss"]["after_cut"], result["loss"]["final"], last["loss_if_cut"]):
        assert found == pytest.approx(loss, rel=1e-5)  # float32
    assert result["accuracy"]["after_cut"] == last["accuracy_if_cut"] == pytest.approx(accuracy, abs=1e-9)
    assert result["loss"]["before_cut"] == last["test_loss"]
    stages = (("base", "dense"), ("before_cut", "before the cut"), ("after_cut", "after"))
    told = ", ".join(f"{result['loss'][key]:.4f} {name}" for key, name in stages)
    assert f"test loss (nats) {told}\n" in done.out


@pytest.mark.parametrize("batch", [7, 18])  # in the middle of an epoch of each stage
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    finished: tuple[Path, Done], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    def load(data_dir: Any) -> Dataset:
        return Stopping(**vars(load_shakespeare(data_dir)))

    LEFT[0] = batch
    monkeypatch.setitem(DATA, "shakespeare", load)
    assert train(text, tmp_path / "run").status == 130
    monkeypatch.undo()
    assert train(text, tmp_path / "run").status == 0
    assert_same_end(tmp_path / "run", finished[0])


def test_held_out_windows_are_tested_on(text: Path, tmp_path: Path) -> None:
    done = train(text, tmp_path / "run", "gpt-tiny-gsm", "validation=5", "base.epochs=1", "prune.epochs=1")
    assert done.status == 0
    told = "a text, 1,280 training and 128 test characters in windows of 128"
    assert result_of(tmp_path / "run")["data"].startswith(told)
    assert "of which the last 5 training examples serve as the test" in done.out


def test_the_loss_of_a_language_model_has_second_derivatives(text: Path) -> None:
    model, data = build_model("gpt-tiny", seed=0).double(), load_shakespeare(text)
    land = Landscape(model, data, torch.arange(3))
    at = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(data.train_inputs[:3]).flatten(0, 1)
    expected = float(F.cross_entropy(logits, data.train_labels[:3].flatten()))
    assert land.measure(at).loss == pytest.approx(expected, rel=1e-12)

    weight = at["blocks.0.qkv.weight"]
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))

    def slope(step: float) -> Tensor:
        here = (weight + step * direction).requires_grad_()
        loss = land.loss({**at, "blocks.0.qkv.weight": here}, torch.arange(3))
        (gradient,) = torch.autograd.grad(loss, here, create_graph=True)
        along = (gradient * direction).sum()
        return torch.stack([along.detach(), (torch.autograd.grad(along, here)[0] * direction).sum()])

    (before, _), (_, bend), (after, _) = slope(-1e-4), slope(0.0), slope(1e-4)
    assert float(bend) == pytest.approx(float(after - before) / 2e-4, rel=1e-5)  # the difference errs by its square
