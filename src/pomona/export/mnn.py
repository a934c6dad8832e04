"""MNN: a mobile runtime whose CPU kernels use unstructured zeros, if its converter is told to look for them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pomona.export.onnx import export_dense, network_of
from pomona.export.source import Source

_SECONDS = 600


def write(source: Source, path: Path) -> None:
    """Through ONNX and `mnnconvert --detectSparseSpeedUp`, the flag without which MNN runs at dense speed."""
    model, example = network_of(source, "mnn")
    beside = Path(sys.executable).with_name("mnnconvert")
    converter = shutil.which("mnnconvert") or shutil.which("MNNConvert") or shutil.which(beside)
    if converter is None:
        raise ImportError("MNN's converter mnnconvert is not on the path: pip install MNN")
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        export_dense(model, example, onnx)
        made = Path(folder) / "model.mnn"
        command = [converter, "-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", str(made), "--bizCode", "pomona"]
        command.append("--detectSparseSpeedUp")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode or not made.exists():
            raise ValueError(f"{converter} failed with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        shutil.copyfile(made, path)
