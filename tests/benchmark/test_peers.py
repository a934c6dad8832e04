"""bench/inference.py makes complete environments from nothing, and one cell of its table runs in one of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pomona.benchmark.paths import Case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bench pins processes to cores as Linux does")

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers.environments")


def inference(*words: str | Path, fails: bool = False, **environment: str) -> str:
    """What bench/inference.py prints."""
    command = [sys.executable, BENCH / "inference.py", *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_python_that_is_not_there_is_named(environments: ModuleType) -> None:
    with pytest.raises(environments.PeerError, match=r"needs Python 3\.2 or 3\.1; this is .* none of python3\.2, "):
        environments.find_python(("3.2", "3.1"))


def test_only_an_environment_is_replaced(environments: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(environments.PeerError, match="exists and is not a virtual environment"):
        environments.build_environment(tmp_path, environments.PEERS["mnn"], tmp_path / "mnn.txt", verify=str)
    assert (tmp_path / "notes.txt").exists()


def test_every_peer_has_pins_and_every_line_is_one(environments: ModuleType) -> None:
    for name, peer in environments.PEERS.items():
        pins = dict(line.split("==") for line in (environments.PINS / f"{name}.txt").read_text().splitlines())
        assert peer.package in pins


def test_peers_that_are_not_built_are_left_out_by_name(
    environments: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present = importlib.import_module("inference").present
    with pytest.raises(SystemExit, match=f"build --venvs {tmp_path} --peers onnxruntime"):
        present(["onnxruntime", "pomona"], tmp_path)
    python = Path(environments.interpreter(tmp_path / "onnxruntime"))
    python.parent.mkdir(parents=True)
    python.touch()
    assert present(["onnxruntime", "mnn sparse", "pomona"], tmp_path) == ["onnxruntime", "pomona"]
    assert "mnn is left out: " in (error := capsys.readouterr().err)
    assert f"build --venvs {tmp_path} --peers mnn\n" in error


@pytest.mark.check
def test_a_peer_whose_process_ends_does_not_stop_the_others(environments: ModuleType, tmp_path: Path) -> None:
    inference = importlib.import_module("inference")
    case = Case(inputs=str(tmp_path / "inputs.npz"))
    x = np.ones((1, 2), np.float32)
    np.savez(case.inputs, **{"0": x})
    codes = {"onnxruntime": "lambda inputs: inputs", "mnn": "__import__('os')._exit(3)"}
    with ExitStack() as stack:
        workers = {}
        for name, code in codes.items():
            serve = f"from pomona.benchmark.paths import serve; serve({{{name!r}: lambda case, threads: {code}}})"
            workers[name] = stack.enter_context(inference.Worker(name, code=serve))
        for _ in range(2):
            paths = inference.compare_and_time(workers, case, [x], threads=1, seconds=0.01)
            assert paths["mnn"] == {"why_not": "its process ended with status 3"}
            assert paths["onnxruntime"]["error"] == 0 and paths["onnxruntime"]["median"] > 0


@pytest.mark.check
def test_pins_must_be_complete(environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / "incomplete-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = "Metadata-Version: 2.1\nName: incomplete\nVersion: 1.0\nRequires-Dist: other-package\n"
        archive.writestr("incomplete-1.0.dist-info/METADATA", about)
        archive.writestr(
            "incomplete-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("incomplete-1.0.dist-info/RECORD", "")
    pins = tmp_path / "pins.txt"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = environments.interpreter(tmp_path / "venv")

    pins.write_text(f"{wheel}\n")
    environments.install(python, environments.Peer("incomplete", (), without=("other-package",)), pins)
    with pytest.raises(environments.PeerError, match=r"pins\.txt is incomplete: .* requires other-package"):
        environments.install(python, environments.Peer("incomplete", ()), pins)
    pins.write_text("other-package==1.0\n")
    with pytest.raises(environments.PeerError, match=r"No matching distribution found for other-package==1\.0"):
        environments.install(python, environments.Peer("other-package", ()), pins)


@pytest.mark.check
def test_a_peer_that_cannot_be_had_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    printed = inference(
        *("build", "--venvs", tmp_path, "--peers", "onnxruntime", "mnn"),
        fails=True,
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
    )
    assert "onnxruntime: NOT BUILT: " in printed and "is not a virtual environment" in printed
    assert "mnn: NOT BUILT: " in printed and "No matching distribution found for MNN==" in printed
    assert "not built: onnxruntime, mnn" in printed
    assert not (tmp_path / "mnn").exists()


@pytest.mark.check
def test_one_cell_from_nothing(tmp_path: Path) -> None:
    """Downloads 50 MB from the package index. Times only have to be there: this says nothing about speed."""
    venvs = ("--venvs", tmp_path / "venvs")
    printed = inference("build", *venvs, "--peers", "onnxruntime")
    pins = dict(line.split("==") for line in (BENCH / "peers" / "onnxruntime.txt").read_text().splitlines())
    assert f"onnxruntime {pins['onnxruntime']}, error " in printed

    cell = ("--nets", "lenet-300-100", "--batches", "1", "--threads", "1", "--masks", "dense", "--seconds", "0.01")
    out = tmp_path / "results"
    inference("run", *venvs, *cell, "--only", "torch", "onnxruntime int8", "pomona", "--out", out)
    (file,) = out.iterdir()
    about = json.loads(file.read_text())
    (row,) = about["rows"]
    assert about["versions"]["onnxruntime"] == pins["onnxruntime"]
    assert set(row["paths"]) == {"onnxruntime", "torch", "onnxruntime int8", "pomona"}
    for name, path in row["paths"].items():
        assert path["median"] > 0, path
        assert path["error"] < (0.1 if "int8" in name else 1e-5), name
