"""What a run was asked to do, checked once, and compared with what an earlier run in the same folder was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from potstill.core.errors import RecipeError, unknown
from potstill.loops.optimise import SCHEDULES, check_optimizer
from potstill.objective import Objective

Schedule = Literal["constant", "linear", "cosine", "step"]
Precision = Literal["fp32", "bf16"]
Sharding = Literal["replicate", "shard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `fit` that decide the numbers. Raises RecipeError for a value that cannot work."""

    steps: int
    lr: float
    accumulate: int
    optimizer: str
    momentum: float
    weight_decay: float
    schedule: Schedule
    warmup: int
    milestones: tuple[float, ...]
    clip: float | None
    precision: Precision
    sharding: Sharding
    compile: bool
    train: tuple[str, ...]
    stage: int
    seed: int

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("accumulate", 1), ("warmup", 0), ("stage", 0), ("seed", 0)):
            at_least(name, getattr(self, name), low)
        _require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a finite number above 0")
        _require(0.0 <= self.momentum < 1.0, "momentum", self.momentum, "a number from 0 to below 1")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more"
        )
        _require(self.warmup < self.steps, "warmup", self.warmup, f"fewer than the {self.steps} steps of the run")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a gradient norm above 0, or none")
        _require(all(0.0 < m < 1.0 for m in self.milestones), "milestones", self.milestones, "fractions of the run")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("sharding", self.sharding, ("replicate", "shard"))
        check_optimizer(self.optimizer)

    def fingerprint(
        self, objective: Objective, *, processes: int, parameters: int, stores: Sequence[str]
    ) -> dict[str, object]:
        """All that must agree for a run to be continued, as it reads back from JSON. stores: their identities."""
        terms = [f"{label} {term.describe()}" for label, term in zip(objective.labels, objective.terms, strict=True)]
        written = {**asdict(self), "processes": processes, "parameters": parameters, "objective": ", ".join(terms)}
        return dict(json.loads(json.dumps(written | ({"stores": list(stores)} if stores else {}))))


def compare(folder: Path, stored: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Raises RecipeError naming what differs between the run in `folder` and the one that is asked for now."""
    different = [name for name in asked if stored.get(name) != asked[name]]
    if different:
        said = "; ".join(f"with {name} {stored.get(name)}, this one says {asked[name]}" for name in different)
        raise RecipeError(f"{folder} holds a run {said}; choose another out= or delete the folder.")


def at_least(name: str, value: int, low: int) -> None:
    _require(not isinstance(value, bool) and value >= low, name, value, f"a whole number, at least {low}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown(f"fit.{name}", value, known, noun=name)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise RecipeError(f"fit.{name}: found {found}, expected {expected}.")
