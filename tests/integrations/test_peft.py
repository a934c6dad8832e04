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
from pomona.integrations.peft import merge
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
    with pytest.raises(ValueError, match=r"the base has no zeros to keep"):
        merge(with_adapter(dense, torch.ones(1, 2), torch.ones(2, 1)))
    model = with_adapter(two_layers(), torch.ones(1, 2), torch.ones(2, 1))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are already merged into this model"):
        merge(model)
    prefix = get_peft_model(sparse_bert(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"adds nothing to the weights, so there is nothing to merge"):
        merge(prefix)


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
