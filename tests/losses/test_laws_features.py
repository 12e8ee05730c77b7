"""METHODS_CLASSIC P1 and P2, for every loss of the catalog that reads features and no mask: new ones are held at once.

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
from potstill.core.errors import SignalError
from potstill.core.types import PerItem

Loss = Callable[..., Tensor]

MAY_BE_NEGATIVE = {"vid": "the logarithm of a density"}
SAME_CHANNELS = {"fsp": "its Gram matrices are channels by channels, and no head can stand there"}
NEEDS_POSITIONS = {
    "attention_transfer": "compares where a network looks",
    "attention_transfer_norm": "compares where a network looks",
    "nst": "compares where a channel fires",
}
TEACH_ONE_ALONE = {"cc_bilinear": "its diagonal holds lengths, which one example has too"}

ONE_LAYER = {"student_feature", "teacher_feature"}
SEVERAL = {"student_features", "teacher_features"}
FEATURES = ONE_LAYER | SEVERAL
FROM_HEADS = {"student_variance"}

B = 5
MAP = (4, 3, 5)
"""More columns than rows."""


def reads(loss: Loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


# Losses that look at the mask compare tokens: test_laws_tokens.py holds them.
LOSSES = {
    name: loss for name, loss in parts("loss").items() if FEATURES & set(reads(loss)) and "mask" not in reads(loss)
}


def is_per_item(loss: Loss) -> bool:
    return bool(get_type_hints(loss, include_extras=True)["return"] == PerItem)


def is_joined(loss: Loss) -> bool:
    """The student must come with the teacher's channels: by a head, or from the start."""
    return bool(card(loss).head) or card(loss).name in SAME_CHANNELS


def held_to(promise: Callable[[Loss], object] = lambda loss: True) -> pytest.MarkDecorator:
    """Parametrize `loss` over those that make a promise."""
    held = [pytest.param(loss, id=name) for name, loss in LOSSES.items() if promise(loss)]
    assert held, "a law that holds for no loss tests nothing"
    return pytest.mark.parametrize("loss", held)


