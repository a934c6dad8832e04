"""LoRA over a sparse base: nothing moves its zeros, and merging keeps them and tells what that costs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

import pomona
from pomona.integrations.peft import _rewriting, merge
from pomona.integrations.transformers import PrunerCallback
from tests.integrations.test_transformers import MAGNITUDE, sparse_bert, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


def two_layers() -> nn.Sequential:
    """2 -> 2 -> 1, with one zero in the first layer and one in the second."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    model[1].weight.data = torch.tensor([[4.0, 0.0]])
    return model


def with_adapter(model: nn.Module, a: Tensor, b: Tensor, **options: Any) -> PeftModel:
    """W + B A in the first layer."""
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["0"], **options))
    layer = adapted.get_base_model()[0]
    layer.lora_A["default"].weight.data = a
    layer.lora_B["default"].weight.data = b
    return adapted


def test_merging_keeps_the_zeros_and_tells_what_is_lost() -> None:
    model = with_adapter(two_layers(), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]))
    dense = copy.deepcopy(model).merge_and_unload()
    assert dense[0].weight.tolist() == [[2.0, 2.0], [4.0, 7.0]]  # no zero is left
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(float(model(torch.ones(1, 2))))
        return seen[-1]

    merged, report = merge(model, evaluate=evaluate)
    assert merged[0].weight.tolist() == [[2.0, 0.0], [4.0, 7.0]]
    assert merged[1].weight.tolist() == [[4.0, 0.0]]
    assert all(p.requires_grad for p in merged.parameters())
    assert [(layer.name, layer.nonzero, layer.largest_cut) for layer in report.layers] == [
        ("0.weight", 3, 2.0),
        ("1.weight", 1, 0.0),
    ]
    assert report.metrics == {"update_lost": 4 / 25}  # of 1 + 4 + 4 + 16, the 4 fell on the zero
    assert report.layers[0].reason == "the base's zeros; 16.0% of its update lost"
    assert (report.accuracy_before, report.accuracy_after) == (16.0, 8.0) == tuple(seen)
    assert pomona.report(merged).sparsity == report.sparsity == 2 / 6


def test_a_part_that_is_trained_whole_keeps_its_zeros_too() -> None:
    model = with_adapter(two_layers(), torch.zeros(1, 2), torch.zeros(2, 1), modules_to_save=["1"])
    model.get_base_model()[1].modules_to_save["default"].weight.data = torch.tensor([[5.0, 6.0]])
    merged, report = merge(model)
    assert merged[1].weight.tolist() == [[5.0, 0.0]]
    assert report.layers[1].largest_cut == 6.0 and report.metrics["update_lost"] == 36 / 37


