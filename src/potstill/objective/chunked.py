"""Losses on a head's output without ever holding [positions, vocabulary].

Any sum of pointwise losses is fused: for each chunk of rows both heads are applied, the losses are computed, and the
gradient is taken AT FORWARD TIME. Counts and weights are known by then, so the gradient is final up to the incoming
scalar. Four head products in all, as in the dense computation; memory O(chunk x V), whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.core.types import Projection
from potstill.objective.representations import head_product

Pointwise: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(student logits [C, V], which rows they are) -> (their share of the loss [], shares for the log [num_terms])."""

LIVE_BUFFERS = 9
"""Buffers of [chunk, V] alive at the peak of one chunk (METHODS_LLM B14)."""


def rows_for(num_classes: int, *, budget_bytes: int) -> int:
    """How many rows a chunk may have for its float32 buffers to stay within a budget: a power of two, at least 16."""
    affordable = budget_bytes // (4 * LIVE_BUFFERS * max(num_classes, 1))
    return int(max(16, 1 << max(int(affordable).bit_length() - 1, 0)))


def fused_sum(student: Projection, pointwise: Pointwise, *, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Sum a pointwise loss over the rows of a head: hidden [N, H] -> (loss [], shares [num_terms]).

    `pointwise` must include weights and divisors. The gradient reaches hidden, weight and bias as far as they ask for
    it: a frozen head allocates none. It can be backpropagated once and not differentiated twice.
    """
    tensors = (student.hidden, student.weight, student.bias)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    work = _Work(student=student, pointwise=pointwise, chunk_rows=chunk_rows, wanted=wanted)
    total, shares = _Fused.apply(*tensors, work)  # type: ignore[no-untyped-call]
    return total, shares


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    student: Projection
    pointwise: Pointwise
    chunk_rows: int
    wanted: tuple[bool, ...]
    """Whether the gradient of hidden, weight and bias is asked for."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        total, shares, ctx.gradients = _run(hidden, weight, bias, work)
        ctx.mark_non_differentiable(shares)
        return total, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("A fused loss can be backpropagated once: its gradient was already handed over.")
        # In place: a second [V, H] buffer would double the memory of the head's gradient.
        return *(None if g is None else g.mul_(incoming.to(g.dtype)) for g in gradients), None


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    wants_hidden, wants_weight, wants_bias = work.wanted
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # On a CPU a half-precision head is widened once, not once per chunk.
    head = weight.to(exact) if weight.device.type == "cpu" else weight
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants_weight else None
    d_bias = None if bias is None or not wants_bias else torch.zeros(bias.shape, dtype=exact, device=bias.device)
    total: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    shares: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    # With no rows at all one empty chunk still runs, so that the shares have their shape.
    for start in range(0, max(hidden.shape[0], 1), work.chunk_rows):
        which = slice(start, start + work.chunk_rows)
        raw = head_product(hidden[which], head, bias)
        if not any(work.wanted):
            share, seen = work.pointwise(work.student.finish(raw), which)
        else:
            with torch.enable_grad():
                share, seen = work.pointwise(work.student.finish(raw.requires_grad_()), which)
                (d_raw,) = torch.autograd.grad(share, raw)
            if d_hidden is not None:
                d_hidden[which] = _product(d_raw, head)
            if d_weight is not None:
                d_weight.addmm_(d_raw.t(), hidden[which].to(exact))
            if d_bias is not None:
                d_bias.add_(d_raw.sum(dim=0))
            del d_raw
        total, shares = total + share.detach(), shares + seen
        del raw, share
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return total, shares, (d_hidden, d_weight, d_bias)


def _product(d_raw: Tensor, head: Tensor) -> Tensor:
    return d_raw @ head if head.dtype == d_raw.dtype else d_raw.to(head.dtype) @ head
