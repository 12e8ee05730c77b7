"""From checked calls to living things: data read, models made, a student written out and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.catalog import card, keywords
from potstill.core.errors import RecipeError, RunError, StorageError
from potstill.core.run import replacing
from potstill.core.types import Need
from potstill.recipe import text
from potstill.recipe.calls import Call, check_call
from potstill.recipe.sections import Recipe, TeacherPlan
from potstill.recipe.signature import as_tree
from potstill.recipe.text import Tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from potstill.core.types import Batch, Teacher
    from potstill.data import ImageData
    from potstill.schemes import Offline

WEIGHTS = "model.safetensors"
BUILD = "student.yaml"
TEACHER_SEED = 0
"""A teacher trained in the run is the same for all seeds of its students."""


def read_data(call: Call, *, seed: int) -> ImageData:
    """The data of a section, in the order of this seed. Raises RecipeError for text, which recipes do not take yet."""
    from potstill.data import ImageData

    data = call(seed=seed)
    if not isinstance(data, ImageData):
        raise RecipeError(
            f"data.use: {call.use} gives text, and recipes train on pictures so far. Text is trained on from Python; "
            "benchmarks/language.py of the project shows how."
        )
    return data


def make_model(call: Call, data: ImageData, *, seed: int) -> nn.Module:
    """The part of a section with fresh weights of this seed; channels and classes come from the data."""
    import torch

    classes = call.knobs.get("classes", data.num_classes)
    if classes < data.num_classes:
        raise RecipeError(
            f"{call.kind}.classes: found {classes}, but the data have {data.num_classes} classes. Leave it out, "
            "or give at least as many."
        )
    torch.manual_seed(seed)
    model: nn.Module = call(**_from_data(call, data))
    return model


def make_teacher(plan: TeacherPlan, data: ImageData) -> nn.Module | Teacher:
    """The teacher before any training of its own: a frozen one where it comes trained, else a model."""
    from potstill.teachers import load_weights

    if card(plan.call.part).kind == "teacher":
        teacher: Teacher = plan.call()
        return teacher
    model = make_model(plan.call, data, seed=TEACHER_SEED)
    return model if plan.weights is None else load_weights(model, plan.weights)


def freeze(teacher: nn.Module | Teacher, device: torch.device | str = "cpu") -> Teacher:
    """A teacher part as it is; a model behind teachers.local."""
    from torch import nn

    from potstill.teachers import local

    return local(teacher).to(device) if isinstance(teacher, nn.Module) else teacher


def teaching(recipe: Recipe, teacher: Teacher | None) -> Callable[[nn.Module], Offline]:
    """Who teaches: from a student to the recipe's scheme around it."""

    def scheme_of(student: nn.Module) -> Offline:
        scheme: Offline = recipe.scheme(student=student, teacher=teacher)
        return scheme

    return scheme_of


def save_student(call: Call, student: nn.Module, data: ImageData, folder: Path) -> None:
    """Weights and how to build the model again, whole or not at all; read back and compared before it counts."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    pictures = data.train.pictures
    build: dict[str, Tree] = {
        "student": {"use": call.use, **_tree(call.knobs), **_from_data(call, data)},
        "weights": WEIGHTS,
        "image": list(data.shape),
        "mean": pictures.mean.flatten().tolist(),
        "std": pictures.std.flatten().tolist(),
        "class_names": list(data.class_names),
    }
    with replacing(folder) as draft:
        draft.mkdir()
        try:
            save_file(_state(student), draft / WEIGHTS)
        except SafetensorError as error:
            raise StorageError(f"Cannot save {folder}: {error}. What was saved before is intact.") from error
        (draft / BUILD).write_text(text.write(build), encoding="utf-8")
        _check_same(student, load_student(draft), next(iter(data.test.batches(8))), folder)


def load_student(folder: Path) -> nn.Module:
    """The model that a run exported, ready to answer: its inputs are (pixels - mean) / std of student.yaml.

    Raises RecipeError where there is none, StorageError or DataError where a file is torn.
    """
    from potstill.teachers import load_weights

    if not (folder / BUILD).is_file():
        raise RecipeError(f"{folder} holds no {BUILD}. Give the student folder of a finished run.")
    build = text.read_file(folder / BUILD)
    if not isinstance(build.get("student"), dict) or not isinstance(build.get("weights"), str):
        raise StorageError(f"{folder / BUILD} does not say how to build the student. Export it again.")
    model: nn.Module = check_call("student", build["student"], place=str(folder / BUILD))()  # type: ignore[arg-type]
    return load_weights(model, folder / str(build["weights"])).eval()


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

    from potstill.students.module import as_student

    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in student.modules()]
    with torch.no_grad():
        said, again = (
            as_student(model.to(device).eval())(batch.to(device), Need(logits=True)).logits
            for model in (student, stored)
        )
    for module, was_training in modes:
        module.training = was_training
    # Not equal to the last bit: an accelerator may choose another kernel for the second model.
    if not torch.allclose(said.logits, again.logits, rtol=1e-3, atol=1e-4):
        raise RunError(
            f"{folder}: the exported student answers differently from the trained one. Something it knows is neither "
            "in its weights nor in its knobs: make it a buffer or a knob."
        )


def _from_data(call: Call, data: ImageData) -> dict[str, Tree]:
    known: dict[str, Tree] = {"channels": data.shape[0], "classes": data.num_classes}
    return {name: value for name, value in known.items() if name in keywords(call.part) and name not in call.knobs}


def _tree(knobs: Mapping[str, object]) -> dict[str, Tree]:
    return {name: as_tree(value) for name, value in knobs.items()}
