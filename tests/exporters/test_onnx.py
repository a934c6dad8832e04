"""ONNX files of what people have: dictionaries in and out, token ids, free batches and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import pomona
from pomona.example import Example
from pomona.exporters.free import freedoms, resized

check = pytest.mark.check  # each takes seconds: torch's exporter is slow


def run(path: Path, **inputs: Tensor) -> list[NDArray[Any]]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    return session.run(None, {name: x.numpy() for name, x in inputs.items()})


def shapes(path: Path) -> dict[str, list[int | str]]:
    runtime = pytest.importorskip("onnxruntime")
    return {value.name: value.shape for value in runtime.InferenceSession(path).get_inputs()}


def outputs(path: Path) -> list[str]:
    runtime = pytest.importorskip("onnxruntime")
    return [value.name for value in runtime.InferenceSession(path).get_outputs()]


@dataclass
class Scores:
    logits: Tensor
    states: tuple[Tensor, ...] = ()
    cache: object = None


class Reader(nn.Module):
    """Reads token ids with a mask; at most `limit` of them."""

    def __init__(self, limit: int = 9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places, self.head = nn.Embedding(20, 6), nn.Embedding(limit, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, scale: float | None = None, *, mask: Tensor | None = None) -> Scores:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        if mask is not None:
            x = x * mask[..., None]
        return Scores(self.head(x.sum(1)), (x, x.mean(1)), object())


IDS = torch.arange(10).view(2, 5)


@check
@pytest.mark.parametrize("example", [IDS, (IDS, None), {"mask": torch.ones(2, 5), "ids": IDS}])
def test_batch_and_length_are_free_and_outputs_have_names(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, path = Reader(), tmp_path / "x.onnx"
    told = pomona.export(model, path, example=example)
    given = {"mask": torch.ones(2, 5)} if isinstance(example, dict) else {}
    assert shapes(path)["ids"] == ["batch", "length"] and list(shapes(path)) == ["ids", *given]
    assert outputs(path) == ["logits", "states_0", "states_1"]
    assert told.notes[0].startswith("inputs: ids (batch, length)")
    assert told.notes[1:] == ("left out: the output cache (object), which is no tensor",)
    for batch, length in ((1, 1), (4, 9), (2, 5)):
        ids = torch.randint(20, (batch, length))
        masks = {name: torch.randint(2, (batch, length)).float() for name in given}
        with torch.no_grad():
            wanted = model(ids, **masks)
        for got, want in zip(run(path, ids=ids, **masks), (wanted.logits, *wanted.states), strict=True):
            assert np.abs(got - want.numpy()).max() < 1e-5


@check
def test_an_example_of_one_leaves_the_batch_free(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, path = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)), tmp_path / "x.onnx"
    model[0].weight.data[torch.rand(30, 20) < 0.9] = 0
    told = pomona.export(torch.compile(model, backend="eager"), path, example=torch.zeros(1, 20))
    assert told.notes == ("inputs: input (batch, 20)",)
    x = torch.randn(4, 20)
    assert np.abs(run(path, input=x)[0] - model(x).detach().numpy()).max() < 1e-5


class Cut(nn.Module):
    """Another function for long inputs, which the trace of one example cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) * (2 if x.shape[1] > 6 else 3)


