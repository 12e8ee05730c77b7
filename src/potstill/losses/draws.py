"""Losses that are linear in the teacher, from a sampled teacher's draws alone: no row of V teacher values is ever made.

Dimension key: V classes, K draws kept per row (distinct; padding has log-weight -inf), "..." leading dimensions.
p is the law of the draws, softmax(log_weights / temperature), q the student's. The same value and gradient as of the
loss they belong to, given the draws as V logits of which V - K are -inf: those cost a softmax over V that says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.types import PerItem
from potstill.losses.logits import full_precision, tempered, with_floor, with_gradient


def forward_kl_of_draws(
    student_logits: Tensor,
    ids: Tensor,
    log_weights: Tensor,
    /,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> PerItem:
    """KL(p || q), times temperature squared: [..., V], [..., K], [..., K] -> [...]"""
    return _of_draws(student_logits, ids, log_weights, temperature, scale_by_t2, entropy=True)


def kd_of_draws(student_logits: Tensor, ids: Tensor, log_weights: Tensor, /, *, temperature: float = 4.0) -> PerItem:
    """The same at kd's temperature."""
    return _of_draws(student_logits, ids, log_weights, temperature, True, entropy=True)


def soft_cross_entropy_of_draws(
    student_logits: Tensor,
    ids: Tensor,
    log_weights: Tensor,
    /,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> PerItem:
    """-sum p log q, times temperature squared: [..., V], [..., K], [..., K] -> [...]"""
    return _of_draws(student_logits, ids, log_weights, temperature, scale_by_t2, entropy=False)


def _of_draws(
    student_logits: Tensor, ids: Tensor, log_weights: Tensor, temperature: float, scale_by_t2: bool, *, entropy: bool
) -> Tensor:
    with torch.no_grad():
        # A class at -inf matters where it was drawn only: a floor under all V would be one more pass over them.
        log_q = torch.log_softmax(tempered(student_logits, temperature), -1)
        log_p = torch.log_softmax(tempered(full_precision(log_weights.detach()), temperature), -1).to(log_q.dtype)
        p = log_p.exp()
        told = with_floor(log_q.gather(-1, ids))
        # 0 log 0 is 0: a padding entry has p = 0 and log p = -inf.
        value = (p * ((log_p if entropy else 0.0) - told)).masked_fill(p == 0, 0.0).sum(-1)
        slope = log_q.exp_().scatter_add_(-1, ids, -p)
    return with_gradient(student_logits, value, slope, temperature=temperature, scale_by_t2=scale_by_t2)
