"""SparseML recipes, written as its own were, become methods and scopes that prune as they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pomona
from pomona import Cubic, Linear, Magnitude, SparseMLRecipe, from_sparseml


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layer = nn.ModuleList([nn.Linear(16, 20), nn.Linear(20, 20)])
        self.head = nn.Linear(20, 2)
        self.position = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).flatten(1)
        for layer in self.layer:
            x = layer(x).relu()
        y: torch.Tensor = self.head(x) + self.position.sum()
        return y


PRUNABLE = ["conv.weight", "layer.0.weight", "layer.1.weight", "head.weight"]


def gradual(kind: str = "GMPruningModifier", **keys: Any) -> str:
    settings = {
        "init_sparsity": 0.05,
        "final_sparsity": 0.8,
        "start_epoch": 1.0,
        "end_epoch": 9.0,
        "update_frequency": 0.5,
        "params": "__ALL_PRUNABLE__",
        **keys,
    }
    lines = [f"  - !{kind}", *(f"    {key}: {value}" for key, value in settings.items() if value is not None)]
    return "\n".join(lines) + "\n"


def read(*modifiers: str, head: str = "", model: nn.Module | None = None, **options: Any) -> SparseMLRecipe:
    text = f"{head}\nmodifiers:\n" + "".join(modifiers)
    return from_sparseml(text, model or Net(), **{"steps_per_epoch": 100, **options})


def names(recipe: SparseMLRecipe, model: nn.Module | None = None) -> list[list[str]]:
    return [list(scope.select(model or Net()).inside) for _, scope in recipe.parts]


# What is read

RESNET = """
# Epoch and Learning-Rate variables
num_epochs: 13.0
pruning_epochs: 10.0
init_lr: 0.00025
inter_func: cubic
mask_type: unstructured

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)

  - !LearningRateFunctionModifier
    final_lr: 0.0
    init_lr: eval(init_lr)
    lr_func: cosine
    start_epoch: 0.0
    end_epoch: eval(num_epochs)

pruning_modifiers:
   - !GlobalMagnitudePruningModifier
     init_sparsity: 0.05
     final_sparsity: 0.90
     start_epoch: 0.0
     end_epoch: eval(pruning_epochs)
     update_frequency: 1.0
     params:
        - 'conv.weight'
        - 're:layer.*.weight'
     leave_enabled: True
     inter_func: eval(inter_func)
     mask_type: eval(mask_type)
