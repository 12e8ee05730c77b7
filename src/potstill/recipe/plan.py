"""A rehearsal: everything of a run but the training. What can be refused is refused here, in seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.catalog import keywords
from potstill.core.errors import RecipeError, UserError, unknown
from potstill.core.types import Need
from potstill.recipe.building import (
    TEACHER_SEED,
    freeze,
    make_model,
    make_student,
    make_teacher,
    objective_of,
    read_data,
    source_of,
    teaching,
    writing_part,
)
from potstill.recipe.calls import Call
from potstill.recipe.eliciting import rows_of, seeds_of, stand_in
from potstill.recipe.materials import Material, Rows, Texts
from potstill.recipe.memory import enough_memory
from potstill.recipe.sections import DataRecipe, Recipe, TeacherPlan, settle
from potstill.recipe.solving import Problems
from potstill.recipe.stages import Stage
from potstill.recipe.stored import check_store, needed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from potstill.core.types import Batch, Teacher
    from potstill.objective import Objective
    from potstill.schemes import Offline

STATES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors of the parameters' size that an optimizer keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """(title, (what, value) rows): the data, the teacher's training, each stage of each arm."""

    parts: tuple[tuple[str, Rows], ...]


def plan(recipe: Recipe | DataRecipe) -> Plan:
    """Build everything, show one batch to both sides, ask and train nothing.

    A student of rows that are yet to be elicited is rehearsed with the seeds in their place.
    Raises RecipeError, DataError or SignalError for what a run would stop at.
    """
    if recipe.elicitation is None:
        return _plan(recipe)
    with enough_memory():
        parts = []
        student = None
        if isinstance(recipe, Recipe) and recipe.rounds is not None:
            parts.append(("rounds", recipe.rounds.rows()))
            recipe.rounds.check_seeds(seeds_of(recipe.elicitation))
            student = writing_part(make_student(recipe.student, seed=recipe.seeds[0]), recipe.student)
        parts.append(("elicit", rows_of(recipe.elicitation, student=student)))
        if isinstance(recipe, Recipe):
            with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
                stand_in(recipe.elicitation, Path(folder))
                rehearsed = _plan(settle(recipe, Path(folder)))
            parts += [("data, seeds in place of the rows", rehearsed.parts[0][1]), *rehearsed.parts[1:]]
    return Plan(parts=tuple(parts))


def _plan(recipe: Recipe) -> Plan:
    from potstill.recipe.caching import sketch_for
    from potstill.teachers import Remembered, Told

    with enough_memory():
        data = read_data(recipe.data, seed=recipe.seeds[0])
        parts = [("data", data.rows())]
        if recipe.task is not None:
            parts.append(("task", _task_rows(recipe.task, data)))
        teacher = None
        if recipe.teacher is not None:
            if not recipe.teacher.follows_student:
                teacher = _unasked(recipe.teacher, data) if recipe.elicitation is not None else None
                teacher = freeze(make_teacher(recipe.teacher, data)) if teacher is None else teacher
                data.check_teacher(teacher)
                if isinstance(teacher, Remembered):
                    parts.append(("teacher", check_store(teacher, recipe, data)))
                if isinstance(teacher, Told):
                    parts.append(("teacher", teacher.account.lines()))
            if recipe.teacher.remember:
                needed(recipe)
                sketch_for(recipe.teacher.remember, recipe, data)
            parts += _rehearse_teachers("teacher", recipe.teacher)
        for name, arm in recipe.arms.items():
            scheme_of = teaching(arm, None if arm.teacher is None else teacher)
            parts += _rehearse(name, arm.student, arm.stages, scheme_of, seed=recipe.seeds[0])
    return Plan(parts=tuple(parts))


def _unasked(how: TeacherPlan, data: Material) -> Teacher | None:
    """Who stands for a teacher that will speak of rows which are yet to be elicited; None for any other."""
    from potstill.teachers.told import Unasked

    if not isinstance(data, Texts) or not how.call.takes("reading"):
        return None
    return Unasked(size=len(data.data.tokenizer), k=how.call.knobs.get("k", keywords(how.call.part)["k"].default))


def _task_rows(problems: Problems, data: Material) -> Rows:
    """What students will be asked at the end."""
    if not isinstance(data, Texts):
        raise RecipeError("task: only a model of texts writes answers, and these data are pictures. Remove this key.")
    _, examples = problems.chosen()
    first = " ".join(examples[0].prompt.split())[:240]
    return (("problems", f"{len(examples):,}"), ("first", first), ("answers", f"at most {problems.max_tokens} tokens"))


