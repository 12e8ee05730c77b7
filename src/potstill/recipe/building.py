"""From checked calls to living things: data read, models made, a student written out and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.catalog import card, keywords
from potstill.core.errors import RecipeError, RunError, StorageError
from potstill.core.run import replacing
from potstill.core.types import Need
from potstill.recipe import text
from potstill.recipe.calls import Call, check_call, located
from potstill.recipe.materials import Material, material
from potstill.recipe.sections import Recipe, TeacherPlan
from potstill.recipe.signature import as_tree
from potstill.recipe.stages import Stage
from potstill.recipe.text import Tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from potstill.core.types import Batch, Source, Teacher
    from potstill.objective import Objective
    from potstill.schemes import Offline
    from potstill.students import HfModel

WEIGHTS = "model.safetensors"
BUILD = "student.yaml"
HERE = "."
"""The model of an exported language model: the folder of its student.yaml."""
TEACHER_SEED = 0
"""A teacher trained in the run is the same for all seeds of its students."""


def read_data(call: Call, *, seed: int) -> Material:
    """The data of a section, in the order of this seed.

    A run asks many times; what was read last is kept, as long as the files that the section names are as they were.
    """
    knobs = {name: located(knob) for name, knob in {**call.filled, **call.knobs}.items()}
    files = [Path(knob) for knob in knobs.values() if isinstance(knob, str) and Path(knob).exists()]
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read(_Asked(call=call, said=json.dumps([call.use, knobs], default=str), seed=seed, stamps=stamps))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Data as they were asked for; equal ones are the same data."""

    call: Call = field(compare=False)
    said: str
    seed: int
    stamps: tuple[tuple[str, int, int], ...]


# Of one seed and of the next: more would only fill the memory.
@lru_cache(maxsize=2)
def _read(asked: _Asked) -> Material:
    return material(asked.call(seed=asked.seed), use=asked.call.use)


def make_model(call: Call, data: Material, *, seed: int) -> nn.Module:
    """The part of a section with fresh weights of this seed; what it lacks comes from the data."""
    import torch

    data.check(call)
    torch.manual_seed(seed)
    model: nn.Module = call(**data.knobs_for(call))
    return model


def make_student(call: Call, *, seed: int, last: Path | None = None) -> nn.Module:
    """A student of texts as a round begins with it: with its first weights, or with those that `last` exported."""
    import torch

    from potstill.students import Adapted

    torch.manual_seed(seed)
    model: nn.Module = call()
    if last is None:
        return model
    return (
        replace(call, knobs={**call.knobs, "model": str(last)})() if isinstance(model, Adapted) else load_student(last)
    )


def writing_part(student: nn.Module, call: Call) -> HfModel:
    """What of a student writes texts. Raises RecipeError where nothing does."""
    from potstill.students import Adapted, HfModel

    inside = student.student if isinstance(student, Adapted) else student
    if not isinstance(inside, HfModel):
        raise RecipeError(
            f"student.use: {call.use} writes no texts. Rounds are for hf, hf_fresh, hf_inherited and lora."
        )
    return inside


def make_teacher(plan: TeacherPlan, data: Material) -> nn.Module | Teacher:
    """The teacher before any training of its own: a frozen one where it comes trained, else a model."""
    from potstill.teachers import load_weights

    if card(plan.call.part).kind == "teacher":
        return with_members(
            plan,
            lambda member: freeze(make_teacher(member, read_data(member.data, seed=TEACHER_SEED))),
            **data.read_for(plan.call),
        )
    model = make_model(plan.call, data, seed=TEACHER_SEED)
    return model if plan.weights is None else load_weights(model, plan.weights)


def with_members(plan: TeacherPlan, make: Callable[[TeacherPlan], Teacher], **supplied: object) -> Teacher:
    """A teacher part around the teachers that it is made of, with what the data supply."""
    known = {
        name: make(members) if isinstance(members, TeacherPlan) else [make(member) for member in members]
        for name, members in plan.members.items()
    }
    teacher: Teacher = plan.call(**known, **supplied)
    return teacher


def freeze(teacher: nn.Module | Teacher, device: torch.device | str = "cpu") -> Teacher:
    """A teacher part as it is; a model frozen."""
    from torch import nn

    from potstill.students import HfModel
    from potstill.teachers import HfTeacher, local

    if isinstance(teacher, HfModel):
        return HfTeacher(teacher.to(device))
    return local(teacher).to(device) if isinstance(teacher, nn.Module) else teacher


def teaching(recipe: Recipe, teacher: Teacher | None) -> Callable[[nn.Module], Offline]:
    """Who teaches: from a student to the recipe's scheme around it. Some teachers are made of the student."""
    from potstill.students.module import as_student

    def scheme_of(student: nn.Module) -> Offline:
        taught_by = teacher
        if recipe.teacher is not None and recipe.teacher.follows_student:
            student = as_student(student)
            taught_by = recipe.teacher.call(student=student)
        scheme: Offline = recipe.scheme(student=student, teacher=taught_by)
        return scheme

    return scheme_of


