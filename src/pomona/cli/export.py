"""``pomona export``: write a run's network, or any state dict, as a file to ship."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomona.cli.report import read_weights
from pomona.cli.train import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's network, or any state dict, as a small file, or in another format",
        description="Write the network of a finished run, in a form that runs without torch, or the tensors in a "
        "file of weights (saved by torch.save or by pomona export), or the network of an ONNX model. With --quantize "
        "the accuracy of a run's network is measured before and after, on the test set of its data.",
    )
    parser.add_argument("path", metavar="RUN_OR_FILE", type=Path, help="a run's folder, or a file of weights")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="e.g. lenet.pomona.safetensors")
    parser.add_argument("--format", help="default: by FILE's suffix; pomona, safetensors, csr, 2:4, bitmask, onnx, mnn")
    parser.add_argument(
        "--quantize",
        metavar="HOW",
        help="k-means:COUNT or uniform:BITS, optionally followed by :shared and :biases=COUNT",
    )
    parser.add_argument(
        "--calibrate",
        metavar="COUNT",
        type=positive,
        help="store the ranges of values on the first COUNT training inputs of a run, for 16-bit fixed point",
    )
    parser.add_argument("--shrink", action="store_true", help="remove dead channels first")
    parser.add_argument(
        "--no-graph", action="store_true", help="leave out the graph: a smaller file, for pomona.load only"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files (default: $POMONA_DATA)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import torch

    import pomona
    from pomona.runtime.readers.trace import UnsupportedError
    from pomona.train.evaluate import evaluate
    from pomona.train.finished import open_finished

    if options.calibrate and options.no_graph:
        raise ValueError(
            "--calibrate stores the ranges of a graph's values, but --no-graph leaves the graph out; give only one of "
            "them"
        )
    if not options.path.is_dir():
        for name in ("shrink", "calibrate"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name} needs a network, but {options.path} is a file of weights; give a run's folder"
                )
        if options.path.name.endswith(".onnx") and not options.no_graph:
            _export_onnx(options)
            return 0
        state = read_weights(options.path)
        print(pomona.export(state, options.out, options.format, quantize=options.quantize))
        return 0
    run = open_finished(options.path)
    data, method = run.load_data(options.data_dir), _method(run.recipe)
    model: torch.nn.Module = run.make_model()
    example = data.test_inputs[:1]
    if options.shrink:
        model, removed = pomona.shrink(model, example)
        print(f"dead channels removed: {', '.join(f'{n} of {name}' for name, n in removed.items()) or 'none'}")
    arguments = {
        "quantize": options.quantize,
        "evaluate": (lambda: evaluate(model, data).accuracy) if options.quantize else None,
        "metadata": {"method": method} if method else None,
    }
    calibrate = data.train_inputs[: options.calibrate] if options.calibrate else None
    is_graph = str(options.format or options.out).endswith(("onnx", "mnn"))
    try:
        given = example if is_graph or not options.no_graph else None
        print(pomona.export(model, options.out, options.format, example=given, calibrate=calibrate, **arguments))
    except UnsupportedError as error:
        why = error.__cause__ or error  # without the advice to leave out example=, which is done here
        if options.calibrate:
            raise ValueError(f"--calibrate needs the graph of the network: {why}") from None
        warnings.warn(f"the file holds tensors only, for pomona.load: {why}", stacklevel=1)
        print(pomona.export(model, options.out, options.format, **arguments))
    return 0


def _export_onnx(options: argparse.Namespace) -> None:
    """The network of an ONNX model, with its graph."""
    import torch

    import pomona
    from pomona.runtime.readers import onnx

    graph, tensors = onnx.read(options.path)
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    print(pomona.export(state, options.out, options.format, quantize=options.quantize, graph=graph))


def _method(recipe: Mapping[str, Any]) -> str:
    """The recipe's method and its settings, as one writes a call; empty for a dense network."""
    settings = dict(recipe.get("method") or {})
    name = settings.pop("name", "")
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})" if name else ""
