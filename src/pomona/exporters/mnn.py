"""MNN: a mobile runtime whose CPU kernels use unstructured zeros, if its converter is asked to look for them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pomona.exporters.onnx import export_dense, network_of
from pomona.exporters.source import Source

_SECONDS = 600
# The converter as a function, for its command line installs packages and calls home; in a process that it may end.
_CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def write(source: Source, path: Path) -> None:
    """Through ONNX and MNN's converter with `--detectSparseSpeedUp`, without which MNN runs at dense speed."""
    model, example = network_of(source, "mnn")
    if importlib.util.find_spec("_tools") is None or importlib.util.find_spec("MNN") is None:
        raise ImportError("MNN's converter is not installed: pip install MNN")
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        export_dense(model, example.in_order(model), onnx)
        made = Path(folder) / "model.mnn"
        command = [sys.executable, "-c", _CONVERT, "-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", str(made)]
        command += ["--bizCode", "pomona", "--detectSparseSpeedUp"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, cwd=folder)
        if done.returncode or not made.exists():
            raise ValueError(
                f"MNN's converter failed with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
            )
        shutil.copyfile(made, path)