def apply(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Call a loss with what it reads; one that reads several layers sees the same one twice, flipped at second."""
    channels = student.shape[1] if student.ndim == 4 else student.shape[-1]
    offered = {
        "student_feature": student,
        "teacher_feature": teacher,
        "student_features": (student, student.flip(-1)),
        "teacher_features": (teacher, teacher.flip(-1)),
        "student_variance": torch.linspace(0.5, 2.0, channels, dtype=student.dtype),
    }
    return loss(*(offered[name] for name in reads(loss)))


def drawn(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A student and a teacher of one shape."""
    return drawn(*shape, dtype=dtype).requires_grad_(), drawn(*shape, seed=8, dtype=dtype)


def unlike(loss: Loss) -> tuple[Tensor, Tensor]:
    """Maps that differ in rows, in columns and, where the loss joins them itself, in channels."""
    return drawn(B, 4, 3, 5).requires_grad_(), drawn(B, 4 if is_joined(loss) else 6, 5, 2, seed=8)


def gradient_of(values: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return gradient


def kinds(loss: Loss) -> list[tuple[int, ...]]:
    """A shape of each kind of feature that the loss takes."""
    with_positions: list[tuple[int, ...]] = [(B, *MAP), (B, 7, 4)]
    return with_positions if card(loss).name in NEEDS_POSITIONS else [*with_positions, (B, 4)]


def of_every_kind(promise: Callable[[Loss], object] = lambda loss: True) -> pytest.MarkDecorator:
    held = [
        pytest.param(loss, shape, id=f"{name}-{len(shape)}d")
        for name, loss in LOSSES.items()
        if promise(loss)
        for shape in kinds(loss)
    ]
    return pytest.mark.parametrize(("loss", "shape"), held)


@held_to()
def test_every_loss_on_features_is_held_to_these_laws(loss: Loss) -> None:
    assert set(reads(loss)) <= FEATURES | FROM_HEADS, "teach `apply` what else this loss reads"


@of_every_kind(lambda loss: card(loss).zero_at_equality)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(loss: Loss, shape: tuple[int, ...]) -> None:
    student, _ = pair(*shape)
    values = apply(loss, student, student.detach().clone())
    torch.testing.assert_close(values, torch.zeros(B).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(gradient_of(values, student), torch.zeros(shape).double(), atol=1e-6, rtol=0)


@held_to(lambda loss: not card(loss).zero_at_equality)
def test_a_loss_that_says_it_is_not_zero_at_equality_is_not(loss: Loss) -> None:
    student, _ = pair(B, *MAP)
    assert apply(loss, student, student.detach().clone()).mean().abs() > 1e-3


@of_every_kind()
def test_every_example_gets_a_value(loss: Loss, shape: tuple[int, ...]) -> None:
    assert apply(loss, *pair(*shape)).shape == (B,)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@held_to(lambda loss: card(loss).name not in MAY_BE_NEGATIVE)
def test_no_loss_is_negative(loss: Loss, dtype: torch.dtype, noise: float) -> None:
    student, teacher = pair(16, *MAP)
    assert apply(loss, (teacher + noise * student).to(dtype), teacher.to(dtype)).min() >= -1e-6


@of_every_kind()
def test_the_gradient_is_the_slope_of_the_value(loss: Loss, shape: tuple[int, ...]) -> None:
    student, teacher = pair(3, *(min(n, 3) for n in shape[1:]))
    assert torch.autograd.gradcheck(lambda feature: apply(loss, feature, teacher), student, rtol=1e-5, atol=1e-7)


@held_to()
def test_the_gradient_goes_through_the_pooling_of_the_larger_map(loss: Loss) -> None:
    student, teacher = unlike(loss)
    student = student[:3, :, :2].detach().requires_grad_()
    teacher = teacher[:3]
    assert torch.autograd.gradcheck(lambda feature: apply(loss, feature, teacher), student, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher_scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("student_scale", [1e-3, 1.0, 1e3])
@held_to()
def test_any_scale_gives_a_finite_value_and_gradient(loss: Loss, student_scale: float, teacher_scale: float) -> None:
    student, teacher = pair(B, *MAP, dtype=torch.float32)
    student = (student_scale * student).detach().requires_grad_()
    values = apply(loss, student, teacher_scale * teacher)
    assert values.isfinite().all()
    gradient = gradient_of(values, student)
    assert gradient.isfinite().all()
    assert gradient.any()


SPREAD = drawn(B, *MAP, dtype=torch.float32)
LEVELS = torch.tensor([0.0, 3.3, -3.3, 1e3, 1e-3]).view(B, 1, 1, 1).expand(B, *MAP)
COPIES = SPREAD[:1].expand(B, *MAP)
EXTREMES = {
    "both zero": (torch.zeros(B, *MAP), torch.zeros(B, *MAP)),
    "student zero": (torch.zeros(B, *MAP), SPREAD),
    "teacher zero": (SPREAD, torch.zeros(B, *MAP)),
    "one student row zero": (SPREAD.index_fill(0, torch.tensor([2]), 0.0), SPREAD.flip(0)),
    "constant student rows": (LEVELS, SPREAD),
    "constant teacher rows": (SPREAD, LEVELS),
    "constant rows": (LEVELS, LEVELS),
    "identical student rows": (COPIES, SPREAD),
    "identical teacher rows": (SPREAD, COPIES),
    "identical rows": (COPIES, -COPIES),
    "opposite": (SPREAD, -SPREAD),
    "two student rows alike": (torch.cat((SPREAD[:1], SPREAD[:4])), SPREAD),
    "everything one number": (torch.full((B, *MAP), 3.3), torch.full((B, *MAP), -3.3)),
    "half precision at its end": (torch.full((B, *MAP), 6e4).half(), SPREAD.half()),
}


@pytest.mark.parametrize("case", EXTREMES)
@held_to()
def test_extreme_features_give_a_finite_value_and_gradient(loss: Loss, case: str) -> None:
    student, teacher = EXTREMES[case]
    student = student.clone().requires_grad_()
    values = apply(loss, student, teacher)
    assert values.isfinite().all()
    gradient = gradient_of(values.mean(), student)
    # Half precision keeps its own gradient, where the square of 6e4 has no room: what is asked is no NaN.
    assert not gradient.isnan().any()
    assert gradient.isfinite().all() or student.dtype == torch.float16


@held_to()
def test_a_batch_of_one_is_finite(loss: Loss) -> None:
    # The objective refuses it where the card asks for more; nobody else should meet a NaN.
    student, teacher = pair(1, *MAP, dtype=torch.float32)
    values = apply(loss, student, teacher)
    assert values.shape == (1,)
    assert values.isfinite().all()
    assert gradient_of(values, student).isfinite().all()


@held_to(lambda loss: card(loss).min_examples > 1 and card(loss).name not in TEACH_ONE_ALONE)
def test_a_lesson_begins_with_the_number_of_examples_on_the_card(loss: Loss) -> None:
    least = card(loss).min_examples
    too_few, enough = (pair(n, *MAP) for n in (least - 1, least))
    assert gradient_of(apply(loss, *too_few), too_few[0]).abs().max() < 1e-10
    assert gradient_of(apply(loss, *enough), enough[0]).abs().max() > 1e-5


@held_to()
def test_a_student_that_is_not_a_number_is_not_hidden(loss: Loss) -> None:
    student, teacher = pair(B, *MAP)
    broken = student.detach().clone()
    broken[1, 2, 0, 3] = math.nan
    values = apply(loss, broken, teacher)
    assert values[1].isnan()
    assert values.isnan().sum() == 1 or not is_per_item(loss)


@held_to()
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    student, teacher = unlike(loss)
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(apply(loss, student, teacher).sum(), teacher, allow_unused=True)
    assert gradient is None or not gradient.any()


@held_to()
def test_another_teacher_teaches_something_else(loss: Loss) -> None:
    student, teacher = unlike(loss)
    here, there = (gradient_of(apply(loss, student, t), student) for t in (teacher, drawn(*teacher.shape, seed=9)))
    assert (here - there).norm() > 1e-2 * here.norm() > 0


@held_to()
def test_inputs_are_left_as_they_were(loss: Loss) -> None:
    student, teacher = unlike(loss)
    before = student.detach().clone(), teacher.clone()
    gradient_of(apply(loss, student, teacher), student)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@held_to()
def test_maps_may_differ_in_rows_and_columns_and_channels_where_no_head_is_needed(loss: Loss) -> None:
    student, teacher = unlike(loss)
    values = apply(loss, student, teacher)
    assert values.shape == (B,)
    assert gradient_of(values, student).any()


@held_to(is_joined)
def test_other_channels_are_refused_where_a_head_is_needed(loss: Loss) -> None:
    with pytest.raises(SignalError, match=rf"{card(loss).name}: found features .*\[5, 4, 3, 5\].*\[5, 6, 3, 5\]"):
        apply(loss, drawn(B, *MAP), drawn(B, 6, *MAP[1:]))


@held_to(lambda loss: card(loss).name in NEEDS_POSITIONS)
def test_vectors_are_refused_where_positions_are_compared(loss: Loss) -> None:
    with pytest.raises(SignalError, match=f"{card(loss).name}: found features"):
        apply(loss, drawn(B, 4), drawn(B, 4, seed=8))


@held_to(is_per_item)
def test_a_subset_of_examples_has_the_subset_of_values(loss: Loss) -> None:
    student, teacher = unlike(loss)
    rows = torch.tensor([True, False, True, True, False])
    values = apply(loss, student, teacher)[rows]
    sliced = apply(loss, student[rows], teacher[rows])
    torch.testing.assert_close(sliced, values)
    torch.testing.assert_close(gradient_of(sliced, student), gradient_of(values, student))


@held_to(is_per_item)
def test_no_examples_give_an_empty_value_with_a_graph(loss: Loss) -> None:
    student, teacher = unlike(loss)
    none = student[:0].detach().requires_grad_()
    values = apply(loss, none, teacher[:0])
    assert values.shape == (0,)
    assert gradient_of(values, none).shape == none.shape


@held_to(lambda loss: not is_per_item(loss))
def test_a_relation_reads_the_other_examples(loss: Loss) -> None:
    student, teacher = unlike(loss)
    other = drawn(*student.shape, seed=9)
    other[0] = student[0].detach()
    assert (apply(loss, other, teacher)[0] - apply(loss, student, teacher)[0]).abs() > 1e-6


@held_to()
def test_the_order_of_the_examples_is_the_order_of_the_values(loss: Loss) -> None:
    student, teacher = unlike(loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    values = apply(loss, student, teacher)[order]
    permuted = apply(loss, student[order], teacher[order])
    torch.testing.assert_close(permuted, values)
    torch.testing.assert_close(gradient_of(permuted, student), gradient_of(values, student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@held_to()
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in unlike(loss))
    exact = student.double().requires_grad_()
    expected = apply(loss, exact, teacher.double())
    student.requires_grad_()
    values = apply(loss, student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    gradient = gradient_of(values, student)
    assert gradient.dtype == dtype
    wanted = gradient_of(expected, exact)
    # The gradient is rounded once, at the end, to the student's own precision.
    assert (gradient.double() - wanted).norm() < 1e-2 * wanted.norm()


@held_to()
def test_autocast_does_not_round_what_is_inside(loss: Loss) -> None:
    student, teacher = (x.detach().float() for x in unlike(loss))
    expected = apply(loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(apply(loss, student, teacher), expected)


@held_to()
def test_double_precision_stays_double(loss: Loss) -> None:
    assert apply(loss, *unlike(loss)).dtype == torch.float64


@held_to()
def test_a_teacher_may_speak_in_another_precision(loss: Loss) -> None:
    student, teacher = unlike(loss)
    teacher = teacher.bfloat16()
    torch.testing.assert_close(apply(loss, student.float(), teacher), apply(loss, student.float(), teacher.float()))


@held_to()
def test_gradient_steps_bring_the_student_to_its_teacher(loss: Loss) -> None:
    student, teacher = pair(4, 3, 2, 2)
    start = apply(loss, student, teacher).mean()
    # Steps of a set length that shrinks: they serve losses of any scale, and those with kinks.
    for step in range(120):
        gradient = gradient_of(apply(loss, student, teacher), student)
        student = (student - 0.8 * 0.95**step * gradient / gradient.norm().clamp(min=1e-12)).detach().requires_grad_()
    end = apply(loss, student, teacher).mean()
    at_teacher = apply(loss, teacher, teacher).mean()
    assert start - at_teacher > 1e-3
    assert end - at_teacher < 1e-2 * (start - at_teacher)


def test_the_lists_of_exceptions_name_losses_that_exist() -> None:
    assert {*MAY_BE_NEGATIVE, *SAME_CHANNELS, *NEEDS_POSITIONS, *TEACH_ONE_ALONE} <= set(LOSSES)
