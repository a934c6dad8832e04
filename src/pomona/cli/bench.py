"""``pomona bench``: how fast a network runs, compared with dense runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomona.benchmark.paths import PATHS
from pomona.cli.train import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="compare size, latency and memory of a network with dense runtimes",
        description="Run one network in Pomona's engine and in each installed dense runtime, in turns, after comparing "
        "their outputs. Shows size, latency, peak memory, the time of each layer, and where dense is faster.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_FILE",
        help="a .pomona.safetensors file with a graph, an .onnx file, a run's folder, or MODULE:FUNCTION that returns "
        "a torch module",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        nargs="+",
        type=shape,
        default=[],
        help="shape of each input with the batch, e.g. 1x3x224x224 (default: one sample of the file's or run's input)",
    )
    parser.add_argument("--threads", metavar="N", type=positive, default=1, help="threads of each path (default: 1)")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=1.0, help="time per path (default: 1); at least three rounds"
    )
    parser.add_argument(
        "--paths", metavar="PATH", nargs="+", default=list(PATHS), help=f"any of: {', '.join(PATHS)} (default: all)"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="also measure accuracy: an .npz file with x [n, ...] and y [n], or for a run the folder of its data",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with a picture")
    parser.set_defaults(run=_run)


def shape(text: str) -> tuple[int, ...]:
    """Whole numbers >= 1, separated by x."""
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers >= 1 separated by x, such as 1x3x224x224, got {text!r}"
        )
    return sizes


def _run(options: argparse.Namespace) -> int:
    from pomona.benchmark.bench import bench

    if not options.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {options.seconds:g}")
    result = bench(
        options.model,
        inputs=options.input,
        threads=options.threads,
        seconds=options.seconds,
        paths=options.paths,
        data=options.data,
    )
    print(result.to_json() if options.json else result)
    if options.html:
        from pomona.benchmark.page import write_bench_page

        write_bench_page(result, options.html)
    return 0
