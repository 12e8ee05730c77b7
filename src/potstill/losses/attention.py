"""Losses on where a network looks: the energy of its features at each position, one value per example.

Dimension key as in shapes.py. Channels vanish in the energy, so widths may differ and no head is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.types import PerItem
from potstill.losses.shapes import same_grid, unit


@part("loss", paper="Zagoruyko & Komodakis 2017")
def attention_transfer(student_feature: Tensor, teacher_feature: Tensor, /, *, power: float = 2.0) -> PerItem:
    """Mean over positions of (Q_s - Q_t)^2, Q the energy map sum_c |F_c|^power at length 1 (AT as published in code).

    [N, C_s, ...], [N, C_t, ...] -> [N]. The usual weight is 1000 for three layers, 3000 / layers otherwise. Take
    features after their ReLU. SignalError without positions, RecipeError for a power below 1.
    """
    student, teacher = _energies(student_feature, teacher_feature, power, reader="attention_transfer")
    return (student - teacher).square().mean(-1)


@part("loss", paper="Zagoruyko & Komodakis 2017")
def attention_transfer_norm(student_feature: Tensor, teacher_feature: Tensor, /, *, power: float = 2.0) -> PerItem:
    """||Q_s - Q_t||_2, not squared: attention transfer as the paper writes it, where its weight is beta / 2.

    [N, C_s, ...], [N, C_t, ...] -> [N]. Its gradient keeps its size up to the teacher, and is 0 there. SignalError
    without positions, RecipeError for a power below 1.
    """
    student, teacher = _energies(student_feature, teacher_feature, power, reader="attention_transfer_norm")
    distance: Tensor = torch.linalg.vector_norm(student - teacher, dim=-1)
    return distance


def _energies(student: Tensor, teacher: Tensor, power: float, *, reader: str) -> tuple[Tensor, Tensor]:
    if not power >= 1:
        raise RecipeError(f"{reader}.power: found {power}, expected a number from 1 on; the paper's is 2.")
    rows_s, rows_t = same_grid(student, teacher, reader=reader)
    return _energy(rows_s, power), _energy(rows_t, power)


def _energy(rows: Tensor, power: float) -> Tensor:
    """Unit map of sum_c |F_c|^power: [N, P, C] -> [N, P]. A map of zeros stays zero."""
    # The scale cancels, so it is taken out first: powers then neither overflow nor vanish.
    largest = rows.detach().abs().amax((1, 2), keepdim=True)
    scaled = rows / largest.masked_fill(largest == 0, 1.0)
    return unit(scaled.abs().pow(power).sum(-1))
