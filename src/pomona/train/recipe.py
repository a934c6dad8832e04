"""Recipes: one TOML file reproduces one row of a published table.

A recipe names a model, a data set and a method, and describes the stages of training: dense training, pruning, and
optionally retraining with the zeros held. Its keys are the fields of `Recipe`, `Stage`, `Expected` and of the method.
Their types and ranges are given with the fields and nowhere else.
"""

from __future__ import annotations

import collections.abc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pomona.method import Method
from pomona.methods import METHODS
from pomona.schedule import Cosine, Cubic, Geometric, Linear, Schedule
from pomona.scope import Scope
from pomona.train.stage import (
    Expected,
    Interval,
    Progressive,
    RecipeError,
    Stage,
    check_interval,
    check_intervals,
    written,
)
from pomona.zoo.data import DATA
from pomona.zoo.models import MODELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_STAGES = {"base", "prune", "retrain"}


_BUILTIN = files("pomona.zoo") / "recipes"
_COMPRESSION = Interval(1)
_NOMINAL = 1000  # steps per epoch, to check the method before the data are known
_TIMES = ("every", "begin", "end", "steps")  # fields of methods that count optimizer steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that one run needs.

    Args:
        title: what the run shows.
        source: the paper and table that it reproduces.
        model: a key of ``pomona.zoo.models.MODELS``.
        data: a key of ``pomona.zoo.data.DATA``.
        batch_size: batch size of all stages.
        seed: seed of the initial weights and of the order of the data.
        eval_every: number of epochs between two tests.
        validation: how many of the last training examples are held out and used instead of the test set, which is
            how hyper-parameters are chosen; 0: none.
        precision: precision of forward and backward passes in training, ``"float32"`` or ``"bfloat16"`` (autocast);
            weights, optimizer, selection and tests are always float32.
        base: dense training, from which pruning starts; without it pruning starts from the initial weights.
        prune: training with the method, with a new optimizer; ends with the cut.
        retrain: training of the remaining weights with the zeros held and a new optimizer.
        scope: fields of ``pomona.Scope`` except ``types``; what is pruned and counted.
        method: ``name``, a key of ``pomona.methods.METHODS``, and the method's fields; ``make_method`` describes how
            they are written.
        progressive: rounds of ``prune`` and ``retrain``, for methods that can hold zeros (``admm``).
        expected: the published numbers; None if there are none.
    """

    title: str
    source: str
    model: str
    data: str
    batch_size: Annotated[int, Interval(1)]
    seed: Annotated[int, Interval(0, 2**31 - 1, "[]")] = 0
    eval_every: Annotated[int, Interval(1)] = 1
    validation: Annotated[int, Interval(0)] = 0
    precision: str = "float32"
    base: Stage | None = None
    prune: Stage
    retrain: Stage | None = None
    scope: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any]
    progressive: Progressive | None = None
    expected: Expected | None = None

    def __post_init__(self) -> None:
        check_intervals(self)
        _check_name("model", self.model, MODELS)
        _check_name("data", self.data, DATA)
        _check_name("precision", self.precision, ("float32", "bfloat16"))
        self.make_scope()
        self.make_method(_NOMINAL)
        if self.progressive:
            if self.base is None or self.validation:
                raise RecipeError("progressive needs a [base] stage, and validation in [progressive] only")
            if "compression" not in self.method or "hold_zeros" not in _hints(self.method["name"]):
                raise RecipeError("progressive needs method.compression, and a method that can hold zeros (admm)")
            if "hold_zeros" in self.method:
                raise RecipeError(
                    "progressive itself sets method.hold_zeros (true from the second round on); leave it out"
                )
            if self.progressive.compressions[-1] >= self.method["compression"]:
                most = f"below method.compression, {self.method['compression']}"
                raise RecipeError(f"progressive.compressions must be {most}, got {self.progressive.compressions[-1]}")

    @property
    def epochs(self) -> int:
        """The epochs of all stages together; if the recipe is progressive, of all its candidates."""
        base, again = self.base.epochs if self.base else 0, self.retrain.epochs if self.retrain else 0
        if self.progressive is None:
            return base + self.prune.epochs + again
        rounds, width = len(self.progressive.compressions) + 1, self.progressive.width
        return base + (min(rounds, width) + max(0, rounds - width) * width) * (self.prune.epochs + again)

    def make_scope(self) -> Scope:
        """The scope: what is pruned."""
        _check_keys(self.scope, ("include", "exclude", "also"), prefix="scope.")
        try:
            return Scope(**self.scope)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"scope: {error}") from None

    def make_method(self, steps_per_epoch: int) -> Method:
        """The method, with its times in optimizer steps.

        In the recipe a time is a number of steps, or text such as ``"2 epochs"`` or ``"75 %"`` (of the pruning
        stage). ``compression = c`` means ``sparsity = 1 - 1 / c``. A schedule is written as a table, such as
        ``{shape = "geometric", start = 1e-3, end = 1e-2, steps = "100 %"}``. ``ramp`` is such a table for the
        sparsity, without ``end``.
        """
        return _build_method(self.method, _Clock(steps_per_epoch, self.prune.epochs))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain JSON values; ``recipe_from_dict`` is the inverse."""
        table = asdict(self, dict_factory=_plain)
        return {key: value for key, value in table.items() if value != {}}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in a TOML file, or a built-in one by name.

    Args:
        path_or_name: the file, or one of ``builtin_recipes()``.
        overrides: ``"key=value"`` each, as in ``prune.lr=0.01``; a value that is not TOML is a plain string.
            ``method.sparsity`` replaces the file's ``method.compression``, and the other way round. ``length=0.4``
            shortens every stage to 0.4 of its epochs, rounded, together with its drops, restarts and warm-up. Times
            of the method in epochs or steps do not change; those in per cent follow.

    Raises:
        RecipeError: the file or the overrides cannot be used.

    Example:
        >>> load_recipe("lenet300-gsm-60x", ["prune.lr=0.01"]).prune.lr
        0.01
    """
    with _blaming(f"{path_or_name}: "):
        table = tomllib.loads(_text(str(path_or_name)))
        recipe = recipe_from_dict(table)
    if not overrides:
        return recipe
    # The file alone is valid, so any error from here on comes from the overrides.
    with _blaming(" ".join(f"--set {override}" for override in overrides) + ": "):
        return recipe_from_dict(_overridden(table, overrides))


def builtin_recipes() -> list[str]:
    """The names of the recipes in the package."""
    paths = (Path(entry.name) for entry in _BUILTIN.iterdir())
    return sorted(path.stem for path in paths if path.suffix == ".toml")


def recipe_from_dict(table: Mapping[str, Any]) -> Recipe:
    """The recipe in a table from TOML, from JSON or from ``Recipe.to_dict``."""
    return _build(Recipe, _table(table, "a recipe"), prefix="")


# From tables to objects.


def _build(kind: type[T], table: Mapping[str, Any], *, prefix: str) -> T:
    declared = fields(kind)  # type: ignore[arg-type]
    _check_keys(table, [one.name for one in declared], prefix=prefix)
    for one in declared:
        if one.name not in table and one.default is MISSING and one.default_factory is MISSING:
            raise RecipeError(f"missing key {prefix}{one.name}")
    hints = get_type_hints(kind, localns={"KW_ONLY": object})  # in Python 3.10 KW_ONLY is not a type
    values = {name: _read(hints[name], value, prefix + name) for name, value in table.items()}
    with _blaming(prefix):
        return kind(**values)


@dataclass(frozen=True, slots=True)
class _Clock:
    """Converts the times of a recipe to steps."""

    steps_per_epoch: int
    epochs: int

    def steps(self, value: object, key: str) -> int:
        if _is_integer(value):
            return value  # type: ignore[return-value]
        number, _, unit = value.partition(" ") if isinstance(value, str) else ("", "", "")
        try:
            units = {"epoch": 1.0, "epochs": 1.0, "%": self.epochs / 100}
            return round(float(number) * units[unit] * self.steps_per_epoch)
        except (KeyError, ValueError, OverflowError):
            wanted = 'a number of steps, or text such as "2 epochs" or "75 %" (of the pruning stage)'
            raise RecipeError(f"{key} must be {wanted}, got {written(value)}") from None


def _hints(name: str) -> dict[str, Any]:
    """Field -> type, for a method."""
    kind = METHODS[name]
    hints = get_type_hints(kind, localns={"KW_ONLY": object})  # in Python 3.10 KW_ONLY is not a type
    return {one.name: hints[one.name] for one in fields(kind)}  # type: ignore[arg-type]


def _build_method(table: Mapping[str, Any], clock: _Clock) -> Method:
    if "name" not in table:
        raise RecipeError(f"missing key method.name{_closest('', METHODS)}")
    name = _read(str, table["name"], "method.name")
    _check_name("method.name", name, METHODS)
    hints = _hints(name)
    extra = ["sparsity", "compression"] if "sparsity" in hints else []
    extra += ["ramp"] if _takes_schedule(hints.get("sparsity")) else []
    _check_keys(table, dict.fromkeys(["name", *extra, *hints]), prefix="method.")
    num_budgets = sum(key in table for key in ("sparsity", "compression"))
    is_needed = any(one.name == "sparsity" and one.default is MISSING for one in fields(METHODS[name]))  # type: ignore[arg-type]
    if num_budgets > 1 or (is_needed and not num_budgets):
        both = "both" if num_budgets else "neither"
        raise RecipeError(f"exactly one of method.sparsity and method.compression must be given, got {both}")

    given = {key: value for key, value in table.items() if key not in ("name", "compression", "ramp")}
    if "compression" in table:
        compression = _read(float, table["compression"], "method.compression")
        check_interval("method.compression", compression, _COMPRESSION)
        given["sparsity"] = 1 - 1 / compression
    arguments = {key: _argument(key, hints[key], value, clock) for key, value in given.items()}
    if "ramp" in table:
        ramp = _table(table["ramp"], "method.ramp")
        if "end" in ramp or not isinstance(arguments.get("sparsity"), float):
            raise RecipeError("method.ramp ends at method.sparsity or method.compression, which must be a number")
        arguments["sparsity"] = _schedule({**ramp, "end": arguments["sparsity"]}, "method.ramp", clock)
    try:
        return METHODS[name](**arguments)
    except (TypeError, ValueError) as error:
        # The messages of a constructor begin with the name of the field.
        dot = "." if str(error).partition(" ")[0] in hints else ": "
        raise RecipeError(f"method{dot}{error}") from None


def _takes_schedule(hint: Any) -> bool:
    return Schedule in (get_args(hint) or (hint,))


def _argument(name: str, hint: Any, value: object, clock: _Clock) -> Any:
    """``value`` converted for a method's field of this name and type."""
    key = f"method.{name}"
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if _takes_schedule(hint) and isinstance(value, Mapping):
        return _schedule(value, key, clock)
    if name in _TIMES and isinstance(value, str):
        return clock.steps(value, key)
    if any(get_origin(kind) is Literal for kind in kinds):
        return _read(str, value, key)
    if any(get_origin(kind) is collections.abc.Mapping for kind in kinds):
        return {name: _read(float, share, f"{key}.{name}") for name, share in _table(value, key).items()}
    return _read(hint, value, key)


