"""Version, dependencies and workflows agree wherever they are stated; test_install.py (slow) installs the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pomona
from pomona.train.recipe import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs/install.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_package() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/pomona/_version.py"
    assert f"\nversion: {pomona.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == (  # type: ignore[index]
        pomona.__version__
    )


def test_the_oldest_versions_are_tested_and_documented() -> None:
    oldest = dict(one.split(">=") for one in PROJECT["project"]["dependencies"])
    assert oldest.keys() == {"torch", "numpy"}
    for package, version in oldest.items():
        assert f"'{package}=={version}.*'" in MAKEFILE
        assert f"{package} {version}" in INSTALL
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"make PYTHON=python{python} test-oldest" in INSTALL


def test_the_workflows_run_existing_targets() -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z][\w-]*(?: [a-z][\w-]*)*):", MAKEFILE, re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    commands = []
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for job in jobs.values():
            assert {*job.get("needs", [])} <= jobs.keys()
            assert "timeout-minutes" in job
            commands += [step["run"] for step in job["steps"] if "run" in step]
    made = {command.split()[-1] for command in commands if command.startswith("make ")}
    assert {"test", "check", "test-oldest", "test-newest", "test-install"} == made <= targets


def test_wheels_have_the_core_or_fail() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    for table in (settings, settings["macos"]):
        assert table["environment"]["POMONA_CORE"] == "1"
    assert len({one.split("-")[0] for one in settings["build"]}) == 1  # one wheel serves every Python
