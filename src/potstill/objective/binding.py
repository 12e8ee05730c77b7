"""What a term reads, by name, found in a lesson and a batch, at the positions that it counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from potstill.core.errors import SignalError, unknown
from potstill.core.types import Batch, Lesson, Logits, Projection
from potstill.objective.representations import Kept, dense, heard
from potstill.objective.selection import LOGITS
from potstill.objective.term import ALL_LAYERS, FACTORS, FACTORS_OF, ONE_LAYER, Term

Side: TypeAlias = Literal["student", "teacher"]
SIDES: tuple[Side, Side] = ("student", "teacher")


def counted(term: Term, lesson: Lesson, batch: Batch, *, chunk_bytes: int) -> Tensor:
    """The positions (or rows) that a term counts, of which its `select` leaves the best: bool [B] or [B, T]."""
    mask = term.counted(batch)
    if term.select is None:
        return mask
    keep, reads = Kept(mask), term.select.reads
    student = keep.of_logits(_logits(lesson, "student", term)) if "student_logits" in reads else None
    teacher = keep.of_logits(_logits(lesson, "teacher", term)) if "teacher_logits" in reads else None
    named = named_in(lesson, batch, term, reads, keep)
    scores = term.select.scores(student, teacher, named, num_rows=keep.num_rows, chunk_bytes=chunk_bytes)
    return term.select.kept(mask, scores)


def named_in(lesson: Lesson, batch: Batch, term: Term, reads: Iterable[str], keep: Kept) -> dict[str, Tensor]:
    """Mask, labels, extras and outputs of the teacher among what is read, at the kept positions.

    SignalError for an extra or an output that is not there.
    """
    elsewhere = LOGITS | ONE_LAYER | ALL_LAYERS | FACTORS | set(term.head_outputs())
    named = {}
    for name in reads:
        if name == "labels":
            named[name] = keep.of(batch.labels)
        elif name == "mask":
            named[name] = keep.of(term.positions(batch))
        elif name in term.teacher_outputs():
            named[name] = keep.of(_feature(lesson, "teacher", name.removeprefix("teacher_"), term))
        elif name not in elsewhere:
            if name not in batch.extras:
                raise SignalError(f"{term.card.name} reads '{name}', but {_has(batch)}.")
            named[name] = keep.of(batch.extras[name])
    return named


def logits_in(lesson: Lesson, term: Term, keep: Kept) -> dict[str, Tensor]:
    """The logits among what a term reads, all of them at once."""
    student = dense(keep.of_logits(_logits(lesson, "student", term))) if "student_logits" in term.reads else None
    teacher = keep.of_logits(_logits(lesson, "teacher", term)) if "teacher_logits" in term.reads else None
    return heard(student, teacher, term.reads, term.card, temperature=term.temperature)


def factors_in(lesson: Lesson, term: Term, keep: Kept) -> dict[str, Tensor]:
    """Among what a term reads, the states before a side's head, and the head. SignalError where it is not plain."""
    named = {}
    for side in SIDES:
        states, head = FACTORS_OF[side]
        if {states, head}.isdisjoint(term.reads):
            continue
        logits = _logits(lesson, side, term)
        plain = isinstance(logits, Projection) and logits.bias is None and logits.scale == 1.0 and not logits.softcap
        if not isinstance(logits, Projection) or not plain:
            raise SignalError(
                f"{term.card.name} takes the {side}'s head apart, which must be a plain matrix, not yet applied, "
                "without bias, scale or soft cap. Take a language model of that kind."
            )
        named[states], named[head] = keep.of(logits.hidden), logits.weight.detach()
    return named


def layer_in(
    lesson: Lesson, batch: Batch, term: Term, pair: tuple[str, str], key: str, keep: Kept
) -> dict[str, Tensor]:
    """What both sides say at one pair of layers; `key` is that of the head there, whose outputs are included."""

    def kept(side: Side, name: str) -> Tensor:
        feature = _feature(lesson, side, name, term)
        # A loss that sees whole examples and no mask sees zeros where nothing counts: padding then says nothing.
        if not term.per_item and "mask" not in term.reads:
            feature = _zero_outside(term.positions(batch), feature)
        return keep.of(feature)

    said = {"teacher_feature": kept("teacher", pair[1])}
    if not term.card.head:
        return {**said, "student_feature": kept("student", pair[0])}
    said["student_feature"] = kept("student", f"{key}.student_feature")
    for name in term.head_outputs():
        # A head may also say things about the layer itself, such as a variance per channel.
        said[name] = _feature(lesson, "student", f"{key}.{name}", term)
    return said


def head_key(label: str, pair: tuple[str, str]) -> str:
    """What the training head of a term between two layers is called."""
    return f"{label}/{pair[0]}>{pair[1]}"


def nothing(lesson: Lesson) -> Tensor:
    """No values, yet a graph: every rank backpropagates through the same parameters."""
    student = lesson.student
    said = list(student.features.values())
    if student.logits is not None:
        said += [t for t in _tensors_of(student.logits) if t.is_floating_point()]
    return sum((tensor.flatten()[:0].sum() for tensor in said), start=torch.zeros(()))[None]


def _logits(lesson: Lesson, side: Side, term: Term) -> Logits:
    signal = lesson.student if side == "student" else lesson.teacher
    if signal.logits is None:
        raise SignalError(f"{term.card.name} reads the {side}'s logits, but the {side} gave none.")
    return signal.logits


def _feature(lesson: Lesson, side: Side, name: str, term: Term) -> Tensor:
    features = (lesson.student if side == "student" else lesson.teacher).features
    if name not in features:
        raise SignalError(str(unknown(f"{term.card.name}, {side}", name, features, noun="captured layer")))
    return features[name]


def _zero_outside(where: Tensor, feature: Tensor) -> Tensor:
    """States of tokens [B, T, D] with zeros where [B, T] does not count; any other feature as it is."""
    if where.ndim != 2 or feature.ndim != 3 or feature.shape[:2] != where.shape:
        return feature
    return feature.masked_fill((where == 0)[..., None], 0.0)


def _tensors_of(logits: Logits) -> list[Tensor]:
    """The tensors a representation is made of."""
    fields = (getattr(logits, name) for name in logits.__slots__)
    return [value for value in fields if isinstance(value, Tensor)]


def _has(batch: Batch) -> str:
    return f"the batch has {', '.join(sorted(batch.extras))}" if batch.extras else "the batch has no extras"
