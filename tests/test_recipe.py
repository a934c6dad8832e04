"""The recipe reader: what it gives, what it refuses, and how it says so."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.budget import num_kept
from pomona.methods import GSM
from pomona.zoo.recipe import (
    Expected,
    Recipe,
    RecipeError,
    Stage,
    builtin_recipes,
    load_recipe,
    recipe_from_dict,
)

TEXT = """
title = "tiny"
source = "nowhere"
model = "lenet-5"
data = "mnist"
batch_size = 8
seed = 3

[base]
epochs = 2
lr = 1

[prune]
epochs = 10
lr = 0.1
lr_drops = [4, 8]
momentum = 0.5
nesterov = true

[method]
name = "gsm"
compression = 4

[expected]
base_accuracy = 99
accuracy = 98.5
tolerance = 0.5
"""
RECIPE = Recipe(
    title="tiny",
    source="nowhere",
    model="lenet-5",
    data="mnist",
    batch_size=8,
    seed=3,
    base=Stage(epochs=2, lr=1),
    prune=Stage(epochs=10, lr=0.1, lr_drops=(4, 8), momentum=0.5, nesterov=True),
    method={"name": "gsm", "compression": 4},
    expected=Expected(base_accuracy=99, accuracy=98.5, tolerance=0.5),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TEXT)
    return path


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_file_is_read_into_its_dataclasses(file: Path) -> None:
    assert load_recipe(file) == load_recipe(str(file)) == RECIPE


def test_what_a_file_leaves_out_has_the_default(file: Path) -> None:
    file.write_text(TEXT.partition("[expected]")[0].replace("seed = 3", ""))
    recipe = load_recipe(file)
    assert (recipe.seed, recipe.eval_every, recipe.expected) == (0, 1, None)


# The schedule of the learning rate.


def test_rate_warms_up_from_zero_and_drops() -> None:
    stage = Stage(epochs=5, lr=0.5, lr_drops=(3, 4), lr_drop=0.5, warmup_epochs=2)
    warmup = [0.0, 0.125, 0.25, 0.375]
    assert stage.learning_rates(2) == [*warmup, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_drops_multiply_the_warmup_too() -> None:
    stage = Stage(epochs=2, lr=1.0, lr_drops=(1,), lr_drop=0.5, warmup_epochs=2)
    assert stage.learning_rates(2) == [0.0, 0.25, 0.25, 0.375]


def test_rate_is_constant_without_warmup_and_drops() -> None:
    assert Stage(epochs=2, lr=0.1).learning_rates(3) == [0.1] * 6


# Built-in recipes.


def test_builtin_recipes_are_listed_sorted() -> None:
    assert builtin_recipes() == [
        "demo",
        "lenet300-gsm-60x",
        "lenet300-ticket-60x",
        "lenet5-gsm-125x",
        "lenet5-gsm-300x",
        "lenet5-ticket-125x",
        "lenet5-ticket-300x",
    ]


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe_loads_and_comes_back_from_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("name", "total", "kept"),
    [
        ("lenet300-gsm-60x", 266_200, 4_436),
        ("lenet5-gsm-125x", 430_500, 3_444),
        ("lenet5-gsm-300x", 430_500, 1_435),
    ],
)
def test_builtin_recipe_keeps_the_number_of_weights_of_its_row(name: str, total: int, kept: int) -> None:
    method = load_recipe(name).make_method(1)
    assert isinstance(method, GSM)
    assert isinstance(method.sparsity, float)
    assert num_kept(method.sparsity, total) == kept


# Overrides.


def test_overrides_are_toml_values_or_bare_words(file: Path) -> None:
    recipe = load_recipe(file, ["prune.lr=0.01", "seed = 1", "prune.lr_drops=[5]", "prune.nesterov=false", "title=x=y"])
    assert (recipe.prune.lr, recipe.seed, recipe.prune.lr_drops) == (0.01, 1, (5,))
    assert (recipe.prune.nesterov, recipe.title) == (False, "x=y")


def test_overrides_can_add_what_the_file_leaves_out(file: Path) -> None:
    file.write_text(TEXT.partition("[expected]")[0])
    values = ["expected.base_accuracy=99", "expected.accuracy=98.5", "expected.tolerance=0.5"]
    assert load_recipe(file, values) == RECIPE


def test_overrides_of_keys_that_depend_on_each_other_come_in_any_order(file: Path) -> None:
    for overrides in (["prune.epochs=3", "prune.lr_drops=[2]"], ["prune.lr_drops=[2]", "prune.epochs=3"]):
        assert load_recipe(file, overrides).prune.learning_rates(1) == [0.1, 0.1, pytest.approx(0.01)]


def test_override_of_sparsity_displaces_compression_and_back(file: Path) -> None:
    assert load_recipe(file, ["method.sparsity=0.5"]).make_method(1) == GSM(sparsity=0.5)
    file.write_text(TEXT.replace("compression = 4", "sparsity = 0.5"))
    assert load_recipe(file, ["method.compression=4"]).make_method(1) == GSM(sparsity=0.75)


# Refusals. What a file and --set have in common is tried with --set, which is shorter.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.epochs=0", "prune.epochs must be >= 1, got 0"),
        ("prune.lr=0", "prune.lr must be > 0, got 0"),
        ("prune.lr=-0.1", "prune.lr must be > 0, got -0.1"),
        ("prune.lr=inf", "prune.lr must be a finite number, got inf"),
        ("prune.lr=nan", "prune.lr must be a finite number, got nan"),
        ("prune.lr=fast", 'prune.lr must be a finite number, got "fast"'),
        ("prune.lr=true", "prune.lr must be a finite number, got true"),
        ("prune.lr_drop=0", "prune.lr_drop must be in (0, 1], got 0"),
        ("prune.lr_drop=1.5", "prune.lr_drop must be in (0, 1], got 1.5"),
        ("prune.lr_drops=[8, 4]", "prune.lr_drops must be strictly increasing, in [1, 9], got [8, 4]"),
        ("prune.lr_drops=[4, 4]", "prune.lr_drops must be strictly increasing, in [1, 9], got [4, 4]"),
        ("prune.lr_drops=[0]", "prune.lr_drops must be strictly increasing, in [1, 9], got [0]"),
        ("prune.epochs=8", "prune.lr_drops must be strictly increasing, in [1, 7], got [4, 8]"),
        ("prune.lr_drops=4", "prune.lr_drops must be a list of integers, got 4"),
        ("prune.lr_drops=[true]", "prune.lr_drops must be a list of integers, got [true]"),
        ("prune.warmup_epochs=11", "prune.warmup_epochs must be in [0, 10], got 11"),
        ("prune.warmup_epochs=-1", "prune.warmup_epochs must be in [0, 10], got -1"),
        ("prune.momentum=1", "prune.momentum must be in [0, 1), got 1"),
        ("prune.momentum=-0.5", "prune.momentum must be in [0, 1), got -0.5"),
        ("prune.momentum=0", "prune.nesterov must be false where momentum is 0, got true"),
        ("prune.nesterov=1", "prune.nesterov must be true or false, got 1"),
        ("prune.weight_decay=-1", "prune.weight_decay must be >= 0, got -1"),
        ("prune.bias_lr=-1", "prune.bias_lr must be >= 0, got -1"),
        ("prune=3", "prune must be a table, got 3"),
        ("prune.lr.start=1", 'prune.lr must be a finite number, got {"start": 1}'),
        ("batch_size=0", "batch_size must be >= 1, got 0"),
        ("batch_size=8.0", "batch_size must be an integer, got 8.0"),
        ("eval_every=0", "eval_every must be >= 1, got 0"),
        ("seed=-1", "seed must be in [0, 2147483647], got -1"),
        ("seed=2147483648", "seed must be in [0, 2147483647], got 2147483648"),
        ("seed=true", "seed must be an integer, got true"),
        ("seed=2020-02-02", 'seed must be an integer, got "2020-02-02"'),
        ("title=1", "title must be a string, got 1"),
        ("expected.accuracy=101", "expected.accuracy must be in [0, 100], got 101"),
        ("expected.base_accuracy=-1", "expected.base_accuracy must be in [0, 100], got -1"),
        ("expected.tolerance=0", "expected.tolerance must be > 0, got 0"),
        ("method.sparsity=90", "method.sparsity must be in [0, 1), got 90 (did you mean 0.9?)"),
        ("method.sparsity=much", 'method.sparsity must be a finite number, got "much"'),
        ("method.compression=0.5", "method.compression must be >= 1, got 0.5"),
        ("method.compression=inf", "method.compression must be a finite number, got inf"),
        ("method.min_density=2", "method.min_density must be in [0, 1], got 2"),
        ("method.name=[]", "method.name must be a string, got []"),
        ("method.name=gms", 'unknown method.name "gms" (did you mean gsm?); known: '),
        ("model=lenet5", 'unknown model "lenet5" (did you mean lenet-5'),
        ("data=cifar", 'unknown data "cifar"; known: mnist'),
        ("prune.lrr=1", "unknown key prune.lrr (did you mean lr or lr_drop?); known: epochs, lr, lr_drops, "),
        (
            "lr=1",
            "unknown key lr; known: title, source, model, data, batch_size, seed, eval_every, validation, precision, base, "
            "prune, retrain",
        ),
        (
            "method.min_densty=0",
            "unknown key method.min_densty (did you mean min_density?); known: name, sparsity",
        ),
        ("expected.accuracies=1", "unknown key expected.accuracies (did you mean accuracy"),
        ("seed", "expected key=value"),
        ("=1", "unknown key "),
    ],
)
def test_bad_override_is_refused(file: Path, override: str, message: str) -> None:
    assert f"--set {override}: {message}" in refusal(file, override)
    assert load_recipe(file) == RECIPE


def test_all_overrides_are_named() -> None:
    message = refusal("demo", "method.sparsity=0.9", "method.compression=10")
    assert message.startswith("--set method.sparsity=0.9 --set method.compression=10: method.sparsity or method.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 10", "epochs = 0", "prune.epochs must be >= 1, got 0"),
        ("momentum", "momentun", "unknown key prune.momentun (did you mean momentum?); known: epochs, lr"),
        ("batch_size = 8", "", "missing key batch_size"),
        ("lr = 0.1", "", "missing key prune.lr"),
        ("tolerance = 0.5", "", "missing key expected.tolerance"),
        ("[method]", "[metod]", "unknown key metod (did you mean method or model?); known: title"),
        ('name = "gsm"', "", "missing key method.name; known: gsm"),
        ("compression = 4", "", "must be given, one of the two, got neither"),
        ("compression = 4", "compression = 4\nsparsity = 0.75", "must be given, one of the two, got both"),
        ("compression = 4", "compresion = 4", "unknown key method.compresion (did you mean compression?)"),
        (
            "compression = 4",
            "sparsity = 90.0",
            "method.sparsity must be in [0, 1), got 90.0 (did you mean 0.9?)",
        ),
        ("seed = 3", "seed = ", "(at line 7, column 8)"),
        ("tiny", "t\udcffny", "can't decode byte 0xff"),
    ],
)
def test_bad_file_is_refused(file: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    file.write_bytes(TEXT.replace(old, new).encode(errors="surrogateescape"))
    refused = refusal(file)
    assert refused.startswith(f"{file}: ")
    assert message in refused


def test_bottomless_nesting_is_refused(file: Path) -> None:
    file.write_text(TEXT.replace("seed = 3", "seed = " + "[" * 5000))
    assert refusal(file).startswith(f"{file}: ")


def test_fault_of_the_file_is_not_blamed_on_overrides(file: Path) -> None:
    file.write_text(TEXT.replace("lr = 0.1", "lr = 0"))
    assert refusal(file, "seed=1") == f"{file}: prune.lr must be > 0, got 0"


def test_missing_file_lists_the_builtin_recipes(tmp_path: Path) -> None:
    message = refusal("lenet300-gsm-60")
    assert "No such file or directory, and no built-in recipe (did you mean lenet300-gsm-60x" in message
    assert message.endswith("; known: " + ", ".join(builtin_recipes()))
    assert "directory" in refusal(tmp_path)


def test_dataclasses_check_themselves_without_a_file() -> None:
    with pytest.raises(RecipeError, match=r"^lr must be > 0, got nan$"):
        Stage(epochs=1, lr=float("nan"))
    with pytest.raises(RecipeError, match=r"^a recipe must be a table, got \[\]$"):
        recipe_from_dict([])  # type: ignore[arg-type]


# Whatever is done to a recipe, it loads or is refused.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = [(key,) for key in RECIPE.to_dict()] + [
    (table, key) for table in ("base", "prune", "method", "expected") for key in RECIPE.to_dict()[table]
]


@settings(deadline=None)  # the first example imports the zoo
@given(place=st.sampled_from(PLACES), name=st.none() | st.text(max_size=5), value=JSON)
def test_mutated_recipe_loads_or_is_refused(place: tuple[str, ...], name: str | None, value: Any) -> None:
    table = copy.deepcopy(RECIPE.to_dict())
    inner = table[place[0]] if len(place) == 2 else table
    if name is None:
        inner[place[-1]] = value
    else:
        inner[name] = inner.pop(place[-1])
    try:
        recipe = recipe_from_dict(table)
    except RecipeError:
        return
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@settings(deadline=None)  # the first example imports the zoo
@given(place=st.sampled_from(PLACES), value=st.text(max_size=8) | JSON.map(json.dumps))
def test_any_override_loads_or_is_refused(place: tuple[str, ...], value: str) -> None:
    try:
        load_recipe("demo", [f"{'.'.join(place)}={value}"])
    except RecipeError as error:
        assert str(error).startswith("--set ")
