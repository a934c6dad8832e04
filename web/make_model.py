"""Make web/digits.pomona.safetensors, the network of the page, from a run of Pomona.

    pomona train lenet5-gsm-300x --set precision=bfloat16 --data-dir DIR --out runs/lenet5   # over an hour of one core
    python web/make_model.py runs/lenet5 --data-dir DIR

DIR holds MNIST's four files. A run of any other recipe on MNIST's digits will do, `pomona train demo` (half a minute,
no data needed) among them. The weights are made to share values, and the accuracy that the page shows is measured
here, with these values, on the test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import pomona
from pomona.files.pack import write
from pomona.files.unpack import read
from pomona.runtime.readers.trace import trace
from pomona.zoo.data import load_mnist
from pomona.zoo.models import MODELS

OUT = Path(__file__).parent / "digits.pomona.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--data-dir")
    parser.add_argument("--quantize", default="k-means:32:shared:biases=32")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()

    result = json.loads((options.run / "result.json").read_text())
    recipe = result["recipe"]
    model = MODELS[recipe["model"]]().eval()
    model.load_state_dict(torch.load(options.run / "model.pt", weights_only=True))
    data = load_mnist(options.data_dir)

    @torch.no_grad()
    def accuracy() -> float:
        return 100 * (model(data.test_inputs).argmax(1) == data.test_labels).double().mean().item()

    graph, _ = trace(model, data.test_inputs[:1], folded=False)
    print(pomona.export(model, options.out, quantize=options.quantize, evaluate=accuracy, graph=graph))

    file = read(options.out)
    metadata = file.metadata | {
        "title": result["title"],
        "source": result["source"],
        "seed": str(result["seed"]),
        "commit": result["commit"],
        "data": result["data"],
        "mean": "0.1307",  # of pixels in 0..1, as pomona.zoo.data takes it off
        "std": "0.3081",
    }
    size = write(options.out, file.tensors, metadata, file.graph)
    print(f"{size:,} bytes with what the page says of it")


if __name__ == "__main__":
    main()
