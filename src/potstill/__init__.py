"""Potstill: distil knowledge from teachers into students.

Nothing heavy is imported here: names below arrive on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill import data, evaluate, losses, students, teachers
    from potstill.core.types import Batch, Dense, Lesson, Need, Projection, Signal, Sparse
    from potstill.loops.fit import fit
    from potstill.objective import Objective, term
    from potstill.schemes.offline import Offline

__version__ = "0.1.0"

_HOMES = {
    "Batch": "potstill.core.types",
    "Dense": "potstill.core.types",
    "Lesson": "potstill.core.types",
    "Need": "potstill.core.types",
    "Objective": "potstill.objective",
    "Offline": "potstill.schemes.offline",
    "Projection": "potstill.core.types",
    "Signal": "potstill.core.types",
    "Sparse": "potstill.core.types",
    "fit": "potstill.loops.fit",
    "term": "potstill.objective",
}
_ROOMS = ("data", "evaluate", "losses", "objective", "report", "schemes", "stores", "students", "teachers")

__all__ = [
    "Batch",
    "Dense",
    "Lesson",
    "Need",
    "Objective",
    "Offline",
    "Projection",
    "Signal",
    "Sparse",
    "data",
    "evaluate",
    "fit",
    "losses",
    "students",
    "teachers",
    "term",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"potstill.{name}")
    raise AttributeError(f"potstill has no '{name}'. It has: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted(__all__)
