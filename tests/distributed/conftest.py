"""One world of four ranks for all tests; smaller meshes are parts of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    one = World(4)
    yield one
    one.close()
