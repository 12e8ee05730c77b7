"""Reading logits: in float32, tempered, finite. Losses on answers share these few lines.

Dimension key: V classes; "..." any leading dimensions. p is the teacher's law, q the student's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from potstill.core.errors import RecipeError, SignalError

IMPOSSIBLE = -1e4
"""Log-probability given to a class whose logit is -inf: exp of it is exactly 0, and 0 times it is no NaN."""

ALL_BUT_IMPOSSIBLE = -30.0
"""The same for a teacher that a student-weighted sum reads (reverse KL): a finite price for a banned class."""

LEAST_SPREAD = 1e-4
"""Rows of logits with a smaller standard deviation count as constant: dividing by it would blow up the gradient."""


def full_precision(logits: Tensor) -> Tensor:
    """float32, or float64 where it was that already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def frozen(teacher_logits: Tensor) -> Tensor:
    """A teacher's logits in full precision, out of reach for the gradient. Every raw read of a teacher passes here."""
    return full_precision(teacher_logits.detach())


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature in full precision: [..., V] -> [..., V]. RecipeError unless temperature > 0."""
    if not temperature > 0:
        raise RecipeError(
            f"temperature: found {temperature}, expected a number above 0. 1.0 leaves logits as they are."
        )
    logits = full_precision(logits)
    return logits if temperature == 1.0 else logits / temperature


def log_probs(logits: Tensor, temperature: float, *, impossible: float = IMPOSSIBLE) -> Tensor:
    """log softmax(logits / temperature), a fresh finite tensor: [..., V] -> [..., V].

    Only exact -inf becomes `impossible`; finite log-probabilities, however low, stay what they are, and
    NaN stays NaN. Without a gradient to keep, the floor is laid in place.
    """
    return with_floor(torch.log_softmax(tempered(logits, temperature), -1), impossible=impossible)


def with_floor(logs: Tensor, *, impossible: float = IMPOSSIBLE) -> Tensor:
    """`impossible` where log-probabilities are exactly -inf, in place if they carry no gradient."""
    lay_floor = torch.nan_to_num if logs.requires_grad else torch.nan_to_num_
    finite: Tensor = lay_floor(logs, nan=math.nan, posinf=math.inf, neginf=impossible)
    return finite


def teacher_log_probs(teacher_logits: Tensor, temperature: float, *, impossible: float = IMPOSSIBLE) -> Tensor:
    """`log_probs` of a teacher: no gradient goes back through it."""
    return log_probs(frozen(teacher_logits), temperature, impossible=impossible)


def probs(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature): [..., V] -> [..., V]."""
    return torch.softmax(tempered(logits, temperature), -1)


def standardise(logits: Tensor, *, ddof: int) -> Tensor:
    """(z - mean) / std over the reachable classes of each row: [..., V] -> [..., V].

    Classes at -inf stay there and enter neither statistic. The deviation divides by count - ddof and is
    held above LEAST_SPREAD.
    """
    reachable = logits != -math.inf
    num_classes = reachable.sum(-1, keepdim=True)
    kept = logits.masked_fill(~reachable, 0.0)
    centred = (kept - kept.sum(-1, keepdim=True) / num_classes).masked_fill(~reachable, 0.0)
    # A norm, not sqrt of a sum: its gradient at a constant row is 0 instead of NaN.
    spread: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (num_classes - ddof).clamp(min=1).sqrt()
    return (centred / spread.clamp(min=LEAST_SPREAD)).masked_fill(~reachable, -math.inf)


def one_row_per_example(logits: Tensor, *, reader: str) -> None:
    """SignalError unless logits are [B, V]: losses that compare the rows of a batch take no positions."""
    if logits.dim() != 2:
        raise SignalError(
            f"{reader}: found logits of shape {tuple(logits.shape)}, expected [examples, classes]. "
            "It compares the examples of a batch; for tokens, take a loss that returns one value per item."
        )


def with_gradient(
    student_logits: Tensor, value: Tensor, slope: Tensor, *, temperature: float, scale_by_t2: bool
) -> Tensor:
    """`value` [...], differentiable in `student_logits` by a `slope` [..., V] already worked out; consumes both.

    `slope` is d value / d(student_logits / temperature). One saved tensor and one pass in backward, where
    autograd would keep and revisit every intermediate. It differentiates once.
    """
    if torch.is_grad_enabled() and student_logits.requires_grad:
        if temperature != 1.0:
            slope.div_(temperature)
        value = _WithGradient.apply(student_logits, value, slope)  # type: ignore[no-untyped-call]
    return value * temperature**2 if scale_by_t2 and temperature != 1.0 else value


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, student_logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return upstream.unsqueeze(-1) * gradient, None, None
