"""One line of an objective: a loss, its weight, its knobs and the layers it looks at, checked when it is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from potstill.core.catalog import Card, card, check_keywords, find
from potstill.core.errors import DataError, RecipeError
from potstill.core.types import IGNORED, Batch, PerExample, PerItem
from potstill.objective.schedules import Schedule

LOGITS = frozenset({"student_logits", "teacher_logits"})
ONE_LAYER = frozenset({"student_feature", "teacher_feature"})
ALL_LAYERS = frozenset({"student_features", "teacher_features"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A loss ready to be asked. Make it with `term(...)`, which checks every field."""

    loss: Callable[..., Tensor]
    card: Card
    weight: float | Schedule
    at: tuple[tuple[str, str], ...]
    """(student layer, teacher layer) pairs."""
    reads: tuple[str, ...]
    """The positional-only parameters of the loss, in order."""
    per_item: bool

    @property
    def reads_features(self) -> bool:
        return any(name in ONE_LAYER or name in ALL_LAYERS for name in self.reads)

    @property
    def pointwise(self) -> bool:
        """It looks at each position's logits alone, so it can be computed in chunks."""
        return self.per_item and "student_logits" in self.reads and not self.reads_features and "mask" not in self.reads

    def head_outputs(self) -> tuple[str, ...]:
        """What it reads from the student's training head beyond the feature itself."""
        known = LOGITS | ONE_LAYER | ALL_LAYERS
        return tuple(name for name in self.reads if name.startswith("student_") and name not in known)

    def weight_at(self, step: int, steps: int) -> float:
        return self.weight(step, steps) if callable(self.weight) else self.weight

    def counted(self, batch: Batch) -> Tensor:
        """bool, the positions (or, per example, the rows) that this term counts. Depends on masks and labels only."""
        counted = batch.mask
        if "labels" in self.reads and self.card.labels == "classes" and batch.labels.shape == counted.shape:
            counted = counted & (batch.labels != IGNORED)
        return counted if self.per_item or counted.ndim == 1 else counted.flatten(1).any(dim=1)


def term(
    loss: Callable[..., Tensor] | str,
    weight: float | Schedule = 1.0,
    /,
    *,
    at: Mapping[str, str] | Sequence[str] = (),
    place: str = "term",
    **knobs: Any,
) -> Term:
    """A loss (function, catalog name or `package.module:name`) with its weight, layers and knobs.

    `at` pairs student layers with teacher layers: {"layer2": "layer3"}, or ["layer2"] where the names agree.
    `place` is what error messages call this term. Raises RecipeError for anything that cannot work.
    """
    function: Callable[..., Tensor] = find("loss", loss, place=f"{place}.use") if isinstance(loss, str) else loss
    check_keywords(function, knobs, place=place)
    pairs = tuple(at.items()) if isinstance(at, Mapping) else tuple((name, name) for name in at)
    reads = _positional(function)
    made = Term(
        loss=partial(function, **knobs) if knobs else function,
        card=card(function),
        weight=_checked(weight, place),
        at=pairs,
        reads=reads,
        per_item=_is_per_item(function, place),
    )
    _check_layers(made, place)
    return made


def _positional(function: Callable[..., Tensor]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)


def _is_per_item(function: Callable[..., Tensor], place: str) -> bool:
    returned = get_type_hints(function, include_extras=True).get("return")
    if returned not in (PerItem, PerExample):
        raise RecipeError(
            f"{place}: {card(function).name} does not say how it counts. "
            "Annotate what it returns: PerItem (one value per position) or PerExample (one per example)."
        )
    return bool(returned == PerItem)


def _checked(weight: float | Schedule, place: str) -> float | Schedule:
    if callable(weight):
        return weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RecipeError(f"{place}.weight: found {weight!r}, expected a finite number or a schedule.")
    return float(weight)


def _check_layers(made: Term, place: str) -> None:
    name = made.card.name
    if made.reads_features and not made.at:
        raise RecipeError(
            f"{place}.at: {name} compares layers, but none is named. Say which, for example at: {{layer2: layer2}}."
        )
    if made.at and not made.reads_features:
        raise RecipeError(f"{place}.at: {name} does not look at layers, so 'at' would be ignored. Remove it.")
    if made.head_outputs() and not made.card.head:
        raise RecipeError(
            f"{place}: {name} reads '{made.head_outputs()[0]}', which only a training head gives; "
            "name one with @part('loss', head=...)."
        )
    if not made.reads:
        raise RecipeError(
            f"{place}: {name} reads nothing. What a loss reads are its positional-only parameters, "
            "such as (student_logits, teacher_logits, /)."
        )


def check_labels(labels: Tensor, *, num_classes: int, card: Card) -> None:
    """Refuse labels of the wrong kind, and class ids outside the student's classes.

    On accelerators the kernels themselves stop on such ids; looking here would cost a synchronisation.
    """
    if labels.is_floating_point() != (card.labels == "numbers"):
        kinds = {True: "numbers", False: "class ids"}
        raise DataError(
            f"{card.name}: the labels are {kinds[labels.is_floating_point()]}, where {card.name} expects "
            f"{kinds[card.labels == 'numbers']}. Choose a loss for the labels that the data has."
        )
    if labels.is_floating_point() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = torch.aminmax(labels)
    if int(low) < 0 or int(high) >= num_classes:
        found = int(high) if int(high) >= num_classes else int(low)
        raise DataError(
            f"{card.name}: label {found} is outside the student's {num_classes} classes (0 to {num_classes - 1}). "
            "Check the labels, or give the student more classes."
        )
