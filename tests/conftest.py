"""Fixtures that several files share."""

from pathlib import Path

import pytest

from tests.runs import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set in MNIST's four files."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")
