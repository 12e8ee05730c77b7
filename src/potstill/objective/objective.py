"""The only reduction: terms bound to signals by name, summed over counted positions, divided by global counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Lesson, Logits, Need, Projection, Sparse
from potstill.losses import spans
from potstill.objective import chunked
from potstill.objective.binding import counted, factors_in, head_key, layer_in, logits_in, named_in, nothing
from potstill.objective.representations import Kept, check_draws, check_numbers, heard, rows, width
from potstill.objective.schedules import Adaptive, State, value_at
from potstill.objective.term import ALL_LAYERS, FACTORS_OF, ONE_LAYER, SPAN, Term, check_labels

Memory: TypeAlias = Mapping[str, State]
"""What the adaptive schedules of an objective know after some steps, by "term.knob". Empty where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What is known before the first forward of an optimizer step. Sum `divisors` over ranks, then use it."""

    divisors: Tensor
    """[num_terms] float64: counted positions (or examples) of all micro-batches."""
    weights: tuple[float, ...]
    knobs: tuple[Mapping[str, float], ...]
    """The scheduled knobs of each term."""


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
    `chunk_bytes` bounds the temporary memory of losses on a student that gives its head unapplied. The default lets
    256 positions of 262,144 classes through the heads at once; fewer classes take in proportion less.
    `compiled` runs the losses inside a chunk through torch.compile.
    """

    def __init__(self, *terms: Term, chunk_bytes: int = 512 * 2**20, compiled: bool = False) -> None:
        self.terms = tuple(term for term in terms if term.weight != 0.0)
        if not self.terms:
            raise RecipeError("objective: no term with a weight other than 0, so there is nothing to learn.")
        self.labels = _labels(self.terms)
        self.chunk_bytes = chunk_bytes
        self._losses = [torch.compile(term.loss) if compiled else term.loss for term in self.terms]
        self._of_draws = [term.of_draws() for term in self.terms]
        self._adaptive = _adaptive(self.labels, self.terms)

    def need(self, side: Literal["student", "teacher"]) -> Need:
        """What one side must say for these terms. A layer behind a training head is asked for by the head's key."""
        layer_of = 0 if side == "student" else 1
        features = set()
        for label, term in zip(self.labels, self.terms, strict=True):
            for pair in term.at:
                behind_head = side == "student" and term.card.head
                features.add(head_key(label, pair) if behind_head else pair[layer_of])
            if side == "teacher":
                features.update(name.removeprefix("teacher_") for name in term.teacher_outputs())
        return Need(
            logits=any(not term.asks.isdisjoint((f"{side}_logits", *FACTORS_OF[side])) for term in self.terms),
            features=frozenset(features),
        )

    def heads(self) -> tuple[HeadRequest, ...]:
        """The training heads the student needs, in a fixed order."""
        return tuple(
            HeadRequest(key=head_key(label, pair), head=term.card.head, student_layer=pair[0], teacher_layer=pair[1])
            for label, term in zip(self.labels, self.terms, strict=True)
            if term.card.head
            for pair in term.at
        )

    def start(self) -> Memory:
        """What the adaptive schedules know before the first step."""
        return {slot: schedule.start() for slot, (_, schedule) in self._adaptive.items()}

    def counts(
        self, batches: Sequence[Batch], *, step: int = 0, steps: int = 1, memory: Memory | None = None
    ) -> Counts:
        """Divisors, weights and knobs of one optimizer step, from masks alone.

        `memory` is what `start` gave and `after_step` renewed. Raises RecipeError where an adaptive schedule is left
        without one after the first step: it could not adapt.
        """
        if memory is None and step > 0 and self._adaptive:
            raise RecipeError(
                f"objective: {', '.join(self._adaptive)} follows the loss. Begin with memory = objective.start(), give "
                "it to counts(...), and renew it with objective.after_step(...) after each step."
            )
        known = self.start() if memory is None else memory
        divisors = [sum(term.count(batch) for batch in batches) for term in self.terms]
        return Counts(
            divisors=torch.stack([torch.as_tensor(d, dtype=torch.float64) for d in divisors]),
            weights=tuple(
                term.weight_at(step, steps, known.get(label))
                for label, term in zip(self.labels, self.terms, strict=True)
            ),
            knobs=tuple(
                {
                    name: value_at(schedule, step, steps, known.get(f"{label}.{name}"))
                    for name, schedule in term.scheduled.items()
                }
                for label, term in zip(self.labels, self.terms, strict=True)
            ),
        )

    def after_step(self, memory: Memory, shares: Tensor, *, step: int, steps: int) -> Memory:
        """The memory once a step is done; `shares` [num_terms]: its Outcome.terms, summed over micro-batches and ranks.

        Where nothing adapts it looks at nothing, so that no accelerator is waited for.
        """
        if not self._adaptive:
            return memory
        losses = shares.tolist()
        return {
            slot: schedule.after_step(memory[slot], losses[index], step, steps)
            for slot, (index, schedule) in self._adaptive.items()
        }

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
            total, seen = self._fused_total(fused, lesson, batch, divisors, counts)
            for position, index in enumerate(fused):
                shares[index] = seen[position]
        for index in range(len(self.terms)):
            if index in fused:
                continue
            values = self._values(index, lesson, batch, counts.knobs[index])
            exact = torch.promote_types(values.dtype, torch.float32)
            share = values.sum(dtype=exact) / divisors[index].to(exact)
            weighted = counts.weights[index] * share
            total = weighted if total is None else total + weighted
            shares[index] = share.detach()
        assert total is not None
        return Outcome(total=total, terms=torch.stack([s.to(total.dtype) for s in shares if s is not None]))

    # Fused terms: losses of single positions, or spans of them, on a head not yet applied.

    def _fused(self, lesson: Lesson) -> tuple[int, ...]:
        if not isinstance(lesson.student.logits, Projection):
            return ()
        return tuple(index for index, term in enumerate(self.terms) if term.in_chunks)

    def _fused_total(
        self, fused: Sequence[int], lesson: Lesson, batch: Batch, divisors: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """All fused terms in one pass over chunks of the positions that any of them counts."""
        student, teacher = lesson.student.logits, lesson.teacher.logits
        assert isinstance(student, Projection)
        masks = [counted(self.terms[index], lesson, batch, chunk_bytes=self.chunk_bytes) for index in fused]
        keep = Kept(torch.stack(masks).any(dim=0))
        asked = [keep.of(mask) for mask in masks]
        chosen = keep.of_logits(student)
        # A teacher of another tokenizer may stand on positions of its own: nobody here asks it then.
        is_heard = any("teacher_logits" in self.terms[index].asks for index in fused)
        teacher = keep.of_logits(teacher) if teacher is not None and is_heard else None
        for term in (self.terms[index] for index in fused):
            if "teacher_logits" in term.reads:
                check_numbers(teacher, term.card)
        per_term = [None if bool(mask.all()) else mask for mask in asked]
        named = {index: named_in(lesson, batch, self.terms[index], self.terms[index].reads, keep) for index in fused}
        assert isinstance(chosen, Projection)

        def pointwise(logits: Tensor, said: Logits | None, which: slice) -> tuple[Tensor, Tensor]:
            shares = []
            for index, mask in zip(fused, per_term, strict=True):
                part = {name: tensor[which] for name, tensor in named[index].items()}
                seen, there = logits, said
                if mask is not None:
                    inside = mask[which]
                    seen, there = logits[inside], None if said is None else rows(said, inside)
                    part = {name: tensor[inside] for name, tensor in part.items()}
                values = self._pointwise(index, seen, there, part, counts.knobs[index])
                shares.append(values.sum(dtype=logits.dtype) / divisors[index].to(logits.dtype))
            stacked = torch.stack(shares)
            weighted = sum(counts.weights[index] * stacked[position] for position, index in enumerate(fused))
            return torch.as_tensor(weighted), stacked.detach()

        device = student.hidden.device.type
        sizes = chunked.sizes_for(width(student), device=device, budget_bytes=self.chunk_bytes)
        begins = [named[index][SPAN] != spans.CONTINUES for index in fused if self.terms[index].in_spans]
        return chunked.fused_sum(chosen, teacher, pointwise, sizes=sizes, begins=begins[0] if begins else None)

    def _pointwise(
        self, index: int, student: Tensor, teacher: Logits | None, named: dict[str, Tensor], knobs: Mapping[str, float]
    ) -> Tensor:
        term, of_draws = self.terms[index], self._of_draws[index]
        if of_draws is not None and isinstance(teacher, Sparse) and teacher.kind == "sampled":
            check_draws(student, teacher, term.card, temperature=term.temperature)
            return of_draws(student, teacher.ids, teacher.log_probs, **knobs)
        arguments = {**named, **heard(student, teacher, term.reads, term.card, temperature=term.temperature)}
        if "labels" in arguments:
            check_labels(arguments["labels"], num_classes=arguments["student_logits"].shape[-1], card=term.card)
        return self._losses[index](*(arguments[name] for name in term.reads), **knobs)

    # Other terms: everything at once.

    def _values(self, index: int, lesson: Lesson, batch: Batch, knobs: Mapping[str, float]) -> Tensor:
        """The loss values [N] of one term."""
        term, loss = self.terms[index], self._losses[index]
        mask = counted(term, lesson, batch, chunk_bytes=self.chunk_bytes)
        keep = Kept(mask)
        if keep.num_rows == 0:
            return nothing(lesson)
        if keep.num_rows < term.card.min_examples:
            raise SignalError(
                f"{term.card.name} compares examples with each other and needs at least {term.card.min_examples} in a "
                f"micro-batch; this one has {keep.num_rows}. Use a larger batch."
            )
        if term.sees_examples:
            keep = Kept(mask.new_ones(len(mask)))
        named = {
            **named_in(lesson, batch, term, term.reads, keep),
            **logits_in(lesson, term, keep),
            **factors_in(lesson, term, keep),
        }
        if term.sees_examples:
            named["mask"] = mask
        if {"labels", "student_logits"} <= named.keys():
            check_labels(named["labels"], num_classes=named["student_logits"].shape[-1], card=term.card)
        if not term.reads_features:
            return loss(*(named[name] for name in term.reads), **knobs)
        keys = [head_key(self.labels[index], pair) for pair in term.at]
        layers = [layer_in(lesson, batch, term, pair, key, keep) for pair, key in zip(term.at, keys, strict=True)]
        if any(name in ALL_LAYERS for name in term.reads):
            several = {f"{name}s": tuple(layer[name] for layer in layers) for name in ONE_LAYER}
            return loss(*(several[name] if name in several else named[name] for name in term.reads), **knobs)
        values = [loss(*({**named, **layer}[name] for name in term.reads), **knobs) for layer in layers]
        return torch.stack(values).sum(dim=0)


def _adaptive(labels: Sequence[str], terms: Sequence[Term]) -> dict[str, tuple[int, Adaptive]]:
    """The adaptive schedules and their terms' numbers, by "term" for a weight and "term.knob" for a knob."""
    slots: dict[str, tuple[int, Adaptive]] = {}
    for index, (label, term) in enumerate(zip(labels, terms, strict=True)):
        if isinstance(term.weight, Adaptive):
            slots[label] = index, term.weight
        for name, schedule in term.scheduled.items():
            if isinstance(schedule, Adaptive):
                slots[f"{label}.{name}"] = index, schedule
    return slots


def _labels(terms: Sequence[Term]) -> tuple[str, ...]:
    """A name for each term: the loss, numbered where it occurs again."""
    seen: dict[str, int] = {}
    labels = []
    for term in terms:
        seen[term.card.name] = seen.get(term.card.name, 0) + 1
        count = seen[term.card.name]
        labels.append(term.card.name if count == 1 else f"{term.card.name}#{count}")
    return tuple(labels)
