"""One world of four ranks for all tests; smaller meshes are parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    one = World(4)
    yield one
    one.close()


# Of the tests here, those without fully_shard. That of torch 2.6 needs a GPU: on CPUs its streams cannot record events.
_WITHOUT_FULLY_SHARD = {
    "test_one_rank_selects_as_a_full_sort",
    "test_ranks_select_as_a_full_sort",
    "test_uneven_and_empty_blocks_and_mass_ties_are_chosen_as_by_a_full_sort",
    "test_data_parallel_ranks_prune_alike_without_a_word_and_tell_of_drift",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and getattr(item, "originalname", "") not in _WITHOUT_FULLY_SHARD:
            item.add_marker(pytest.mark.skip(reason="fully_shard of torch 2.6 does not run on CPUs"))
