"""``pomona env``: what this installation runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from typing import Any

import numpy
import torch

from pomona._version import __version__
from pomona.native import core
from pomona.pages.text import table

_EXTRAS = {
    "zoo": ("matplotlib", "mlxtend"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("onnx", "onnxruntime", "openvino"),
}


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "env",
        help="print versions, the number of threads, and which code selects weights",
        description="Print what a bug report should contain: versions, the number of threads, and whether the compiled "
        "core or numpy selects weights, and why.",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    rows = {
        "pomona": __version__,
        "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": str(torch.get_num_threads()),
        "selection": _selection(),
    }
    rows |= {f"extra {name}": _extra(name, packages) for name, packages in _EXTRAS.items()}
    print(table(list(rows.items())))
    return 0


def _selection() -> str:
    if core.is_available():
        return f"compiled core, {core.isa()}"
    return f"numpy; no compiled core: {core.why_not()}"


def _extra(name: str, packages: tuple[str, ...]) -> str:
    found = {package: _version(package) for package in packages}
    missing = [package for package, version in found.items() if version is None]
    if missing:
        return f"missing {', '.join(missing)} (pip install 'pomona[{name}]')"
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
