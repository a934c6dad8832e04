"""``pomona report``: the results in a run's folder, or the zeros in a file of weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="count the zeros of a run or of any state dict, and draw a run's pictures",
        description="For a run's folder, finished or not: print the table, and write the pictures and report.html "
        "again. For a file: count the zeros of every tensor of two or more dimensions in a state dict saved by "
        "torch.save or by pomona export, or in an ONNX model.",
    )
    parser.add_argument("path", metavar="RUN_OR_FILE", type=Path, help="a run's folder, or a file of weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.path.is_dir():
        return _report_run(options.path, as_json=options.json)
    report = _report_file(options.path)
    print(report.to_json() if options.json else report)
    return 0


def _report_run(folder: Path, *, as_json: bool) -> int:
    import json

    from pomona.train.finished import read_run
    from pomona.train.stages import write_report

    result = read_run(folder)
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['title']}, seed {result['seed']}\ndata: {result['data']}")
    if "table" in result:
        print(result["table"])
    else:
        print("this run has not finished; the pictures show how far it has come")
    for path in write_report(folder):
        print(path)
    return 0


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a file that torch.save or pomona export wrote, or the constants of an ONNX model."""
    import torch

    import pomona

    if path.name.endswith(".safetensors"):
        return pomona.load(path)
    if path.name.endswith(".onnx"):
        from pomona.runtime.readers import onnx

        return {name: torch.from_numpy(array.copy()) for name, array in onnx.read_weights(path).items()}
    with path.open("rb") as file:  # its own errors name the path
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load documents no closed list
            raise ValueError(
                f"{path} cannot be read as weights: torch.load(weights_only=True) raises {type(error).__name__}. Save "
                "the state dict alone: torch.save(model.state_dict(), path)"
            ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _report_file(path: Path) -> Any:
    import torch

    from pomona.reporting import Report, report_layer

    state = read_weights(path)
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    layers = [report_layer(name, t) for name, t in tensors.items() if t.ndim >= 2 and t.is_floating_point()]
    if not layers:
        raise ValueError(
            f"{path} holds no floating-point tensor of two or more dimensions (keys: {list(state)[:5]}); save "
            "the state dict of the model alone"
        )
    inside = {layer.name for layer in layers}
    return Report(tuple(layers), {name: "fewer than 2 dimensions" for name in tensors if name not in inside})
