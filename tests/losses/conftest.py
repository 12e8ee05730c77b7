"""Shared by the tests of losses: the golden position G4 and a way to look at a value with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Measure = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def measure() -> Measure:
    """`measure(loss, student, *others, **knobs)` -> (values, gradient of their sum at the student), in float64."""

    def measured(loss: Callable[..., Tensor], student: Any, *others: Any, **knobs: Any) -> tuple[Tensor, Tensor]:
        leaf = torch.as_tensor(student, dtype=torch.float64).detach().clone().requires_grad_()
        read = [torch.as_tensor(other) for other in others]
        values = loss(leaf, *(x.double() if x.is_floating_point() else x for x in read), **knobs)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    return measured


@pytest.fixture
def g4() -> tuple[Tensor, Tensor]:
    """METHODS_LLM 0.8: one position over four classes, student then teacher."""
    return torch.tensor([0.5, 1.5, -0.5, 0.0]).double(), torch.tensor([2.0, 1.0, 0.0, -1.0]).double()


@pytest.fixture
def mirrored() -> tuple[Tensor, Tensor]:
    """METHODS_CLASSIC A1: z_s = [1, 2, 3], z_t = [3, 2, 1]."""
    return torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[3.0, 2.0, 1.0]]).double()