def objective_of(stage: Stage, scheme: Offline) -> Objective:
    """What a stage compares, its layer maps drawn for these two models."""
    if not stage.maps:
        return stage.objective
    blocks = {
        "num_student_layers": _num_blocks("student", scheme.student, stage.place),
        "num_teacher_layers": _num_blocks("teacher", scheme.teacher, stage.place),
    }
    return stage.mapped({index: call(**blocks) for index, call in stage.maps.items()})


def source_of(stage: Stage, data: Material, scheme: Offline, *, seed: int) -> Source:
    """Where a stage's batches come from: the training part, or what a source makes of it and the live student."""
    if stage.source is None:
        return data.train
    supplied = {"teacher": scheme.teacher, "seed": seed}
    taken = {name: value for name, value in supplied.items() if stage.source.takes(name)}
    source: Source = stage.source(scheme.student, data.train, **taken)
    return source


def save_student(call: Call, student: nn.Module, data: Material, folder: Path) -> None:
    """Weights and how to build the model again, whole or not at all; read back and compared before it counts.

    A language model of transformers becomes a folder that `from_pretrained` loads, with its tokenizer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from potstill.students import Adapted, HfModel

    with replacing(folder) as draft:
        if isinstance(student, HfModel | Adapted):
            student.export(draft)
            build: dict[str, Tree] = {"student": _as_loaded(call)}
        else:
            draft.mkdir()
            try:
                save_file(_state(student), draft / WEIGHTS)
            except SafetensorError as error:
                raise StorageError(f"Cannot save {folder}: {error}. What was saved before is intact.") from error
            build = {"student": {"use": call.use, **_tree(call.knobs), **data.knobs_for(call)}, "weights": WEIGHTS}
        (draft / BUILD).write_text(text.write({**build, **data.facts}), encoding="utf-8")
        _check_same(student, load_student(draft), next(iter(data.test.batches(2))), folder)


def load_student(folder: Path) -> nn.Module:
    """The model that a run exported, ready to answer. A model of pictures reads (pixels - mean) / std of student.yaml.

    Raises RecipeError where there is none, StorageError or DataError where a file is torn.
    """
    from potstill.teachers import load_weights

    if not (folder / BUILD).is_file():
        raise RecipeError(f"{folder} holds no {BUILD}. Give the student folder of a finished run.")
    build = text.read_file(folder / BUILD)
    section, weights = build.get("student"), build.get("weights")
    if not isinstance(section, dict) or (weights is None and section.get("model") != HERE):
        raise StorageError(f"{folder / BUILD} does not say how to build the student. Export it again.")
    if weights is None:
        section = {**section, "model": str(folder)}
    model: nn.Module = check_call("student", section, place=str(folder / BUILD))()
    return (model if weights is None else load_weights(model, folder / str(weights))).eval()


def _as_loaded(call: Call) -> dict[str, Tree]:
    """How to load the folder of a language model: those of its knobs that do not say how it was made."""
    from potstill.students import hf

    kept = {name: knob for name, knob in call.knobs.items() if name in keywords(hf) and name != "model"}
    return {"use": "hf", "model": HERE, **_tree(kept)}


def _num_blocks(side: str, model: object, place: str) -> int:
    from potstill.students import Adapted, HfModel
    from potstill.teachers import HfTeacher

    inside = model.student if isinstance(model, HfTeacher | Adapted) else model
    if not isinstance(inside, HfModel):
        raise RecipeError(
            f"{place}objective: a layer map counts the blocks of two transformers, but the {side} is "
            f"{type(model).__name__}. Write the pairs out, such as at: {{hidden/1: hidden/2}}."
        )
    return int(inside.model.config.get_text_config().num_hidden_layers)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What a model knows; of tensors that share memory only the first, since safetensors stores no ties."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            state[name] = tensor.detach().cpu().contiguous()
        seen |= {tensor.data_ptr()} if tensor.numel() else set()
    return state


def _check_same(student: nn.Module, stored: nn.Module, batch: Batch, folder: Path) -> None:
    """The export says what the student says. Raises RunError where it does not."""
    import torch

    from potstill.objective.representations import dense, rows
    from potstill.students.module import as_student

    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in student.modules()]
    shown = batch.to(device)
    with torch.no_grad():
        said, again = (
            dense(rows(as_student(model.to(device).eval())(shown, Need(logits=True)).logits, shown.mask)).float()
            for model in (student, stored)
        )
    for module, was_training in modes:
        module.training = was_training
    # Not equal to the last bit: an accelerator may choose another kernel for the second model, and adapters that are
    # added to weights of half precision are rounded.
    exact = all(parameter.dtype == torch.float32 for parameter in stored.parameters())
    if not torch.allclose(said, again, rtol=1e-3 if exact else 2e-2, atol=1e-4 if exact else 0.25):
        raise RunError(
            f"{folder}: the exported student answers differently from the trained one. Something it knows is neither "
            "in its weights nor in its knobs: make it a buffer or a knob."
        )


def _tree(knobs: Mapping[str, object]) -> dict[str, Tree]:
    return {name: as_tree(value) for name, value in knobs.items()}
