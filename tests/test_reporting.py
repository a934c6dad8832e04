"""The report: counted from the tensors, of the weights in scope, in words, in JSON and in a table."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pomona.native import core
from pomona.reporting import LayerReport, Report, report, report_layer
from pomona.scope import Scope


def strict_json(text: str) -> Any:
    """Parse what the standard allows: Python alone would take NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def small_model() -> nn.Sequential:
    """Eight weights in scope, two of them not zero, and four outputs, two of them dead; a bias beside."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[0.0, -3.0], [0.0, -0.0], [0.25, 0.0]])
    model[1].weight.data = torch.tensor([[0.0, 0.0]])
    model[1].bias.data = torch.tensor([0.0])
    return model


# one layer


def test_a_layer_by_hand() -> None:
    layer = report_layer("fc", torch.tensor([[0.0, -3.0, 1.0], [0.0, 0.0, 0.0]]), largest_cut=0.125, reason="why")
    assert layer == LayerReport(
        name="fc",
        shape=(2, 3),
        total=6,
        nonzero=2,
        channels=2,
        dead_channels=1,
        largest_cut=0.125,
        smallest_kept=1.0,
        reason="why",
    )
    assert layer.density == 2 / 6


def test_a_convolution_has_a_channel_for_each_output() -> None:
    kernel = torch.zeros(3, 2, 2, 2)
    kernel[1, 0, 1, 1] = 5.0
    layer = report_layer("conv", kernel)
    assert (layer.total, layer.nonzero, layer.channels, layer.dead_channels) == (24, 1, 3, 2)


def test_a_vector_has_a_channel_for_each_entry() -> None:
    layer = report_layer("bias", torch.tensor([0.0, 2.0, 0.0]))
    assert (layer.shape, layer.total, layer.nonzero, layer.channels, layer.dead_channels) == ((3,), 3, 1, 3, 2)


def test_minus_zero_is_zero() -> None:
    layer = report_layer("fc", torch.tensor([[-0.0, 1.0], [-0.0, 0.0]]))
    assert (layer.nonzero, layer.dead_channels, layer.smallest_kept) == (1, 1, 1.0)


def test_zero_is_exactly_zero() -> None:
    layer = report_layer("fc", torch.tensor([[1e-45, 0.0]]))  # the smallest float32
    assert layer.nonzero == 1
    assert layer.smallest_kept == torch.tensor(1e-45).item() > 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_weight_is_counted(dtype: torch.dtype) -> None:
    layer = report_layer("fc", torch.tensor([[0.0, -0.5], [2.0, 0.0]], dtype=dtype))
    assert (layer.nonzero, layer.smallest_kept) == (2, 0.5)


def test_a_transposed_weight_is_counted_by_its_rows() -> None:
    layer = report_layer("fc", torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]).t())
    assert (layer.shape, layer.channels, layer.dead_channels) == ((2, 3), 2, 1)


def test_of_an_all_zero_layer_nothing_is_kept() -> None:
    layer = report_layer("fc", torch.zeros(2, 2))
    assert (layer.nonzero, layer.dead_channels, layer.smallest_kept, layer.density) == (0, 2, None, 0.0)


@pytest.mark.parametrize("shape", [(40, 30), (8, 5, 3, 3), (700,), ()])
def test_the_core_changes_no_number(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.1)
    for bad in (0.0, math.inf, math.nan):
        value = value.clone()
        value.view(-1)[:1] = bad
        layers = []
        for with_core in (True, False):
            with core.switched(with_core):
                layers.append(str(report_layer("fc", value)))  # as text, in which one nan equals another
        assert layers[0] == layers[1]


def test_a_parameter_may_be_counted_and_is_left_alone() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 1.0]]))
    report_layer("fc", weight)
    assert weight.tolist() == [[0.0, 1.0]]
    assert weight.requires_grad


def test_an_empty_layer_has_no_dead_channels() -> None:
    layer = report_layer("fc", torch.zeros(3, 0))
    assert (layer.total, layer.nonzero, layer.dead_channels, layer.density) == (0, 0, 0, 0.0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 2), (0,)])
def test_a_layer_without_outputs_is_empty(shape: tuple[int, ...]) -> None:
    layer = report_layer("fc", torch.zeros(shape))
    assert (layer.shape, layer.total, layer.channels, layer.dead_channels) == (shape, 0, 0, 0)


@pytest.mark.parametrize(("value", "nonzero"), [(0.0, 0), (2.0, 1)])
def test_a_scalar_is_one_weight(value: float, nonzero: int) -> None:
    layer = report_layer("scale", torch.tensor(value))
    assert (layer.shape, layer.total, layer.nonzero) == ((), 1, nonzero)


def test_a_scalar_has_no_channels() -> None:
    assert report_layer("scale", torch.tensor(0.0)).channels == 0


# a model


def test_a_state_dict_is_no_model() -> None:
    with pytest.raises(TypeError, match="got OrderedDict; load a state dict into its model first"):
        report(small_model().state_dict())  # type: ignore[arg-type]


def test_a_model_is_counted_from_its_tensors() -> None:
    found = report(small_model())
    assert [layer.name for layer in found.layers] == ["0.weight", "1.weight"]
    assert (found.total, found.nonzero) == (8, 2)
    assert (found.density, found.sparsity, found.compression) == (0.25, 0.75, 4.0)
    assert found.dead_channels == 2
    assert found.smallest_kept == 0.25
    assert found.largest_cut is None
    assert found.outside == {"1.bias": "a vector"}


def test_the_report_follows_the_tensors() -> None:
    model = small_model()
    before = report(model)
    nn.init.constant_(model[1].get_parameter("weight"), 2.0)
    assert (before.nonzero, report(model).nonzero) == (2, 4)


def test_only_the_scope_is_counted() -> None:
    found = report(small_model(), Scope(include=("0",)))
    assert (found.total, found.nonzero, found.dead_channels) == (6, 2, 1)
    assert found.outside["1.weight"] == "not in include"


def test_vectors_are_counted_if_the_scope_takes_them() -> None:
    found = report(small_model(), Scope(include=("1",), also=("1",)))
    assert [(layer.name, layer.shape, layer.nonzero) for layer in found.layers] == [
        ("1.weight", (1, 2), 0),
        ("1.bias", (1,), 0),
    ]


def test_a_tied_weight_is_counted_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    found = report(model, Scope(also=("1",)))
    assert found.total == 8
    assert found.outside == {"1.weight": "tied to 0.weight"}


def test_zeros_made_by_torch_are_counted() -> None:
    model = nn.Linear(10, 10)
    torch_prune: Any = prune  # published without types
    torch_prune.l1_unstructured(model, "weight", amount=30)
    torch_prune.remove(model, "weight")
    assert (report(model).total, report(model).nonzero) == (100, 70)


def test_sparsity_is_the_fraction_of_zeros() -> None:
    assert Report((report_layer("fc", torch.tensor([0.0] * 3 + [1.0] * 7)),)).sparsity == 0.3


def test_the_largest_cut_and_the_smallest_kept_are_over_all_layers() -> None:
    layers = (
        report_layer("a", torch.tensor([[0.0, 3.0]]), largest_cut=0.5),
        report_layer("b", torch.tensor([[0.0, 0.0]]), largest_cut=0.75),
        report_layer("c", torch.tensor([[2.0, 4.0]])),
    )
    assert (Report(layers).largest_cut, Report(layers).smallest_kept) == (0.75, 2.0)


def test_a_cut_of_nothing_but_zeros_is_a_cut_without_loss() -> None:
    assert Report((report_layer("a", torch.tensor([[0.0, 3.0]]), largest_cut=0.0),)).largest_cut == 0.0


def test_compression_is_infinite_when_nothing_is_left() -> None:
    found = Report((report_layer("fc", torch.zeros(2, 2)),))
    assert (found.sparsity, found.density, found.compression) == (1.0, 0.0, math.inf)


def test_a_report_of_no_layers_is_empty() -> None:
    found = Report(())
    assert (found.total, found.nonzero, found.density, found.dead_channels) == (0, 0, 0.0, 0)
    assert found.largest_cut is found.smallest_kept is None
    assert "total" in str(found)


# JSON


def full_report() -> Report:
    return Report(
        layers=(report_layer("fc", torch.tensor([[0.0, 2.0]]), largest_cut=0.125, reason="why"),),
        outside={"fc.bias": "a vector"},
        accuracy_before=98.5,
        accuracy_after=98.25,
        metrics={"decay_exponent": 7.5},
        num_steps=12,
        num_skipped=3,
    )


def test_a_report_as_json_by_hand() -> None:
    assert strict_json(full_report().to_json()) == {
        "of": "the 2 weights in scope (1 tensors)",
        "total": 2,
        "nonzero": 1,
        "sparsity": 0.5,
        "density": 0.5,
        "compression": 2.0,
        "dead_channels": 0,
        "granularity": "weight",
        "largest_cut": 0.125,
        "smallest_kept": 2.0,
        "accuracy_before": 98.5,
        "accuracy_after": 98.25,
        "metrics": {"decay_exponent": 7.5},
        "num_steps": 12,
        "num_skipped": 3,
        "multiply_adds": None,
        "kept_multiply_adds": None,
        "other_multiply_adds": None,
        "layers": [
            {
                "name": "fc",
                "shape": [1, 2],
                "total": 2,
                "nonzero": 1,
                "channels": 1,
                "dead_channels": 0,
                "largest_cut": 0.125,
                "smallest_kept": 2.0,
                "reason": "why",
                "multiply_adds": None,
                "kept_multiply_adds": None,
                "density": 0.5,
            }
        ],
        "outside": {"fc.bias": "a vector"},
    }


def test_to_dict_is_what_json_gives_back() -> None:
    for found in (full_report(), report(small_model()), Report(())):
        assert strict_json(found.to_json()) == found.to_dict()


def test_json_stays_valid_when_nothing_is_left() -> None:
    found = strict_json(Report((report_layer("fc", torch.zeros(2, 2)),)).to_json())
    assert (found["nonzero"], found["compression"], found["smallest_kept"]) == (0, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_stays_valid_when_a_run_has_diverged(bad: float) -> None:
    diverged = report_layer("fc", torch.tensor([[bad, 0.0]]))
    strict_json(Report((diverged,), accuracy_after=bad, metrics={"decay_exponent": bad}).to_json())


# the table


def cells(line: str) -> list[str]:
    return line.split()


def test_the_table_holds_the_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(20, 50, 5), nn.Linear(800, 500, bias=False))
    with torch.no_grad():
        model[0].get_parameter("weight").zero_()[:5] = 1.0
        model[1].get_parameter("weight").zero_()[:, 0] = 0.5
    header, rule, conv, fc, same_rule, total, *notes = str(report(model)).splitlines()
    assert cells(header) == "layer shape weights non-zero density dead channels why".split()
    assert set(rule) == {"-"}
    assert rule == same_rule
    assert cells(conv) == "0.weight 50x20x5x5 25,000 2,500 10.00 % 45 of 50".split()
    assert cells(fc) == "1.weight 500x800 400,000 500 0.12 % 0 of 500".split()
    assert cells(total) == "total 425,000 3,000 0.71 % 45 141.7x compression".split()
    assert notes == ["not pruned and not counted: 0.bias (a vector)"]


def test_numbers_are_flush_right_and_nothing_trails() -> None:
    lines = str(report(small_model())).splitlines()
    ends = [lines[i].index(end) + len(end) for i, end in ((0, "weights"), (2, " 6 "), (3, " 2 "), (5, " 8 "))]
    assert ends[0] == ends[1] - 1 == ends[2] - 1 == ends[3] - 1
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines[:1] + lines[2:4] + lines[5:6])) == len(lines[1])


def test_the_reason_stands_in_the_row_of_the_layer() -> None:
    table = str(Report((report_layer("fc", torch.ones(1, 2), reason="held at the floor min_density=0.1"),)))
    assert table.splitlines()[2].endswith("0 of 1  held at the floor min_density=0.1")


def test_the_notes_tell_what_the_cut_did() -> None:
    assert str(full_report()).splitlines()[5:] == [
        "accuracy 98.50 before the cut, 98.25 after (-0.25)",
        "largest weight cut 0.12, smallest kept 2",
        "decay exponent 7.5",
        "3 steps were skipped because a gradient was not finite",
        "not pruned and not counted: fc.bias (a vector)",
    ]


def test_there_are_no_notes_without_anything_to_tell() -> None:
    table = str(Report((report_layer("fc", torch.ones(1, 2)),))).splitlines()
    assert len(table) == 5


def test_one_accuracy_alone_is_no_comparison() -> None:
    assert "accuracy" not in str(Report((report_layer("fc", torch.ones(1, 2)),), accuracy_before=98.0))


def test_scalars_and_vectors_have_rows_too() -> None:
    table = str(Report((report_layer("scale", torch.tensor(2.0)), report_layer("bias", torch.tensor([0.0, 1.0])))))
    assert cells(table.splitlines()[2])[:3] == ["scale", "1", "1"]
    assert cells(table.splitlines()[3])[:4] == ["bias", "2", "2", "1"]


def test_a_table_of_nothing_left_reads_well() -> None:
    assert "infx" not in str(Report((report_layer("fc", torch.zeros(2, 2)),)))


def test_what_is_not_counted_is_grouped_by_its_reason() -> None:
    model = nn.Sequential(*[layer for _ in range(60) for layer in (nn.Linear(2, 2), nn.BatchNorm1d(2))])
    line = str(report(model)).splitlines()[-1]
    assert line == (
        "not pruned and not counted: 1.weight, 1.bias, 3.weight and 117 more (of a norm, BatchNorm1d); "
        "0.bias, 2.bias, 4.bias and 57 more (a vector)"
    )
    many = Report((report_layer("fc", torch.ones(1, 2)),), {f"w{i}": f"tied to v{i}" for i in range(20)})
    assert str(many).endswith("w7 (tied to v7); and 12 for other reasons")
