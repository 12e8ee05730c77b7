"""One distribution, four representations: how a term gets what it reads from any of them.

Dense logits, a head not yet applied, a few entries of a teacher, several laws not put together yet. The same
distribution gives the same loss in each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from potstill.core.asking import head_product
from potstill.core.catalog import Card
from potstill.core.errors import SignalError
from potstill.core.types import Dense, Logits, Mixture, Projection, Sparse
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
        case Mixture():
            return width(logits.members[0])


def positions(logits: Logits) -> tuple[int, ...]:
    """The leading dimensions: [B] or [B, T]."""
    match logits:
        case Dense():
            return tuple(logits.logits.shape[:-1])
        case Projection():
            return tuple(logits.hidden.shape[:-1])
        case Sparse():
            return tuple(logits.ids.shape[:-1])
        case Mixture():
            return tuple(logits.weights.shape[:-1])


@overload
def rows(logits: Dense | Projection, which: Tensor | slice) -> Dense | Projection: ...
@overload
def rows(logits: Logits, which: Tensor | slice) -> Logits: ...
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
        case Mixture():
            members = tuple(rows(member, which) for member in logits.members)
            return replace(logits, members=members, weights=logits.weights[which])


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
        case Mixture():
            return mixed(logits)


def mixed(mixture: Mixture) -> Tensor:
    """The logits [..., V] of a mixture, in float32 (float64 stays): of probabilities, T log sum_m w_m softmax(z_m / T),
    up to the constant that makes it a log-law at T; of logits, sum_m w_m z_m."""
    total: Tensor | None = None
    for member, weight in zip(mixture.members, mixture.weights.unbind(dim=-1), strict=True):
        said = dense(member)
        said = said.float() if said.dtype in (torch.float16, torch.bfloat16) else said
        share = weight.to(said.dtype)[..., None]
        if mixture.mean == "logits":
            # A member without a say may hold infinities, and 0 * inf is no number.
            part = torch.where(share > 0, share * said, 0.0)
            total = part if total is None else total + part
        else:
            part = (said / mixture.temperature).log_softmax(dim=-1) + share.log()
            total = part if total is None else torch.logaddexp(total, part)
    assert total is not None, "a mixture of nobody"
    return total if mixture.mean == "logits" else total * mixture.temperature


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
    _check_classes(student_logits, teacher, card)
    student_logits, teacher_logits = meet(student_logits, teacher, card, temperature=temperature)
    return {"student_logits": student_logits, "teacher_logits": teacher_logits}


def meet(student_logits: Tensor, teacher: Logits, card: Card, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits over the same classes, for one loss: [N, V] and a teacher -> [N, V'], [N, V'].

    V' = V, except for a top-k teacher: there both are coarsened to its K classes and one tail bucket, which turns any
    divergence into the same divergence of the coarsened laws (METHODS_LLM B11), exact for K = V.
    Raises SignalError where the loss cannot be computed from what a sparse teacher holds.
    """
    if not isinstance(teacher, Sparse):
        check_numbers(teacher, card)
        return student_logits, dense(teacher)
    if teacher.kind == "top":
        if not card.distribution:
            raise SignalError(
                f"{card.name} needs all {teacher.size} of the teacher's logits, but the teacher remembers "
                f"{teacher.ids.shape[-1]} per position. Use a divergence such as forward_kl, or a live teacher."
            )
        if not card.coarsens:
            raise SignalError(
                f"{card.name} compares the laws of different examples, and of a top-k teacher these have other classes "
                "listed. Remember all logits (the sketch whole), or take a live teacher."
            )
        return coarsened(student_logits, teacher)
    _check_sampled(teacher, card, temperature)
    return student_logits, scattered(teacher)


def check_numbers(teacher: Logits | None, card: Card) -> None:
    """Raises SignalError where a loss reads logits as numbers and the teacher knows its law alone."""
    if card.raw and isinstance(teacher, Mixture) and teacher.mean == "probabilities":
        raise SignalError(
            f"{card.name} reads the teacher's logits as numbers, and a mean of probabilities has none but up to a "
            "constant. Take an ensemble with mean: logits."
        )


def check_draws(student_logits: Tensor, teacher: Sparse, card: Card, *, temperature: float) -> None:
    """Raises SignalError where a loss cannot be computed from a sampled teacher, or the classes differ."""
    _check_classes(student_logits, teacher, card)
    _check_sampled(teacher, card, temperature)


def _check_classes(student_logits: Tensor, teacher: Logits, card: Card) -> None:
    if width(teacher) != student_logits.shape[-1]:
        raise SignalError(
            f"{card.name}: the student has {student_logits.shape[-1]} classes, the teacher {width(teacher)}. Give both "
            "the same classes in the same order, or compare features instead."
        )


def _check_sampled(teacher: Sparse, card: Card, temperature: float) -> None:
    if not card.linear_in_teacher:
        others = "a top-k teacher" if card.coarsens else "a teacher of all logits"
        raise SignalError(
            f"{card.name} is not linear in the teacher, so a sampled teacher would bias it. Use forward_kl or {others}."
        )
    if teacher.temperature != temperature:
        raise SignalError(
            f"{card.name} compares at temperature {temperature:g}, but the teacher's classes were drawn at "
            f"{teacher.temperature:g}. Build the store at the temperature of the loss, or keep the top classes."
        )


def coarsened(student_logits: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's K classes and of all others together: [N, V] -> two of [N, K + 1].

    With K = V a full list leaves no others, and one that is not full has room for them: the result is [N, K].
    """
    logits = student_logits.float() if student_logits.dtype in (torch.float16, torch.bfloat16) else student_logits
    student, said = coarse.coarsened(logits, teacher.ids, teacher.log_probs)
    if teacher.ids.shape[-1] < teacher.size:
        return student, said
    held = said[..., :-1] > -torch.inf
    is_full = held.sum(dim=-1, keepdim=True) >= teacher.size
    free = held.to(torch.uint8).argmin(dim=-1, keepdim=True)

    def housed(law: Tensor) -> Tensor:
        listed, others = law[..., :-1], law[..., -1:]
        return listed.scatter(-1, free, torch.where(is_full, listed.gather(-1, free), others))

    return housed(student), housed(said)


def scattered(teacher: Sparse) -> Tensor:
    """A sampled teacher as logits: log weight where it was drawn, -inf elsewhere. [N, K] -> [N, V]."""
    probs = torch.zeros(*teacher.ids.shape[:-1], teacher.size, dtype=teacher.log_probs.dtype, device=teacher.ids.device)
    return probs.scatter_add(-1, teacher.ids, teacher.log_probs.exp()).log()
