"""Reading features: in full precision, the teacher's out of reach, at one size. Losses on features share these lines.

Dimension key: N examples or counted positions, B examples that are compared, C channels or width, H and W rows and
columns, T tokens, P = H W or T positions. A map is [N, C, H, W], tokens are [N, T, C], a vector is [N, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import SignalError

LEAST_LENGTH = 1e-12
"""Vectors up to this length count as zero (the epsilon of published code)."""

Pool = Callable[[Tensor, tuple[int, int]], Tensor]


def readable(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision, at least float32, the teacher out of reach for the gradient. All raw reads pass here."""
    exact = torch.promote_types(student_feature.dtype, torch.promote_types(teacher_feature.dtype, torch.float32))
    return student_feature.to(exact), teacher_feature.detach().to(exact)


def same_space(student_feature: Tensor, teacher_feature: Tensor, /, *, reader: str) -> tuple[Tensor, Tensor]:
    """Readable, and over the same positions: of two maps the larger is average-pooled, rows and columns apart.

    [N, C_s, ...], [N, C_t, ...] -> [N, C_s, ...], [N, C_t, ...]; vectors and tokens stay as they are. SignalError,
    in the name of `reader`, where positions cannot be matched.
    """
    student, teacher = readable(student_feature, teacher_feature)
    if student.ndim == teacher.ndim == 4:
        return to_smaller(student, teacher, pool=F.adaptive_avg_pool2d)
    if student.ndim != teacher.ndim or _sites(student) != _sites(teacher):
        raise SignalError(
            f"{reader}: found features {_said(student, teacher)}, expected the same kind of feature over the same "
            "positions (maps may differ in size, tokens not in number). Choose layers that correspond."
        )
    return student, teacher


def same_shape(student_feature: Tensor, teacher_feature: Tensor, /, *, reader: str) -> tuple[Tensor, Tensor]:
    """Over the same positions and of the same width: broadcasting never hides a mismatch. SignalError otherwise."""
    student, teacher = same_space(student_feature, teacher_feature, reader=reader)
    if student.shape != teacher.shape:
        raise SignalError(
            f"{reader}: found features {_said(student_feature, teacher_feature)}, expected the same number of "
            "examples and channels. Bring the student to the teacher's width first, as the head 'projector' does."
        )
    return student, teacher


def same_grid(student_feature: Tensor, teacher_feature: Tensor, /, *, reader: str) -> tuple[Tensor, Tensor]:
    """[N, P, C_s], [N, P, C_t] over the same P > 1 positions. SignalError where there is nothing to compare."""
    student, teacher = same_space(student_feature, teacher_feature, reader=reader)
    student_rows, teacher_rows = positions(student), positions(teacher)
    if student_rows.shape[1] < 2:
        raise SignalError(
            f"{reader}: found features {_said(student_feature, teacher_feature)}, expected at least two positions in "
            "common: it compares where a network looks. Choose layers that give maps or tokens."
        )
    return student_rows, teacher_rows


def to_smaller(one: Tensor, other: Tensor, /, *, pool: Pool) -> tuple[Tensor, Tensor]:
    """Maps [N, C, H, W] pooled to the fewer rows and the fewer columns of both; one that fits is not touched."""
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    fit_one, fit_other = (x if tuple(x.shape[2:]) == size else pool(x, size) for x in (one, other))
    return fit_one, fit_other


def positions(feature: Tensor) -> Tensor:
    """Channels last, one row per position: maps [N, C, H, W] -> [N, H W, C], vectors [N, C] -> [N, 1, C]."""
    if feature.ndim == 2:
        return feature.unsqueeze(1)
    return feature if feature.ndim == 3 else feature.flatten(2).mT


def embeddings(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """One readable vector per example, whatever the layers: [B, ...], [B, ...] -> [B, D_s], [B, D_t]."""
    student, teacher = readable(student_feature, teacher_feature)
    return student.flatten(1), teacher.flatten(1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors over their length, [..., D] -> [..., D]; a zero vector stays zero and passes no gradient.

    Dividing by max(length, epsilon) would give a zero vector the gradient 1 / epsilon.
    """
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length <= LEAST_LENGTH, math.inf)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the precision they have: autocast would round a Gram matrix to half precision."""
    with torch.autocast(device_type=left.device.type, enabled=False):
        return left @ right


def _sites(feature: Tensor) -> torch.Size:
    """The sizes that are neither examples nor channels."""
    return feature.shape[1:-1] if feature.ndim < 4 else feature.shape[2:]


def _said(student: Tensor, teacher: Tensor) -> str:
    return f"of shape {list(student.shape)} from the student and {list(teacher.shape)} from the teacher"