"""


def test_a_recipe_as_they_were_written() -> None:
    recipe = from_sparseml(RESNET, Net(), steps_per_epoch=100, ignore=["LearningRateFunctionModifier"])
    ((method, _),) = recipe.parts
    assert method == Magnitude(Cubic(0.05, 0.9, steps=1000), every=100, begin=100, allocation="global")
    assert names(recipe) == [["conv.weight", "layer.0.weight", "layer.1.weight"]]
    assert recipe.epochs == 13.0


@pytest.mark.parametrize(
    "keys, method",
    [
        ({}, Magnitude(Cubic(0.05, 0.8, steps=800, begin=100), every=50, begin=100, allocation="uniform")),
        (
            {"inter_func": "linear", "start_epoch": 0, "end_epoch": 0.25, "update_frequency": 0.1},
            Magnitude(Linear(0.05, 0.8, steps=25), every=10, begin=5, allocation="uniform"),  # cuts at 5, 15, 25
        ),
        (
            {"init_sparsity": 0.8, "start_epoch": 2.0},
            Magnitude(0.8, every=50, begin=200, allocation="uniform"),
        ),
        ({"init_sparsity": 0.8, "start_epoch": -1}, Magnitude(0.8, every=50, begin=1, allocation="uniform")),
        (
            {"update_frequency": -1},
            Magnitude(Cubic(0.05, 0.8, steps=800, begin=100), every=1, begin=100, allocation="uniform"),
        ),
        (
            {"init_sparsity": "__FROM_PARAM__"},
            Magnitude(Cubic(0.0, 0.8, steps=800, begin=100), every=50, begin=100, allocation="uniform"),
        ),
        (
            {"init_sparsity": "5e-2", "log_types": "__ALL__", "leave_enabled": "True", "mask_type": "unstructured"},
            Magnitude(Cubic(0.05, 0.8, steps=800, begin=100), every=50, begin=100, allocation="uniform"),
        ),
    ],
)
def test_epochs_become_steps(keys: dict[str, Any], method: Magnitude) -> None:
    recipe = read(gradual(**keys))
    assert [one for one, _ in recipe.parts] == [method]


@pytest.mark.parametrize(
    ("mask_type", "final", "granularity"),
    [("block4", 0.8, "1x4"), ("'1:4'", 0.75, "1:4"), ("tensorrt", 0.5, "2:4"), ("[2, 1]", 0.8, "2x1")],
)
def test_mask_types_become_granularities(mask_type: str, final: float, granularity: str) -> None:
    ((method, _),) = read(gradual(mask_type=mask_type, final_sparsity=final)).parts
    assert isinstance(method, Magnitude)
    assert method.granularity == granularity


def test_the_last_cut_comes_at_the_end_and_reaches_the_sparsity() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    keys = {"start_epoch": 0.0, "end_epoch": 3.0, "update_frequency": 1.0}
    ((method, scope),) = read(gradual(**keys), model=model, steps_per_epoch=7).parts
    assert method is not None
    pruner = pomona.Pruner(model, optimizer, method, scope=scope)
    levels = []
    for _ in range(21):
        model(torch.randn(2, 1, 4, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        levels.append(float((model.layer[1].weight == 0).float().mean()))
    cubic = [0.8 - 0.75 * (1 - epoch / 3) ** 3 for epoch in (1, 2, 3)]
    assert levels[5] == 0.0
    assert [levels[6], levels[13], levels[20]] == pytest.approx(cubic, abs=1 / 400)
    assert levels[19] == levels[13]
    for layer in pruner.harden().layers:
        assert layer.nonzero == int(layer.total * (1 - 0.8) + 1e-6)  # each alike, rounded down


@pytest.mark.parametrize(
    "params, expected",
    [
        ("__ALL_PRUNABLE__", PRUNABLE),
        ("['re:layer']", ["layer.0.weight", "layer.0.bias", "layer.1.weight", "layer.1.bias"]),  # re.match: a prefix
        ("['head.weight', 're:.*0.weight']", ["layer.0.weight", "head.weight"]),
        ("['__ALL_PRUNABLE__', 'position']", ["position", *PRUNABLE]),
        ("__ALL__", [name for name, _ in Net().named_parameters()]),
    ],
)
def test_params_are_looked_up_in_the_model(params: str, expected: list[str]) -> None:
    assert names(read(gradual(params=params))) == [expected]


def test_a_tied_weight_is_one_under_each_of_its_names() -> None:
    model = Net()
    model.layer[1].weight = nn.Parameter(torch.randn(2, 20))
    model.head.weight = model.layer[1].weight
    assert names(read(gradual(params="['head.weight']"), model=model), model) == [["layer.1.weight"]]
    with pytest.raises(ValueError, match=r"layer\.1\.weight is in the params of two modifiers"):
        read(gradual(params="['head.weight']"), gradual(params="['layer.1.weight']"), model=model)


def test_modifiers_that_are_set_alike_are_one() -> None:
    layers = [gradual(params=f"['{name}']") for name in PRUNABLE]
    recipe = read(*layers)
    assert len(recipe.parts) == 1 and names(recipe) == [PRUNABLE]
    assert names(read(*layers[:3], gradual(params="['head.weight']", final_sparsity=0.5))) == [
        PRUNABLE[:3],
        ["head.weight"],
    ]


def test_each_global_modifier_ranks_its_own() -> None:
    kind = "GlobalMagnitudePruningModifier"
    recipe = read(gradual(kind, params="['conv.weight']"), gradual(kind, params="['re:layer.*weight']"))
    assert names(recipe) == [["conv.weight"], ["layer.0.weight", "layer.1.weight"]]


def test_levels_of_sparsity_are_parts() -> None:
    recipe = read(gradual(params="[]", final_sparsity="{0.5: ['conv.weight'], 0.9: ['re:layer.*weight']}"))
    assert names(recipe) == [["conv.weight"], ["layer.0.weight", "layer.1.weight"]]
    assert [method.sparsity.end for method, _ in recipe.parts] == [0.5, 0.9]  # type: ignore[union-attr]


def test_a_constant_modifier_stands_for_hold() -> None:
    model = Net()
    model.layer[1].weight.data[::2] = 0.0
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = read("  - !ConstantPruningModifier\n    params: ['re:layer.1.weight']\n    end_epoch: 9\n", model=model)
    ((method, scope),) = recipe.parts
    assert method is None and recipe.epochs == 9.0
    (layer,) = pomona.hold(model, optimizer, scope=scope).verify().layers
    assert (layer.name, layer.nonzero) == ("layer.1.weight", 200)


def test_a_file_and_a_card_are_read(tmp_path: Path) -> None:
    text = "modifiers:\n" + gradual()
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "recipe.md").write_text(f"---\n{text}---\n# A card\n\n- !Nothing\n")
    parts = [from_sparseml(tmp_path / n, Net(), steps_per_epoch=100).parts for n in ("recipe.yaml", "recipe.md")]
    assert parts[0] == parts[1] == read(gradual()).parts


def test_variables_are_worked_out() -> None:
    head = "num_epochs: 20\nshare: eval(2 * (1 - 0.75))\nlevel: 0.75\nwho: ['head.weight']"
    recipe = read(
        gradual(end_epoch="eval(num_epochs * share - -1)", final_sparsity="eval(level)", params="eval(who)"), head=head
    )
    assert recipe.epochs == 11.0 and names(recipe) == [["head.weight"]]
    assert recipe.parts[0][0].sparsity == Cubic(0.05, 0.75, steps=1000, begin=100)  # type: ignore[union-attr]


# What is refused


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"score_type": "movement"}, "GMPruningModifier has score_type, which is not read; the keys are init_sparsity"),
        ({"params": None}, "GMPruningModifier lacks params"),
        ({"mask_type": "block"}, r"mask_type must be one of unstructured, block4, tensorrt, n:m such as '2:4', or"),
        ({"mask_type": "[1, 4, 4]"}, r"a block such as \[1, 4\], got \[1, 4, 4\]"),
        ({"mask_type": "2:4"}, "got 124: YAML reads 2:4 without quotes as a number of minutes"),
        ({"mask_type": "'2:4'"}, r"GMPruningModifier: granularity='2:4' .*0\.5"),
        ({"leave_enabled": "False"}, "leave_enabled must be True, got False: a pruned weight stays zero"),
        ({"inter_func": "inverse_cubic"}, "inter_func must be linear or cubic, got 'inverse_cubic'"),
        ({"end_epoch": 1.0}, "must end after it starts, got start_epoch 1 and end_epoch 1, which are the steps 100"),
        ({"end_epoch": True}, r"end_epoch must be a number, got True"),
        ({"end_epoch": "soon"}, "GMPruningModifier.end_epoch must be a number, got 'soon'"),
        ({"final_sparsity": 80}, r"GMPruningModifier: sparsity must be in \[0, 1\), got 80.0 \(did you mean 0.8"),
        ({"final_sparsity": 0.01}, "sparsity must not fall"),
        ({"params": "['conv.wieght']"}, r"params has 'conv.wieght', which matches no parameter of Net; it has pos"),
        ({"params": "['re:(']"}, r"'re:\(' in params is not a regular expression"),
        ({"params": "[]"}, r"params must be a list of names such as 're:.\*weight', got \[\]"),
        ({"final_sparsity": "{0.5: ['conv.weight']}"}, r"works with params: \[\] only"),
        ({"end_epoch": "eval(num_epochs)"}, r"eval\(num_epochs\) cannot be computed: the recipe has no variable"),
        ({"end_epoch": "eval(a)"}, "refer to each other in a circle"),
        ({"end_epoch": "eval(1 / 0)"}, "division by zero"),
        ({"end_epoch": "eval(__import__('os'))"}, r"is more than numbers, variables and \+ - \* /"),
        ({"end_epoch": "eval(2 **)"}, "cannot be computed"),
    ],
)
def test_what_a_modifier_cannot_say(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(gradual(**keys), head="a: eval(b)\nb: eval(a)")


def test_modifiers_that_are_not_read_are_named_with_what_to_use() -> None:
    others = [
        "  - !SetLearningRateModifier\n    learning_rate: 0.1\n",
        "  - !QuantizationModifier\n    start_epoch: 3\n",
        "  - !MFACPruningModifier\n    params: __ALL__\n",
    ]
    with pytest.raises(
        ValueError,
        match=r"\(MFAC.*: not known here; Quant.*: .*pomona.export.*; SetLearning.*: set lr",
    ):
        read(gradual(), *others)
    kinds = ["SetLearningRateModifier", "QuantizationModifier", "MFACPruningModifier"]
    assert read(gradual(), *others, ignore=kinds) == read(gradual())
    with pytest.raises(ValueError, match="ignore has 'LearningRateModifier', but the recipe has GMPruningModifier"):
        read(gradual(), ignore="LearningRateModifier")


@pytest.mark.parametrize(
    "text, message",
    [
        ("modifiers: [\n", "the recipe is not YAML"),
        ("- a\n- b\n", "must be a mapping .*, got list"),
        ("num_epochs: 3\nlr: 1\n", "no list of modifiers; its keys are num_epochs, lr"),
        ("modifiers:\n  GMPruningModifier:\n    x: 1\n", "the stages modifiers|must be a list of modifiers"),
        ("modifiers:\n  - GMPruningModifier\n", "has 'GMPruningModifier', which is not a modifier such as"),
        ("modifiers:\n  - !GMPruningModifier [1]\n", "not YAML|not a modifier"),
        ("one:\n  pruning_modifiers: []\ntwo:\n  quantization_modifiers: []\n", "has the stages one, two"),
        ("modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoch: 2\n", "the recipe prunes nothing"),
    ],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_sparseml(text, Net(), steps_per_epoch=10)


def test_one_weight_has_one_modifier() -> None:
    with pytest.raises(ValueError, match=r"conv\.weight is in the params of two modifiers, GMP.* and Global"):
        read(gradual(params="['conv.weight']"), gradual("GlobalMagnitudePruningModifier"))


def test_what_is_held_is_held_throughout() -> None:
    text = "  - !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n    start_epoch: 2\n"
    with pytest.raises(ValueError, match="from epoch 2 to -1 of 0: zeros are held for the whole training"):
        read(text)


def test_a_schedule_from_zeros_that_are_there_needs_a_number() -> None:
    model = Net()
    model.head.weight.data[0, 0] = 0.0
    with pytest.raises(ValueError, match=r"__FROM_PARAM__, and head\.weight has zeros already"):
        read(gradual(init_sparsity="__FROM_PARAM__"), model=model)


def test_one_ranking_has_one_sparsity() -> None:
    with pytest.raises(ValueError, match="GMPruningModifier only: one ranking has one sparsity"):
        read(gradual("GlobalMagnitudePruningModifier", params="[]", final_sparsity="{0.5: ['conv.weight']}"))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch must be >= 1, got 0"):
        read(gradual(), steps_per_epoch=0)
    with pytest.raises(TypeError, match=r"steps_per_epoch must be an integer, got 2.5"):
        read(gradual(), steps_per_epoch=2.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        from_sparseml("a: 1\n", {}, steps_per_epoch=1)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        from_sparseml("nowhere.yaml", Net(), steps_per_epoch=1)


def test_without_yaml_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="needs PyYAML: pip install pyyaml"):
        read(gradual())
