"""How small: bits for each weight that is left, against the entropy limit and what else there is.

    python bench/size.py [--nets lenet-5 resnet-56 resnet-50] [--runs DIR ...]

Random masks, which are the worst case for positions, and masks of the largest weights of the whole network, drawn from
each layer's usual initialisation. ``--runs`` adds the networks of finished runs, with accuracy before and after
quantisation, on the data of $POMONA_DATA. zstd needs the package zstandard; without it its columns are empty. Prints
tables and writes bench/results/size.json, in which other networks and runs are kept as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pomona
from pomona.files import safetensors
from pomona.files.pack import pack
from pomona.files.quantize import Quantization, quantize
from pomona.files.stored import Stored
from pomona.files.unpack import read
from pomona.train.evaluate import evaluate
from pomona.zoo.data import DATA
from pomona.zoo.models import MODELS, build_model
from speed import machine, resnet50

RESULT = Path(__file__).parent / "results" / "size.json"
SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.997)
HOWS = ("k-means:16", "k-means:8", "k-means:8:biases=8", "uniform:4", "uniform:3")
Weights = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=[], choices=[*MODELS, "resnet-50"])
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "runs": []}
    found["rows"] = [row for row in found["rows"] if row["net"] not in options.nets]
    found["runs"] = [row for row in found["runs"] if row["run"] not in [folder.name for folder in options.runs]]
    found |= {"machine": machine(), "matrix": list(matrices())}
    for net in options.nets:
        torch.manual_seed(0)
        model = resnet50() if net == "resnet-50" else build_model(net, seed=0)
        weights = {name: p.detach().numpy() for name, p in model.named_parameters() if p.ndim > 1}
        for mask in ("random", "largest"):
            for sparsity in SPARSITIES:
                found["rows"].append(
                    {"net": net, "mask": mask, "sparsity": sparsity, **measure(weights, mask, sparsity)}
                )
                print(table([found["rows"][-1]]).splitlines()[-1], flush=True)
    for folder in options.runs:
        found["runs"] += trained(folder)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("rows", "matrix", "runs"):
        if found[name]:
            print(f"\n{table(found[name])}")


def measure(weights: Weights, kind: str, sparsity: float) -> dict[str, Any]:
    """Bits for each weight that is left: of positions alone, and of whole files."""
    pruned = cut(weights, kind, sparsity)
    masks = [array != 0 for array in pruned.values()]
    kept, total = sum(int(m.sum()) for m in masks), sum(m.size for m in masks)
    start = time.process_time()
    data = pack(stored(pruned))
    encoding = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        start = time.process_time()
        back = read(path)
        decoding = time.process_time() - start
    assert all(np.array_equal(back.tensors[name].dense(), array) for name, array in pruned.items())
    plain = safetensors.pack({name: ("F32", array) for name, array in pruned.items()}, {})
    packed = b"".join(np.packbits(m, bitorder="little").tobytes() for m in masks)
    rows = sum(m.shape[0] + 1 for m in masks)
    bits = {
        "limit": sum(map(entropy, masks)),
        "pomona": stream_bits(pack(stored(noise(masks)))) - 32 * kept,
        "bitmask": total,
        "bitmask, zlib": 8 * len(zlib.compress(packed, 9)),
        "CSR int16": 16 * kept + 32 * rows,
        "CSR int32": 32 * kept + 32 * rows,
        "bitmask, zstd": zstd(packed),
        "header": 8 * len(data) - stream_bits(data),
        "file, fp32": 8 * len(data),
        "file, 4 bit": 8 * len(pack(quantize(stored(pruned), Quantization("k-means", 16)))),
        "dense, zlib": 8 * len(zlib.compress(plain, 9)),
        "dense, zstd": zstd(plain),
    }
    told: dict[str, Any] = {"kept": kept, "total": total}
    told |= {name: None if value is None else round(value / kept, 3) for name, value in bits.items()}
    return told | {"encode s": round(encoding, 3), "decode s": round(decoding, 3)}


def cut(weights: Weights, kind: str, sparsity: float) -> Weights:
    """Exactly round((1 - sparsity) n) weights stay: any of each layer, or the largest of all."""
    generator = np.random.default_rng(0)
    if kind == "random":
        scores = {name: generator.random(array.shape) for name, array in weights.items()}
        limits = {name: np.quantile(score, sparsity) for name, score in scores.items()}
    else:
        scores = {name: np.abs(array) for name, array in weights.items()}
        every = np.quantile(np.concatenate([score.reshape(-1) for score in scores.values()]), sparsity)
        limits = dict.fromkeys(scores, every)
    return {name: np.where(scores[name] > limits[name], array, np.float32(0)) for name, array in weights.items()}


def stored(weights: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    return {name: Stored("F32", array) for name, array in weights.items()}


def noise(masks: list[np.ndarray]) -> Weights:
    """Values of 32 random bits, which no coder shrinks: what a file takes beyond them are the positions."""
    generator = np.random.default_rng(1)
    bits = [generator.integers(1, 2**32, mask.shape, np.uint32) * mask for mask in masks]
    return {str(i): array.view(np.float32) for i, array in enumerate(bits)}


def stream_bits(data: bytes) -> int:
    """Of the compressed data of a file: without the header, which has names and shapes, and the checksum."""
    (length,) = struct.unpack("<Q", data[:8])
    return 8 * (len(data) - 8 - length - 32)


def entropy(mask: np.ndarray) -> float:
    """Bits of a mask of which only the number of ones is known: n H(p)."""
    p = float(mask.mean())
    return 0.0 if p in (0, 1) else -mask.size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def zstd(data: bytes) -> int | None:
    try:
        import zstandard
    except ImportError:
        return None
    level = 19 if len(data) < 1 << 24 else 9  # which takes seconds instead of minutes
    return 8 * len(zstandard.ZstdCompressor(level=level).compress(data))


def matrices() -> Iterator[dict[str, Any]]:
    """HAM and sHAM (arXiv 2108.12704), by the size that their authors' code counts, on its smallest common ground."""
    for density in (0.1, 0.05, 0.02):
        generator = np.random.default_rng(0)
        matrix = np.where(generator.random((100, 300)) < density, generator.standard_normal((100, 300)), 0)
        made = quantize({"w": Stored("F32", matrix.astype(np.float32))}, Quantization("k-means", 16))
        dense = 4 * matrix.size
        yield {
            "matrix": "100 x 300, 16 values",
            "density": density,
            "pomona": round(len(pack(made)) / dense, 4),
            "HAM": round(ham(made["w"].dense(), sparse=False) / dense, 4),
            "sHAM": round(ham(made["w"].dense(), sparse=True) / dense, 4),
        }


