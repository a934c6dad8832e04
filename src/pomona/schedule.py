"""WHEN: numbers and events as functions of the optimizer step, counted from 1.

A schedule is a frozen value. Every hyper-parameter that accepts a schedule also accepts a plain number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias


class Schedule(ABC):
    """A number that depends on the step."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, step: int) -> float: ...


Value: TypeAlias = float | Schedule
FAR_AWAY = 2**53  # a step at which every schedule has ended


def value_at(value: Value, step: int) -> float:
    """The value at ``step``: that of a schedule, or the number itself."""
    return value(step) if isinstance(value, Schedule) else value


def highest(value: Value) -> float:
    """The largest value of a ramp or a constant; 0 for a schedule of unknown shape."""
    if isinstance(value, _Ramp):
        return max(value.start, value.end)
    if isinstance(value, Constant):
        return value.value
    return 0.0 if isinstance(value, Schedule) else value


def check_value(name: str, value: Value, *, low: float, high: float) -> None:
    """Refuse a hyper-parameter outside [low, high), with its name, its value and the way out.

    A schedule is checked at its ends: all schedules here are monotonic between them.
    """
    if isinstance(value, _Ramp):
        numbers: tuple[object, ...] = (value.start, value.end)
    else:
        numbers = (value.value if isinstance(value, Constant) else value,)
    for number in numbers:
        if isinstance(number, Schedule):
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number or a Schedule, got {number!r}")
        if not low <= number < high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {number}{_hint(number, low, high)}")


def check_count(name: str, count: int, *, low: int = 1) -> None:
    """Refuse a count, such as a number of steps, that is not an integer or is below ``low``."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if count < low:
        raise ValueError(f"{name} must be >= {low}, got {count}")


def check_never_falls(name: str, value: Value) -> None:
    """Refuse a falling ramp: for methods whose cut weights never return."""
    first, last = value_at(value, 0), value_at(value, FAR_AWAY)
    if first > last:
        raise ValueError(
            f"{name} must not fall, because a cut weight never returns, got {value}, from {first:g} to {last:g}; swap "
            f"its ends, or use GSM, whose weights return"
        )


def _hint(number: float, low: float, high: float) -> str:
    percent = number / 100
    return f" (did you mean {percent:g}?)" if number >= 10.0 * high and low <= percent < high else ""


@dataclass(frozen=True, slots=True)
class Constant(Schedule):
    """``value`` at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class _Ramp(Schedule):
    """From ``start`` to ``end``: ``start`` up to step ``begin``, ``end`` from step ``begin + steps`` on.

    Args:
        start: the value before the ramp.
        end: the value after it.
        steps: length of the ramp in optimizer steps, >= 1.
        begin: the last step that still has ``start``, >= 0.
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not (isinstance(self.start, (int, float)) and isinstance(self.end, (int, float))):
            raise TypeError(f"{name} needs numbers for start and end, got {self.start!r} and {self.end!r}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"{name} needs finite start and end, got {self.start} and {self.end}")
        if self.steps < 1:
            raise ValueError(f"{name}(steps=...) must be >= 1, got {self.steps}")
        if self.begin < 0:
            raise ValueError(f"{name}(begin=...) must be >= 0, got {self.begin}")

    def __call__(self, step: int) -> float:
        if step <= self.begin:
            return self.start  # not end + (start - end), which is rounded
        progress = min((step - self.begin) / self.steps, 1.0)
        return self.end + (self.start - self.end) * self._left(progress)

    def _left(self, progress: float) -> float:
        """Remaining share of the ramp, from 1 to 0 as ``progress`` goes from 0 to 1."""
        raise NotImplementedError


class Linear(_Ramp):
    """At constant speed: ``start + (end - start) p``."""

    __slots__ = ()

    def _left(self, progress: float) -> float:
        return 1.0 - progress


class Cubic(_Ramp):
    """Fast at first, then slow: ``end + (start - end) (1 - p)^3`` (Zhu & Gupta, arXiv 1710.01878, eq. 1)."""

    __slots__ = ()

    def _left(self, progress: float) -> float:
        return (1.0 - progress) ** 3


class Cosine(_Ramp):
    """Slow at both ends: ``end + (start - end) (1 + cos(pi p)) / 2`` (the shape of arXiv 1608.03983, eq. 5)."""

    __slots__ = ()

    def _left(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class Geometric(_Ramp):
    """By the same factor at each step: ``start (end / start)^p``; both ends above 0."""

    __slots__ = ()

    def __post_init__(self) -> None:
        _Ramp.__post_init__(self)
        if self.start <= 0 or self.end <= 0:
            raise ValueError(f"Geometric needs start and end above 0, got {self.start} and {self.end}")

    def __call__(self, step: int) -> float:
        if step <= self.begin:
            return self.start
        if step >= self.begin + self.steps:
            return self.end  # not start * (end / start), which is rounded
        value: float = self.start * (self.end / self.start) ** ((step - self.begin) / self.steps)
        return value


@dataclass(frozen=True, slots=True)
class Every:
    """An event every ``n`` steps: true at ``start``, ``start + n``, ... up to and including ``end``.

    Args:
        n: period in optimizer steps, >= 1.
        start: first step of the event, >= 1.
        end: last step at which it may happen; None: no limit.
    """

    n: int
    start: int = 1
    end: int | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(number, int) for number in (self.n, self.start, self.end or 1)):
            raise TypeError(f"Every counts whole steps, got {self}")
        if self.n < 1 or self.start < 1:
            raise ValueError(f"Every needs n >= 1 and start >= 1, got n={self.n}, start={self.start}")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"Every(end=...) must be >= start ({self.start}), got {self.end}")

    def __call__(self, step: int) -> bool:
        if step < self.start or (self.end is not None and step > self.end):
            return False
        return (step - self.start) % self.n == 0
