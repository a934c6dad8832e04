"""Virtual environments of the peers that bench/inference.py measures, each made from nothing.

bench/peers/NAME.txt pins everything that an environment contains besides pip. Nothing else is installed, so that a new
release of a dependency cannot change a measurement, and `pip check` has to agree that nothing is missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PINS = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    package: str  # the distribution whose version is reported
    paths: tuple[str, ...]  # those of bench/inference.py that run in this environment
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13", "3.14")  # versions that all pinned wheels exist for
    without: tuple[str, ...] = ()  # requirements of the package that are deliberately left out


PEERS = {
    "onnxruntime": Peer("onnxruntime", ("onnxruntime", "onnxruntime int8")),
    # The runtime does not need telemetry, which reports its use.
    "openvino": Peer("openvino", ("openvino", "openvino int8"), without=("openvino-telemetry",)),
    "mnn": Peer("MNN", ("mnn", "mnn sparse")),
    # The engine alone (openers.py): the rest of the package needs these, and reports its use.
    "deepsparse": Peer(
        "deepsparse",
        ("deepsparse",),
        pythons=("3.11", "3.10"),
        without=("click", "onnx", "protobuf", "pydantic", "requests", "sparsezoo", "tqdm"),
    ),
}


class PeerError(RuntimeError):
    """An environment cannot be had; the message is the reason."""


def build_environment(folder: Path, peer: Peer, pins: Path, verify: Callable[[], str]) -> str:
    """Make the environment anew and return what `verify` reports of it.

    One that is incomplete or fails `verify` is removed again: a folder that is there works.

    Raises:
        PeerError: no interpreter fits, a pinned wheel cannot be had, a requirement is not pinned, or `verify` failed.
    """
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise PeerError(f"{folder} exists and is not a virtual environment; move it away or choose another --venvs")
    python = find_python(peer.pythons)
    try:
        run(python, "-m", "venv", "--clear", str(folder))
        install(interpreter(folder), peer, pins)
        return verify()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def interpreter(folder: Path) -> str:
    return str(folder / "bin" / "python")


def find_python(versions: tuple[str, ...]) -> str:
    """This interpreter, if its version is one of these; otherwise the first on the PATH that is."""
    current = f"{sys.version_info.major}.{sys.version_info.minor}"
    if current in versions:
        return sys.executable
    for version in versions:
        found = shutil.which(f"python{version}")
        # A shim of pyenv is on the PATH even where the version that it stands for is switched off.
        if found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return found
    raise PeerError(
        f"it needs Python {' or '.join(versions)}; this is Python {current}, and none of "
        f"{', '.join(f'python{version}' for version in versions)} runs from the PATH"
    )


def install(python: str, peer: Peer, pins: Path) -> None:
    """Install exactly the pins, as wheels, and check that they are complete."""
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check"]  # -I: PYTHONPATH's packages are not the peer's
    run(*pip, "install", "--quiet", "--no-deps", "--only-binary", ":all:", "-r", str(pins))
    done = subprocess.run([*pip, "check"], capture_output=True, text=True)
    expected = tuple(f" requires {name}, which is not installed." for name in peer.without)
    problems = [line for line in done.stdout.splitlines() if not line.endswith(expected)] if done.returncode else []
    if problems:
        raise PeerError(f"{pins} is incomplete: {' '.join(problems)}")


def run(*command: str) -> None:
    """Run a command; if it fails, its errors are the reason."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        raise PeerError(" ".join(line.removeprefix("ERROR: ") for line in errors) or f"{command[0]} failed")