def test_what_cannot_be_merged_is_refused() -> None:
    wrong: Any = two_layers()
    with pytest.raises(TypeError, match=r"model must be a peft.PeftModel, got Sequential"):
        merge(wrong)
    dense = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"no zeros to keep: none of its 1 weights of two .*; merge\(model, masks=...\)"
    ):
        merge(with_adapter(dense, torch.ones(1, 2), torch.ones(2, 1)))
    model = with_adapter(two_layers(), torch.ones(1, 2), torch.ones(2, 1))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are already merged into this model"):
        merge(model)
    prefix = get_peft_model(sparse_bert(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"adds nothing to the weights, so there is nothing to merge"):
        merge(prefix)


def sparse_pair() -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    for layer in (base[0], base[2]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    return base


def trained(base: nn.Module, how: Any, **options: Any) -> PeftModel:
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=how, **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_adapters_that_rewrote_the_base_are_refused_and_the_advice_works(how: str) -> None:
    base = sparse_pair()
    before, masks = pomona.report(base).sparsity, {name: p != 0 for name, p in base.named_parameters()}
    model = trained(base, how)
    left = model.get_base_model()[0].base_layer.weight == 0
    assert left.sum() < (~masks["0.weight"]).sum()
    with pytest.raises(
        ValueError, match=rf"'default' was made with init_lora_weights='{how}', which rewrote .*True; or"
    ):
        merge(model)
    with pytest.raises(ValueError, match=r"and masks= does not name 0.weight"):
        merge(model, masks={"2.weight": masks["2.weight"]})
    merged, report = merge(model, masks=masks)
    assert pomona.report(merged).sparsity == report.sparsity == before
    assert report.metrics == {} and report.layers[0].reason == "the zeros of the mask given"
    assert torch.equal(merged[0].weight != 0, masks["0.weight"])

    merged, report = merge(trained(sparse_pair(), True))
    assert report.sparsity == pomona.report(merged).sparsity == before and report.metrics["update_lost"] > 0.5


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", "eva"])
@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
@pytest.mark.filterwarnings("ignore:.*EVA:UserWarning")
def test_adapters_that_leave_the_base_alone_are_merged(how: Any) -> None:
    base = sparse_pair()
    before = pomona.report(base).sparsity
    merged, report = merge(trained(base, how))
    assert report.sparsity == pomona.report(merged).sparsity == before


def test_all_that_rewrite_are_known_by_their_settings() -> None:
    for how in ("corda", "loftq", "lora_ga", "pissa_niter_16"):
        config = LoraConfig()
        config.init_lora_weights = how
        assert _rewriting(config) == f"init_lora_weights={how!r}"
    config = LoraConfig()
    assert _rewriting(config) == "" == _rewriting(PrefixTuningConfig())
    config.kasa_config = object()
    assert _rewriting(config) == "kasa_config"


def test_masks_for_an_ordinary_adapter_add_to_the_zeros_of_the_base() -> None:
    model = with_adapter(two_layers(), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]))
    for masks, message in (
        (
            {"base.0.weight": torch.ones(2, 2, dtype=torch.bool)},
            r"'base.0.weight', but the base has no such parameter; .*'0.w",
        ),
        (
            {"0.weight": torch.ones(2, 2)},
            r"masks\['0.weight'\] must be a boolean tensor of shape \(2, 2\), .* got torch.fl",
        ),
        ({"0.weight": torch.ones(3, dtype=torch.bool)}, r"of shape \(2, 2\), .* got torch.bool of shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(model, masks=masks)
    merged, report = merge(model, masks={"0.weight": torch.tensor([[False, True], [True, True]])})
    assert merged[0].weight.tolist() == [[0.0, 2.0], [4.0, 7.0]] and merged[1].weight.tolist() == [[4.0, 0.0]]
    assert report.metrics == {"update_lost": 4 / 25}


def test_a_layer_without_zeros_is_said_to_have_none() -> None:
    base = two_layers()
    base[0].weight.data.fill_(1)
    _, report = merge(with_adapter(base, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]])))
    assert report.layers[0].reason == "the base has no zeros here" and report.metrics == {"update_lost": 0.0}


def adapted_bert() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(sparse_bert(), config)


def test_training_adapters_moves_no_zero_of_the_base_and_merging_keeps_them(tmp_path: Path) -> None:
    before = sparse_bert().state_dict()
    model = adapted_bert()
    trainer_of(tmp_path, model=model, save_strategy="no", learning_rate=0.1).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    merged, report = merge(model)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    assert report.metrics["update_lost"] > 0
    for name, value in before.items():
        if value.ndim > 1:
            assert not after[name][value == 0].any(), name
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(after[query], before[query])
    optimizer = torch.optim.AdamW(merged.parameters())
    assert pomona.hold(merged, optimizer).verify().sparsity == report.sparsity


def test_a_pruner_that_would_only_meet_adapters_is_refused(tmp_path: Path) -> None:
    for callback in (PrunerCallback(), PrunerCallback(MAGNITUDE)):
        with pytest.raises(ValueError, match=r"only the adapters of a PEFT model train"):
            trainer_of(tmp_path, callback, model=adapted_bert()).train()
    callback = PrunerCallback(MAGNITUDE, scope=pomona.Scope(include=["*.lora_*"]))
    trainer_of(tmp_path, callback, model=adapted_bert(), save_strategy="no").train()
    assert callback.report.sparsity == pytest.approx(0.75, abs=0.01)
