"""Several ranks prune as one process does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed import checks
from tests.distributed.world import World
from tests.selection.test_selection import DTYPES, VALUES
from tests.test_contract import METHODS, Case


def by_default(names: Iterable[str], *chosen: str) -> list[Any]:
    """All of them; those that are not chosen in `make check` only."""
    return [pytest.param(name, marks=[pytest.mark.check] * (name not in chosen)) for name in names]


def can_share(way: str, case: Case) -> bool:
    if case.name == "admm by layer":  # its densities are for the layers of the contract's network
        return checks.has_plain_layers(way)
    if case.method.granularity in ("1:2", "1x2"):  # its groups would lie on two ranks, or there are none
        return checks.keeps_pairs_of_inputs(way)
    return True


each_layout = pytest.mark.parametrize(
    "layout", by_default(checks.LAYOUTS, "rows over 3", "columns and rows", "four copies")
)
# Of each method its first line in the table that prunes single weights; the other lines in `make check`.
FIRST = {type(case.method): case.name for case in reversed(METHODS) if case.method.granularity == "weight"}
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.check] * (case.name not in FIRST.values()))
        for case in METHODS
    ],
)


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
@settings(max_examples=settings().max_examples // 7, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_select_as_a_full_sort(world: World, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(checks.LAYOUTS)))
    ws = data.draw(arrays())
    gs = [w[::-1].copy() if w.ndim and data.draw(st.booleans()) else None for w in ws]
    k = data.draw(st.integers(0, sum(w.size for w in ws)))
    changed = data.draw(st.sampled_from(checks.VARIANTS))
    world.run(checks.selects_as_a_full_sort, layout, ws, gs, k, data.draw(DTYPES), changed)


@each_layout
def test_uneven_and_empty_blocks_and_mass_ties_are_chosen_as_by_a_full_sort(world: World, layout: str) -> None:
    generator = np.random.default_rng(0)
    ws = [generator.standard_normal(shape) for shape in [(131, 7), (1, 5), (3, 2, 4)]]
    tied = [np.round(w, 1) for w in ws]
    ones = [np.ones_like(w) for w in ws]
    cases = [(tied, 500), (ones, 77), (ws, 900), (ws, 100), (tied, 100)]
    for (drawn, k), changed in zip(cases, checks.VARIANTS, strict=True):
        world.run(checks.selects_as_a_full_sort, layout, drawn, [None] * 3, k, torch.float32, changed)


@pytest.mark.parametrize("granularity", by_default(["2:4", "1x4", "2x1", "channel", "input channel"], "2:4"))
def test_ranks_keep_the_groups_that_one_process_does_or_say_why_not(world: World, granularity: str) -> None:
    generator = np.random.default_rng(0)
    ws = [generator.standard_normal(shape) * scale for shape, scale in [((12, 8), 1), ((4, 16, 3), 2), ((2, 4), 0.1)]]
    tied = [np.round(w) for w in ws]
    refused = []
    for layout in checks.LAYOUTS:
        for drawn, k, allocation in [(ws, 148, "global"), (tied, 148, "global"), (ws, 200, "uniform")]:
            told = world.run(checks.groups_as_on_one_process, layout, drawn, k, granularity, allocation)
            here = {one for one in told if one != "not there"}
            assert len(here) == 1  # all ranks alike
            refused += [layout] if here != {"as one"} else []
            if here != {"as one"}:
                assert "that lie on two ranks; shard it along another dimension" in here.pop()
    torn = {
        "2:4": {"columns over 2", "rows and columns", "columns and rows", "columns, two copies"},
        "1x4": {"columns over 2", "rows and columns", "columns and rows", "columns, two copies"},
        "2x1": {
            "rows over 2",
            "rows over 3",
            "rows over 4",
            "rows and columns",
            "columns and rows",
            "rows twice",
            "rows, two copies",
        },
    }
    assert set(refused) == torn.get(granularity, set())


@each_case
def test_every_method_prunes_as_on_one_process(world: World, case: Case) -> None:
    world.run(checks.prunes_as_on_one_process, "fsdp over 2", case.name, 14, case.budget)


@pytest.mark.parametrize("way", by_default(list(checks.WAYS)[1:], "fsdp over 3, uneven", "tensor parallel over 2"))
def test_however_a_model_is_shared_it_is_pruned_as_on_one_process(world: World, way: str) -> None:
    world.run(checks.prunes_as_on_one_process, way, "gsm", 4, None)


@pytest.mark.check
@pytest.mark.parametrize(
    ("way", "case"),
    [
        pytest.param(way, case, id=f"{case.name}-{way}")
        for case in METHODS
        for way in list(checks.WAYS)[1:]
        if can_share(way, case)
    ],
)
def test_however_a_model_is_shared_every_method_prunes_as_on_one_process(world: World, way: str, case: Case) -> None:
    world.run(checks.prunes_as_on_one_process, way, case.name, 9, None)


def test_a_step_of_gsm_sends_five_small_sums_or_six_with_a_tie(world: World) -> None:
    for steps in world.run(checks.traffic_of_gsm):
        for i, sent in enumerate(steps):
            if i % 5 == 0:  # at its first step a run asks which tensors are zero
                assert sent.pop(1) <= 16
            # whether to skip; three histograms; what each of up to six tensors keeps; who stays of a tie
            assert len(sent) in (5, 6)
            assert sent[:4] == [8, 2048 * 8, 1024 * 8, 1024 * 8]
            assert max(sent[4:]) <= 16 * 1024
            assert sum(sent) < 40 * 1024


@pytest.mark.parametrize("way", by_default(checks.WAYS, "fsdp over 2"))
def test_zeros_at_the_start_learn_as_on_one_process(world: World, way: str) -> None:
    world.run(checks.learns_zeros_as_on_one_process, way)


def test_a_nan_on_one_rank_is_skipped_on_all(world: World) -> None:
    assert world.run(checks.a_nan_on_one_rank_is_skipped_on_all)[:2] == [(3, 1)] * 2


def test_a_step_counts_on_all_ranks_or_on_none(world: World) -> None:
    assert world.run(checks.a_step_without_rates_counts_where_one_rank_has_a_gradient)[:2] == [1, 1]


def test_what_would_prune_wrongly_is_refused_on_all_ranks(world: World) -> None:
    first, second, *_ = world.run(checks.what_is_refused)
    assert first == second
    expected = {
        "global_top_k": "pass of=weights",
        "kth_largest": "pass of=weights",
        "others": "of must be the weights that the scores are of",
        "shape of state": "Shaped remembers rows of shape (5,) for 0.weight",
        "too early, step": "0.weight was no DTensor when the Pruner was made and has been replaced since",
        "too early, harden": "shard first (fully_shard, parallelize_module), then make the optimizer, then the Pruner",
        "partial": "0.weight is placed as P(sum); only weights placed as Shard or Replicate can be pruned",
        "scattered": "0.weight is placed as (_StridedShard(dim=0, sf=2),), so that a rank does not hold one contiguous",
        "two meshes": "2.weight is on DeviceMesh((dp=3)",
        "gradient": "the gradient of 0.weight is placed as (Partial(sum),) and the weight as (Shard(dim=0),)",
        "methods": "granularity='weight', score='magnitude', zeros='learn') for 2 tensors",
        "fsdp1": "use its successor, torch.distributed.fsdp.fully_shard",
        "deepspeed": "DeepSpeedEngine belongs to DeepSpeed, which flattens the weights",
    }
    for name, message in expected.items():
        assert message in first[name], (name, first[name])
    assert first.keys() == expected.keys()


def test_a_plain_tensor_among_sharded_ones_counts_once(world: World) -> None:
    report, *_ = world.run(checks.whole_and_shared_weights_in_one_scope)
    assert (report.total, report.nonzero) == (72, 18)


def test_mixed_precision_prunes_the_weights_in_float32(world: World) -> None:
    assert world.run(checks.mixed_precision)[:2] == [18, 18]


def test_what_is_frozen_is_left_alone_on_all_ranks(world: World) -> None:
    (survivors, frozen), second, *_ = world.run(checks.what_is_frozen_is_left)
    assert second == (survivors, frozen)
    assert 18 < survivors < 72 and frozen > 12


def test_zeros_are_held_and_copied(world: World) -> None:
    assert world.run(checks.holds_zeros_and_those_of_copies)[:2] == [36, 36]


def test_verify_tells_which_copies_differ(world: World) -> None:
    for message in world.run(checks.copies_that_differ_are_told):
        assert "2.weight is not the same on all ranks" in message
        assert "0.weight" not in message
        assert "another rank does not have 0 steps" in message


def test_data_parallel_ranks_prune_alike_without_a_word_and_tell_of_drift(world: World) -> None:
    for num_calls, errors in world.run(checks.data_parallel):
        assert num_calls == 0
        *before, at_check, at_end = [message for message in errors if message != "no error"]
        assert before == []
        # By then the masks differ, and so do all weights.
        assert "module.0.weight, module.2.weight differ between the ranks of" in at_check
        assert "at step 16" in at_check
        assert "module.2.weight is not the same on all ranks" in at_end


@pytest.mark.parametrize("name", ["gsm", "weightmom"])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(world: World, name: str, tmp_path: Path) -> None:
    """2 -> 1 -> 3 -> a process without ranks -> 2, with the cut on the way, as if it had never stopped."""
    files = ["", *(str(tmp_path / str(i)) for i in range(4)), ""]
    for i, size in enumerate((2, 1, 3, 0, 2)):
        *_, first, second, _, _ = [None, *world.run(checks.go_on, size, name, files[i], files[i + 1], 4 * i, 4)]
    unbroken = world.run(checks.go_on, 0, name, "", "", 0, 20)[0]
    assert first == second == unbroken


def test_a_state_loads_however_it_was_laid_out(world: World) -> None:
    world.run(checks.a_whole_state_is_taken_apart)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7, 8, 9, 13])
def test_blocks_are_where_they_are_said_to_be(world: World, rows: int) -> None:
    """What torch cuts, FSDP over tensor parallelism too, evenly or not, is where the shard says; nothing is refused."""
    assert world.run(checks.blocks_are_where_they_are_said_to_be, rows, 6) == [[]] * 4


def test_an_overflow_on_one_rank_is_skipped_on_all(world: World) -> None:
    assert world.run(checks.a_loss_scale_and_an_overflow_on_one_rank)[:2] == [(4, 0, 512.0)] * 2
