"""The only reduction: terms bound to signals by name, summed over counted positions, divided by global counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError, unknown
from potstill.core.types import Batch, Lesson, Logits, Need, Projection
from potstill.objective import chunked
from potstill.objective.representations import dense, meet, rows, width
from potstill.objective.term import ALL_LAYERS, LOGITS, ONE_LAYER, Term, check_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What is known before the first forward of an optimizer step. Sum `divisors` over ranks, then use it."""

    divisors: Tensor
    """[num_terms] float64: counted positions (or examples) of all micro-batches."""
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """A training head that must stand between a student's layer and a loss."""

    key: str
    head: str
    student_layer: str
    teacher_layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """total [] carries the graph; terms [num_terms] are each term's unweighted share, detached, for the log."""

    total: Tensor
    terms: Tensor


class Objective:
    """A weighted sum of terms: sum_j weight_j * (sum of values_j) / (global count_j).

    A term whose weight is the number 0 is left out altogether, so it changes nothing, not even by rounding.
    `chunk_bytes` bounds the temporary memory of losses on a student that gives its head unapplied.
    `compiled` runs the losses inside a chunk through torch.compile.
    """

    def __init__(self, *terms: Term, chunk_bytes: int = 64 * 2**20, compiled: bool = False) -> None:
        self.terms = tuple(term for term in terms if callable(term.weight) or term.weight != 0.0)
        if not self.terms:
            raise RecipeError("objective: no term with a weight other than 0, so there is nothing to learn.")
        self.labels = _labels(self.terms)
        self.chunk_bytes = chunk_bytes
        self._losses = [torch.compile(term.loss) if compiled else term.loss for term in self.terms]

    def need(self, side: Literal["student", "teacher"]) -> Need:
        """What one side must say for these terms. A layer behind a training head is asked for by the head's key."""
        layer_of = 0 if side == "student" else 1
        features = set()
        for label, term in zip(self.labels, self.terms, strict=True):
            for pair in term.at:
                behind_head = side == "student" and term.card.head
                features.add(_key(label, pair) if behind_head else pair[layer_of])
        return Need(
            logits=any(f"{side}_logits" in term.reads for term in self.terms),
            features=frozenset(features),
        )

    def heads(self) -> tuple[HeadRequest, ...]:
        """The training heads the student needs, in a fixed order."""
        return tuple(
            HeadRequest(key=_key(label, pair), head=term.card.head, student_layer=pair[0], teacher_layer=pair[1])
            for label, term in zip(self.labels, self.terms, strict=True)
            if term.card.head
            for pair in term.at
        )

    def counts(self, batches: Sequence[Batch], *, step: int = 0, steps: int = 1) -> Counts:
        """Divisors and weights of one optimizer step, from masks alone."""
        divisors = [sum(term.counted(batch).sum(dtype=torch.float64) for batch in batches) for term in self.terms]
        return Counts(
            divisors=torch.stack([torch.as_tensor(d, dtype=torch.float64) for d in divisors]),
            weights=tuple(term.weight_at(step, steps) for term in self.terms),
        )

    def __call__(self, lesson: Lesson, batch: Batch, counts: Counts | None = None) -> Tensor:
        """The loss [] of one micro-batch. Without counts the batch counts as the whole optimizer step."""
        return self.evaluate(lesson, batch, counts).total

    def evaluate(self, lesson: Lesson, batch: Batch, counts: Counts | None = None) -> Outcome:
        """The loss of one micro-batch and each term's share of it."""
        counts = self.counts([batch]) if counts is None else counts
        divisors = counts.divisors.clamp(min=1.0).to(batch.mask.device)
        fused = self._fused(lesson)
        total: Tensor | None = None
        shares: list[Tensor | None] = [None] * len(self.terms)
        if fused:
            total, seen = self._fused_total(fused, lesson, batch, divisors, counts.weights)
            for position, index in enumerate(fused):
                shares[index] = seen[position]
        for index, term in enumerate(self.terms):
            if index in fused:
                continue
            values = self._values(index, term, lesson, batch)
            exact = torch.promote_types(values.dtype, torch.float32)
            share = values.sum(dtype=exact) / divisors[index].to(exact)
            weighted = counts.weights[index] * share
            total = weighted if total is None else total + weighted
            shares[index] = share.detach()
        assert total is not None
        return Outcome(total=total, terms=torch.stack([s.to(total.dtype) for s in shares if s is not None]))

    # Fused terms: pointwise losses on a head not yet applied.

    def _fused(self, lesson: Lesson) -> tuple[int, ...]:
        if not isinstance(lesson.student.logits, Projection):
            return ()
        return tuple(index for index, term in enumerate(self.terms) if term.pointwise)

    def _fused_total(
        self, fused: Sequence[int], lesson: Lesson, batch: Batch, divisors: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """All pointwise terms in one pass over chunks of the positions that any of them counts."""
        student, teacher = lesson.student.logits, lesson.teacher.logits
        assert isinstance(student, Projection)
        counted = [self.terms[index].counted(batch) for index in fused]
        union = torch.stack(counted).any(dim=0)
        keep = _Kept(union)
        asked = [keep.of(mask) for mask in counted]
        chosen = keep.of_logits(student)
        teacher = None if teacher is None else keep.of_logits(teacher)
        per_term = [None if bool(mask.all()) else mask for mask in asked]
        named = {index: self._named(index, batch, keep) for index in fused}
        assert isinstance(chosen, Projection)

        def pointwise(logits: Tensor, said: Logits | None, which: slice) -> tuple[Tensor, Tensor]:
            shares = []
            for index, mask in zip(fused, per_term, strict=True):
                part = {name: tensor[which] for name, tensor in named[index].items()}
                seen, heard = logits, said
                if mask is not None:
                    inside = mask[which]
                    seen, heard = logits[inside], None if said is None else rows(said, inside)
                    part = {name: tensor[inside] for name, tensor in part.items()}
                values = self._pointwise(index, seen, heard, part)
                shares.append(values.sum(dtype=logits.dtype) / divisors[index].to(logits.dtype))
            stacked = torch.stack(shares)
            weighted = sum(weights[index] * stacked[position] for position, index in enumerate(fused))
            return torch.as_tensor(weighted), stacked.detach()

        device = student.hidden.device.type
        sizes = chunked.sizes_for(width(student), device=device, budget_bytes=self.chunk_bytes)
        return chunked.fused_sum(chosen, teacher, pointwise, sizes=sizes)

    def _pointwise(self, index: int, student: Tensor, teacher: Logits | None, named: dict[str, Tensor]) -> Tensor:
        term = self.terms[index]
        arguments = dict(named)
        if "teacher_logits" in term.reads:
            _check_teacher(term, student.shape[-1], teacher)
            assert teacher is not None
            student, arguments["teacher_logits"] = meet(student, teacher, term.card)
        if "labels" in arguments:
            check_labels(arguments["labels"], num_classes=student.shape[-1], card=term.card)
        arguments["student_logits"] = student
        return self._losses[index](*(arguments[name] for name in term.reads))

    def _named(self, index: int, batch: Batch, keep: _Kept) -> dict[str, Tensor]:
        """Labels and extras that a term reads, at the kept positions."""
        term = self.terms[index]
        special = LOGITS | ONE_LAYER | ALL_LAYERS | set(term.head_outputs()) | {"mask"}
        named = {}
        for name in term.reads:
            if name == "labels":
                named[name] = keep.of(batch.labels)
            elif name not in special:
                if name not in batch.extras:
                    raise SignalError(f"{term.card.name} reads '{name}', but {_has(batch)}.")
                named[name] = keep.of(batch.extras[name])
        return named

    # Other terms: everything at once.

    def _values(self, index: int, term: Term, lesson: Lesson, batch: Batch) -> Tensor:
        """The loss values [N] of one term."""
        counted = term.counted(batch)
        keep = _Kept(counted)
        if keep.num_rows == 0:
            return _nothing(lesson)
        if keep.num_rows < term.card.min_examples:
            raise SignalError(
                f"{term.card.name} compares examples with each other and needs at least {term.card.min_examples} in a "
                f"micro-batch; this one has {keep.num_rows}. Use a larger batch."
            )
        named = self._named(index, batch, keep)
        if "mask" in term.reads:
            named["mask"] = keep.of(batch.mask)
        if "student_logits" in term.reads:
            named["student_logits"] = dense(keep.of_logits(_logits(lesson, "student", term)))
        if "teacher_logits" in term.reads:
            teacher = keep.of_logits(_logits(lesson, "teacher", term))
            _check_teacher(term, named["student_logits"].shape[-1], teacher)
            named["student_logits"], named["teacher_logits"] = meet(named["student_logits"], teacher, term.card)
        if "labels" in named and "student_logits" in named:
            check_labels(named["labels"], num_classes=named["student_logits"].shape[-1], card=term.card)
        if not term.reads_features:
            return self._losses[index](*(named[name] for name in term.reads))
        layers = [self._layer(index, pair, lesson, keep) for pair in term.at]
        if any(name in ALL_LAYERS for name in term.reads):
            several = {f"{name}s": tuple(layer[name] for layer in layers) for name in ONE_LAYER}
            return self._losses[index](*(several[name] if name in several else named[name] for name in term.reads))
        values = [self._losses[index](*({**named, **layer}[name] for name in term.reads)) for layer in layers]
        return torch.stack(values).sum(dim=0)

    def _layer(self, index: int, pair: tuple[str, str], lesson: Lesson, keep: _Kept) -> dict[str, Tensor]:
        """What both sides say at one pair of layers, head outputs included."""
        term, key = self.terms[index], _key(self.labels[index], pair)
        said = {"teacher_feature": keep.of(_feature(lesson, "teacher", pair[1], term))}
        if not term.card.head:
            return {**said, "student_feature": keep.of(_feature(lesson, "student", pair[0], term))}
        for name in ("student_feature", *term.head_outputs()):
            tensor = _feature(lesson, "student", f"{key}.{name}", term)
            # A head may also say things about the layer itself, such as a variance per channel.
            said[name] = keep.of(tensor) if name == "student_feature" else tensor
        return said


class _Kept:
    """Selects the counted rows; a no-op, not a copy, where all are counted."""

    def __init__(self, mask: Tensor) -> None:
        self.everything = bool(mask.all())
        self.mask = mask
        self.num_rows = mask.numel() if self.everything else int(mask.sum())

    def of(self, tensor: Tensor) -> Tensor:
        if not self.everything:
            return tensor[self.mask]
        return tensor if self.mask.ndim == 1 else tensor.flatten(0, self.mask.ndim - 1)

    def of_logits(self, logits: Logits) -> Logits:
        if not self.everything or self.mask.ndim > 1:
            return rows(logits, self.mask)
        return logits


def _labels(terms: Sequence[Term]) -> tuple[str, ...]:
    """A name for each term: the loss, numbered where it occurs again."""
    seen: dict[str, int] = {}
    labels = []
    for term in terms:
        seen[term.card.name] = seen.get(term.card.name, 0) + 1
        count = seen[term.card.name]
        labels.append(term.card.name if count == 1 else f"{term.card.name}#{count}")
    return tuple(labels)


def _key(label: str, pair: tuple[str, str]) -> str:
    return f"{label}/{pair[0]}>{pair[1]}"


def _logits(lesson: Lesson, side: Literal["student", "teacher"], term: Term) -> Logits:
    signal = lesson.student if side == "student" else lesson.teacher
    if signal.logits is None:
        raise SignalError(f"{term.card.name} reads the {side}'s logits, but the {side} gave none.")
    return signal.logits


def _feature(lesson: Lesson, side: Literal["student", "teacher"], name: str, term: Term) -> Tensor:
    features = (lesson.student if side == "student" else lesson.teacher).features
    if name not in features:
        raise SignalError(str(unknown(f"{term.card.name}, {side}", name, features, noun="captured layer")))
    return features[name]


def _check_teacher(term: Term, num_classes: int, teacher: Logits | None) -> None:
    if teacher is None:
        raise SignalError(f"{term.card.name} reads the teacher's logits, but the teacher gave none.")
    if width(teacher) != num_classes:
        raise SignalError(
            f"{term.card.name}: the student has {num_classes} classes, the teacher {width(teacher)}. Give both the "
            "same classes in the same order, or compare features instead."
        )


def _nothing(lesson: Lesson) -> Tensor:
    """No values, yet a graph: every rank backpropagates through the same parameters."""
    student = lesson.student
    said = list(student.features.values())
    if student.logits is not None:
        said += [t for t in _tensors_of(student.logits) if t.is_floating_point()]
    return sum((tensor.flatten()[:0].sum() for tensor in said), start=torch.zeros(()))[None]


def _tensors_of(logits: Logits) -> list[Tensor]:
    """The tensors a representation is made of."""
    fields = (getattr(logits, name) for name in logits.__slots__)
    return [value for value in fields if isinstance(value, Tensor)]


def _has(batch: Batch) -> str:
    return f"the batch has {', '.join(sorted(batch.extras))}" if batch.extras else "the batch has no extras"
