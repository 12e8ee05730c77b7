"""One distribution, three representations: how a term gets what it reads from any of them.

Dense logits, a head not yet applied, a few entries of a teacher. The same distribution gives the same loss in each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from potstill.core.catalog import Card
from potstill.core.errors import SignalError
from potstill.core.types import Dense, Logits, Projection, Sparse
from potstill.losses import coarse


def width(logits: Logits) -> int:
    """The number of classes V."""
    match logits:
        case Dense():
            return logits.logits.shape[-1]
        case Projection():
            return logits.weight.shape[0]
        case Sparse():
            return logits.size


def rows(logits: Logits, which: Tensor | slice) -> Logits:
    """The positions `which` (bool over the leading dims, or a slice of rows)."""
    match logits:
        case Dense():
            return Dense(logits=logits.logits[which])
        case Projection():
            return Projection(
                hidden=logits.hidden[which],
                weight=logits.weight,
                bias=logits.bias,
                scale=logits.scale,
                softcap=logits.softcap,
            )
        case Sparse():
            return replace(logits, ids=logits.ids[which], log_probs=logits.log_probs[which])


class Kept:
    """Selects the counted rows; a no-op, not a copy, where all are counted."""

    def __init__(self, mask: Tensor) -> None:
        self.everything = bool(mask.all())
        self.mask = mask
        self.num_rows = mask.numel() if self.everything else int(mask.sum())

    def of(self, tensor: Tensor) -> Tensor:
        if not self.everything:
            return tensor[self.mask]
        return tensor if self.mask.ndim == 1 else tensor.flatten(0, self.mask.ndim - 1)

    def of_logits(self, logits: Logits) -> Logits:
        if not self.everything or self.mask.ndim > 1:
            return rows(logits, self.mask)
        return logits


def head_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias, accumulated and returned in float32 (float64 stays): [N, H], [V, H] -> [N, V].

    A half-precision product cast afterwards is not the same: near convergence its gradient is wrong by 5 to 150
    percent while the loss looks right (METHODS_LLM 0.6).
    """
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        if weight.dtype in (torch.float32, torch.float64):
            return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        if hidden.is_cuda and hidden.dtype == weight.dtype and not torch.is_grad_enabled():
            product = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
            return product if bias is None else product + bias.float()
        return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def dense(logits: Logits) -> Tensor:
    """The logits [..., V] of a representation that holds all of them."""
    match logits:
        case Dense():
            return logits.logits
        case Projection():
            return logits.finish(head_product(logits.hidden, logits.weight, logits.bias))
        case Sparse():
            raise SignalError(
                f"A sparse signal holds {logits.ids.shape[-1]} of {logits.size} classes, where all are needed."
            )


def heard(
    student_logits: Tensor | None,
    teacher: Logits | None,
    reads: Collection[str],
    card: Card,
    *,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """What a loss or a weight reads of the logits at some positions, by name: [N, V] each, met over the same classes.

    `temperature` is the one it compares at. Raises SignalError where the teacher said none, or speaks of other classes.
    """
    named = {} if student_logits is None else {"student_logits": student_logits}
    if "teacher_logits" not in reads:
        return named
    if teacher is None:
        raise SignalError(f"{card.name} reads the teacher's logits, but the teacher gave none.")
    if student_logits is None:
        return {"teacher_logits": dense(teacher)}
    if width(teacher) != student_logits.shape[-1]:
        raise SignalError(
            f"{card.name}: the student has {student_logits.shape[-1]} classes, the teacher {width(teacher)}. Give both "
            "the same classes in the same order, or compare features instead."
        )
    student_logits, teacher_logits = meet(student_logits, teacher, card, temperature=temperature)
    return {"student_logits": student_logits, "teacher_logits": teacher_logits}


def meet(student_logits: Tensor, teacher: Logits, card: Card, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits over the same classes, for one loss: [N, V] and a teacher -> [N, V'], [N, V'].

    V' = V, except for a top-k teacher: there both are coarsened to its K classes and one tail bucket, which turns any
    divergence into the same divergence of the coarsened laws (METHODS_LLM B11), exact for K = V.
    Raises SignalError where the loss cannot be computed from what a sparse teacher holds.
    """
    if not isinstance(teacher, Sparse):
        return student_logits, dense(teacher)
    if teacher.kind == "top":
        if not card.distribution:
            raise SignalError(
                f"{card.name} needs all {teacher.size} of the teacher's logits, but the teacher remembers "
                f"{teacher.ids.shape[-1]} per position. Use a divergence such as forward_kl, or a live teacher."
            )
        return coarsened(student_logits, teacher)
    if not card.linear_in_teacher:
        raise SignalError(
            f"{card.name} is not linear in the teacher, so a sampled teacher would bias it. Use forward_kl or a "
            "top-k teacher."
        )
    if teacher.temperature != temperature:
        raise SignalError(
            f"{card.name} compares at temperature {temperature:g}, but the teacher's classes were drawn at "
            f"{teacher.temperature:g}. Build the store at the temperature of the loss, or keep the top classes."
        )
    return student_logits, scattered(teacher)


def coarsened(student_logits: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's K classes and of all others together: [N, V] -> two of [N, K + 1].

    With K = V there are no others, and the result is [N, K].
    """
    logits = student_logits.float() if student_logits.dtype in (torch.float16, torch.bfloat16) else student_logits
    student, said = coarse.coarsened(logits, teacher.ids, teacher.log_probs)
    if teacher.ids.shape[-1] >= teacher.size:
        return student[..., :-1], said[..., :-1]
    return student, said


def scattered(teacher: Sparse) -> Tensor:
    """A sampled teacher as logits: log weight where it was drawn, -inf elsewhere. [N, K] -> [N, V]."""
    probs = torch.zeros(*teacher.ids.shape[:-1], teacher.size, dtype=teacher.log_probs.dtype, device=teacher.ids.device)
    return probs.scatter_add(-1, teacher.ids, teacher.log_probs.exp()).log()
