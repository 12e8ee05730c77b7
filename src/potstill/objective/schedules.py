"""Weights that change while a run goes on: functions of (step, steps)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from potstill.core.catalog import part
from potstill.core.errors import RecipeError

Schedule: TypeAlias = Callable[[int, int], float]
"""(step, steps) -> weight, where step counts from 0 and steps is the length of the run."""


@part("schedule")
def linear(*, start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> Schedule:
    """From start to end in a straight line between the fractions begin and finish of the run."""
    fraction = _fraction(begin, finish)
    return lambda step, steps: start + (end - start) * fraction(step, steps)


@part("schedule")
def cosine(*, start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> Schedule:
    """From start to end along half a cosine between the fractions begin and finish of the run."""
    fraction = _fraction(begin, finish)
    return lambda step, steps: end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction(step, steps)))


@part("schedule", paper="Tarvainen and Valpola 2017")
def sigmoid_ramp(*, end: float, finish: float = 0.4) -> Schedule:
    """end * exp(-5 (1 - t)^2), t from 0 to 1 over the first `finish` of the run (Laine and Aila's ramp-up)."""
    fraction = _fraction(0.0, finish)
    return lambda step, steps: end * math.exp(-5.0 * (1.0 - fraction(step, steps)) ** 2)


def _fraction(begin: float, finish: float) -> Callable[[int, int], float]:
    """How far the run is between two fractions of its length: 0 before, 1 after."""
    if not 0.0 <= begin < finish <= 1.0:
        raise RecipeError(f"schedule: begin {begin} and finish {finish} must be 0 <= begin < finish <= 1.")
    return lambda step, steps: min(max((step / max(steps, 1) - begin) / (finish - begin), 0.0), 1.0)
