"""Shared by all tests."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import pomona


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


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell that starts tests in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
