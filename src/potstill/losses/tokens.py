"""Losses on the states of tokens, compared inside each example, one value per example.

Dimension key as in shapes.py. States are [B, T, D]; the mask [B, T] says which tokens count (0 or False: not at all),
and each example is a world of its own, so that any split of a batch gives the same values. All compute in float32
(float64 stays), and nothing outside the mask is ever read, not even where it is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import SignalError
from potstill.core.types import PerExample
from potstill.losses.shapes import product, readable, same_shape, unit


@part("loss", paper="Kornblith et al. 2019")
def token_cka(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
    """1 - linear CKA over the tokens of each example: [B, T, D_s], [B, T, D_t], [B, T] -> [B].

    Widths may differ; rotation, scale and offset of either side change nothing. Two tokens are always perfectly
    aligned: an example of fewer than three has nothing to learn. Memory is B T^2.
    """
    states = same_tokens(student_feature, teacher_feature, mask, reader="token_cka")
    student, teacher = (_gram_directions(x, mask != 0) for x in states)
    return 0.5 * (student - teacher).square().sum((1, 2))


@part("loss", paper="Tung & Mori 2019")
def token_similarity(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
    """Mean over all pairs of an example's tokens of (cos_s - cos_t)^2: [B, T, D_s], [B, T, D_t], [B, T] -> [B].

    Widths may differ; rotation of either side and the length of any state change nothing. Memory is B T^2.
    """
    states = same_tokens(student_feature, teacher_feature, mask, reader="token_similarity")
    student, teacher = (product(unit(x), unit(x).mT) for x in states)
    return (student - teacher).square().sum((1, 2)) / num_tokens(mask).square()


@part("loss", paper="Sun et al. 2019", head="projector")
def pkd(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
    """Mean over channels of the squared difference of unit states at an example's first token, [CLS] (patient KD).

    [B, T, D], [B, T, D] -> [B], at the first position in the mask [B, T]; with a mask [B] at position 0, vectors [B, D]
    as they are. The published code's mean, with weights from 10 to 1000; the sum over channels is D times this.
    SignalError if widths differ.
    """
    student, teacher = same_shape(student_feature, teacher_feature, reader="pkd")
    if student.ndim == 3:
        first = (mask != 0).int().argmax(1) if mask.ndim == 2 else torch.zeros_like(mask, dtype=torch.long)
        rows = torch.arange(len(student), device=student.device)
        without = (mask.view(len(mask), -1) == 0).all(1, keepdim=True)
        student, teacher = (x[rows, first].masked_fill(without, 0.0) for x in (student, teacher))
    return (unit(student) - unit(teacher)).square().mean(-1)


def same_tokens(
    student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, *, reader: str
) -> tuple[Tensor, Tensor]:
    """States of the same tokens, zero outside the mask: [B, T, D_s], [B, T, D_t]. SignalError for anything else."""
    student, teacher = readable(student_feature, teacher_feature)
    if student.ndim != 3 or teacher.ndim != 3 or not student.shape[:2] == teacher.shape[:2] == mask.shape:
        raise SignalError(
            f"{reader}: found features of shape {list(student.shape)} from the student and {list(teacher.shape)} from "
            f"the teacher under a mask {list(mask.shape)}, expected the states [B, T, D] of the tokens that the mask "
            "[B, T] is about. Choose layers that give one state per token, and say over: attention_mask where the "
            "batch's own mask has no positions."
        )
    outside = (mask == 0).unsqueeze(-1)
    return student.masked_fill(outside, 0.0), teacher.masked_fill(outside, 0.0)


def num_tokens(mask: Tensor) -> Tensor:
    """How many tokens of each example count, at least 1: [B, T] -> [B]."""
    return (mask != 0).sum(-1).clamp(min=1)


def _gram_directions(states: Tensor, inside: Tensor) -> Tensor:
    """Gram matrix of each example's centred tokens, at Frobenius norm 1: [B, T, D] -> [B, T, T]."""
    outside = ~inside.unsqueeze(-1)
    # From one token first: identical tokens then centre to exactly zero, not to rounding errors.
    first = inside.int().argmax(1).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    moved = (states - states.gather(1, first)).masked_fill(outside, 0.0)
    mean = moved.sum(1, keepdim=True) / num_tokens(inside).view(-1, 1, 1)
    # Scaled before the product, whose entries are squares: no overflow, and no tiny value taken for zero.
    centred = _unit_matrices((moved - mean).masked_fill(outside, 0.0))
    return _unit_matrices(product(centred, centred.mT))


def _unit_matrices(matrices: Tensor) -> Tensor:
    return unit(matrices.flatten(1)).view_as(matrices)
