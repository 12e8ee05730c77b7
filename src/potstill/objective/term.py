"""One line of an objective: a loss, its weight, its knobs and the layers it looks at, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from potstill.core.catalog import Card, card, check_keywords, find, keywords
from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import IGNORED, Batch, PerExample, PerItem
from potstill.objective.schedules import Adaptive, Schedule, State, value_at
from potstill.objective.selection import LOGITS, Top, Weight, positional, weighted

ONE_LAYER = frozenset({"student_feature", "teacher_feature"})
ALL_LAYERS = frozenset({"student_features", "teacher_features"})
FACTORS_OF = {side: (f"{side}_states", f"{side}_head") for side in ("student", "teacher")}
FACTORS = frozenset(name for names in FACTORS_OF.values() for name in names)
"""The two factors of a Projection: what the head is given, [B, T, H], and its weight, [V, H], without a gradient."""
SPAN = "teacher_span"
"""Who reads this looks at the positions of a span together (losses/spans)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A loss ready to be asked. Make it with `term(...)`, which checks every field."""

    loss: Callable[..., Tensor]
    """Its fixed knobs are bound."""
    card: Card
    weight: float | Schedule
    at: tuple[tuple[str, str], ...]
    """(student layer, teacher layer) pairs."""
    reads: tuple[str, ...]
    """The positional-only parameters of the loss, in order."""
    per_item: bool
    knobs: Mapping[str, Any]
    """All knobs as they were given."""
    scheduled: Mapping[str, Schedule]
    """The knobs among them that change from step to step."""
    over: str
    """Which of the batch's masks says where it counts: "mask", or a name in the inputs or extras."""
    only: Mapping[str, int]
    """It counts only where these extras have these values."""
    select: Top | None
    """It counts only the best of these positions."""
    temperature: float
    """What it compares at; not a number where a schedule moves it."""

    @property
    def asks(self) -> frozenset[str]:
        """All it wants to know: what the loss reads, and what its positions are selected by."""
        return frozenset(self.reads) | (frozenset(self.select.reads) if self.select else frozenset())

    @property
    def reads_features(self) -> bool:
        return any(name in ONE_LAYER or name in ALL_LAYERS for name in self.reads)

    @property
    def sees_examples(self) -> bool:
        """One value per position, yet from the whole example: it reads layers, and the mask that says which count."""
        return self.per_item and self.reads_features and "mask" in self.reads

    @property
    def in_chunks(self) -> bool:
        """It looks at the logits of single positions, or of short spans of them, so it can be computed in chunks."""
        alone = self.per_item and not self.reads_features and "mask" not in self.reads
        return alone and "student_logits" in self.reads

    @property
    def in_spans(self) -> bool:
        """A chunk must not tear a span apart."""
        return SPAN in self.reads

    def teacher_outputs(self) -> tuple[str, ...]:
        """What it reads from the teacher beyond logits and layers: `teacher_<x>` is its feature x, at each position."""
        known = LOGITS | ONE_LAYER | ALL_LAYERS | FACTORS
        return tuple(name for name in self.reads if name.startswith("teacher_") and name not in known)

    def head_outputs(self) -> tuple[str, ...]:
        """What it reads from the student's training head beyond the feature itself."""
        known = LOGITS | ONE_LAYER | ALL_LAYERS | FACTORS
        return tuple(name for name in self.reads if name.startswith("student_") and name not in known)

    def of_draws(self) -> Callable[..., Tensor] | None:
        """Its loss from a sampled teacher's draws, the fixed knobs bound; None where it has no such form."""
        if self.card.of_draws is None:
            return None
        fixed = {name: knob for name, knob in self.knobs.items() if name not in self.scheduled}
        return partial(self.card.of_draws, **fixed)

    def weight_at(self, step: int, steps: int, state: State | None = None) -> float:
        return value_at(self.weight, step, steps, state)

    def positions(self, batch: Batch) -> Tensor:
        """Where it may count, [B] or [B, T]: a bool mask, or whole numbers of which 0 does not count.

        Numbers tell packed segments apart. Raises SignalError where the batch has no such mask.
        """
        if self.over == "mask":
            return batch.mask
        known = {**batch.inputs, **batch.extras}
        if self.over not in known:
            raise SignalError(
                f"{self.card.name} counts over '{self.over}', but the batch has {', '.join(sorted(known)) or 'nothing'}"
                " beside its mask."
            )
        where = known[self.over]
        if "student_logits" in self.asks and where.shape != batch.mask.shape:
            raise SignalError(
                f"{self.card.name} counts over '{self.over}' of shape {list(where.shape)}, but the logits stand where "
                f"the mask {list(batch.mask.shape)} does. Remove 'over', or compare features."
            )
        # A row that the mask leaves out as a whole stays out.
        return where if batch.mask.ndim == where.ndim else where * batch.mask.view(-1, *[1] * (where.ndim - 1))

    def counted(self, batch: Batch) -> Tensor:
        """bool, the positions (or, per example, the rows) that this term may count: from masks, labels and tags."""
        counted = self.positions(batch) != 0
        if "labels" in self.asks and self.card.labels == "classes" and batch.labels.shape == counted.shape:
            counted = counted & (batch.labels != IGNORED)
        for name, value in self.only.items():
            if name not in batch.extras:
                raise SignalError(
                    f"{self.card.name} counts only where '{name}' is {value}, but the batch has no such extra."
                )
            matches = batch.extras[name] == value
            counted = counted & (matches if matches.ndim == counted.ndim else matches[:, None])
        return counted if self.per_item or counted.ndim == 1 else counted.flatten(1).any(dim=1)

    def count(self, batch: Batch) -> Tensor:
        """How many positions (or rows) it counts, float64 []: known before any forward."""
        counted = self.counted(batch)
        kept = counted if self.select is None else self.select.num_kept(counted)
        return kept.sum(dtype=torch.float64)

    def describe(self) -> str:
        """What sets it apart from other terms of the same loss: weight, layers, positions and knobs, in words."""
        where = [f"over {self.over}"] if self.over != "mask" else []
        where += [f"only {name}={value}" for name, value in self.only.items()]
        where += [f"top {self.select.fraction:g} by {self.select.card.name}"] if self.select else []
        layers = [f"{student}>{teacher}" for student, teacher in self.at]
        knobs = [f"{name}={_said(knob)}" for name, knob in sorted(self.knobs.items())]
        return " ".join([f"x {_said(self.weight)}", *layers, *where, *knobs])


