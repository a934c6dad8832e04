"""Several ranks prune as one process does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed import checks
from tests.distributed.world import World
from tests.test_contract import METHODS, Case
from tests.test_selection import DTYPES, VALUES

each_layout = pytest.mark.parametrize("layout", checks.LAYOUTS)


@st.composite
def arrays(draw: st.DrawFn) -> list[np.ndarray]:
    shapes = draw(st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=4))
    return [
        np.array(
            draw(st.lists(VALUES, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), dtype=np.float64
        ).reshape(shape)
        for shape in shapes
    ]


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_select_as_a_full_sort(world: World, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(checks.LAYOUTS)))
    ws = data.draw(arrays())
    gs = [w[::-1].copy() if w.ndim and data.draw(st.booleans()) else None for w in ws]
    k = data.draw(st.integers(0, sum(w.size for w in ws)))
    few = data.draw(st.sampled_from([0, 8, 2048]))
    world.run(checks.selects_as_a_full_sort, layout, ws, gs, k, few, data.draw(DTYPES))


@each_layout
def test_uneven_and_empty_blocks_and_mass_ties_are_chosen_as_by_a_full_sort(world: World, layout: str) -> None:
    generator = np.random.default_rng(0)
    ws = [generator.standard_normal(shape) for shape in [(131, 7), (1, 5), (3, 2, 4)]]
    tied = [np.round(w, 1) for w in ws]
    for arrays_, k in ((ws, 100), (ws, 900), (tied, 100), (tied, 500), ([w * 0 + 1 for w in ws], 77)):
        for few in (0, 2048):
            world.run(checks.selects_as_a_full_sort, layout, arrays_, [None] * 3, k, few, torch.float32)


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_every_method_prunes_as_on_one_process(world: World, case: Case) -> None:
    world.run(checks.prunes_as_on_one_process, "fsdp over 2", case.name, 14, case.budget)


@pytest.mark.parametrize("way", list(checks.WAYS)[1:])
def test_however_a_model_is_shared_it_is_pruned_as_on_one_process(world: World, way: str) -> None:
    for name in ("gsm", "weightmom", "rigl"):
        world.run(checks.prunes_as_on_one_process, way, name, 5, None)
