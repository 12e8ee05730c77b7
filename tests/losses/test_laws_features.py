"""METHODS_CLASSIC P1 and P2, for every loss of the catalog that reads features: a new one is held the day it is added.

What a loss promises stands on its card; the few facts that no card has a field for stand here, each with its reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from potstill.core.catalog import card, parts
from potstill.core.errors import SignalError
from potstill.core.types import PerItem

Loss = Callable[..., Tensor]

MAY_BE_NEGATIVE = {"vid": "the logarithm of a density"}
SAME_CHANNELS = {"fsp": "its Gram matrices are channels by channels, and no head can stand there"}
NEEDS_POSITIONS = {
    "attention_transfer": "compares where a network looks",
    "attention_transfer_norm": "compares where a network looks",
    "nst": "compares where a channel fires",
}
NO_SMALL_CHANGE_AT_CONSTANT_ROWS = {"smooth_l1": "its layer norm has an epsilon"}

ONE_LAYER = {"student_feature", "teacher_feature"}
SEVERAL = {"student_features", "teacher_features"}
FEATURES = ONE_LAYER | SEVERAL
FROM_HEADS = {"student_variance"}

B = 5
STUDENT_MAP = (4, 3, 5)
TEACHER_MAP = (6, 5, 2)


def reads(loss: Loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


LOSSES = {name: loss for name, loss in parts("loss").items() if FEATURES & set(reads(loss))}


def is_per_item(loss: Loss) -> bool:
    return bool(get_type_hints(loss, include_extras=True)["return"] == PerItem)


def is_joined(loss: Loss) -> bool:
    """The student must come with the teacher's channels: by a head, or from the start."""
    return bool(card(loss).head) or card(loss).name in SAME_CHANNELS


def held_to(promise: Callable[[Loss], object] = lambda loss: True) -> pytest.MarkDecorator:
    """Parametrize `loss` over those that make a promise."""
    held = [pytest.param(loss, id=name) for name, loss in LOSSES.items() if promise(loss)]
    assert held, "a law that holds for no loss tests nothing"
    return pytest.mark.parametrize("loss", held)


def apply(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Call a loss with what it reads; one that reads several layers sees the same one twice, flipped the second time."""
    channels = student.shape[1] if student.ndim == 4 else student.shape[-1]
    offered = {
        "student_feature": student,
        "teacher_feature": teacher,
        "student_features": (student, student.flip(0)) if student.ndim < 4 else (student, student.flip(-1)),
        "teacher_features": (teacher, teacher.flip(0)) if teacher.ndim < 4 else (teacher, teacher.flip(-1)),
        "student_variance": torch.linspace(0.5, 2.0, channels, dtype=student.dtype),
    }
    return loss(*(offered[name] for name in reads(loss)))
