"""Losses on a head's output without ever holding [positions, vocabulary].

Any sum of pointwise losses is fused: for each chunk of rows both heads are applied, the losses are computed, and the
gradient is taken AT FORWARD TIME. Counts and weights are known by then, so the gradient is final up to the incoming
scalar. Four head products in all, as in the dense computation; memory O(chunk x V), whatever the number of rows.

A chunk is large, because its matrix products must be; on a CPU the losses then walk through it in strips that fit the
cache, and each strip's gradient takes the place of its logits. A chunk so holds two buffers of [chunk, V], not nine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.core.types import Dense, Logits, Projection
from potstill.objective.representations import head_product, rows

Pointwise: TypeAlias = Callable[[Tensor, Logits | None, slice], tuple[Tensor, Tensor]]
"""(student logits [C, V], the teacher there, which rows they are) -> (share of the loss [], of each term [terms])."""

CHUNK_BUFFERS = {"cpu": 2, "cuda": 9}
"""Buffers of [chunk, V] alive at the peak: with strips the two products, without them the losses' own as well."""

STRIP_BYTES = 2 * 2**20
"""What one [strip, V] buffer may take: about a core's share of cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows go through the heads at once, and how many of these through the losses at once."""

    chunk: int
    strip: int


def sizes_for(num_classes: int, *, device: str, budget_bytes: int) -> Sizes:
    """Chunks whose float32 buffers stay within a budget: a power of two of rows, at least 16."""
    row_bytes = 4 * max(num_classes, 1)
    affordable = budget_bytes // (CHUNK_BUFFERS.get(device, CHUNK_BUFFERS["cuda"]) * row_bytes)
    chunk = max(16, _power_of_two(affordable))
    return Sizes(chunk=chunk, strip=min(chunk, _power_of_two(STRIP_BYTES // row_bytes)) if device == "cpu" else chunk)


def slices(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows; one empty slice of nothing, so that results keep their shape."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size))


def fused_sum(
    student: Projection, teacher: Logits | None, pointwise: Pointwise, *, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Sum a pointwise loss over the rows of a head: hidden [N, H] -> (loss [], shares [num_terms]).

    `pointwise` must include weights and divisors. The gradient reaches hidden, weight and bias as far as they ask for
    it: a frozen head allocates none. It can be backpropagated once and not differentiated twice.
    """
    tensors = (student.hidden, student.weight, student.bias)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    work = _Work(student=student, teacher=teacher, pointwise=pointwise, sizes=sizes, wanted=wanted)
    total, shares = _Fused.apply(*tensors, work)  # type: ignore[no-untyped-call]
    return total, shares


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    student: Projection
    teacher: Logits | None
    pointwise: Pointwise
    sizes: Sizes
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
    num_rows, chunk = hidden.shape[0], work.sizes.chunk
    head = _Head(work.student, min(chunk, num_rows))
    teacher = _Head(work.teacher, min(chunk, num_rows)) if isinstance(work.teacher, Projection) else None
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants_weight else None
    d_bias = None if bias is None or not wants_bias else torch.zeros(bias.shape, dtype=exact, device=bias.device)
    total: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    shares: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    for which in slices(num_rows, chunk):
        raw = head.product(which)
        said = _said(work.teacher, teacher, which)
        for strip in slices(raw.shape[0], work.sizes.strip):
            share, seen = _strip(work, raw[strip], None if said is None else rows(said, strip), _within(which, strip))
            total, shares = total + share, shares + seen
        # raw now holds the gradient with respect to itself.
        if d_hidden is not None:
            d_hidden[which] = raw.to(head.weight.dtype) @ head.weight
        if d_weight is not None:
            _add_outer(d_weight, raw, hidden[which])
        if d_bias is not None:
            d_bias.add_(raw.sum(dim=0))
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return total, shares, (d_hidden, d_weight, d_bias)


class _Head:
    """A head applied to a chunk at a time, always into one buffer: fresh pages would cost a part of the product."""

    def __init__(self, projection: Projection, num_rows: int) -> None:
        self.projection = projection.detach()
        weight = self.projection.weight
        # On a CPU a half-precision head is widened once, not once per chunk.
        widened = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.to(widened) if weight.device.type == "cpu" else weight
        self.buffer = torch.empty(num_rows, weight.shape[0], dtype=widened, device=weight.device)

    def product(self, which: slice) -> Tensor:
        """hidden @ weight.T + bias at some rows, in float32 (float64 stays). It lasts until the next call."""
        hidden, bias = self.projection.hidden[which], self.projection.bias
        if self.weight.dtype != self.buffer.dtype:
            return head_product(hidden, self.weight, bias)
        raw = self.buffer[: hidden.shape[0]]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            torch.mm(hidden.to(raw.dtype), self.weight.t(), out=raw)
        return raw if bias is None else raw.add_(bias)


def _add_outer(d_weight: Tensor, d_raw: Tensor, hidden: Tensor) -> None:
    """d_weight += d_raw.T @ hidden, accumulated in d_weight's precision: [V, H], [C, V], [C, H]."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        d_weight.add_(torch.mm(d_raw.to(hidden.dtype).t(), hidden, out_dtype=d_weight.dtype))
    else:
        d_weight.addmm_(d_raw.t(), hidden.to(d_weight.dtype))


def _strip(work: _Work, raw: Tensor, teacher: Logits | None, which: slice) -> tuple[Tensor, Tensor]:
    """Loss of one strip; where gradients are asked for, the logits are overwritten by theirs."""
    if not any(work.wanted):
        return work.pointwise(work.student.finish(raw), teacher, which)
    logits = raw.detach().requires_grad_()
    with torch.enable_grad():
        share, seen = work.pointwise(work.student.finish(logits), teacher, which)
        (gradient,) = torch.autograd.grad(share, logits)
    raw.copy_(gradient)
    return share.detach(), seen


def _said(teacher: Logits | None, head: _Head | None, which: slice) -> Logits | None:
    """The teacher at some rows, its head applied: all strips of a chunk share one product."""
    if head is not None:
        return Dense(logits=head.projection.finish(head.product(which)))
    return None if teacher is None else rows(teacher, which)


def _within(chunk: slice, strip: slice) -> slice:
    return slice(chunk.start + strip.start, chunk.start + strip.stop)


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return int(1 << max(int(number).bit_length() - 1, 0))