class Table(nn.Module):
    """Works for a batch of three only."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows


@check
@pytest.mark.parametrize(
    ("model", "shape", "inputs", "notes"),
    [
        (Cut(), (3, 7, 2), "x (batch, 7, 2)", ["only the batch is free, since with more: "]),
        (Table(), (3, 7, 2), "x (3, 7, 2)", ["the batch is fixed to that of the example, with"]),
        (nn.LSTM(2, 3, batch_first=True), (1, 7, 2), "input (batch, length, 2)", []),
        (nn.Conv1d(2, 3, 3), (1, 2, 9), "input (batch, 2, length)", []),
    ],
)
def test_a_dimension_that_the_model_does_not_leave_free_is_fixed_and_said_to_be(
    model: nn.Module, shape: tuple[int, ...], inputs: str, notes: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    told = pomona.export(model, tmp_path / "x.onnx", example=torch.randn(shape))
    assert told.notes[-1] == f"inputs: {inputs}" and len(told.notes) == len(notes) + 1
    assert all(note.startswith(start) for note, start in zip(told.notes, notes, strict=False))


@check
def test_shapes_are_fixed_or_given_on_request(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, path = Reader(), tmp_path / "x.onnx"
    pomona.export(model, path, example=IDS, dynamic_shapes={})
    assert shapes(path) == {"ids": [2, 5]}
    pomona.export(model, path, example=IDS, dynamic_shapes={"ids": {1: torch.export.Dim.DYNAMIC}})
    assert shapes(path) == {"ids": [2, "length"]}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Silent(nn.Module):
    def forward(self, x: Tensor) -> dict[str, int]:
        return {"size": len(x)}


@check
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), r"torch cannot export Branch to ONNX \(.*\); give a module whose forward takes and returns tensor"),
        (Silent(), "Silent returns no tensor for the example"),
        (
            nn.ReLU().bfloat16(),
            r"ReLU takes or returns bfloat16, .*; export model.float\(\) with an example in flo",
        ),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(model: nn.Module, message: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    x = torch.ones(2, 3, dtype=torch.bfloat16 if "bfloat16" in message else torch.float32)
    with pytest.raises(ValueError, match=message):
        pomona.export(model, tmp_path / "x.onnx", example=x)
    assert not (tmp_path / "x.onnx").exists()


@check
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_padded_batch_in_torchs_own_transformer(tmp_path: Path) -> None:
    """Its fast path packs the batch and unpacks it with zeros; elsewhere the outputs are the file's."""
    pytest.importorskip("onnxscript")
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    told = pomona.export(model, tmp_path / "x.onnx", example=(x, {"src_key_padding_mask": padding}))
    assert told.notes == ("inputs: src (batch, length, 8), src_key_padding_mask (batch, length)",)
    (got,) = run(tmp_path / "x.onnx", src=x, src_key_padding_mask=padding)
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding).numpy()
    assert not wanted[1, 3:].any() and torch.backends.mha.get_fastpath_enabled()
    assert np.abs(got - wanted)[~padding.numpy()].max() < 1e-5


@check
def test_infinite_outputs_and_random_numbers(tmp_path: Path) -> None:
    """Masked scores are minus infinity in both; what a model draws is not drawn from the user's numbers."""
    pytest.importorskip("onnxscript")

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            return x.masked_fill(x < 0, -torch.inf)

    state = torch.get_rng_state()
    pomona.export(Masked(), tmp_path / "x.onnx", example=torch.tensor([[1.0, -1.0], [2.0, -2.0]]))
    assert torch.equal(state, torch.get_rng_state())


# What is tried, without the exporter


def test_batch_and_lengths_then_the_batch_then_nothing() -> None:
    image, text, table, signal = torch.zeros(4, 3, 8, 8), IDS[:1].repeat(4, 1), torch.zeros(9, 2), torch.zeros(4, 1, 6)
    example = Example.of((image, text, {"table": table, "signal": signal, "factor": torch.tensor(2.0)}))
    assert [freedom.dims for freedom in freedoms(example)] == [
        ((0,), (0, 1), (0, 1), (0, 2), ()),
        ((0,), (0,), (), (0,), ()),
        ((), (), (), (), ()),
    ]
    assert [freedom.says for freedom in freedoms(Example.of(image))] == [
        "",
        "every dimension is fixed to that of the example",
    ]
    one = Example.of((image[:1], table))
    assert [x.shape[0] for x in freedoms(one)[0].enlarged(one).tensors()] == [2, 9]
    assert freedoms(one)[-1].enlarged(one) is one


def test_another_size_is_made_of_what_is_there() -> None:
    assert resized(torch.tensor([[1, 2, 3]]), 1, 5).tolist() == [[1, 2, 3, 1, 2]]
    assert resized(torch.tensor([[1, 2, 3]]), 1, 2).tolist() == [[1, 2]]
