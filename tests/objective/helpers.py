"""Small signals and batches for the tests of the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.types import IGNORED, Batch, Dense, Lesson, Logits, PerExample, PerItem, Projection, Signal


def batch(labels: Tensor, mask: Tensor | None = None, **extras: Tensor) -> Batch:
    mask = torch.ones(labels.shape, dtype=torch.bool) if mask is None else mask
    return Batch(keys=(), inputs={}, labels=labels, mask=mask, extras=extras)


def lesson(student: Logits | None, teacher: Logits | None = None, **teacher_outputs: Tensor) -> Lesson:
    return Lesson(student=Signal(logits=student), teacher=Signal(logits=teacher, features=teacher_outputs))


def projection(*shape: int, width: int, num_classes: int, seed: int, bias: bool = True, **fields: float) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    offsets = torch.randn(num_classes, generator=generator, dtype=torch.float64) if bias else None
    return Projection(hidden=hidden, weight=weight, bias=offsets, **fields)


def trainable(head: Projection) -> Projection:
    for tensor in (head.hidden, head.weight, head.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return head


def gradients(head: Projection) -> list[Tensor]:
    found = [t.grad for t in (head.hidden, head.weight, head.bias) if t is not None]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


def applied(head: Projection) -> Dense:
    """The head applied by hand, independently of the library."""
    raw = head.hidden @ head.weight.T
    raw = raw if head.bias is None else raw + head.bias
    raw = raw * head.scale
    return Dense(logits=head.softcap * torch.tanh(raw / head.softcap) if head.softcap else raw)


def soft_error(student_logits: Tensor, teacher_logits: Tensor, /) -> PerItem:
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


def label_error(student_logits: Tensor, labels: Tensor, /, *, sharpness: float = 1.0) -> PerItem:
    return -(sharpness * student_logits).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def layer_error(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    return (student_feature - teacher_feature).square().flatten(1).mean(1)


def spread(student_logits: Tensor, /) -> PerExample:
    return (student_logits - student_logits.mean(0)).square().flatten(1).mean(1)


__all__ = [
    "IGNORED",
    "applied",
    "batch",
    "gradients",
    "label_error",
    "layer_error",
    "lesson",
    "projection",
    "soft_error",
    "spread",
    "trainable",
]
