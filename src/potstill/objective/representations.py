"""One distribution, three representations: how a term gets what it reads from any of them.

Dense logits, a head not yet applied, a few entries of a teacher. The same distribution gives the same loss in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.catalog import Card
from potstill.core.errors import SignalError
from potstill.core.types import Dense, Logits, Projection, Sparse


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
            return Sparse(ids=logits.ids[which], log_probs=logits.log_probs[which], size=logits.size, kind=logits.kind)


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


def meet(student_logits: Tensor, teacher: Logits, card: Card) -> tuple[Tensor, Tensor]:
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
    return student_logits, scattered(teacher)


def coarsened(student_logits: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's K classes and of all others together: [N, V] -> two of [N, K + 1].

    With K = V there are no others, and the result is [N, K]. The student's tail is a logsumexp over the other
    logits, not 1 - sum: the difference would be noise where the student is confident.
    """
    logits = student_logits.float() if student_logits.dtype in (torch.float16, torch.bfloat16) else student_logits
    held = teacher.log_probs > -torch.inf
    # Padding repeats the row's first class: its logit may be masked twice, but nobody else's.
    ids = torch.where(held, teacher.ids, teacher.ids[..., :1])
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    student = (logits.gather(-1, ids) - normaliser).masked_fill(~held, -torch.inf)
    log_probs = teacher.log_probs.to(logits.dtype)
    if teacher.ids.shape[-1] >= teacher.size:
        return student, log_probs
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True) - normaliser
    rest = (1.0 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp(min=0.0).log()
    return torch.cat([student, others], dim=-1), torch.cat([log_probs, rest], dim=-1)


def scattered(teacher: Sparse) -> Tensor:
    """A sampled teacher as logits: log weight where it was drawn, -inf elsewhere. [N, K] -> [N, V]."""
    probs = torch.zeros(*teacher.ids.shape[:-1], teacher.size, dtype=teacher.log_probs.dtype, device=teacher.ids.device)
    return probs.scatter_add(-1, teacher.ids, teacher.log_probs.exp()).log()
