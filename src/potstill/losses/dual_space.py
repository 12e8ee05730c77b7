"""Distillation in two spaces: each model's states, carried over into the other's, are read by the other's head.

Dimension key: B examples; T and U positions, D and E widths, V and W classes of the student and of the teacher; N and M
counted positions of theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.types import IGNORED, PerItem
from potstill.losses.by_rows import in_chunks, rows_for
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
) -> PerItem:
    """Dual-space distillation with cross-model attention, per counted token of the student, without T squared.

    The student's token attends to the teacher's by their embeddings, with A = Q K^T / sqrt(2 E), and so gets a teacher
    state that the student's head can read, and the other way round. Three parts are summed: the cross-entropy of the
    carried teacher, which trains the projections; KL(carried teacher || student) where the carried teacher is right;
    KL(teacher || carried student) at the teacher's tokens, of which each of the student's has an even share. No head
    learns from it. For `at`, name the layer of the embeddings on both sides; the teacher stands behind
    `teachers.beside`. Published beside cross-entropy, half and half.

    The published deviations that keys and values are divided by are those of a micro-batch; here each example has its
    own, so that any split of a batch gives the same.

    Queries [B, T, 2 E] and embeddings [B, U, E]; maps [E, D] and [D, E]; states [B, T, D], [B, U, E]; heads [V, D],
    [W, E]; labels [B, U], [B, T]; mask [B, T] -> [N]. Memory is B T U, and flat in T V.
    """
    ours, theirs = (mask != 0) & (labels != IGNORED), teacher_labels != IGNORED
    exact = torch.promote_types(full_precision(student_states).dtype, full_precision(teacher_states).dtype)
    # What does not count may hold anything.
    queries, states = (_only(ours, tensor.to(exact)) for tensor in (student_feature, student_states))
    answers, named = _only(theirs, teacher_states.detach().to(exact)), teacher_feature.detach().to(exact)
    following = behind(named)
    keys = _unit(torch.cat([named, following], dim=-1), theirs)
    scores = product(queries, keys.mT) / math.sqrt(keys.shape[-1])
    values = product(_unit(answers, theirs) + _unit(following, theirs), student_from_teacher.to(exact).mT)
    carried = _attended(scores, theirs, values)[ours]
    brought = _attended(scores.mT, ours, product(states, student_to_teacher.to(exact).mT))[theirs]
    head, their_head = student_head.to(exact), teacher_head.to(exact)
    targets, said = labels[ours], answers[theirs]

    def learnt(which: slice, carried: Tensor, own: Tensor) -> Tensor:
        """The carried teacher's cross-entropy, and what it teaches the student where it is right."""
        logits, wanted = product(carried, head.mT), targets[which]
        (right,) = (logits.argmax(dim=-1) == wanted).nonzero(as_tuple=True)
        taught = forward_kl(
            product(own[right], head.mT), logits[right].detach(), temperature=temperature, scale_by_t2=False
        )
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="none").index_add(0, right, taught)

    def back(which: slice, brought: Tensor) -> Tensor:
        return forward_kl(
            product(brought, their_head.mT), product(said[which], their_head.mT), temperature=temperature,
            scale_by_t2=False,
        )  # fmt: skip

    forth = in_chunks(learnt, carried, states[ours], size=rows_for(len(head)))
    return forth + _shared(in_chunks(back, brought, size=rows_for(len(their_head))), theirs, ours)


def behind(embeddings: Tensor) -> Tensor:
    """The embedding of the token that each position predicts, zeros for the last: [B, T, D] -> [B, T, D]."""
    return torch.nn.functional.pad(embeddings[:, 1:], (0, 0, 0, 1))


def _unit(states: Tensor, where: Tensor) -> Tensor:
    """Divided by their standard deviation over all that counts of an example, so padding changes nothing; else zeros.

    [B, T, D], [B, T] -> [B, T, D]
    """
    counted = _only(where, states)
    num = (where.sum(dim=-1) * states.shape[-1]).view(-1, 1, 1)
    mean = counted.sum(dim=(1, 2), keepdim=True) / num.clamp(min=1)
    squares = _only(where, counted - mean).square().sum(dim=(1, 2), keepdim=True)
    spread = (squares / (num - 1).clamp(min=1)).sqrt()
    return counted / torch.where(num > 1, spread, 1.0).clamp(min=1e-6)


def _only(where: Tensor, states: Tensor) -> Tensor:
    """States [B, T, D], zeros outside `where` [B, T]."""
    return torch.where(where[..., None], states, 0.0)


def _attended(scores: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Means of `values` [B, U, D] by the softmax of `scores` [B, T, U] over the places `where` [B, U] -> [B, T, D]."""
    # A row without any place attends evenly, and counts nowhere.
    weights = scores.masked_fill(~where[:, None], -1e5).softmax(dim=-1)
    return product(weights, values)


def _shared(values: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    """An example's sum, over its counted positions on the other side alike: values [M] -> [N]."""
    num_theirs, num_ours = theirs.sum(dim=-1), ours.sum(dim=-1)
    examples = torch.arange(len(ours), device=ours.device)
    sums = values.new_zeros(len(ours)).index_add(0, examples.repeat_interleave(num_theirs), values)
    return (sums / num_ours.clamp(min=1)).repeat_interleave(num_ours)
