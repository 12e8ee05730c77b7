"""Floor 2: what is compared. Terms, the one reduction, and the engine that fuses any pointwise loss with a head."""

from potstill.objective.objective import Counts, HeadRequest, Objective, Outcome
from potstill.objective.schedules import Schedule, cosine, linear, sigmoid_ramp
from potstill.objective.term import Term, term

__all__ = [
    "Counts",
    "HeadRequest",
    "Objective",
    "Outcome",
    "Schedule",
    "Term",
    "cosine",
    "linear",
    "sigmoid_ramp",
    "term",
]
