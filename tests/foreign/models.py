"""The models of other people that Pomona is tried on: one line each, with what is different about it.

Random weights, few layers, small inputs. A package is imported when its model is made, so names need none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import pomona
from pomona.layout import Layout, register

ALL = ("GSM", "Magnitude", "Feather", "RigL", "ADMM")
Example = Tensor | tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A model, and what is to come out of it.

    Attributes:
        make: returns the model with random weights.
        example: its input: a tensor, a tuple of arguments, or keyword arguments.
        tensors: how many the default scope selects (or ``scope``).
        runtime: "" if the whole network runs in ``pomona.runtime``; otherwise what its error names as missing.
        refused: what the Pruner's error says with the default scope, as a regular expression; the scope that it advises
            is taken then.
        warned: what it warns of with the default scope, if it does.
        scope: instead of the default one; None: there is no way out.
        copies: whether torch can copy it (``copy.deepcopy``).
        ways: with which methods it is pruned, of ``trial.WAYS``.
    """

    make: Callable[[], nn.Module]
    example: Example
    tensors: int = 0
    runtime: str = ""
    refused: str = ""
    warned: str = ""
    scope: pomona.Scope | None = field(default_factory=pomona.Scope)
    ways: tuple[str, ...] = ("GSM", "Magnitude")
    copies: bool = True


# Inputs


def image(size: int = 32, *, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words(length: int = 6, *, batch: int = 2, vocabulary: int = 50) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def edges() -> Tensor:
    """A ring of six nodes."""
    return torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])


# Where models come from


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, num_classes=5, **options)


def of(path: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """A class or a function of a package, by its full name, called with these."""
    module, _, name = path.rpartition(".")
    return lambda: getattr(importlib.import_module(module), name)(*arguments, **options)


def hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), name)
        return kind(kind.config_class(**config))

    return make


def layers(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(module() for module in modules))


# Plain modules of torch, put together here


class Recurrent(nn.Module):
    """Words, a recurrent network over them, and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 24, batch_first=True, **options)
        self.head = nn.Linear((options.get("proj_size") or 24) * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


class SharedCell(nn.Module):
    """One cell for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x)
        return self.head(self.cell(x, state)[0])


class Attention(nn.Module):
    """Attention with one packed projection, then with three, because keys and values have other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.apart = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=12)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.packed(x, x, x)[0]
        return self.head(self.apart(x, x[..., :8], x[..., :12])[0])


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(50, 16, **options), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = nn.Bilinear(8, 8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.pair(x, y).relu())


class Splines(nn.Module):
    """A layer of a Kolmogorov-Arnold network, as papers write it: a raw parameter (outputs, inputs, powers)."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(0.1 * torch.randn(16, 8, 4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        powers = torch.stack([x.tanh() ** p for p in range(4)], -1)
        return self.head(torch.einsum("bip,oip->bo", powers, self.coefficients))


class ScaledBlock(nn.Module):
    """A residual block whose scale broadcasts over the places of an image, small at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm([8, 6, 6])
        self.scale = nn.Parameter(1e-6 * torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.body(x))


class Experts(nn.Module):
    """Experts of one's own in one tensor, (experts, outputs, inputs); unknown to Pomona until they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.2 * torch.randn(4, 16, 8))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("bi,eoi->beo", x, self.up).relu().mean(1))


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and in many networks with group norms."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Cut(nn.Module):
    """The first of several outputs."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


def mlp(**how: Any) -> nn.Module:
    """8 -> 24 -> 16 -> 3."""
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).to(**how)


def convolutions(dims: int) -> nn.Module:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    return nn.Sequential(
        conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 6**dims, 3)
    )


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 2, stride=2),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))


def shared() -> nn.Module:
    """One layer in two places."""
    middle = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), middle, nn.ReLU(), middle, nn.ReLU(), nn.Linear(16, 3))


def frozen() -> nn.Module:
    """Whose first layer does not train."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


def registered(kind: type[nn.Module], **weights: Layout) -> Callable[[], nn.Module]:
    """A module that Pomona has been told of."""

    def make() -> nn.Module:
        register(kind, **weights)
        return kind()

    return make


