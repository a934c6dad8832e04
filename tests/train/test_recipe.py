"""The recipe reader: what it gives, what it refuses, and how it says so."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.budget import num_kept
from pomona.method import Method
from pomona.methods import ADMM, GRDA, GSM, METHODS, SET, Feather, Magnitude, RigL, WeightMom
from pomona.schedule import Cosine, Cubic, Geometric, Linear
from pomona.scope import Scope
from pomona.train.recipe import Recipe, builtin_recipes, load_recipe, recipe_from_dict
from pomona.train.stage import Expected, Progressive, RecipeError, Stage

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
    names = builtin_recipes()
    assert names == sorted(names) and {"demo", "lenet300-gsm-60x", "compare-admm"} <= {*names}


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


def test_length_shortens_every_stage_with_its_drops(file: Path) -> None:
    long = ["prune.epochs=30", "prune.lr_drops=[20, 21, 29]", "prune.warmup_epochs=5"]
    prune = load_recipe(file, [*long, "length=0.1"]).prune
    assert (prune.epochs, prune.lr_drops, prune.warmup_epochs) == (3, (2,), 1)
    assert load_recipe(file, [*long, "length=1"]) == load_recipe(file, long)


@pytest.mark.parametrize("length", ["0", "1.5", "-1", "short", "nan"])
def test_a_length_out_of_range_is_told_with_the_range(file: Path, length: str) -> None:
    assert "length must be in (0, 1]" in refusal(file, f"length={length}")


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
        ("prune.momentum=0", "prune.nesterov must be false if momentum is 0, got true"),
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
        ("data=imagenet", 'unknown data "imagenet"; known: mnist'),
        ("prune.lrr=1", "unknown key prune.lrr (did you mean lr or lr_drop?); known: epochs, lr, lr_drops, "),
        (
            "lr=1",
            "unknown key lr; known: title, source, model, data, batch_size, seed, eval_every, validation, precision, "
            "base, prune, retrain",
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
    assert message.startswith("--set method.sparsity=0.9 --set method.compression=10: exactly one of ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 10", "epochs = 0", "prune.epochs must be >= 1, got 0"),
        ("momentum", "momentun", "unknown key prune.momentun (did you mean momentum?); known: epochs, lr"),
        ("batch_size = 8", "", "missing key batch_size"),
        ("lr = 0.1", "", "missing key prune.lr"),
        ("tolerance = 0.5", "", "missing key expected.tolerance"),
        ("[method]", "[metod]", "unknown key metod (did you mean method or model?); known: title"),
        ('name = "gsm"', "", "missing key method.name; known: admm, feather, grda, gsm, "),
        ("compression = 4", "", "exactly one of method.sparsity and method.compression must be given, got neither"),
        (
            "compression = 4",
            "compression = 4\nsparsity = 0.75",
            "exactly one of method.sparsity and method.compression must be given, got both",
        ),
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


# Stages with another optimizer, and rates that start again.


def test_rate_starts_again_and_the_drops_count_from_each_start() -> None:
    stage = Stage(epochs=5, lr=1.0, lr_drops=(1,), lr_drop=0.5, lr_restart=2)
    assert stage.learning_rates(2) == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0]


def test_rate_warms_up_once_however_often_it_starts_again() -> None:
    assert Stage(epochs=4, lr=1.0, lr_restart=2, warmup_epochs=1).learning_rates(2) == [0.0, 0.5] + [1.0] * 6


def test_rate_may_fall_straight_epoch_by_epoch() -> None:
    stage = Stage(epochs=6, lr=1.0, lr_fall=(1, 5), lr_drop=0.2, warmup_epochs=1)
    expected = [0.0, 0.5, 1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]
    assert stage.learning_rates(2) == pytest.approx(expected)


def test_length_shortens_a_fall(file: Path) -> None:
    long = ["prune.epochs=30", "prune.lr_drops=[]", "prune.lr_fall=[15, 27]"]
    assert load_recipe(file, [*long, "length=0.1"]).prune.lr_fall == (2, 3)
    assert load_recipe(file, [*long, "length=0.01"]).prune.lr_fall == (0, 1)


# Base, retraining, scope, validation, rounds.

ROUNDS = """
title = "rounds"
source = "nowhere"
model = "lenet-300-100"
data = "mnist"
batch_size = 8

