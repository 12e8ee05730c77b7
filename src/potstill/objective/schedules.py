"""Numbers that change while a run goes on: weights and knobs of terms.

A schedule is a function of (step, steps). An adaptive one also follows its term's loss; it holds no state itself, the
loop carries that from step to step, so that one objective serves several runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from potstill.core.catalog import part
from potstill.core.errors import RecipeError

State: TypeAlias = Mapping[str, float]
"""What an adaptive schedule knows after some steps: plain numbers, kept in checkpoints."""


class Adaptive(ABC):
    """A schedule that follows the loss of its term: as the mean over a whole optimizer step, all ranks included."""

    @abstractmethod
    def start(self) -> State:
        """The state before the first step."""

    @abstractmethod
    def value(self, state: State, step: int, steps: int) -> float:
        """The number for this step, which counts from 0; steps is the length of the run."""

    @abstractmethod
    def after_step(self, state: State, loss: float, step: int, steps: int) -> State:
        """The state once this step is done, given the term's loss in it."""


Schedule: TypeAlias = Callable[[int, int], float] | Adaptive
"""(step, steps) -> number, where step counts from 0 and steps is the length of the run; or one that adapts."""


def value_at(number: float | Schedule, step: int, steps: int, state: State | None = None) -> float:
    """A number as it is, or what a schedule says; an adaptive one without a state is at its start."""
    if isinstance(number, Adaptive):
        return number.value(number.start() if state is None else state, step, steps)
    return number(step, steps) if callable(number) else number


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


@part("schedule", paper="Shing et al. 2025")
def taid_schedule(*, start: float = 0.4, end: float = 1.0, speed: float = 5e-4, momentum: float = 0.99) -> Schedule:
    """The teacher's share in TAID's target: never below the line from start to end, ahead of it while the loss falls.

    For the knob `mix` of the loss taid. Each step adds speed * sigmoid(m) * (1 - share), m the running mean of the
    relative fall of the loss. Raises RecipeError for shares outside 0..1.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise RecipeError(f"taid_schedule: start {start} and end {end} must be 0 <= start <= end <= 1.")
    return Interpolation(start_share=start, end_share=end, speed=speed, momentum=momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation(Adaptive):
    """TAID's schedule. Its state: the share reached, the running mean m, the last loss (infinite before the first)."""

    start_share: float
    end_share: float
    speed: float
    momentum: float

    def start(self) -> State:
        return {"share": self.start_share, "trend": 0.0, "loss": math.inf}

    def value(self, state: State, step: int, steps: int) -> float:
        line = self.start_share + (self.end_share - self.start_share) * step / max(steps, 1)
        return min(self.end_share, max(line, state["share"]))

    def after_step(self, state: State, loss: float, step: int, steps: int) -> State:
        share = self.value(state, step, steps)
        if math.isinf(state["loss"]):
            return {"share": share, "trend": state["trend"], "loss": loss}
        # The epsilon of the published code: a loss of 0 then has fallen by nothing.
        fall = (state["loss"] - loss) / (state["loss"] + 1e-15)
        trend = self.momentum * state["trend"] + (1.0 - self.momentum) * fall
        moved = share + self.speed * _sigmoid(trend) * (1.0 - share)
        return {"share": min(self.end_share, moved), "trend": trend, "loss": loss}


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _fraction(begin: float, finish: float) -> Callable[[int, int], float]:
    """How far the run is between two fractions of its length: 0 before, 1 after."""
    if not 0.0 <= begin < finish <= 1.0:
        raise RecipeError(f"schedule: begin {begin} and finish {finish} must be 0 <= begin < finish <= 1.")
    return lambda step, steps: min(max((step / max(steps, 1) - begin) / (finish - begin), 0.0), 1.0)