def term(
    loss: Callable[..., Tensor] | str,
    weight: float | Schedule = 1.0,
    /,
    *,
    at: Mapping[str, str] | Sequence[str] = (),
    over: str = "mask",
    only: Mapping[str, int] | None = None,
    weigh: Weight | str | None = None,
    select: Top | None = None,
    place: str = "term",
    **knobs: Any,
) -> Term:
    """A loss (function, catalog name or `package.module:name`) with its weight, layers and knobs.

    `at` pairs student layers with teacher layers: {"layer2": "layer3"}, or ["layer2"] where the names agree.
    `over` names another mask in the batch's inputs or extras, such as "attention_mask": all tokens, not only answers.
    `only` counts the rows or positions with these tags in the extras, such as {"task": 1}, with a divisor of their own.
    `weigh` multiplies each position's value (kind "weight"); the divisor stays the number of positions.
    `select` counts the top fraction of each example's positions: top("student_entropy", fraction=0.2).
    A knob that is a number may be a schedule. `place` is what error messages call this term.
    Raises RecipeError for anything that cannot work.
    """
    function: Callable[..., Tensor] = find("loss", loss, place=f"{place}.use") if isinstance(loss, str) else loss
    check_keywords(function, knobs, place=place)
    pairs = tuple(at.items()) if isinstance(at, Mapping) else tuple((name, name) for name in at)
    per_item = _is_per_item(function, place)
    if not per_item and (weigh is not None or select is not None):
        raise RecipeError(
            f"{place}: {card(function).name} gives one value per example, so its positions cannot be weighed or "
            "selected. Take a loss that gives one value per item."
        )
    if select is not None and SPAN in positional(function):
        raise RecipeError(
            f"{place}.select: {card(function).name} adds up spans of positions, which a selection would tear."
        )
    scheduled = {name: knob for name, knob in knobs.items() if _is_schedule(function, name, knob)}
    fixed = {name: knob for name, knob in knobs.items() if name not in scheduled}
    loss_card, reads, bound = card(function), positional(function), partial(function, **fixed) if fixed else function
    if weigh is not None:
        bound, loss_card, reads = weighted(bound, loss_card, reads, weigh, place=f"{place}.weigh")
    made = Term(
        loss=bound,
        card=loss_card,
        weight=_checked(weight, place),
        at=pairs,
        reads=reads,
        per_item=per_item,
        knobs=knobs,
        scheduled=scheduled,
        over=over,
        only=dict(only or {}),
        select=select,
        temperature=_temperature(function, knobs),
    )
    _check_layers(made, place)
    if made.sees_examples and (weigh is not None or select is not None):
        raise RecipeError(
            f"{place}: {made.card.name} looks at whole examples, so its positions cannot be weighed or selected."
        )
    return made


def _is_schedule(function: Callable[..., Tensor], name: str, knob: object) -> bool:
    """Whether a knob changes from step to step, rather than being a function that the loss itself asks for."""
    if isinstance(knob, Adaptive):
        return True
    return callable(knob) and get_type_hints(function).get(name) in (float, int)


def _temperature(function: Callable[..., Tensor], knobs: Mapping[str, Any]) -> float:
    """A loss without such a knob compares at 1."""
    declared = keywords(function).get("temperature")
    given = knobs.get("temperature", 1.0 if declared is None else declared.default)
    return float(given) if isinstance(given, (int, float)) else math.nan


def _said(number: object) -> str:
    """A weight or knob in words that are the same in every process; functions have none."""
    return "scheduled" if callable(number) else str(number)


def _is_per_item(function: Callable[..., Tensor], place: str) -> bool:
    returned = get_type_hints(function, include_extras=True).get("return")
    if returned not in (PerItem, PerExample):
        raise RecipeError(
            f"{place}: {card(function).name} does not say how it counts. "
            "Annotate what it returns: PerItem (one value per position) or PerExample (one per example)."
        )
    return bool(returned == PerItem)


def _checked(weight: float | Schedule, place: str) -> float | Schedule:
    if callable(weight) or isinstance(weight, Adaptive):
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
