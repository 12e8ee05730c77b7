"""Losses on a head's output without ever holding [positions, vocabulary].

Any sum of losses that look at single rows, or at short runs of them, is fused: for each chunk of rows both heads are
applied, the losses are computed, and the gradient is taken AT FORWARD TIME. Counts and weights are known by then, so
the gradient is final up to the incoming scalar. Four head products in all, as in the dense computation; memory
O(chunk x V), whatever the number of rows.

A chunk is large, because its matrix products must be; on a CPU the losses then walk through it in strips that fit the
cache, and each strip's gradient takes the place of its logits. A chunk so holds two buffers of [chunk, V], not nine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.core.asking import head_product
from potstill.core.types import Dense, Logits, Mixture, Projection
from potstill.objective.representations import dense, rows

Pointwise: TypeAlias = Callable[[Tensor, Logits | None, slice], tuple[Tensor, Tensor]]
"""(student logits [C, V], the teacher there, which rows they are) -> (share of the loss [], of each term [terms])."""

CHUNK_BUFFERS = {"cpu": 2, "cuda": 9}
"""Buffers of [chunk, V] alive at the peak: with strips the two products, without them the losses' own as well."""

ENOUGH_ROWS = 256
"""A product reads its head's whole weight: with 64 rows at V = 128,000 a step takes a fifth longer than with 256, and
with 512 no less. So this many rows are wanted whatever the vocabulary."""

CHEAP_BYTES = 64 * 2**20
"""As long as its buffers take no more, a chunk has more rows than enough: a small vocabulary's chunks are then few."""

STRIP_BYTES = 2 * 2**20
"""What one [strip, V] buffer may take: about a core's share of cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows go through the heads at once, and how many of these through the losses at once."""

    chunk: int
    strip: int


def sizes_for(num_classes: int, *, device: str, budget_bytes: int) -> Sizes:
    """A power of two of rows, at least 16: enough, if their float32 buffers stay within a budget; more, if cheap."""
    row_bytes = 4 * max(num_classes, 1)
    buffers_bytes = row_bytes * CHUNK_BUFFERS.get(device, CHUNK_BUFFERS["cuda"])
    affordable, cheap = (_power_of_two(limit // buffers_bytes) for limit in (budget_bytes, CHEAP_BYTES))
    chunk = max(16, min(affordable, max(ENOUGH_ROWS, cheap)))
    return Sizes(chunk=chunk, strip=min(chunk, _power_of_two(STRIP_BYTES // row_bytes)) if device == "cpu" else chunk)


def slices(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows; one empty slice of nothing, so that results keep their shape."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size))


def whole_runs(begins: Tensor, size: int) -> list[slice]:
    """Consecutive slices of about `size` rows that tear no run of rows apart: bool [N], where a run begins.

    A slice is longer than `size` only where a run is.
    """
    places = [*begins.nonzero().flatten().tolist(), len(begins)]
    cut = [0]
    while cut[-1] < len(begins):
        following = bisect_right(places, cut[-1] + size)
        fits = following > 0 and places[following - 1] > cut[-1]
        # A run that is longer than a slice makes a slice of its own.
        cut.append(places[following - 1] if fits else places[following])
    return [slice(start, stop) for start, stop in pairwise(cut)] or [slice(0, 0)]


def fused_sum(
    student: Projection, teacher: Logits | None, pointwise: Pointwise, *, sizes: Sizes, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum a pointwise loss over the rows of a head: hidden [N, H] -> (loss [], shares [num_terms]).

    `pointwise` must include weights and divisors. `begins` [N], bool, says where a run of rows begins that it must see
    together; without it every row stands alone. The gradient reaches hidden, weight and bias as far as they ask for
    it: a frozen head allocates none. It can be backpropagated once and not differentiated twice.
    """
    tensors = (student.hidden, student.weight, student.bias)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    work = _Work(
        student=student,
        teacher=teacher,
        pointwise=pointwise,
        sizes=sizes,
        # Where slices end is decided on the CPU.
        begins=None if begins is None else begins.cpu(),
        wanted=wanted,
    )
    total, shares = _Fused.apply(*tensors, work)  # type: ignore[no-untyped-call]
    return total, shares


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    student: Projection
    teacher: Logits | None
    pointwise: Pointwise
    sizes: Sizes
    begins: Tensor | None
    wanted: tuple[bool, ...]
    """Whether the gradient of hidden, weight and bias is asked for."""

    def slices(self, within: slice, size: int) -> list[slice]:
        """Slices of a range of rows, counted from its start."""
        if self.begins is None:
            return list(slices(within.stop - within.start, size))
        return whole_runs(self.begins[within], size)


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
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    chunks = work.slices(slice(0, hidden.shape[0]), work.sizes.chunk)
    longest = max(chunk.stop - chunk.start for chunk in chunks)
    head = AppliedHead(work.student, longest)
    teacher = AppliedHead(work.teacher, longest) if isinstance(work.teacher, Projection) else None
    gradient = HeadGradient(hidden, weight, bias, wanted=work.wanted)
    total: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    shares: Tensor = torch.zeros((), dtype=exact, device=hidden.device)
    for which in chunks:
        raw = head.product(which)
        said = _said(work.teacher, teacher, which)
        for strip in work.slices(which, work.sizes.strip):
            share, seen = _strip(work, raw[strip], None if said is None else rows(said, strip), _within(which, strip))
            total, shares = total + share, shares + seen
        # raw now holds the gradient with respect to itself.
        gradient.add(which, raw, head)
    return total, shares, gradient.whole()


class AppliedHead:
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


class HeadGradient:
    """The gradients of hidden [N, H], weight [V, H] and bias [V] as far as they are wanted, gathered chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, wanted: tuple[bool, ...]) -> None:
        wants_hidden, wants_weight, wants_bias = wanted
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._of_hidden = torch.empty_like(hidden) if wants_hidden else None
        self._of_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants_weight else None
        self._of_bias = None if bias is None or not wants_bias else torch.zeros_like(bias, dtype=exact)

    def add(self, which: slice, d_raw: Tensor, head: AppliedHead) -> None:
        """Some rows' share: the gradient of their bare products, [C, V]."""
        if self._of_hidden is not None:
            self._of_hidden[which] = d_raw.to(head.weight.dtype) @ head.weight
        if self._of_weight is not None:
            _add_outer(self._of_weight, d_raw, self._hidden[which])
        if self._of_bias is not None:
            self._of_bias.add_(d_raw.sum(dim=0))

    def whole(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each in the precision of what it belongs to."""
        of_weight = None if self._of_weight is None else self._of_weight.to(self._weight.dtype)
        of_bias = None if self._of_bias is None or self._bias is None else self._of_bias.to(self._bias.dtype)
        return self._of_hidden, of_weight, of_bias


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


def _said(teacher: Logits | None, head: AppliedHead | None, which: slice) -> Logits | None:
    """The teacher at some rows, its head applied: all strips of a chunk share one product."""
    if head is not None:
        return Dense(logits=head.projection.finish(head.product(which)))
    if isinstance(teacher, Mixture):
        return Dense(logits=dense(rows(teacher, which)))
    return None if teacher is None else rows(teacher, which)


def _within(chunk: slice, strip: slice) -> slice:
    return slice(chunk.start + strip.start, chunk.start + strip.stop)


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return int(1 << max(int(number).bit_length() - 1, 0))
