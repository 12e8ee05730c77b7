"""A frozen teacher, or none, teaches a student. The scheme that most of the field lives in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Following, Frozen, Lesson, Logits, Need, Signal, Teacher
from potstill.objective import HeadRequest, Objective
from potstill.objective.representations import width
from potstill.objective.term import check_labels
from potstill.students.heads import Equipped, equip
from potstill.students.module import as_student
from potstill.teachers.average import Average
from potstill.teachers.ensemble import leaves
from potstill.teachers.hf import HfTeacher
from potstill.teachers.local import Local
from potstill.teachers.remembered import Remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What one side says under one name; the shape has the batch in front."""

    side: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A training head that was built."""

    request: HeadRequest
    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a dry run on one batch found out: who says what, what was built, where the loss starts."""

    captured: tuple[Captured, ...]
    heads: tuple[Head, ...]
    num_student_parameters: int
    num_teacher_parameters: int | None
    """None where there is no teacher, or one that does not run here."""
    loss: float
    terms: Mapping[str, float]
    """Each term's share, unweighted, by its label; in eval mode, so dropout does not enter."""

    def rows(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines for `potstill check`."""
        teacher = () if self.num_teacher_parameters is None else (_parameters("teacher", self.num_teacher_parameters),)
        return (
            _parameters("student", self.num_student_parameters),
            *teacher,
            *((f"{one.side} {one.name}", str(list(one.shape))) for one in self.captured),
            *_parameters_of(self.heads),
            *((f"loss {label}", f"{share:.6g}") for label, share in self.terms.items()),
            ("loss, weighted", f"{self.loss:.6g}"),
        )


@part("scheme", name="offline")
class Offline:
    """`student` (a student, or any nn.Module that reads the batch's "image") learns from `teacher`.

    Call `prepare` before the optimizer is made: it builds the training heads.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | None = None) -> None:
        if isinstance(teacher, nn.Module):
            raise RecipeError(
                f"Offline, teacher: found a bare {type(teacher).__name__}. Freeze it first: teachers.local(model)."
            )
        self.student = as_student(student)
        self.teacher = teacher
        self._equipped = Equipped(self.student, {}, {})
        self._bound: nn.Module = self._equipped
        self._teachers = () if teacher is None else tuple(leaves(teacher))
        """The teacher, or those it is made of."""
        own = {p for each in self._teachers if isinstance(each, Local | HfTeacher) for p in each.parameters()}
        if own & set(self.student.parameters()):
            raise RecipeError(
                "Offline: student and teacher share parameters, which the teacher has frozen. Give the teacher a copy "
                "of its own: teachers.local(copy.deepcopy(model))."
            )

    def learners(self) -> nn.Module:
        """The student with its training heads: what is optimized, wrapped and checkpointed."""
        return self._equipped

    def rebind(self, module: nn.Module) -> None:
        """Lessons are asked of `module` from now on: `learners()` as wrapped by DDP, FSDP or torch.compile.

        Raises RecipeError where a teacher follows the student and `module` holds other parameters than it does.
        """
        if self._following() and set(self._equipped.parameters()).isdisjoint(module.parameters()):
            raise RecipeError(
                "fit.sharding: the teacher follows the student, which no process holds whole. Take sharding: replicate."
            )
        self._bound = module

    def prepare(self, objective: Objective, batch: Batch) -> Plan:
        """A dry run that changes nothing but the training heads, which are built anew: one call per stage.

        Raises RecipeError where a teacher is needed and there is none, SignalError where a side does not say what
        the objective needs, DataError where the batch's labels are not classes of the student.
        """
        student_need, teacher_need = objective.need("student"), objective.need("teacher")
        self._check_teacher(teacher_need, objective)
        requests = objective.heads()
        layers_need = _without_heads(student_need, requests)
        with _rehearsing(self.student):
            taught = self._ask_teacher(batch, teacher_need)
            said: Signal = self.student(batch, layers_need)
        _check_said("student", said, layers_need)
        _check_said("teacher", taught, teacher_need)
        _check_labels(objective, said.logits, batch)
        self._equipped = self._bound = equip(self.student, requests, said, taught)
        with _rehearsing(self._equipped):
            lesson = Lesson(student=self._equipped(batch, student_need), teacher=taught)
            outcome = objective.evaluate(lesson, batch)
        return Plan(
            captured=(*_captured("student", said), *_captured("teacher", taught)),
            heads=tuple(
                Head(request=request, num_parameters=_count(head))
                for request, head in zip(requests, self._equipped.heads.values(), strict=True)
            ),
            num_student_parameters=_count(self.student),
            num_teacher_parameters=self._num_teacher_parameters(),
            loss=float(outcome.total),
            terms=dict(zip(objective.labels, outcome.terms.tolist(), strict=True)),
        )

    def frozen(self) -> Iterator[Frozen]:
        """The models behind the teacher that run here: they may be spread over processes."""
        for teacher in self._teachers:
            if isinstance(teacher, Local | HfTeacher):
                yield from teacher.frozen()

    def stores(self) -> tuple[str, ...]:
        """Identities of what is remembered behind the teacher: of a model it would cost a look at all its weights."""
        return tuple(each.identity for each in self._teachers if isinstance(each, Remembered))

    def lessons(self, batch: Batch, student_need: Need, teacher_need: Need) -> Iterator[Lesson]:
        """The one lesson of a batch: the same rows shown to both, the teacher first, while no graph is held."""
        taught = self._ask_teacher(batch, teacher_need)
        yield Lesson(student=self._bound(batch, student_need), teacher=taught)

    def after_step(self) -> None:
        """Teachers that follow the student, such as its running average, move with it."""
        for teacher in self._following().values():
            teacher.after_step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is beyond the learners: the state of teachers that follow the student."""
        return {
            f"{number}.{name}": tensor
            for number, teacher in self._following().items()
            for name, tensor in teacher.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        following = self._following()
        parts: dict[int, dict[str, torch.Tensor]] = {number: {} for number in following}
        for name, tensor in state.items():
            place, _, inner = name.partition(".")
            assert place.isdecimal() and int(place) in following, f"state of a teacher that is not there: {name}"
            parts[int(place)][inner] = tensor
        for number, teacher in following.items():
            teacher.load_state_dict(parts[number])

    def _following(self) -> dict[int, Following]:
        """The teachers that move with the student, by their place among all."""
        return {n: teacher for n, teacher in enumerate(self._teachers) if isinstance(teacher, Following)}

    def _num_teacher_parameters(self) -> int | None:
        """None where no model runs here."""
        here = [each.num_parameters for each in self._teachers if isinstance(each, Local | HfTeacher | Average)]
        return sum(here) if here else None

    def _check_teacher(self, need: Need, objective: Objective) -> None:
        if need and self.teacher is None:
            raise RecipeError(
                f"scheme offline, teacher: there is none, but the objective reads {_spoken(need)} of one. "
                f"Give a teacher, or leave out what reads it; the terms are: {', '.join(objective.labels)}."
            )

    def _ask_teacher(self, batch: Batch, need: Need) -> Signal:
        if not need:
            return Signal()
        assert self.teacher is not None, "prepare() refuses an objective that needs a teacher where there is none"
        return self.teacher(batch, need).detach()


@contextmanager
def _rehearsing(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradient and a copy of the random streams; everything is put back, mode by mode."""
    modes = [(each, each.training) for each in module.modules()]
    accelerators = {p.device.index for p in module.parameters() if p.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(accelerators)):
            module.eval()
            yield
    finally:
        for each, was_training in modes:
            each.training = was_training


def _without_heads(need: Need, requests: Sequence[HeadRequest]) -> Need:
    """The need with the layers behind the heads in place of the heads, which are not built yet."""
    layer_of = {request.key: request.student_layer for request in requests}
    return Need(logits=need.logits, features=frozenset(layer_of.get(name, name) for name in need.features))


def _check_said(side: str, signal: Signal, need: Need) -> None:
    """What was asked for is there, also from students and teachers that others wrote."""
    missing = sorted(need.features - signal.features.keys())
    if need.logits and signal.logits is None:
        missing = ["logits"]
    if missing:
        raise SignalError(
            f"The {side} was asked for {_spoken(need)} and left out '{missing[0]}'. "
            "Its forward must answer all that the need names."
        )


def _check_labels(objective: Objective, logits: Logits | None, batch: Batch) -> None:
    """On the CPU and before the first step: an accelerator would only stop with an unreadable assertion."""
    for term in objective.terms:
        if logits is not None and {"labels", "student_logits"} <= set(term.reads):
            counted = batch.labels[term.counted(batch)].cpu()
            check_labels(counted, num_classes=width(logits), card=term.card)


def _captured(side: str, signal: Signal) -> Iterator[Captured]:
    if signal.logits is not None:
        yield Captured(side=side, name="classes", shape=(width(signal.logits),))
    for name, tensor in signal.features.items():
        yield Captured(side=side, name=name, shape=tuple(tensor.shape))


def _spoken(need: Need) -> str:
    return ", ".join(["the logits"] * need.logits + [f"'{name}'" for name in sorted(need.features)])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parameters(side: str, count: int) -> tuple[str, str]:
    return f"{side} parameters", f"{count:,}"


def _parameters_of(heads: tuple[Head, ...]) -> Iterator[tuple[str, str]]:
    for head in heads:
        asked = head.request
        yield f"head {asked.head} {asked.student_layer} > {asked.teacher_layer}", f"{head.num_parameters:,} parameters"
