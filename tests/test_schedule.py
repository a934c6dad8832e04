"""WHEN: each schedule at its ends and its middle, worked out by hand, and what is refused at the door."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.methods.gsm import GSM
from pomona.schedule import (
    Constant,
    Cosine,
    Cubic,
    Every,
    Geometric,
    Linear,
    Schedule,
    Value,
    check_count,
    check_value,
    highest,
    value_at,
)

RAMPS = [Linear, Cubic, Cosine]

fast = settings(deadline=None)


# ramps

# A quarter of the way, half, three quarters: what is left is, by hand,
#   Linear 3/4, 1/2, 1/4;  Cubic 27/64, 1/8, 1/64;  Cosine (1 + cos(pi p)) / 2 = (2 + sqrt 2)/4, 1/2, (2 - sqrt 2)/4
LEFT = {
    Linear: (3 / 4, 1 / 2, 1 / 4),
    Cubic: (27 / 64, 1 / 8, 1 / 64),
    Cosine: ((2 + math.sqrt(2)) / 4, 1 / 2, (2 - math.sqrt(2)) / 4),
}


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_up_by_hand(ramp: type[Any]) -> None:
    schedule = ramp(0.0, 1.0, 4)
    expected = [0.0, *(1 - left for left in LEFT[ramp]), 1.0]
    # Linear and Cubic are exact in binary; the cosine is rounded, and once more by the subtraction: 4 ulp of 1.
    assert [schedule(step) for step in range(5)] == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_down_with_an_offset_by_hand(ramp: type[Any]) -> None:
    schedule = ramp(8.0, 2.0, 8, begin=100)
    expected = [8.0, *(2 + 6 * left for left in LEFT[ramp]), 2.0]
    assert [schedule(step) for step in (100, 102, 104, 106, 108)] == pytest.approx(expected, rel=0, abs=1e-14)


@pytest.mark.parametrize("ramp", RAMPS)
def test_before_and_after_the_ramp_nothing_moves(ramp: type[Any]) -> None:
    schedule = ramp(0.0, 0.9, 10, begin=5)
    assert [schedule(step) for step in (0, 1, 4, 5)] == [0.0] * 4
    assert [schedule(step) for step in (15, 16, 10**9)] == [0.9] * 3
    assert 0.0 < schedule(6) < schedule(14) < 0.9


def test_cubic_is_the_formula_of_zhu_and_gupta() -> None:
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0.1, s_f = 0.85, t_0 = 20, n dt = 50, at t = 30
    assert Cubic(0.1, 0.85, 50, begin=20)(30) == pytest.approx(0.85 - 0.75 * 0.512, rel=1e-15)


def test_a_ramp_of_one_step_is_a_jump() -> None:
    assert [Linear(0.0, 0.9, 1, begin=3)(step) for step in (3, 4)] == [0.0, 0.9]


@pytest.mark.parametrize("ramp", RAMPS)
@given(
    start=st.floats(-1e6, 1e6),
    end=st.floats(-1e6, 1e6),
    steps=st.integers(1, 1000),
    begin=st.integers(0, 1000),
    step=st.integers(0, 3000),
)
@fast
def test_ramps_are_monotone_and_stay_between_their_ends(
    ramp: type[Any], start: float, end: float, steps: int, begin: int, step: int
) -> None:
    schedule = ramp(start, end, steps, begin)
    sign = 1 if end >= start else -1
    assert sign * schedule(step) <= sign * schedule(step + 1)
    assert sign * schedule(step + 1) <= sign * end


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=st.floats(0.0, 1.0), end=st.floats(0.0, 1.0), steps=st.integers(1, 1000))
@fast
def test_the_end_of_a_ramp_is_exactly_its_end(ramp: type[Any], start: float, end: float, steps: int) -> None:
    assert ramp(start, end, steps)(steps) == end


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_start_of_a_ramp_is_exactly_its_start(ramp: type[Any]) -> None:
    assert ramp(0.1, 0.9, 10)(0) == 0.1


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_between_equal_ends_is_constant(ramp: type[Any]) -> None:
    assert {ramp(0.3, 0.3, 7)(step) for step in range(10)} == {0.3}


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0.0, math.nan, 10), "{} needs finite start and end, got 0.0 and nan"),
        ((-math.inf, 0.9, 10), "{} needs finite start and end, got -inf and 0.9"),
        ((0.0, 0.9, 0), "{}(steps=...) must be >= 1, got 0"),
        ((0.0, 0.9, -5), "{}(steps=...) must be >= 1, got -5"),
        ((0.0, 0.9, 10, -1), "{}(begin=...) must be >= 0, got -1"),
    ],
)
def test_a_bad_ramp_is_refused_by_its_own_name(ramp: type[Any], arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told.format(ramp.__name__))}$"):
        ramp(*arguments)


def test_a_ramp_of_strings_is_refused_by_its_own_name() -> None:
    with pytest.raises(TypeError, match="Linear"):
        Linear("0.0", "0.9", 10)  # type: ignore[arg-type]


# Geometric, whose ends must both be above 0


def test_geometric_by_hand() -> None:
    assert [Geometric(1.0, 16.0, 4)(step) for step in range(6)] == [1.0, 2.0, 4.0, 8.0, 16.0, 16.0]
    down = Geometric(1e-2, 1e-4, 4, begin=10)
    assert [down(step) for step in (9, 10)] == [1e-2] * 2
    assert [down(step) for step in (12, 14)] == pytest.approx([1e-3, 1e-4], rel=1e-14)


def test_geometric_is_monotone_in_equal_factors_over_three_decades() -> None:
    # rho of ADMM, say. The value is computed as a way between the ends: each is within 4 ulp of the larger end.
    schedule = Geometric(1e-4, 1e-1, 30)
    values = [schedule(step) for step in range(31)]
    assert values[0] == 1e-4 and values[-1] == 1e-1
    factors = [after / before for before, after in pairwise(values)]
    assert factors == pytest.approx([10**0.1] * 30, rel=1e-12)


@given(start=st.floats(1e-6, 1e6), end=st.floats(1e-6, 1e6), steps=st.integers(1, 1000), begin=st.integers(0, 1000))
@fast
def test_geometric_moves_one_way_between_its_ends(start: float, end: float, steps: int, begin: int) -> None:
    schedule = Geometric(start, end, steps, begin)
    assert schedule(begin) == start
    assert schedule(begin + steps) == schedule(begin + steps + 1) == pytest.approx(end, rel=1e-15)
    middle = [schedule(begin + step) for step in range(0, steps + 1, max(steps // 7, 1))]
    slack = 4 * math.ulp(max(start, end))
    assert min(start, end) - slack <= min(middle) and max(middle) <= max(start, end) + slack
    rising = middle if end >= start else middle[::-1]
    assert all(after >= before - slack for before, after in pairwise(rising))


def test_the_end_of_geometric_is_exactly_its_end() -> None:
    assert Geometric(1e-06, 956022.7097860768, 5)(5) == 956022.7097860768


def test_geometric_is_accurate_over_twelve_decades() -> None:
    assert Geometric(1e-12, 1.0, 12)(1) == pytest.approx(1e-11, rel=1e-12, abs=0.0)


def test_geometric_between_equal_ends_is_constant() -> None:
    assert {Geometric(0.3, 0.3, 7)(step) for step in range(10)} == {0.3}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0.0, 0.9, 10), "Geometric needs start and end above 0, got 0.0 and 0.9"),
        ((0.9, 0, 10), "Geometric needs start and end above 0, got 0.9 and 0"),
        ((-1.0, 1.0, 10), "Geometric needs start and end above 0, got -1.0 and 1.0"),
        ((1.0, math.nan, 10), "Geometric needs finite start and end, got 1.0 and nan"),
        ((1.0, math.inf, 10), "Geometric needs finite start and end, got 1.0 and inf"),
        ((1.0, 2.0, 0), "Geometric(steps=...) must be >= 1, got 0"),
        ((1.0, 2.0, 1, -1), "Geometric(begin=...) must be >= 0, got -1"),
    ],
)
def test_a_bad_geometric_is_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        Geometric(*arguments)


def test_geometric_is_checked_like_any_ramp() -> None:
    assert highest(Geometric(1e-3, 1e-1, 10)) == highest(Geometric(1e-1, 1e-3, 10)) == 1e-1
    with pytest.raises(ValueError, match=r"rho must be in \[0, 1\), got 2\.0"):
        check_value("rho", Geometric(0.1, 2.0, 10), low=0.0, high=1.0)


# schedules are values


@pytest.mark.parametrize(
    "schedule",
    [Constant(0.5), Linear(0.0, 0.9, 3), Cubic(0.0, 0.9, 3), Cosine(0.0, 0.9, 3), Geometric(0.1, 0.9, 3)],
)
def test_schedules_are_frozen_values(schedule: Any) -> None:
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == copy.deepcopy(schedule)
    assert hash(again) == hash(schedule)
    assert eval(repr(schedule)) == schedule  # what is printed can be typed
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):  # which of them depends on the Python
        schedule.end = 0.1


def test_ramps_of_another_shape_are_not_equal() -> None:
    linear: Schedule = Linear(0.0, 0.9, 3)
    assert linear != Cubic(0.0, 0.9, 3)
    assert linear != Linear(0.0, 0.9, 4)


def test_a_constant_is_its_value_at_every_step() -> None:
    assert [Constant(0.9)(step) for step in (0, 1, 10**9)] == [0.9] * 3


@pytest.mark.parametrize(("value", "number"), [(0.9, 0.9), (0, 0), (Constant(0.9), 0.9), (Linear(0.0, 1.0, 4), 0.25)])
def test_a_number_is_accepted_where_a_schedule_is(value: Value, number: float) -> None:
    assert value_at(value, 1) == number


# Every


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Every(1), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (Every(3), [1, 4, 7]),
        (Every(3, start=2), [2, 5, 8]),
        (Every(3, start=2, end=5), [2, 5]),
        (Every(3, start=2, end=7), [2, 5]),
        (Every(4, start=4, end=4), [4]),
        (Every(100, start=9), [9]),
        (Every(2, start=10), []),
    ],
)
def test_events_by_hand(every: Every, steps: list[int]) -> None:
    assert [step for step in range(10) if every(step)] == steps


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 40))
@fast
def test_events_are_a_range(n: int, start: int, length: int) -> None:
    every = Every(n, start, start + length)
    assert [step for step in range(100) if every(step)] == list(range(start, start + length + 1, n))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0,), "Every needs n >= 1 and start >= 1, got n=0, start=1"),
        ((-2,), "Every needs n >= 1 and start >= 1, got n=-2, start=1"),
        ((2, 0), "Every needs n >= 1 and start >= 1, got n=2, start=0"),
        ((2, 5, 4), "Every(end=...) must be >= start (5), got 4"),
    ],
)
def test_a_bad_period_is_refused(arguments: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        Every(*arguments)


def test_a_broken_period_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="Every"):
        Every(2.5)  # type: ignore[arg-type]


# check_value


@pytest.mark.parametrize(
    "value", [0, 0.0, 0.9, 0.999999, np.float64(0.9), Linear(0.0, 0.9, 10), Cubic(0.5, 0.0, 1), Constant(0.9)]
)
def test_what_is_in_range_passes(value: Value) -> None:
    check_value("sparsity", value, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (90, "sparsity must be in [0, 1), got 90 (did you mean 0.9?)"),
        (99.5, "sparsity must be in [0, 1), got 99.5 (did you mean 0.995?)"),
        (100, "sparsity must be in [0, 1), got 100"),
        (-0.1, "sparsity must be in [0, 1), got -0.1"),
        (math.nan, "sparsity must be in [0, 1), got nan"),
        (math.inf, "sparsity must be in [0, 1), got inf"),
        (-math.inf, "sparsity must be in [0, 1), got -inf"),
        (Linear(0.0, 90.0, 10), "sparsity must be in [0, 1), got 90.0 (did you mean 0.9?)"),
        (Cubic(-0.1, 0.9, 10), "sparsity must be in [0, 1), got -0.1"),
        (Cosine(0.0, 100.0, 10), "sparsity must be in [0, 1), got 100.0"),
    ],
)
def test_a_number_out_of_range_is_told_with_the_way_out(value: Value, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        check_value("sparsity", value, low=0.0, high=1.0)


@pytest.mark.parametrize("value", [True, False, "0.9", None, [0.9], Every(3)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    told = f"sparsity must be a number or a Schedule, got {value!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(told)}$"):
        check_value("sparsity", value, low=0.0, high=1.0)


def test_the_range_in_the_message_is_the_one_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^rho must be in \[0\.5, 20\), got 0\.1$"):
        check_value("rho", 0.1, low=0.5, high=20.0)
    with pytest.raises(ValueError, match=r"^rho must be in \[0\.5, 20\), got 30$"):  # 0.3 would be no help
        check_value("rho", 30, low=0.5, high=20.0)


def test_a_schedule_of_ones_own_is_taken_at_its_word() -> None:
    @dataclass(frozen=True)
    class Steps(Schedule):
        def __call__(self, step: int) -> float:
            return 0.0 if step < 10 else 0.9

    check_value("sparsity", Steps(), low=0.0, high=1.0)
    assert value_at(Steps(), 10) == 0.9


@pytest.mark.parametrize("value", [90, -0.1, math.nan])
def test_a_constant_out_of_range_is_refused_like_the_number(value: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        GSM(sparsity=Constant(value))


def test_one_is_not_mistaken_for_one_percent() -> None:
    with pytest.raises(ValueError, match=r"got 1\.0$"):
        check_value("sparsity", 1.0, low=0.0, high=1.0)


# counts


@pytest.mark.parametrize(("count", "low"), [(1, 1), (0, 0), (10**12, 1)])
def test_a_count_passes(count: int, low: int) -> None:
    check_count("every", count, low=low)


@pytest.mark.parametrize(
    ("count", "error", "told"),
    [
        (0, ValueError, "every must be >= 1, got 0"),
        (-5, ValueError, "every must be >= 1, got -5"),
        (1.0, TypeError, "every must be an integer, got 1.0"),
        (True, TypeError, "every must be an integer, got True"),
        (None, TypeError, "every must be an integer, got None"),
        ("10", TypeError, "every must be an integer, got '10'"),
    ],
)
def test_what_is_no_count_is_refused(count: int, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(told)}$"):
        check_count("every", count)