def ham(matrix: np.ndarray, *, sparse: bool) -> int:
    """Bytes: Huffman codes in words of 8 bytes, a table of 8 + (length + 1) + 4 + 8 an entry; sHAM: and raw indices."""
    symbols = matrix[matrix != 0] if sparse else matrix.reshape(-1)
    _, counts = np.unique(symbols, return_counts=True)
    lengths = huffman(counts.tolist())
    words = -(-sum(n * length for n, length in zip(counts.tolist(), lengths, strict=True)) // 64)
    size = 8 * words + sum(length + 1 + 4 + 8 for length in lengths)
    if sparse:
        index = next(b for b in (1, 2, 4, 8) if matrix.shape[0] <= 256**b)
        size += index * (symbols.size + matrix.shape[1])
    return size


def huffman(counts: list[int]) -> list[int]:
    """Length of each symbol's code."""
    import heapq

    lengths = [0] * len(counts)
    heap = [(count, [i]) for i, count in enumerate(counts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        for i in (*left, *right):
            lengths[i] += 1
        heapq.heappush(heap, (a + b, [*left, *right]))
    return lengths


def trained(folder: Path) -> Iterator[dict[str, Any]]:
    """The network of a run: as it is and without its dead channels, in full precision and quantised."""
    recipe = json.loads((folder / "result.json").read_text())["recipe"]
    data = DATA[recipe["data"]](None)
    model = build_model(recipe["model"], seed=0)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    example = data.test_inputs[:1]
    smaller, _ = pomona.shrink(model, example)
    kept = pomona.report(model).nonzero
    for name, network in (("as trained", model), ("shrunk", smaller)):
        for how in (None, *HOWS):
            measured = (lambda n=network: evaluate(n, data).accuracy) if how else None
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / "x.pomona.safetensors"
                with_graph = pomona.export(network, path, quantize=how, example=example).num_bytes
                told = pomona.export(network, path, quantize=how, evaluate=measured)
                (header,) = struct.unpack("<Q", path.read_bytes()[:8])
            dense = sum(p.numel() for p in model.parameters()) * 4
            yield {
                "run": folder.name,
                "model": recipe["model"],
                "data": data.description,
                "weights": kept,
                "network": name,
                "values": how or "fp32",
                "bytes": told.num_bytes,
                "of these header": header,
                "with graph": with_graph,
                "times smaller": round(dense / told.num_bytes, 1),
                "accuracy": evaluate(network, data).accuracy if how is None else told.accuracy_before,
                "after": told.accuracy_after,
            }


def table(rows: list[dict[str, Any]]) -> str:
    """GitHub's Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)]
    lines += [["-" if row[key] is None else str(row[key]) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
