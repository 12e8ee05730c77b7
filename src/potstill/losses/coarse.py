"""Laws coarsened to some listed classes and a tail for all others: a divergence of them is at most that of the whole.

A list is ids [..., K] with the teacher's log-probabilities [..., K]; entries of -inf are padding, whatever their id.
Dimension key: V classes, K listed classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coarsened(student_logits: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p of the listed classes and of the tail: [..., V], [..., K], [..., K] -> [..., K + 1] twice.

    The student's tail is a sum over the other classes, not 1 - sum: the difference would be noise where the student is
    confident. A list without entries leaves everything in both tails, so that nothing is to be learnt from it.
    """
    held = log_probs > -torch.inf
    ids = unpadded(ids, held)
    normaliser = student_logits.logsumexp(dim=-1, keepdim=True)
    student = (student_logits.gather(-1, ids) - normaliser).masked_fill(~held, -torch.inf)
    others = student_logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True) - normaliser
    others = torch.where(held.any(dim=-1, keepdim=True), others, 0.0)
    return torch.cat([student, others], dim=-1), with_tail(log_probs.to(student_logits.dtype))


def unpadded(ids: Tensor, held: Tensor) -> Tensor:
    """The ids, int64, with a held one in place of padding: what is done to a row at its ids then hits no other."""
    first = held.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return torch.where(held, ids, ids.gather(-1, first)).long()


def with_tail(log_probs: Tensor) -> Tensor:
    """A teacher's listed classes and the rest of its mass: log p [..., K] -> [..., K + 1]."""
    rest = (1.0 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp(min=0.0).log()
    return torch.cat([log_probs, rest], dim=-1)