_SHAPES = {"linear": Linear, "cubic": Cubic, "cosine": Cosine, "geometric": Geometric}


def _schedule(table: Mapping[str, Any], key: str, clock: _Clock) -> Schedule:
    _check_keys(table, ("shape", "start", "end", "steps", "begin"), prefix=f"{key}.")
    for name in ("shape", "end", "steps"):
        if name not in table:
            raise RecipeError(f"missing key {key}.{name}")
    shape = _read(str, table["shape"], f"{key}.shape")
    _check_name(f"{key}.shape", shape, _SHAPES)
    start, end = (float(_read(float, table.get(name, 0.0), f"{key}.{name}")) for name in ("start", "end"))
    steps, begin = (clock.steps(table.get(name, 0), f"{key}.{name}") for name in ("steps", "begin"))
    with _blaming(f"{key}: "):
        return _SHAPES[shape](start, end, steps=steps, begin=begin)


def _read(hint: Any, value: object, key: str) -> Any:
    """``value`` converted for a field of type ``hint``."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if any(get_origin(kind) is collections.abc.Mapping for kind in kinds):
        return dict(_table(value, key))
    for kind in (Stage, Expected, Progressive):
        if kind in kinds:
            return _build(kind, _table(value, key), prefix=f"{key}.")
    allowed = [_PLAIN[kind] for kind in kinds if kind in _PLAIN]
    if not allowed:
        raise RecipeError(f"{key} has a type that a recipe cannot express; leave it out, so that it keeps its default")
    if not any(accepts(value) for _, accepts in allowed):
        raise RecipeError(f"{key} must be {' or '.join(name for name, _ in allowed)}, got {written(value)}")
    return tuple(value) if isinstance(value, list) else value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


# What TOML can express, by the type of the field.
_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer", _is_integer),
    float: ("a finite number", _is_number),
    str: ("a string", lambda value: isinstance(value, str)),
    tuple[int, ...]: ("a list of integers", _are_integers),
    tuple[float, ...]: ("a list of finite numbers", _are_numbers),
}


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The inverse of ``_read`` for the fields of one table: None is left out, tuples become lists."""
    held = ((key, value) for key, value in items if value is not None)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in held}


