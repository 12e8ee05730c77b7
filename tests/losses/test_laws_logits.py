"""LAWS.md A, for every loss of the catalog that reads only logits and labels: a new one is held the day it is added.

What a loss promises stands on its card; the few facts that no card has a field for stand here, each with its reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from potstill.core.catalog import card, parts
from potstill.core.types import PerItem

Loss = Callable[..., Tensor]

REAL_LABELS = {
    "binary_cross_entropy": "multi-label data: one label in [0, 1] per class",
    "bounded_regression": "labels are the regressed numbers themselves",
}
NOT_ITS_OWN_GRADIENT = {
    "adaptive_kl": "its weights are constants to the gradient by definition",
    "taid": "its target holds the student as a constant by definition",
}
NUMBERS_NOT_LOGITS = {"bounded_regression": "a student that regresses -inf is wrong, not banned"}

READABLE = {"student_logits", "teacher_logits", "labels"}


def reads(loss: Loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


def is_per_item(loss: Loss) -> bool:
    return bool(get_type_hints(loss, include_extras=True)["return"] == PerItem)


def has_knob(loss: Loss, name: str) -> bool:
    return name in inspect.signature(loss).parameters


LOSSES = {name: loss for name, loss in parts("loss").items() if set(reads(loss)) <= READABLE}
TAUGHT = {name: loss for name, loss in LOSSES.items() if "teacher_logits" in reads(loss)}


def held_to(losses: dict[str, Loss], promise: Callable[[str, Loss], object] = lambda name, loss: True):
    """Parametrize `loss` over those of `losses` that make a promise."""
    held = [pytest.param(loss, id=name) for name, loss in losses.items() if promise(name, loss)]
    assert held, "a law that holds for no loss tests nothing"
    return pytest.mark.parametrize("loss", held)


def apply(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **knobs: float) -> Tensor:
    """Call a loss with what it reads; labels are drawn from the shape alone unless given."""
    if labels is None:
        labels = labels_for(loss, student)
    offered = {"student_logits": student, "teacher_logits": teacher, "labels": labels}
    return loss(*(offered[name] for name in reads(loss)), **knobs)


def labels_for(loss: Loss, student: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if card(loss).name in REAL_LABELS:
        return torch.rand(student.shape, generator=generator, dtype=torch.float64)
    return torch.randint(student.shape[-1], student.shape[:-1], generator=generator)


def pair(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def gradient_of(values: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return gradient


@held_to(TAUGHT, lambda name, loss: card(loss).zero_at_equality)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(loss: Loss) -> None:
    student, _ = pair(6, 7)
    values = apply(loss, student, student.detach().clone())
    # 1e-5 is for DIST, which adds 1e-8 to a denominator; the others are at 1e-15.
    torch.testing.assert_close(values, torch.zeros(6).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient_of(values, student), torch.zeros(6, 7).double(), atol=1e-5, rtol=0)


@held_to(TAUGHT, lambda name, loss: not card(loss).zero_at_equality)
def test_a_loss_that_says_it_is_above_zero_at_equality_is(loss: Loss) -> None:
    student, _ = pair(6, 7)
    assert apply(loss, student, student.detach().clone()).mean() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "noise"),
    [(torch.float32, 0.0), (torch.float32, 1e-3), (torch.bfloat16, 1e-2), (torch.float16, 1.0)],
    ids=str,
)
@held_to(LOSSES)
def test_no_loss_is_negative_over_a_quarter_million_classes(loss: Loss, dtype: torch.dtype, noise: float) -> None:
    noise_law, teacher = pair(2, 250_000, scale=0.5)
    student = teacher + noise * noise_law.detach()
    values = apply(loss, student.to(dtype), teacher.to(dtype))
    assert values.dtype == torch.float32
    assert values.min() >= -1e-6


@held_to(LOSSES, lambda name, loss: not card(loss).raw)
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    shifts = torch.tensor([[-300.0], [-1.0], [0.0], [2.0], [300.0]])
    values, shifted = apply(loss, student, teacher), apply(loss, student + shifts, teacher - 2 * shifts)
    torch.testing.assert_close(shifted, values)
    torch.testing.assert_close(gradient_of(shifted, student), gradient_of(values, student))


@held_to(LOSSES, lambda name, loss: card(loss).raw)
def test_a_loss_that_says_it_reads_numbers_sees_a_constant(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    assert (apply(loss, student + 3.0, teacher) - apply(loss, student, teacher)).abs().min() > 1e-3
    assert not card(loss).distribution


@held_to(LOSSES, lambda name, loss: not card(loss).raw)
def test_the_gradient_over_the_classes_sums_to_zero(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    gradient = gradient_of(apply(loss, student, teacher), student)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5).double(), atol=1e-10, rtol=0)


@held_to(LOSSES, lambda name, loss: name not in NOT_ITS_OWN_GRADIENT)
def test_the_gradient_is_the_slope_of_the_value(loss: Loss) -> None:
    student, teacher = pair(3, 4)
    labels = labels_for(loss, student)
    assert torch.autograd.gradcheck(lambda z: apply(loss, z, teacher, labels), student)


APART = torch.zeros(2, 6).index_fill(1, torch.tensor([0]), 1e4), torch.zeros(2, 6).index_fill(1, torch.tensor([1]), 1e4)
BANNED = torch.tensor([0.0, 1.0, -math.inf, 2.0, -math.inf, -1.0]).repeat(2, 1)
FREE = torch.tensor([1.0, 0.0, 3.0, -2.0, 0.5, 0.0]).repeat(2, 1)
ONE_HOT = torch.full((2, 6), -math.inf).index_fill(1, torch.tensor([3]), 0.0)
EXTREMES = {
    "sure of different classes": APART,
    "opposite ramps to 1e4": (torch.linspace(-1e4, 1e4, 6).repeat(2, 1), torch.linspace(1e4, -1e4, 6).repeat(2, 1)),
    "teacher bans two classes": (FREE, BANNED),
    "both ban the same classes": (BANNED + FREE, BANNED),
    "one-hot teacher": (FREE, ONE_HOT),
    "one-hot teacher, sure student": (APART[0], ONE_HOT),
    "constant student": (torch.full((2, 6), 3.0), FREE),
    "constant teacher": (FREE, torch.full((2, 6), -3.0)),
    "both zero": (torch.zeros(2, 6), torch.zeros(2, 6)),
    "tiny logits": (1e-3 * FREE, -1e-3 * FREE),
}


@pytest.mark.parametrize("case", EXTREMES)
@held_to(LOSSES)
def test_extreme_logits_give_a_finite_value_and_gradient(loss: Loss, case: str) -> None:
    student, teacher = EXTREMES[case]
    if card(loss).name in NUMBERS_NOT_LOGITS:
        student = student.clamp(min=-1e4)
    student = student.clone().requires_grad_()
    labels = labels_for(loss, student) if card(loss).name in REAL_LABELS else torch.tensor([0, 3])
    values = apply(loss, student, teacher, labels)
    assert values.isfinite().all()
    assert gradient_of(values, student).isfinite().all()
    assert values.min() >= -1e-6


@held_to(LOSSES)
def test_a_student_that_is_not_a_number_is_not_hidden(loss: Loss) -> None:
    student, teacher = pair(3, 7)
    broken = student.detach().clone()
    broken[1, 2] = math.nan
    assert apply(loss, broken, teacher)[1].isnan()


@held_to(TAUGHT)
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(apply(loss, student, teacher).sum(), teacher, allow_unused=True)
    assert gradient is None or not gradient.any()


@held_to(TAUGHT)
def test_another_teacher_teaches_something_else(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    here, there = (gradient_of(apply(loss, student, t), student) for t in (teacher, teacher.flip(-1)))
    assert (here - there).abs().max() > 1e-3


@held_to(LOSSES)
def test_inputs_are_left_as_they_were(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    before = student.detach().clone(), teacher.clone()
    knobs = {"temperature": 2.0} if has_knob(loss, "temperature") else {}
    gradient_of(apply(loss, student, teacher, **knobs), student)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@held_to(LOSSES, lambda name, loss: is_per_item(loss))
def test_masking_rows_is_slicing_them(loss: Loss) -> None:
    student, teacher = pair(6, 7)
    labels, rows = labels_for(loss, student), torch.tensor([True, False, True, True, False, False])
    values = apply(loss, student, teacher, labels)[rows]
    sliced = apply(loss, student[rows], teacher[rows], labels[rows])
    torch.testing.assert_close(sliced, values)
    torch.testing.assert_close(gradient_of(sliced, student), gradient_of(values, student))


@held_to(LOSSES, lambda name, loss: is_per_item(loss))
def test_positions_are_rows_whatever_their_arrangement(loss: Loss) -> None:
    student, teacher = pair(6, 7)
    labels = labels_for(loss, student)
    values = apply(loss, student, teacher, labels)
    folded = (x.unflatten(0, (2, 3)) for x in (student, teacher, labels))
    torch.testing.assert_close(apply(loss, *folded), values.view(2, 3))


@held_to(LOSSES, lambda name, loss: is_per_item(loss))
def test_no_rows_give_an_empty_value_with_a_graph(loss: Loss) -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    values = apply(loss, student, torch.zeros(0, 7))
    assert values.shape == (0,)
    assert gradient_of(values, student).shape == (0, 7)


@held_to(LOSSES)
def test_every_row_gets_a_value(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    assert apply(loss, student, teacher).shape == (5,)


@held_to(LOSSES, lambda name, loss: has_knob(loss, "temperature"))
def test_temperature_reaches_the_loss(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    cool, warm = (apply(loss, student, teacher, temperature=t).sum() for t in (1.0, 3.0))
    assert (cool - warm).abs() > 1e-4 * cool.abs()


@held_to(LOSSES, lambda name, loss: has_knob(loss, "scale_by_t2"))
def test_t_squared_keeps_the_gradient_of_one_size(loss: Loss) -> None:
    student, teacher = pair(20, 7, scale=1.0)
    norms = [gradient_of(apply(loss, student, teacher, temperature=t), student).norm() for t in (1.0, 2.0, 4.0, 8.0)]
    assert max(norms) < 3 * min(norms)


@held_to(LOSSES, lambda name, loss: has_knob(loss, "scale_by_t2"))
def test_t_squared_is_exactly_a_factor(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    scaled, plain = (apply(loss, student, teacher, temperature=3.0, scale_by_t2=on) for on in (True, False))
    torch.testing.assert_close(scaled, 9 * plain)
    torch.testing.assert_close(gradient_of(scaled, student), 9 * gradient_of(plain, student))


@held_to(LOSSES)
def test_the_order_of_the_classes_does_not_matter(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    labels = labels_for(loss, student)
    moved = labels[:, order] if labels.dim() == 2 else order.argsort()[labels]
    values = apply(loss, student, teacher, labels)
    permuted = apply(loss, student[:, order], teacher[:, order], moved)
    torch.testing.assert_close(permuted, values)
    torch.testing.assert_close(gradient_of(permuted, student), gradient_of(values, student))


@pytest.mark.parametrize("padding", [-math.inf, -1e4])
@held_to(LOSSES, lambda name, loss: card(loss).distribution)
def test_unreachable_classes_change_nothing(loss: Loss, padding: float) -> None:
    student, teacher = pair(5, 7)
    labels = labels_for(loss, student)
    pad = torch.full((5, 3), padding).double()
    values = apply(loss, student, teacher, labels)
    padded = apply(loss, torch.cat((student, pad), -1), torch.cat((teacher, pad), -1), labels)
    torch.testing.assert_close(padded, values)
    torch.testing.assert_close(gradient_of(padded, student), gradient_of(values, student))


@held_to(TAUGHT, lambda name, loss: card(loss).linear_in_teacher)
def test_the_gradient_is_linear_in_the_teacher(loss: Loss) -> None:
    student, teacher = pair(5, 7)
    one, other = teacher.softmax(-1), teacher.flip(-1).softmax(-1)

    def taught_by(law: Tensor) -> Tensor:
        return gradient_of(apply(loss, student, law.log(), temperature=1.0), student)

    torch.testing.assert_close(taught_by(0.3 * one + 0.7 * other), 0.3 * taught_by(one) + 0.7 * taught_by(other))


@held_to(TAUGHT)
def test_gradient_steps_bring_the_student_to_its_teacher(loss: Loss) -> None:
    student, teacher = pair(4, 5, scale=1.0)
    labels = labels_for(loss, student)
    start = apply(loss, student, teacher, labels).mean()
    # Steps of a set length that shrinks: they serve losses of any scale, and those with kinks.
    for step in range(150):
        gradient = gradient_of(apply(loss, student, teacher, labels), student)
        student = (student - 0.95**step * gradient / gradient.norm().clamp(min=1e-12)).detach().requires_grad_()
    end = apply(loss, student, teacher, labels).mean()
    at_teacher = apply(loss, teacher, teacher, labels).mean()
    assert start - at_teacher > 1e-3
    assert end - at_teacher < 1e-2 * (start - at_teacher)


@held_to(TAUGHT, lambda name, loss: card(loss).distribution and card(loss).zero_at_equality)
def test_a_divergence_is_zero_only_at_the_teacher(loss: Loss) -> None:
    _, teacher = pair(5, 7)
    assert (apply(loss, teacher.roll(1, -1), teacher) > 1e-2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@held_to(LOSSES)
def test_half_precision_logits_are_computed_in_full(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = pair(5, 700, dtype=dtype)
    exact = student.detach().double().requires_grad_()
    values, expected = apply(loss, student, teacher), apply(loss, exact, teacher.double())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-6)
    gradient = gradient_of(values, student)
    assert gradient.dtype == dtype
    # The gradient is rounded once, at the end, to the student's own precision.
    torch.testing.assert_close(gradient.double(), gradient_of(expected, exact), rtol=1e-2, atol=1e-5)


@held_to(LOSSES)
def test_double_precision_stays_double(loss: Loss) -> None:
    assert apply(loss, *pair(5, 7)).dtype == torch.float64


def test_the_lists_of_exceptions_name_losses_that_exist() -> None:
    named = {*REAL_LABELS, *NOT_ITS_OWN_GRADIENT, *NUMBERS_NOT_LOGITS}
    assert named <= set(LOSSES)
