"""How far each kind of layer is from its ceiling: multiplications that are left, at the rate of dense ONNX Runtime.

    python bench/ceiling.py                          ResNet-50, 90 and 95 %, float32 and int16, one thread
    python bench/ceiling.py --net mobilenet-v1 --sparsities 0.9

The rate is that of the whole dense network, from bench/results/inference (`bench/inference.py run`); a layer at 100 %
gains as much as the zeros it has. Results go into bench/results/ceiling-NET.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from nets import NETS, make, mask_
from pomona.files.sparse import Sparse
from pomona.runtime.engine import Engine
from pomona.runtime.fold import fold
from pomona.runtime.ranges import with_ranges
from pomona.runtime.readers.trace import trace
from speed import machine, show

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet-50", choices=NETS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    dense = dense_rate(options.net)
    print(f"{options.net}: dense ONNX Runtime does {dense / 1e9:.1f} G multiplications a second\n")
    rows = [row for sparsity in options.sparsities for row in measure(options.net, sparsity, options.repeats, dense)]
    show(["layers", "sparsity", "kept, M", "float32, ms", "of the ceiling", "int16, ms", "of the ceiling"], head=True)
    for row in rows:
        cells = []
        for precision in ("float32", "int16"):
            share = row[precision]["of_ceiling"]
            cells += [f"{1e3 * row[precision]['seconds']:.2f}", "-" if share is None else f"{100 * share:.0f} %"]
        show([row["layers"], f"{100 * row['sparsity']:g} %", f"{row['kept_macs'] / 1e6:.1f}", *cells])
    file = RESULTS / f"ceiling-{options.net}.json"
    file.write_text(json.dumps({"machine": machine(), "dense_macs_a_second": dense, "rows": rows}, indent=1))


def dense_rate(net: str) -> float:
    rows = json.loads((RESULTS / "inference" / f"{net}-b1-t1.json").read_text())["rows"]
    row = next(row for row in rows if row["mask"] == "dense")
    return float(row["macs"] / row["paths"]["onnxruntime"]["cpu"])


def measure(net: str, sparsity: float, repeats: int, dense: float) -> list[dict[str, object]]:
    """A row for each kind of layer, and one for all."""
    model = make(net)
    mask_(model, "uniform", sparsity)
    x = torch.randn(16, *NETS[net].shape, generator=torch.Generator().manual_seed(3)).numpy()
    graph, tensors = fold(*trace(model, torch.from_numpy(x[:1])))
    graph = with_ranges(graph, tensors, x)
    shapes = graph.shapes(tensors)
    seconds = {}
    for precision in ("float32", "int16"):
        engine = Engine(graph, tensors, precision=precision)
        engine(x[:1])
        # The least of a few means: what disturbs only adds.
        seconds[precision] = np.min([engine.profile(x[:1], repeats=repeats // 5 or 1) for _ in range(5)], axis=0)
    kinds: defaultdict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for i, node in enumerate(graph.nodes):
        macs = 0.0
        kind = "all other"
        if node.op in ("conv", "linear"):
            weight = tensors[node.weight or ""]
            kept = len(weight.values) if isinstance(weight, Sparse) else int(np.count_nonzero(weight))
            out, image = shapes[graph.num_inputs + i], shapes[node.operands[0]]
            macs = kept * (math.prod(out[1:]) if node.op == "conv" else math.prod(out[:-1]))
            kernel = weight.shape[2] if len(weight.shape) == 4 else 1
            kind = f"{kernel}x{kernel}" if node.op == "conv" else "linear"
            if node.op == "conv":
                kind += f"/{node.stride[0]}" * (node.stride[0] > 1) + ", depthwise" * (node.groups > 1)
                kind += f" at {image[1]}"
        for name in (kind, "the network"):
            kinds[name]["kept_macs"] += macs
            for precision, spent in seconds.items():
                kinds[name][precision] += float(spent[i])
    rows: list[dict[str, object]] = []
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1]["float32"]):
        row: dict[str, object] = {"layers": name, "sparsity": sparsity, "kept_macs": kind["kept_macs"]}
        for precision in seconds:
            share = kind["kept_macs"] / dense / kind[precision]
            row[precision] = {"seconds": kind[precision], "of_ceiling": share if kind["kept_macs"] else None}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
