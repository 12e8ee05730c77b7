"""Distillation in two spaces: each model's states, carried over into the other's, are read by the other's head.

Dimension key: B examples; T and U positions, D and E widths, V and W classes of the student and of the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.types import IGNORED, PerExample
from potstill.losses.divergence import forward_kl
from potstill.losses.logits import full_precision
from potstill.losses.shapes import product


@part("loss", paper="Zhang et al. 2024", zero_at_equality=False, head="dual_space")
def dskd(
    student_feature: Tensor,
    teacher_feature: Tensor,
    student_to_teacher: Tensor,
    student_from_teacher: Tensor,
    student_states: Tensor,
    student_head: Tensor,
    teacher_states: Tensor,
    teacher_head: Tensor,
    teacher_labels: Tensor,
    labels: Tensor,
    mask: Tensor,
    /,
    *,
    temperature: float = 2.0,
) -> PerExample:
    """Dual-space distillation with cross-model attention, per counted token of the student, without T squared.

    The student's token attends to the teacher's by their embeddings, with A = Q K^T / sqrt(2 E), and so gets a teacher
    state that the student's head can read, and the other way round. Three parts are summed: the cross-entropy of the
    carried teacher, which trains the projections; KL(carried teacher || student) where the carried teacher is right;
    KL(teacher || carried student) at the teacher's tokens. No head learns from it. For `at`, name the layer of the
    embeddings on both sides; the teacher stands behind `teachers.beside`.

    Queries [B, T, 2 E] and embeddings [B, U, E]; maps [E, D] and [D, E]; states [B, T, D], [B, U, E]; heads [V, D],
    [W, E]; labels [B, U], [B, T]; mask [B, T] -> [B].
    """
    ours, theirs = (mask != 0) & (labels != IGNORED), teacher_labels != IGNORED
    # What does not count may hold anything.
    queries, states = (_only(ours, tensor) for tensor in (student_feature, student_states))
    answers, named = _only(theirs, teacher_states.detach()), full_precision(teacher_feature.detach())
    following = behind(named)
    keys = _unit(torch.cat([named, following], dim=-1), theirs)
    scores = product(queries, keys.mT) / math.sqrt(keys.shape[-1])
    values = _mapped(_unit(answers, theirs) + _unit(following, theirs), student_from_teacher)
    carried = _mapped(_attended(scores, theirs, values), student_head)
    brought = _mapped(_attended(scores.mT, ours, _mapped(states, student_to_teacher)), teacher_head)
    own, said = _mapped(states, student_head), _mapped(answers, teacher_head)
    targets, at_ours = labels[ours], carried[ours]
    learnt = torch.nn.functional.cross_entropy(at_ours, targets, reduction="none")
    right = at_ours.argmax(dim=-1) == targets
    taught = forward_kl(own[ours], at_ours.detach(), temperature=temperature, scale_by_t2=False)
    taught = torch.where(right, taught, 0.0)
    back = forward_kl(brought[theirs], said[theirs], temperature=temperature, scale_by_t2=False)
    total = _per_example(learnt + taught, ours) + _per_example(back, theirs)
    return total / ours.sum(dim=-1).clamp(min=1)


def behind(embeddings: Tensor) -> Tensor:
    """The embedding of the token that each position predicts, zeros for the last: [B, T, D] -> [B, T, D]."""
    return torch.nn.functional.pad(embeddings[:, 1:], (0, 0, 0, 1))


def _unit(states: Tensor, where: Tensor) -> Tensor:
    """Divided by their standard deviation over all that counts, so that padding changes nothing; zeros elsewhere."""
    counted = states[where]
    spread = counted.std() if counted.numel() > 1 else states.new_ones(())
    return _only(where, states) / spread.clamp(min=1e-6)


def _only(where: Tensor, states: Tensor) -> Tensor:
    """States [B, T, D] in full precision, zeros outside `where` [B, T]."""
    return torch.where(where[..., None], full_precision(states), 0.0)


def _attended(scores: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Means of `values` [B, U, D] by the softmax of `scores` [B, T, U] over the places `where` [B, U] -> [B, T, D]."""
    # A row without any place attends evenly, and counts nowhere.
    weights = scores.masked_fill(~where[:, None], -1e5).softmax(dim=-1)
    return product(weights, values)


def _mapped(states: Tensor, weight: Tensor) -> Tensor:
    """[B, T, D], [V, D] -> [B, T, V]."""
    return product(states, full_precision(weight).mT)


def _per_example(values: Tensor, where: Tensor) -> Tensor:
    """Sums over each example's counted positions: values [N] of the places `where` [B, T] -> [B]."""
    whose = torch.arange(len(where), device=where.device)[:, None].expand_as(where)[where]
    return values.new_zeros(len(where)).index_add(0, whose, values)