[base]
epochs = 2
lr = 1
optimizer = "adamw"

[prune]
epochs = 10
lr = 0.1

[retrain]
epochs = 3
lr = 0.01
lr_drops = [1]
lr_restart = 2

[scope]
also = ["*"]
exclude = ["fc3"]

[method]
name = "admm"
compression = 40
every = "2 epochs"
rho = { shape = "geometric", start = 1e-3, end = 1e-2, steps = "50 %" }

[progressive]
compressions = [10, 20]
width = 2
validation = 40
"""
IN_ROUNDS = Recipe(
    title="rounds",
    source="nowhere",
    model="lenet-300-100",
    data="mnist",
    batch_size=8,
    base=Stage(epochs=2, lr=1, optimizer="adamw"),
    prune=Stage(epochs=10, lr=0.1),
    retrain=Stage(epochs=3, lr=0.01, lr_drops=(1,), lr_restart=2),
    scope={"also": ["*"], "exclude": ["fc3"]},
    method={
        "name": "admm",
        "compression": 40,
        "every": "2 epochs",
        "rho": {"shape": "geometric", "start": 1e-3, "end": 1e-2, "steps": "50 %"},
    },
    progressive=Progressive(compressions=(10, 20), width=2, validation=40),
)


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    path = tmp_path / "rounds.toml"
    path.write_text(ROUNDS)
    return path


def test_all_tables_are_read_into_their_dataclasses_and_come_back_from_json(rounds: Path) -> None:
    assert load_recipe(rounds) == IN_ROUNDS
    assert recipe_from_dict(json.loads(json.dumps(IN_ROUNDS.to_dict()))) == IN_ROUNDS
    assert IN_ROUNDS.make_scope() == Scope(also=["*"], exclude=["fc3"])


def test_only_the_pruning_stage_is_needed(file: Path) -> None:
    file.write_text(TEXT.replace("[base]\nepochs = 2\nlr = 1\n", ""))
    recipe = load_recipe(file)
    assert (recipe.base, recipe.retrain, recipe.progressive, recipe.validation) == (None, None, None, 0)
    assert recipe.make_scope() == Scope()
    assert recipe.to_dict().keys().isdisjoint({"base", "retrain", "scope", "progressive"})
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    file.write_text(TEXT.replace("[prune]", "[retrain]"))
    assert refusal(file) == f"{file}: missing key prune"


def test_overrides_can_add_tables_and_schedules(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "retrain.epochs=3",
            "retrain.lr=0.5",
            'scope.also=["*"]',
            "validation=5",
            "method.name=magnitude",
            "method.ramp.shape=linear",
            "method.ramp.steps=50 %",
        ],
    )
    assert recipe.retrain == Stage(epochs=3, lr=0.5)
    assert (recipe.make_scope(), recipe.validation) == (Scope(also="*"), 5)
    assert recipe.make_method(20) == Magnitude(Linear(0.0, 0.75, steps=100))


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        ([], 12),
        (["retrain.epochs=3", "retrain.lr=1"], 15),
    ],
)
def test_epochs_are_those_of_all_stages(file: Path, overrides: list[str], epochs: int) -> None:
    assert load_recipe(file, overrides).epochs == epochs


@pytest.mark.parametrize(
    ("compressions", "width", "prunings"),
    [
        ((2,), 1, 2),  # one after the other
        ((2, 4, 6), 1, 4),
        ((2,), 2, 2),  # both from the dense network
        ((2, 4), 2, 2 + 2),
        ((2, 4, 6, 8), 3, 3 + 2 * 3),
        ((2, 4), 5, 3),
    ],
)
def test_epochs_of_rounds_are_those_of_all_candidates(compressions: tuple[int, ...], width: int, prunings: int) -> None:
    rounds = Progressive(compressions=compressions, width=width, validation=0 if width == 1 else 9)
    assert replace(IN_ROUNDS, progressive=rounds).epochs == 2 + prunings * (10 + 3)


# From a table to the method.


def method(steps_per_epoch: int = 20, **fields: Any) -> Method:
    """Made by a recipe whose pruning stage has 10 epochs."""
    return replace(RECIPE, method=fields).make_method(steps_per_epoch)


METHODS_OF_TABLES = [
    ({"name": "gsm", "compression": 4, "min_density": 0}, GSM(sparsity=0.75, min_density=0)),
    ({"name": "grda", "c": 1e-3, "mu": 0.6}, GRDA(c=1e-3, mu=0.6)),
    ({"name": "grda", "compression": 4, "steps": "80 %"}, GRDA(sparsity=0.75, steps=160)),
    (
        {"name": "admm", "sparsity": 0.5, "every": "1 epoch", "hold_zeros": True, "allocation": "erk", "rho": 1},
        ADMM(sparsity=0.5, every=20, hold_zeros=True, allocation="erk", rho=1),
    ),
    ({"name": "admm", "densities": {"fc*": 0.5, "conv*": 1}}, ADMM(densities={"fc*": 0.5, "conv*": 1})),
    (
        {"name": "admm", "sparsity": 0.5, "rho": {"shape": "linear", "start": 1, "end": 2, "steps": 9}},
        ADMM(sparsity=0.5, rho=Linear(1.0, 2.0, steps=9)),
    ),
    ({"name": "magnitude", "sparsity": 0.5, "begin": "1 epochs"}, Magnitude(0.5, begin=20)),
    (
        {"name": "magnitude", "compression": 4, "ramp": {"shape": "cubic", "begin": "10 %", "steps": "45 %"}},
        Magnitude(Cubic(0.0, 0.75, steps=90, begin=20)),
    ),
    (
        {"name": "magnitude", "sparsity": {"shape": "cosine", "start": 0.1, "end": 0.5, "steps": 7}},
        Magnitude(Cosine(0.1, 0.5, steps=7)),
    ),
    (
        {"name": "rigl", "compression": 4, "every": 100, "end": "75 %", "drop": 0.5, "seed": 3},
        RigL(0.75, every=100, end=150, drop=0.5, seed=3),
    ),
    (
        {"name": "set", "sparsity": 0.5, "every": "1 epoch", "allocation": "uniform"},
        SET(0.5, every=20, allocation="uniform"),
    ),
    (
        {"name": "feather", "compression": 4, "gradient_scale": 0.5, "ramp": {"shape": "cubic", "steps": "50 %"}},
        Feather(Cubic(0.0, 0.75, steps=100), gradient_scale=0.5),
    ),
    ({"name": "weightmom", "threshold": 0.3, "every": "1 epoch"}, WeightMom(threshold=0.3, every=20)),
    (
        {
            "name": "weightmom",
            "compression": 4,
            "every": "0.5 epochs",
            "window": 3,
            "importance": "none",
            "ramp": {"shape": "geometric", "start": 0.5, "steps": "2 epochs"},
        },
        WeightMom(Geometric(0.5, 0.75, steps=40), every=10, window=3, importance="none"),
    ),
]


@pytest.mark.parametrize(("table", "expected"), METHODS_OF_TABLES)
def test_a_method_is_built_from_its_table(table: dict[str, Any], expected: Method) -> None:
    assert method(**table) == expected
    recipe = replace(RECIPE, method=table)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))).make_method(20) == expected


def test_every_method_can_be_written_in_a_recipe() -> None:
    assert {table["name"] for table, _ in METHODS_OF_TABLES} == set(METHODS)


@pytest.mark.parametrize(
    ("time", "steps"),
    [
        (7, 7),
        ("2 epochs", 40),
        ("1 epoch", 20),
        ("0.5 epochs", 10),
        ("0.07 epochs", 1),  # 1.4
        ("75 %", 150),
        ("33.3 %", 67),  # 66.6
        ("100 %", 200),
    ],
)
def test_a_time_is_steps_or_epochs_or_a_share_of_the_pruning_stage(time: int | str, steps: int) -> None:
    assert method(name="admm", sparsity=0.5, every=time) == ADMM(sparsity=0.5, every=steps)


def test_a_recipe_names_a_score() -> None:
    assert method(name="magnitude", sparsity=0.5, score="lamp") == Magnitude(0.5, score="lamp")
    with pytest.raises(RecipeError, match=r"method\.score must be one of 'magnitude', 'lamp', "):
        method(name="magnitude", sparsity=0.5, score="lamb")
    with pytest.raises(RecipeError, match=r"method\.score must be a string, got 1"):
        method(name="magnitude", sparsity=0.5, score=1)


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe_has_a_method_at_any_length_of_an_epoch(name: str) -> None:
    recipe = load_recipe(name)
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())))
    for steps_per_epoch in (31, 235, 1200):
        assert recipe.make_method(steps_per_epoch) == again.make_method(steps_per_epoch)


TIME = 'must be a number of steps, or text such as "2 epochs" or "75 %" (of the pruning stage), got '


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"name": "adm"},
            'unknown method.name "adm" (did you mean admm?); known: admm, feather, grda, gsm, magnitude, rigl, ',
        ),
        ({"name": "admm", "every": 1.5}, "method.every must be an integer, got 1.5"),
        ({"name": "admm", "every": True}, "method.every must be an integer, got true"),
        ({"name": "admm", "every": "soon"}, f'method.every {TIME}"soon"'),
        ({"name": "admm", "every": "75%"}, f'method.every {TIME}"75%"'),
        ({"name": "admm", "every": "2 hours"}, f'method.every {TIME}"2 hours"'),
        ({"name": "admm", "every": "two epochs"}, f'method.every {TIME}"two epochs"'),
        ({"name": "admm", "every": "nan epochs"}, f'method.every {TIME}"nan epochs"'),
        ({"name": "admm", "every": "inf %"}, f'method.every {TIME}"inf %"'),
        ({"name": "admm", "every": "-1 epochs"}, "method.every must be >= 1, got -1000"),  # of 1000 steps, for a look
        ({"name": "admm", "every": "0 %"}, "method.every must be >= 1, got 0"),
        ({"name": "admm", "rho": "2 epochs"}, 'method.rho must be a finite number, got "2 epochs"'),
        ({"name": "admm", "rho": -1}, "method.rho must be in [0, inf), got -1"),
        ({"name": "admm", "allocation": "erc"}, "method.allocation must be "),
        ({"name": "admm", "allocation": 3}, "method.allocation must be a string, got 3"),
        ({"name": "admm", "hold_zeros": 1}, "method.hold_zeros must be true or false, got 1"),
        ({"name": "admm", "densities": 0.5}, "method.densities must be a table, got 0.5"),
        ({"name": "admm", "densities": {"fc1": "half"}}, 'method.densities.fc1 must be a finite number, got "half"'),
        ({"name": "admm", "densities": {"fc1": 0.5}}, "method: ADMM takes either sparsity or densities, got both"),
        ({"name": "admm", "ramp": {"shape": "linear", "steps": 5}}, "unknown key method.ramp"),
        ({"name": "weightmom", "every": 5, "window": "2 epochs"}, 'method.window must be an integer, got "2 epochs"'),
        ({"name": "rigl", "seed": "1 epoch"}, 'method.seed must be an integer, got "1 epoch"'),
        (
            {"name": "rigl", "sparsity": {"shape": "linear"}},
            'method.sparsity must be a finite number, got {"shape": "l',
        ),
        ({"name": "rigl", "end": 50}, "method.end must be >= every (100), the first update, got 50"),
        ({"name": "grda", "c": 1e-3}, "method: GRDA takes either c or sparsity, got both"),
        ({"name": "grda"}, "method.steps must be given with sparsity=0.75"),
        ({"name": "magnitude", "ramp": 5}, "method.ramp must be a table, got 5"),
        ({"name": "magnitude", "ramp": {"steps": 5}}, "missing key method.ramp.shape"),
        ({"name": "magnitude", "ramp": {"shape": "linear"}}, "missing key method.ramp.steps"),
        (
            {"name": "magnitude", "ramp": {"shape": "cubical", "steps": 5}},
            'unknown method.ramp.shape "cubical" (did you mean cubic?); known: linear, cubic, cosine, geometric',
        ),
        ({"name": "magnitude", "ramp": {"shape": 3, "steps": 5}}, "method.ramp.shape must be a string, got 3"),
        ({"name": "magnitude", "ramp": {"shape": "linear", "steps": "5"}}, f'method.ramp.steps {TIME}"5"'),
        ({"name": "magnitude", "ramp": {"shape": "linear", "steps": 0}}, "method.ramp: Linear(steps=...) must be >= 1"),
        (
            {"name": "magnitude", "ramp": {"shape": "geometric", "steps": 5}},
            "method.ramp: Geometric needs start and end",
        ),
        (
            {"name": "magnitude", "ramp": {"shape": "linear", "stepz": 5}},
            "unknown key method.ramp.stepz (did you mean st",
        ),
        (
            {"name": "magnitude", "ramp": {"shape": "linear", "steps": 5, "end": 0.5}},
            "method.ramp ends at method.sparsity or method.compression, which must be a number",
        ),
        (
            {"name": "magnitude", "ramp": {"shape": "linear", "steps": 5, "start": 90}},
            "method.sparsity must be in [0, 1), got 90",
        ),
    ],
)
def test_bad_method_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method(**table if "sparsity" in table else {"compression": 4, **table})
    assert str(caught.value).startswith(message)


def test_a_ramp_needs_a_number_to_end_at() -> None:
    ramp = {"shape": "linear", "steps": 5}
    for table in ({"threshold": 0.5}, {"sparsity": {**ramp, "end": 0.5}}):
        with pytest.raises(RecipeError, match=r"^method\.ramp ends at method\.sparsity or method\.compression, which"):
            method(name="weightmom", every=5, ramp=ramp, **table)


@pytest.mark.parametrize(("method_name", "missing"), [("magnitude", True), ("rigl", True), ("admm", False)])
def test_a_budget_is_asked_for_where_the_method_has_no_other(method_name: str, missing: bool) -> None:
    with pytest.raises(RecipeError) as caught:
        method(name=method_name)
    asked = "exactly one of method.sparsity and method.compression must be given, got neither"
    assert (str(caught.value) == asked) == missing


def test_fault_that_only_the_length_of_an_epoch_shows_is_reported_in_steps() -> None:
    """At the door an epoch is taken for 1000 steps; the data tell its true length."""
    table = {"name": "rigl", "sparsity": 0.5, "every": 100, "end": "50 %"}
    assert method(20, **table) == RigL(0.5, every=100, end=100)
    with pytest.raises(RecipeError, match=r"^method\.end must be >= every \(100\), the first update, got 95"):
        method(19, **table)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrain.epochs=0", "retrain.epochs must be >= 1, got 0"),
        ("retrain=3", "retrain must be a table, got 3"),
        ("base.lrr=1", "unknown key base.lrr (did you mean lr"),
        ("prune.optimizer=sdg", 'prune.optimizer must be one of sgd, adam, adamw, got "sdg"'),
        ("prune.optimizer=3", "prune.optimizer must be a string, got 3"),
        ("base.momentum=0.9", "base.momentum must be 0 with adamw, which has its own, got 0.9"),
        ("base.nesterov=true", "base.nesterov must be false if momentum is 0, got true"),
        ("prune.lr_restart=11", "prune.lr_restart must be in [0, 10], got 11"),
        ("prune.lr_restart=-1", "prune.lr_restart must be in [0, 10], got -1"),
        (
            "retrain.lr_restart=1",
            "retrain.lr_drops must be strictly increasing, in [1, 0], got [1]; set it together with lr_restart",
        ),
        ("retrain.lr_fall=[1, 2]", "retrain.lr_fall replaces lr_drops and lr_restart; leave them out"),
        (
            "prune.lr_fall=[3, 11]",
            "prune.lr_fall must be two epochs in [0, 10], the first below the second, got [3, 11]; set it together",
        ),
        ("prune.lr_fall=[3, 3]", "prune.lr_fall must be two epochs in [0, 10], the first below the second, got [3, 3]"),
        ("prune.lr_fall=[3]", "prune.lr_fall must be two epochs in [0, 10], the first below the second, got [3]"),
        ("validation=-1", "validation must be >= 0, got -1"),
        ("scope=3", "scope must be a table, got 3"),
        ("scope.types=3", "unknown key scope.types; known: include, exclude, also"),
        ("scope.also=-1", "scope: Scope patterns are strings such as 'head.*', got -1"),
        ("scope.include=[3]", "scope: Scope patterns are strings such as 'head.*', got 3"),
        ("progressive=3", "progressive must be a table, got 3"),
        (
            "progressive.compressions=[20, 10]",
            "progressive.compressions must be strictly increasing, above 1, got [20, ",
        ),
        (
            "progressive.compressions=[1, 10]",
            "progressive.compressions must be strictly increasing, above 1, got [1, 10]",
        ),
        ("progressive.compressions=[]", "progressive.compressions must be strictly increasing, above 1, got []"),
        ("progressive.compressions=10", "progressive.compressions must be a list of finite numbers, got 10"),
        ("progressive.compressions=[10, 40]", "progressive.compressions must be below method.compression, 40, got 40"),
        ("progressive.width=0", "progressive.width must be >= 1, got 0"),
        ("progressive.width=1", "progressive.validation must be > 0 with a width above 1"),
        ("progressive.validation=0", "progressive.validation must be > 0 with a width above 1"),
        ("validation=40", "progressive needs a [base] stage, and validation in [progressive] only"),
        (
            "method.hold_zeros=true",
            "progressive itself sets method.hold_zeros (true from the second round on); leave it",
        ),
        ("method.sparsity=0.99", "progressive needs method.compression, and a method that can hold zeros (admm)"),
        (
            "method={name='gsm', compression=40}",
            "progressive needs method.compression, and a method that can hold zero",
        ),
    ],
)
def test_bad_override_of_rounds_is_refused(rounds: Path, override: str, message: str) -> None:
    assert f"--set {override}: {message}" in refusal(rounds, override)


def test_rounds_without_a_dense_network_are_refused(rounds: Path) -> None:
    rounds.write_text(ROUNDS.replace('[base]\nepochs = 2\nlr = 1\noptimizer = "adamw"\n', ""))
    assert refusal(rounds) == f"{rounds}: progressive needs a [base] stage, and validation in [progressive] only"


PLACES_IN_ROUNDS = [(key,) for key in IN_ROUNDS.to_dict()] + [
    (table, key) for table, inner in IN_ROUNDS.to_dict().items() if isinstance(inner, dict) for key in inner
]


@settings(deadline=None)  # the first example imports the zoo
@given(place=st.sampled_from(PLACES_IN_ROUNDS), value=JSON | st.sampled_from(["1 epoch", "5 %", "1e400 epochs", "- %"]))
def test_mutated_recipe_of_rounds_loads_or_is_refused(place: tuple[str, ...], value: Any) -> None:
    table = copy.deepcopy(IN_ROUNDS.to_dict())
    inner = table[place[0]] if len(place) == 2 else table
    inner[place[-1]] = value
    try:
        recipe = recipe_from_dict(table)
    except RecipeError:
        return
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.epochs >= 1