def in_place(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    """An MLP, of which the second layer is changed."""

    def make() -> nn.Module:
        model = mlp()
        change(model[2])
        return model

    return make


def called_once(make: Callable[[], nn.Module], example: Example) -> Callable[[], nn.Module]:
    """A model whose lazy layers have got their shapes."""

    def made() -> nn.Module:
        model = make()
        call(model, example)
        return model

    return made


def convnext() -> nn.Module:
    """torchvision's, with layer scales of shape (C, 1, 1)."""
    module = importlib.import_module("torchvision.models.convnext")
    widths = [(16, 32), (32, 48), (48, None)]
    return module.ConvNeXt([module.CNBlockConfig(width, out, 1) for width, out in widths], num_classes=5)


def call(model: nn.Module, example: Example) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


# The table

_BERT = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
_LLAMA = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    max_position_embeddings=16,
    head_dim=8,
    pad_token_id=0,
)
_VISION = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
_WIDE = dict(img_size=32, depth=2, embed_dim=48, num_heads=3)

MODELS: Mapping[str, Tried] = {
    "torch/LSTM": Tried(
        ways=ALL,
        make=lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        example=words(),
        tensors=9,
        runtime="aten.embedding",
    ),
    "torch/GRU": Tried(
        make=lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
        example=words(),
        tensors=9,
        runtime="aten.embedding",
    ),
    "torch/LSTM with projection": Tried(
        make=lambda: Recurrent(nn.LSTM, proj_size=8), example=words(), tensors=4, runtime="aten.embedding"
    ),
    "torch/LSTMCell": Tried(make=SharedCell, example=rows(4, 8), tensors=3, runtime="aten.lstm_cell"),
    "torch/MultiheadAttention": Tried(
        ways=ALL, make=Attention, example=rows(2, 5, 16), tensors=7, runtime="aten.transpose"
    ),
    "torch/TransformerEncoder": Tried(make=encoder, example=rows(2, 5, 16), tensors=9, runtime="aten.transpose"),
    "torch/Transformer": Tried(
        make=lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        example=(rows(2, 5, 16), rows(2, 3, 16)),
        tensors=10,
        runtime="aten.transpose",
    ),
    "torch/Conv1d": Tried(make=lambda: convolutions(1), example=rows(2, 2, 6), tensors=3, runtime="aten.conv1d"),
    "torch/Conv3d": Tried(make=lambda: convolutions(3), example=rows(2, 2, 6, 6, 6), tensors=3, runtime="aten.conv3d"),
    "torch/ConvTranspose2d": Tried(
        ways=ALL, make=autoencoder, example=image(16), tensors=4, runtime="aten.conv_transpose2d"
    ),
    "torch/Bilinear": Tried(make=Pairs, example=(rows(4, 8), rows(4, 8)), tensors=2, runtime="aten.bilinear"),
    "torch/EmbeddingBag": Tried(make=Bags, example=words(), tensors=1, runtime="aten.reshape"),
    "torch/EmbeddingBag, sparse gradients": Tried(
        ways=("Magnitude with SGD",), make=lambda: Bags(sparse=True), example=words(), tensors=1, runtime="aten.reshape"
    ),
    "torch/Embedding with padding and max_norm": Tried(
        make=lambda: Bags(padding_idx=0, max_norm=1.0), example=words(), tensors=1, runtime="aten.embedding_renorm_"
    ),
    "torch/LayerNorm over an image, layer scale": Tried(
        make=layers(lambda: nn.Conv2d(3, 8, 3), ScaledBlock, ScaledBlock, nn.Flatten, lambda: nn.Linear(288, 3)),
        example=image(8),
        tensors=4,
        runtime="aten.layer_norm",
    ),
    "torch/a layer in two places": Tried(make=shared, example=rows(4, 8), tensors=3),
    "torch/a frozen layer": Tried(make=frozen, example=rows(4, 8), tensors=2),
    "torch/bfloat16": Tried(
        ways=("Magnitude",), make=lambda: mlp(dtype=torch.bfloat16), example=rows(4, 8).bfloat16(), tensors=3
    ),
    "torch/channels_last": Tried(
        make=lambda: autoencoder().to(memory_format=torch.channels_last),
        example=image(16).contiguous(memory_format=torch.channels_last),
        tensors=4,
        runtime="aten.conv_transpose2d",
    ),
    "torch/complex": Tried(
        refused=r"0\.weight, 2\.weight, 4\.weight \(it is torch\.complex64; only real",
        scope=None,
        make=lambda: mlp(dtype=torch.complex64),
        example=rows(4, 8).cfloat(),
        tensors=0,
    ),
    "torch/torch.compile": Tried(make=lambda: _compiled(mlp()), example=rows(4, 8), tensors=3),
    "torch/Module.compile": Tried(make=lambda: _compiled_in_place(mlp()), example=rows(4, 8), tensors=3),
    "torch/a raw parameter (KAN)": Tried(
        warned="512 weights stay dense.*coefficients of Splines",
        scope=pomona.Scope(also=["coefficients"]),
        make=Splines,
        example=rows(4, 8),
        tensors=2,
        runtime="aten.pow",
    ),
    "torch/experts of one's own": Tried(
        make=registered(Experts, up=Layout(outputs=1, inputs=2)), example=rows(4, 8), tensors=2, runtime="aten.einsum"
    ),
    "torch/weight standardisation": Tried(
        refused=r"2\.weight \(by its Standardised",
        make=layers(lambda: nn.Conv2d(3, 8, 3), nn.ReLU, lambda: Standardised(8, 8, 3), nn.Flatten),
        example=image(8),
        tensors=1,
    ),
    "torch/weight_norm": Tried(make=in_place(parametrizations.weight_norm), example=rows(4, 8), tensors=3),
    "torch/weight_norm, the old one": Tried(copies=False, make=in_place(weight_norm), example=rows(4, 8), tensors=3),
    "torch/spectral_norm": Tried(
        refused=r"2\.parametrizations\.weight\.original \(by SpectralNorm\).*remove_parametrizations",
        make=in_place(parametrizations.spectral_norm),
        example=rows(4, 8),
        tensors=2,
    ),
    "torch/spectral_norm, the old one": Tried(
        refused=r"2\.weight_orig \(by SpectralNorm\).*remove_spectral_norm",
        copies=False,
        make=in_place(spectral_norm),
        example=rows(4, 8),
        tensors=2,
    ),
    "torch/orthogonal": Tried(
        refused=r"2\.parametrizations\.weight\.original \(by Orthogonal\)",
        make=in_place(parametrizations.orthogonal),
        example=rows(4, 8),
        tensors=2,
    ),
    "torch/torch.nn.utils.prune": Tried(
        refused=r"2\.weight_orig \(by a mask of torch\.nn\.utils\.prune\).*from_torch_prune",
        copies=False,
        make=in_place(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        example=rows(4, 8),
        tensors=2,
    ),
    "transformers/GPT-2": Tried(
        ways=ALL,
        make=hf("GPT2LMHeadModel", vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2),
        example={"input_ids": words()},
        tensors=8,
        runtime="aten.embedding",
    ),
    "transformers/Llama, tied": Tried(
        make=hf("LlamaForCausalLM", **_LLAMA, tie_word_embeddings=True),
        example={"input_ids": words()},
        tensors=14,
        runtime="aten.embedding",
    ),
    "transformers/Llama": Tried(
        make=hf("LlamaForCausalLM", **_LLAMA), example={"input_ids": words()}, tensors=15, runtime="aten.embedding"
    ),
    "transformers/Mixtral": Tried(
        ways=ALL,
        make=hf("MixtralForCausalLM", **_LLAMA, num_local_experts=4),
        example={"input_ids": words()},
        tensors=13,
        runtime="aten.div_",
    ),
    "transformers/Qwen3-MoE": Tried(
        make=hf("Qwen3MoeForCausalLM", **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
        example={"input_ids": words()},
        tensors=13,
        runtime="aten.embedding",
    ),
    "transformers/gpt-oss": Tried(
        make=hf("GptOssForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        example={"input_ids": words()},
        tensors=13,
        runtime="aten.embedding",
    ),
    "transformers/BERT, masked words": Tried(
        make=hf("BertForMaskedLM", **_BERT), example={"input_ids": words()}, tensors=7, runtime="aten.embedding"
    ),
    "transformers/BERT, classification": Tried(
        make=hf("BertForSequenceClassification", **_BERT),
        example={"input_ids": words()},
        tensors=8,
        runtime="aten.embedding",
    ),
    "transformers/ALBERT": Tried(
        make=hf("AlbertForSequenceClassification", **{**_BERT, "num_hidden_layers": 2}, embedding_size=8),
        example={"input_ids": words()},
        tensors=9,
        runtime="aten.embedding",
    ),
    "transformers/XLNet": Tried(
        make=hf("XLNetLMHeadModel", vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32),
        example={"input_ids": words()},
        tensors=14,
        runtime="aten.transpose",
    ),
    "transformers/T5": Tried(
        make=hf("T5ForConditionalGeneration", vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        example={"input_ids": words(), "decoder_input_ids": words(4)},
        tensors=16,
        runtime="aten.embedding",
    ),
    "transformers/Mamba": Tried(
        warned="256 weights stay dense.*A_log of MambaMixer",
        runtime="aten.embedding",
        make=hf("MambaForCausalLM", vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2),
        example={"input_ids": words()},
        tensors=10,
    ),
    "transformers/ViT": Tried(
        make=hf("ViTForImageClassification", **_VISION, intermediate_size=32),
        example={"pixel_values": image(16)},
        tensors=8,
        runtime="aten.flatten",
    ),
    "transformers/ConvNeXtV2": Tried(
        make=hf("ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]),
        example={"pixel_values": image(32)},
        tensors=17,
        runtime="aten.permute",
    ),
    "transformers/CLIP": Tried(
        make=hf(
            "CLIPModel",
            text_config={**_BERT, "eos_token_id": 2, "projection_dim": 8},
            vision_config={**_VISION, "intermediate_size": 32, "projection_dim": 8},
            projection_dim=8,
        ),
        example={"input_ids": words(), "pixel_values": image(16)},
        tensors=15,
        runtime="aten.flatten",
    ),
    "transformers/Whisper": Tried(
        make=hf(
            "WhisperForConditionalGeneration",
            vocab_size=50,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=8,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        example={"input_features": rows(2, 8, 16), "decoder_input_ids": words(4)},
        tensors=18,
        runtime="aten.conv1d",
    ),
    "transformers/Wav2Vec2": Tried(
        make=hf(
            "Wav2Vec2ForCTC",
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
        ),
        example={"input_values": rows(2, 200)},
        tensors=11,
        runtime="aten.unsqueeze",
    ),
    "timm/resnet18": Tried(
        ways=ALL, make=timm("resnet18", layers=(1, 1, 1, 1), channels=(16, 32, 32, 64)), example=image(), tensors=14
    ),
    "timm/resnet50": Tried(
        make=timm("resnet50", layers=(1, 1, 1, 1), channels=(16, 32, 32, 64)), example=image(), tensors=17
    ),
    "timm/resnetv2_50": Tried(
        make=timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 64, 64, 128)), example=image(), tensors=18
    ),
    "timm/convnext_atto": Tried(
        make=timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
        example=image(),
        tensors=17,
        runtime="aten.permute",
    ),
    "timm/mobilenetv1_100": Tried(make=timm("mobilenetv1_100"), example=image(), tensors=28),
    "timm/mobilenetv3_small_050": Tried(make=timm("mobilenetv3_small_050"), example=image(), tensors=54),
    "timm/efficientnet_lite0": Tried(make=timm("efficientnet_lite0"), example=image(), tensors=50),
    "timm/tf_efficientnet_lite0": Tried(make=timm("tf_efficientnet_lite0"), example=image(), tensors=50),
    "timm/regnety_002": Tried(make=timm("regnety_002"), example=image(), tensors=71),
    "timm/ghostnet_050": Tried(make=timm("ghostnet_050"), example=image(), tensors=96),
    "timm/repvgg_a0": Tried(make=timm("repvgg_a0"), example=image(), tensors=45),
    "timm/densenet121": Tried(
        make=timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)), example=image(), tensors=21
    ),
    "timm/nfnet_f0": Tried(
        refused=r"stem\.conv1\.weight,.* and 22 more \(by its ScaledStdConv2d",
        make=timm(
            "nfnet_f0", depths=(1, 1, 1, 1), channels=(32, 32, 64, 64), group_size=16, stem_chs=16, num_features=64
        ),
        example=image(),
        tensors=9,
    ),
    "timm/mobilevit_xxs": Tried(make=timm("mobilevit_xxs"), example=image(), tensors=72, runtime="aten.reshape"),
    "timm/fastvit_t8": Tried(make=timm("fastvit_t8", layers=(1, 1, 1, 1)), example=image(), tensors=39),
    "timm/vit_tiny_patch16_224": Tried(
        make=timm("vit_tiny_patch16_224", **_WIDE), example=image(), tensors=10, runtime="aten.flatten"
    ),
    "timm/deit_tiny_distilled_patch16_224": Tried(
        make=timm("deit_tiny_distilled_patch16_224", **_WIDE), example=image(), tensors=11, runtime="aten.flatten"
    ),
    "timm/deit3_small_patch16_224": Tried(
        make=timm("deit3_small_patch16_224", **_WIDE), example=image(), tensors=10, runtime="aten.flatten"
    ),
    "timm/beit_base_patch16_224": Tried(
        make=timm("beit_base_patch16_224", **_WIDE), example=image(), tensors=10, runtime="aten.flatten"
    ),
    "timm/eva02_tiny_patch14_224": Tried(
        make=timm("eva02_tiny_patch14_224", **{**_WIDE, "img_size": 28}),
        example=image(28),
        tensors=10,
        runtime="aten.flatten",
    ),
    "timm/swin_tiny_patch4_window7_224": Tried(
        make=timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            depths=(1, 1, 2, 1),
            embed_dim=24,
            num_heads=(1, 2, 2, 4),
        ),
        example=image(64),
        tensors=25,
        runtime="aten.permute",
    ),
    "timm/MLP-Mixer": Tried(
        make=of("timm.models.mlp_mixer.MlpMixer", 5, img_size=32, patch_size=16, num_blocks=2, embed_dim=48),
        example=image(),
        tensors=10,
        runtime="aten.flatten",
    ),
    "timm/xcit_nano_12_p16_224": Tried(
        make=timm("xcit_nano_12_p16_224", depth=2, embed_dim=48), example=image(), tensors=30, runtime="aten.flatten"
    ),
    "timm/levit_128s": Tried(
        make=timm("levit_128s", img_size=64, embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 2, 2)),
        example=image(64),
        tensors=28,
        runtime="aten.flatten",
    ),
    "timm/tiny_vit_5m_224": Tried(
        make=timm("tiny_vit_5m_224", depths=(1, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 1, 2, 2)),
        example=image(),
        tensors=35,
        runtime="aten.permute",
    ),
    "timm/efficientformerv2_s0": Tried(
        make=timm("efficientformerv2_s0", img_size=64, depths=(1, 1, 2, 2), embed_dims=(16, 32, 32, 48)),
        example=image(64),
        tensors=61,
        runtime="aten.reshape",
    ),
    "timm/sam2_hiera_tiny": Tried(
        make=timm("sam2_hiera_tiny", stages=(1, 1, 2, 1), embed_dim=16, num_heads=1, global_att_blocks=()),
        example=image(),
        tensors=25,
        runtime="aten.permute",
    ),
    "torchvision/ConvNeXt": Tried(make=convnext, example=image(), tensors=13, runtime="aten.permute"),
    "torchvision/MobileNetV3": Tried(
        make=of("torchvision.models.mobilenet_v3_small", num_classes=5, width_mult=0.5), example=image(), tensors=54
    ),
    "torchvision/ViT": Tried(
        make=of("torchvision.models.VisionTransformer", 32, 16, 2, 2, 32, 64, num_classes=5),
        example=image(),
        tensors=10,
        runtime="aten.reshape",
    ),
    "segmentation-models-pytorch/U-Net on timm's resnet18": Tried(
        make=of(
            "segmentation_models_pytorch.Unet",
            encoder_name="tu-resnet18",
            encoder_weights=None,
            encoder_depth=3,
            decoder_channels=(32, 16, 8),
        ),
        example=image(),
        tensors=17,
    ),
    "torch-geometric/GCN": Tried(
        make=of("torch_geometric.nn.GCN", 8, 16, 2, 3),
        example=(rows(6, 8), edges()),
        tensors=2,
        runtime="could not trace",
    ),
    "torch-geometric/GIN, lazy": Tried(
        make=called_once(of("torch_geometric.nn.GIN", -1, 16, 2, 3), (rows(6, 8), edges())),
        example=(rows(6, 8), edges()),
        tensors=4,
        runtime="could not trace",
    ),
    "ultralytics/yolov8n": Tried(
        make=of("ultralytics.nn.tasks.DetectionModel", "yolov8n.yaml", nc=2, verbose=False),
        example=image(64),
        tensors=63,
        runtime="aten.view",
    ),
}