# From the user's words to tables.


def _text(path_or_name: str) -> str:
    names = builtin_recipes()
    if path_or_name in names:
        return (_BUILTIN / f"{path_or_name}.toml").read_text(encoding="utf-8")
    try:
        return Path(path_or_name).read_text(encoding="utf-8")
    except OSError as error:
        message = f"{error.strerror}, and no built-in recipe{_closest(path_or_name, names)}"
        raise RecipeError(message) from None


def _overridden(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``table`` with each ``key=value`` applied."""
    settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError("expected key=value")
        settings[key.strip()] = _value(text.strip())

    result = deepcopy(dict(table))
    if settings.keys() & {"method.sparsity", "method.compression"}:
        for name in ("sparsity", "compression"):
            result["method"].pop(name, None)
    for key, value in settings.items():
        *path, name = key.split(".")
        inner = result
        for part in path:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[name] = value
    if "length" in result:
        length = result.pop("length")
        if not _is_number(length) or not 0 < length <= 1:
            raise RecipeError(f"length must be in (0, 1], the share of its epochs that each stage keeps, got {length}")
        for stage in _STAGES & result.keys():
            _shorten(result[stage], length)
    return result


def _shorten(stage: dict[str, Any], length: float) -> None:
    """Multiply every time of a stage by ``length``; at least one epoch remains, and coinciding drops become one."""
    for key in ("epochs", "lr_restart", "warmup_epochs"):
        if stage.get(key):
            stage[key] = max(1, round(stage[key] * length))
    end = stage.get("lr_restart") or stage["epochs"]
    if stage.get("lr_fall"):
        last = max(1, round(stage["lr_fall"][-1] * length))
        stage["lr_fall"] = [min(last - 1, round(stage["lr_fall"][0] * length)), last]
        return
    drops = sorted({max(1, round(epoch * length)) for epoch in stage.get("lr_drops", [])})
    stage["lr_drops"] = [epoch for epoch in drops if epoch < end]


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# Checks and their messages.


@contextmanager
def _blaming(culprit: str) -> Iterator[None]:
    """Prefix the message of any error inside with ``culprit``."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # tomllib recurses into nested arrays
        raise RecipeError(f"{culprit}{error}") from None


def _check_name(key: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise RecipeError(f"unknown {key} {written(name)}{_closest(name, known)}")


def _check_keys(table: Mapping[str, Any], known: Collection[str], *, prefix: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"unknown key {prefix}{key}{_closest(key, known)}")


def _closest(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{hint}; known: {', '.join(known)}"


def _table(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key} must be a table, got {written(value)}")
    return value
