"""Shared by all tests: what runs where, what may be skipped, one thread and one seed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import pomona

ROOT = Path(__file__).parent

# `make check` draws three times as many examples as `make test`. A test that asks for fewer has costly ones.
settings.register_profile("test", deadline=None, max_examples=50)
settings.register_profile("check", deadline=None, max_examples=150)
settings.load_profile("test")

# Importing Lightning, Transformers, Accelerate, PEFT and the models of others takes ten seconds in each worker: files
# that do it at their head are for `make check`, and are not even collected without it.
# The models of others bring a torchvision that other libraries would find: they run in a process of their own, by name.
_FOREIGN = ROOT / "tests/foreign"
_FRAMEWORKS = (ROOT / "src/pomona/integrations", ROOT / "tests/integrations", _FOREIGN)


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    """Tests do not depend on each other's random numbers, nor on how many cores there are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace |= {"torch": torch, "nn": torch.nn, "pomona": pomona}


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without MNIST."""
    monkeypatch.delenv("POMONA_DATA", raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test is skipped that conftest.py does not name")


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell that starts tests in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True for the framework files in a run that would deselect their tests."""
    if collection_path == _FOREIGN and not any("foreign" in given for given in config.args):
        return True
    return True if collection_path in _FRAMEWORKS and "not check" in config.option.markexpr else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if str(item.path).startswith(tuple(f"{folder}{os.sep}" for folder in _FRAMEWORKS)):
        item.add_marker(pytest.mark.check)


# Skipped tests


@dataclass(frozen=True)
class MaySkip:
    """A reason that a test may give for being skipped, and whether the reason holds on this machine."""

    reason: str  # a regular expression for all of it
    holds: Callable[[], bool]


def _lacks(*variables: str) -> Callable[[], bool]:
    return lambda: not any(os.environ.get(name) for name in variables)


def _lacks_data(folder: str) -> Callable[[], bool]:
    return lambda: _lacks("POMONA_DATA")() and not (ROOT.parent / "shared" / "data" / folder).exists()


# Hardware and data that no command installs. A missing program is not in the list: `make check` installs it.
MAY_SKIP = (
    MaySkip("needs a GPU|needs CUDA", lambda: not torch.cuda.is_available()),
    MaySkip("needs a machine without CUDA", torch.cuda.is_available),
    MaySkip("no pretrained models: POMONA_CIFAR_MODELS is not set.*", _lacks("POMONA_CIFAR_MODELS")),
    MaySkip("needs tiny Shakespeare in .*", _lacks_data("tinyshakespeare")),
    MaySkip("needs the full MNIST in .*", _lacks_data("mnist")),
    MaySkip(r"all tests skipped by \+SKIP option", lambda: True),  # an example that says so itself
    MaySkip("root writes everywhere", lambda: os.access("/", os.W_OK)),
    MaySkip("this machine has all instruction sets", lambda: len(pomona.native.core.isas()) == 3),
)


def may_skip(reason: str) -> bool:
    return any(re.fullmatch(known.reason, reason) and known.holds() for known in MAY_SKIP)


def _wrongly_skipped(config: pytest.Config) -> dict[str, str]:
    """Test or file to reason, as far as the run knows."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not config.option.no_skips or reporter is None:  # xdist's workers have none
        return {}
    skipped = reporter.stats.get("skipped", [])
    reasons = {report.nodeid: report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    return {name: reason for name, reason in reasons.items() if not may_skip(reason)}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if wrong := _wrongly_skipped(config):
        terminalreporter.section("skipped, and not in MAY_SKIP of conftest.py", red=True)
        for name, reason in wrong.items():
            terminalreporter.line(f"{name}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _wrongly_skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
