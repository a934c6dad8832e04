"""Models of Transformers in pomona.compile and pomona.export, as people call them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as hf

import pomona
from pomona.native import library

BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {
    "vocab_size": 100,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "vocab_size": 100,
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "decoder_start"))},
}
VIT = {**BERT, "image_size": 32, "patch_size": 8}

IDS = torch.arange(5, 29).view(2, 12)
SHORT = IDS[:, :5]
SOUND = torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40)

# Model, how it is called, and the inputs of its ONNX file.
MODELS: dict[str, tuple[Any, Any, Any, str]] = {
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(vocab_size=100, **BERT),
        {"attention_mask": torch.ones_like(IDS), "input_ids": IDS},
        "input_ids (batch, length), attention_mask (batch, length)",
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**VIT),
        torch.randn(1, 3, 32, 32),
        "pixel_values (batch, 3, 32, 32)",
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), IDS, "input_ids (batch, length)"),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(vocab_size=100, **BERT),
        (IDS[:1], {"use_cache": False}),
        "input_ids (batch, length)",
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5),
        {"input_ids": IDS, "decoder_input_ids": SHORT},
        "input_ids (batch, length), decoder_input_ids (batch, length_2)",
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(**WHISPER),
        {"input_features": SOUND, "decoder_input_ids": SHORT},
        "input_features (batch, 8, 40), decoder_input_ids (batch, length)",
    ),
}


def sparse(name: str) -> tuple[nn.Module, Any]:
    kind, config, example, _ = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) > 0.8)
    return model, example


def called(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(example, dict):
            return model(**example).logits
        return model(*example[:1], **example[1]).logits if isinstance(example, tuple) else model(example).logits


@pytest.mark.skipif(not library.is_available(), reason="no compiled core")
@pytest.mark.parametrize("name", MODELS)
def test_compile_takes_them_as_they_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.runtime import compile as module

    monkeypatch.setattr(module, "_GAIN", float("inf"))
    monkeypatch.setattr(module, "_MOST_ROUNDS", 1)
    model, example = sparse(name)
    compiled = pomona.compile(model, example)
    assert compiled.compilation.num_sparse > 0
    torch.testing.assert_close(called(compiled, example), called(model, example), rtol=1e-4, atol=1e-5)


def test_the_conv1d_of_gpt2_is_listed_as_passed_over() -> None:
    model, example = sparse("gpt2")
    compilation = pomona.compile(model, example).compilation
    reasons = {one.name: (one.kind, one.reason) for one in compilation.passed_over}
    assert reasons["transformer.h.0.mlp.c_fc.weight"][0] == "Conv1D"
    assert reasons["transformer.h.0.mlp.c_fc.weight"][1].startswith(
        "stored as (inputs, outputs), for which there is no"
    )
    assert reasons["transformer.wpe.weight"] == ("Embedding", "its rows are looked up, not multiplied")
    assert "transformer.wte.weight" not in reasons  # the head's too, which is taken
    assert "transformer.h.0.attn.c_attn.weight" in str(compilation)


def test_experts_are_listed_as_passed_over() -> None:
    config = hf.MixtralConfig(vocab_size=100, num_key_value_heads=2, num_local_experts=4, **BERT)
    model = hf.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 3:
                weight.mul_(torch.rand_like(weight) > 0.8)
    found = pomona.compile(model, {"input_ids": IDS}).compilation.passed_over
    assert len(found) == 2 and all("experts" in one.name for one in found)
    assert all(one.reason.startswith("only a MixtralExperts knows") for one in found)


@pytest.mark.filterwarnings("ignore")  # of torch's exporter and onnxscript
@pytest.mark.parametrize("name", MODELS)
def test_onnx_files_have_a_free_batch_and_length_and_named_outputs(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, example = sparse(name)
    told = pomona.export(model, tmp_path / "x.onnx", example=example)
    assert told.notes[0] == f"inputs: {MODELS[name][3]}"
    left_out = [note for note in told.notes if "left out" in note]
    assert [note.split()[4] for note in left_out] == (["past_key_values"] if name in ("gpt2", "t5", "whisper") else [])
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    assert session.get_outputs()[0].name == "logits"
    inputs = example if isinstance(example, dict) else {session.get_inputs()[0].name: example}
    inputs = {key: value[0] if isinstance(value, tuple) else value for key, value in inputs.items()}
    other = {key: torch.cat([x, x, x])[:5] for key, x in inputs.items()}
    if "input_ids" in other and name != "t5":
        other = {key: x[:, :9] for key, x in other.items()}
    (got, *_) = session.run(None, {key: x.numpy() for key, x in other.items()})
    wanted = called(model, other).numpy()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max() and got.shape[0] == len(next(iter(other.values())))


def test_a_file_that_runs_without_torch_is_refused_by_name(tmp_path: Path) -> None:
    model, example = sparse("bert")
    path = tmp_path / "x.pomona.safetensors"
    ways = r"pomona.compile\(model, example\) .* Leave out example= to write the file without a graph"
    with pytest.raises(ValueError, match=rf"aten.embedding.default in bert.embeddings.word_embeddings.*{ways}"):
        pomona.export(model, path, example=example["input_ids"])
    pomona.export(model, path)
    assert pomona.load(path).keys() == model.state_dict().keys()
