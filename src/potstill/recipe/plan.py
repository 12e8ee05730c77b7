"""A rehearsal: everything of a run but the training. What can be refused is refused here, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from potstill.core.errors import UserError, unknown
from potstill.recipe.building import TEACHER_SEED, freeze, make_model, make_teacher, read_data, teaching
from potstill.recipe.calls import Call
from potstill.recipe.sections import Recipe
from potstill.recipe.stages import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from potstill.core.types import Batch
    from potstill.data import ImageData
    from potstill.objective import Objective
    from potstill.schemes import Offline

STATES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors of the parameters' size that an optimizer keeps."""

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """(title, (what, value) rows): the data, the teacher's training, each stage of the student, the student alone."""

    parts: tuple[tuple[str, Rows], ...]


def plan(recipe: Recipe) -> Plan:
    """Build everything, show one batch to both sides, train nothing.

    Raises RecipeError, DataError or SignalError for what a run would stop at.
    """
    from potstill.schemes import Offline

    data = read_data(recipe.data, seed=recipe.seeds[0])
    parts = [("data", _data_rows(data))]
    teacher = None
    if recipe.teacher is not None:
        teacher = freeze(make_teacher(recipe.teacher, data))
        stages = () if recipe.teacher.stage is None else (recipe.teacher.stage,)
        parts += _rehearse("teacher", recipe.teacher.call, stages, Offline, seed=TEACHER_SEED)
    main = "alone" if teacher is None else "distilled"
    parts += _rehearse(main, recipe.student, recipe.stages, teaching(recipe, teacher), seed=recipe.seeds[0])
    if recipe.alone is not None:
        arm = recipe.alone
        parts += _rehearse("alone", arm.student, arm.stages, teaching(arm, None), seed=recipe.seeds[0])
    return Plan(parts=tuple(parts))


def _rehearse(
    arm: str, call: Call, stages: Sequence[Stage], scheme_of: Callable[[nn.Module], Offline], *, seed: int
) -> list[tuple[str, Rows]]:
    """A dry run of each stage, on a model that is thrown away."""
    told = []
    for number, stage in enumerate(stages):
        data = read_data(stage.data, seed=seed)
        model = make_model(call, data, seed=seed)
        _choose_parts(model, stage)
        scheme, batch = scheme_of(model), data.train.batch(0)
        try:
            said = scheme.prepare(stage.objective, batch)
        except UserError as error:
            raise type(error)(f"{stage.place}objective: {error}") from error
        rows = (("steps", f"{stage.steps:,}"), *said.rows(), *_memory_rows(scheme, stage, batch))
        told.append((arm if len(stages) == 1 else f"{arm}, stage {number}", rows))
    return told


def _data_rows(data: ImageData) -> Rows:
    return (
        ("training rows", f"{data.train.num_rows:,}"),
        ("labelled", f"{len(data.train.pictures.labelled):,}"),
        ("test rows", f"{data.test.num_rows:,}"),
        ("classes", str(data.num_classes)),
        ("image", " x ".join(map(str, data.shape))),
    )


def _choose_parts(student: nn.Module, stage: Stage) -> None:
    """Freeze all but what the stage trains, as loops.fit will; refuse names of nothing before a teacher is trained."""
    names = [name for name, _ in student.named_parameters()]
    for index, part in enumerate(stage.train):
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            parts = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            raise unknown(f"{stage.place}train[{index}]", part, parts, noun="part of the student with weights")
    for name, parameter in student.named_parameters():
        learns = not stage.train or any(f"{name}.".startswith(f"{part}.") for part in stage.train)
        parameter.requires_grad_(learns)


def _memory_rows(scheme: Offline, stage: Stage, batch: Batch) -> Rows:
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
        "activations": _activation_bytes(scheme, stage.objective, batch, parameters),
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
