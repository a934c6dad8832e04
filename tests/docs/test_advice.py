"""What a message advises works: its calls exist with these arguments, its commands are accepted, its extras install."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import pomona
from pomona.cli import parser
from pomona.files.quantize import Quantization
from pomona.train.recipe import tomllib

ROOT = Path(__file__).parents[2]
UNKNOWN = "_placeholder_"  # what an f-string inserts
NAME = re.compile(r"(?<![\w.'\"])((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)\(")
COMMAND = re.compile(r"(`?)\bpomona ([a-z]+)\b((?: [^\s`;,:()]+)*)")
INTEGRATIONS = ("accelerate", "lightning", "peft", "transformers")


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """All strings that are not docstrings, with their lines. Messages are often built apart from their raise."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):
            skipped |= {part for part in ast.iter_child_nodes(node) if isinstance(part, ast.Constant)}
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else UNKNOWN for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def calls(text: str) -> Iterator[tuple[str, str]]:
    """Dotted names that are followed by parentheses, each with its whole call."""
    for match in NAME.finditer(text):
        depth = 0
        for end in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                yield match[1], text[match.start() : end + 1]
                break


@functools.cache
def candidates(first: str) -> list[Any]:
    """What a name that messages use without its module may stand for; frameworks are imported only if one is named."""
    where: list[Any] = [pomona, torch.optim]
    if first in ("PrunerCallback", "prune", "merge"):
        names = [name for name in INTEGRATIONS if importlib.util.find_spec(name)]
        where += [importlib.import_module(f"pomona.integrations.{name}") for name in names] + [torch.nn.utils]
    places = {"pomona": pomona, "torch": torch, "pruner": pomona.Pruner}
    found = [getattr(module, first) for module in where if hasattr(module, first)]
    return [places[first]] if first in places else found


def members(found: Any, parts: list[str]) -> Any:
    """The object that these attributes lead to.

    Raises:
        AttributeError: there is none.
    """
    for part in parts:
        if inspect.ismodule(found) and not hasattr(found, part):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def fault_of_call(name: str, text: str) -> str:
    """Why this call cannot work; "" if it can, or if it calls nothing of ours or of torch."""
    first, *parts = name.split(".")
    found = [fault_of_one(one, parts, text) for one in candidates(first)]
    return "" if "" in found or not found else found[0]


def fault_of_one(first: Any, parts: list[str], text: str) -> str:
    try:
        target = members(first, parts)
    except AttributeError as error:
        return str(error)
    if not callable(target):
        return ""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return "" if UNKNOWN in text else f"{text} cannot be parsed"
    assert isinstance(call, ast.Call)
    positional = [one for one in call.args if not (isinstance(one, ast.Constant) and one.value is ...)]
    keywords = {one.arg: one.value for one in call.keywords if one.arg and one.arg != UNKNOWN}
    if inspect.isfunction(target) and "." in target.__qualname__:
        positional = [ast.Constant("self"), *positional]
    try:
        inspect.signature(target).bind_partial(*positional, **keywords)
    except TypeError as error:
        return f"{text}: {error}"
    how = keywords.get("quantize")
    if target is pomona.export and isinstance(how, ast.Constant) and isinstance(how.value, str):
        try:
            Quantization.parse(how.value)
        except ValueError as error:
            return str(error)
    return fault_of_value(target, call, text)


def fault_of_value(target: Any, call: ast.Call, text: str) -> str:
    """Why a method, scope or schedule refuses the numbers that a message writes out; "" if it does not."""
    checked = pomona.Method | pomona.Scope | pomona.Schedule
    names = {one.id for one in ast.walk(call) if isinstance(one, ast.Name)}
    if not (isinstance(target, type) and issubclass(target, checked) and names <= {*pomona.__all__, "pomona"}):
        return ""
    if UNKNOWN in text or "..." in text:
        return ""
    try:
        eval(text, {"pomona": pomona} | {name: getattr(pomona, name) for name in pomona.__all__})
    except (TypeError, ValueError) as error:
        return f"{text}: {error}"
    return ""


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def fault_of_command(command: str, arguments: str, *, quoted: bool) -> str:
    """Why the command line refuses this; only options are judged in prose, which goes on after it."""
    choices = commands()
    if command not in choices:
        return f"there is no command {command}" if quoted else ""
    options = re.findall(r"--[a-z][\w-]*", arguments)
    wrong = [one for one in options if one not in choices[command]._option_string_actions]
    if wrong or not quoted or not arguments:
        return f"pomona {command} has no {', '.join(wrong)}" if wrong else ""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    choices[command].error = refuse  # type: ignore[method-assign]
    try:
        choices[command].parse_args([re.sub(f"^({UNKNOWN}|N)$", "1", word) for word in shlex.split(arguments)])
    except ValueError as error:
        return f"pomona {command}{arguments}: {error}"
    return ""


def faults(text: str) -> Iterator[str]:
    for name, call in calls(text):
        if fault := fault_of_call(name, call):
            yield fault
    for match in COMMAND.finditer(text):
        if fault := fault_of_command(match[2], match[3], quoted=bool(match[1])):
            yield fault
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\bpomona\[([a-z][\w,]*)\]", text):
        yield from (f"no extra {one}" for one in extras.split(",") if one not in project["optional-dependencies"])


SOURCES = sorted((ROOT / "src/pomona").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_messages_advise_works(path: Path) -> None:
    strings = literals(ast.parse(path.read_text(encoding="utf-8")))
    assert [f"{path.name}:{line}: {fault}" for line, text in strings for fault in faults(text)] == []


def test_the_advice_is_found() -> None:
    """Enough of it, so that a change of the patterns does not make the test above empty."""
    texts = [text for path in SOURCES for _, text in literals(ast.parse(path.read_text(encoding="utf-8")))]
    found = [name for text in texts for name, _ in calls(text) if candidates(name.split(".")[0])]
    assert len(found) > 40 and {"Scope", "GSM", "PrunerCallback", "pomona.export"} <= set(found)
    assert len([match for text in texts for match in COMMAND.findall(text) if match[1] in commands()]) > 5


@pytest.mark.parametrize(
    "text",
    [
        "export with pomona.export(model, path, values='int8')",
        "export with pomona.export(model, path, quantize='int8')",
        "use pomona.exports(model)",
        "use pomona.runtime.read(path)",
        "use torch.optim.SGD(params, lr=0.1, moment=0.9)",
        "such as GSM(sparsity=90)",
        "such as Magnitude(Cubic(0.9, 0.0, steps=10))",
        "leave it dense: Scope(without=['head'])",
        "call pruner.harden(now=True)",
        "call Pruner.trial()",
        "say PrunerCallback(..., number=0)",
        "run `pomona trian demo`",
        "run `pomona valley runs/A`",
        "run pomona train demo --sparsity 0.9",
        "pip install 'pomona[tpu]'",
    ],
)
def test_wrong_advice_is_caught(text: str) -> None:
    assert list(faults(text)) != []


@pytest.mark.parametrize(
    "text",
    [
        "export with pomona.export(model, path, quantize='uniform:8')",
        "such as GSM(sparsity=0.9), or torch.optim.SGD(..., momentum=0.98)",
        f"leave it dense: Scope(exclude=[{UNKNOWN}]), Scope({UNKNOWN}=['head'])",
        "call harden() of the Pruner, pruner.harden(ema), or callback.pruner.harden(anything=1)",
        "run `pomona report FILE`; pomona needs torch, and pomona train --set seed=1 goes on",
        "pip install 'pomona[onnx]'",
    ],
)
def test_right_advice_passes(text: str) -> None:
    assert list(faults(text)) == []
