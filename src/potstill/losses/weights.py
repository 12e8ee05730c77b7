"""How much a position matters: one number per row of logits, which a term multiplies by (weigh) or ranks by (select).

Written like losses (they read by name, [..., V] -> [...]), but nothing learns from them: no gradient passes. p is the
teacher's law, q the student's. Over a top-k teacher both are the coarsened laws, and V the classes these have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.losses.logits import log_probs, probs


@part("weight", distribution=True)
@torch.no_grad()
def teacher_confidence(teacher_logits: Tensor, /) -> Tensor:
    """max p, from 1 / V to 1."""
    return probs(teacher_logits, 1.0).amax(-1)


@part("weight", distribution=True)
@torch.no_grad()
def teacher_certainty(teacher_logits: Tensor, /) -> Tensor:
    """1 - H(p) / ln V: 0 for a teacher that knows nothing, 1 for one that is sure."""
    return 1.0 - _relative_entropy(teacher_logits)


@part("weight", distribution=True)
@torch.no_grad()
def student_entropy(student_logits: Tensor, /) -> Tensor:
    """H(q) / ln V, from 0 to 1. Its top fifth are the forks of a reasoning trace."""
    return _relative_entropy(student_logits)


@part("weight", distribution=True)
@torch.no_grad()
def student_teacher_gap(student_logits: Tensor, teacher_logits: Tensor, /) -> Tensor:
    """sum |p - q| / 2, from 0 to 1: how much the student has still to learn here."""
    return 0.5 * (probs(student_logits, 1.0) - probs(teacher_logits, 1.0)).abs().sum(-1)


# Not marked distribution: a top-k teacher may have put the label into its tail.
@part("weight", paper="Lin et al. 2024")
@torch.no_grad()
def excess_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
    """-log q + log p of the label (Rho-1, the teacher as its reference): to select by; it may be below 0.

    Rho-1 keeps the top 0.6 of the tokens.
    """
    at = labels.unsqueeze(-1)
    gap = log_probs(teacher_logits, 1.0).gather(-1, at) - log_probs(student_logits, 1.0).gather(-1, at)
    return gap.squeeze(-1)


def _relative_entropy(logits: Tensor) -> Tensor:
    logs = log_probs(logits, 1.0)
    entropy = -(logs.exp() * logs).sum(-1)
    return entropy / math.log(max(logits.shape[-1], 2))
