"""Values of rows behind a wide head, some rows at a time, so that [N, V] is never held. Nothing here reduces.

For losses that make states of their own for a head that does not learn. What reads the student's logits needs none of
it: the objective's engine fuses it with the head.
Dimension key: N rows, C rows of a chunk, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Values = Callable[..., Tensor]
"""(which rows, some tensors [C, D]) -> [C]: each value from its own row alone."""

CHUNK_BYTES = 64 * 2**20
CHUNK_BUFFERS = 8
"""Buffers of [C, V] that a divergence and its gradient hold at the peak."""


def rows_for(num_classes: int) -> int:
    """How many rows of float32 values stay within CHUNK_BYTES; at least 16."""
    return max(16, CHUNK_BYTES // (4 * CHUNK_BUFFERS * max(num_classes, 1)))


def in_chunks(values: Values, *rows: Tensor, size: int) -> Tensor:
    """`values` of all rows, `size` at a time: [N, D] each -> [N].

    The gradient of a row is taken along with its value, so nothing is computed twice and no chunk outlives its turn.
    It reaches `rows` and nothing else that `values` looks at, and differentiates once.
    """
    # One empty slice where there are no rows: a result of their kind.
    slices = [slice(start, start + size) for start in range(0, max(len(rows[0]), 1), size)]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in rows)):
        return torch.cat([values(which, *(tensor[which] for tensor in rows)) for which in slices])
    found: Tensor = _ByRows.apply(values, slices, *rows)  # type: ignore[no-untyped-call]
    return found


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Values, slices: list[slice], *rows: Tensor) -> Tensor:
        # Made before any chunk: small tensors kept between large ones would leave the memory full of holes.
        found, gradients = rows[0].new_empty(len(rows[0])), [torch.empty_like(tensor) for tensor in rows]
        for which in slices:
            leaves = [tensor[which].detach().requires_grad_() for tensor in rows]
            with torch.enable_grad():
                some = values(which, *leaves)
                slopes = torch.autograd.grad(some.sum(), leaves, allow_unused=True, materialize_grads=True)
            found[which] = some.detach()
            for gradient, slope in zip(gradients, slopes, strict=True):
                gradient[which] = slope
        ctx.save_for_backward(*gradients)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * incoming.unsqueeze(-1) for gradient in ctx.saved_tensors)