def _rehearse_teachers(name: str, how: TeacherPlan) -> list[tuple[str, Rows]]:
    """The training of a teacher, and of those that it is made of."""
    from potstill.schemes import Offline

    stages = () if how.stage is None else (how.stage,)
    told = _rehearse(name, how.call, stages, Offline, seed=TEACHER_SEED)
    for arm, member in how.arms(name):
        told += _rehearse_teachers(arm, member)
    return told


def _rehearse(
    arm: str, call: Call, stages: Sequence[Stage], scheme_of: Callable[[nn.Module], Offline], *, seed: int
) -> list[tuple[str, Rows]]:
    """A dry run of each stage, on a model that is thrown away."""
    told = []
    for number, stage in enumerate(stages):
        data = read_data(stage.data, seed=seed)
        model = make_model(call, data, seed=seed)
        _choose_parts(model, stage)
        scheme = scheme_of(model)
        objective = objective_of(stage, scheme)
        batch = source_of(stage, data, scheme, seed=seed).batch(0)
        try:
            said = scheme.prepare(objective, batch)
            _try_longest(data, scheme)
        except UserError as error:
            raise type(error)(f"{stage.place}objective: {error}") from error
        rows = (("steps", f"{stage.steps:,}"), *said.rows(), *_memory_rows(scheme, objective, stage, batch))
        told.append((arm if len(stages) == 1 else f"{arm}, stage {number}", rows))
    return told


def _try_longest(data: Material, scheme: Offline) -> None:
    """The row that a model is most likely to refuse, now and not after hours."""
    import torch

    from potstill.teachers import HfTeacher

    longest = data.longest()
    if longest is None:
        return
    sides: list[nn.Module | Teacher] = [scheme.student]
    # Others may know these rows or not, and say so when they are asked.
    sides += [scheme.teacher] if isinstance(scheme.teacher, HfTeacher) else []
    with torch.no_grad():
        for side in sides:
            side(longest, Need(logits=True))


def _choose_parts(student: nn.Module, stage: Stage) -> None:
    """Freeze all but what the stage trains, as loops.fit will; refuse names of nothing before a teacher is trained."""
    names = [name for name, _ in student.named_parameters()]
    for index, part in enumerate(stage.train):
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            parts = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            raise unknown(f"{stage.place}train[{index}]", part, parts, noun="part of the student with weights")
    for name, parameter in student.named_parameters():
        learns = not stage.train or any(f"{name}.".startswith(f"{part}.") for part in stage.train)
        # What an adapter lies on stays frozen.
        parameter.requires_grad_(parameter.requires_grad and learns)


def _memory_rows(scheme: Offline, objective: Objective, stage: Stage, batch: Batch) -> Rows:
    """What one optimizer step holds; activations are what the backward pass of one batch keeps, measured."""
    parameters = [parameter for parameter in scheme.learners().parameters() if parameter.requires_grad]
    learned = sum(parameter.nbytes for parameter in parameters)
    fit = stage.written["fit"]
    assert isinstance(fit, dict)
    states = 0 if fit["optimizer"] == "sgd" and not fit["momentum"] else STATES.get(str(fit["optimizer"]), 2)
    sizes = {
        "weights": sum(tensor.nbytes for tensor in (*scheme.learners().parameters(), *scheme.learners().buffers())),
        "gradients": learned,
        "optimizer": states * learned,
        "activations": _activation_bytes(scheme, objective, batch, parameters),
    }
    whole = (("memory of the student", _size(sum(sizes.values()))),)
    return (*whole, *((f"  {name}", _size(size)) for name, size in sizes.items()))


def _activation_bytes(scheme: Offline, objective: Objective, batch: Batch, parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps of one batch, weights apart. The model is a throw-away one: its statistics move."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lessons = scheme.lessons(batch, objective.need("student"), objective.need("teacher"))
        totals = [objective(lesson, batch) for lesson in lessons]
    del totals
    return sum(kept.values())


def _size(size: int) -> str:
    power = 1 if size < 2**20 else 2 if size < 2**30 else 3
    return f"{size / 1024**power:,.1f} {' KMG'[power]}iB"
