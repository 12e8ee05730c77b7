"""LAWS.md A, for every loss of the catalog that compares tokens under a mask: a new one is held the day it is added.

The inputs are three ragged examples. What a layer gives is tokens' states [B, T, D], but for the losses below.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from potstill.core.catalog import card, parts
from potstill.core.errors import SignalError
from potstill.core.types import PerExample

Loss = Callable[..., Tensor]

ATTENTION = {"attention_kl": "reads attention after its softmax", "attention_scores": "reads scores before the softmax"}
ONE_WIDTH = {"query_key_scores": "has as many heads, of any width, but the test's two layers are one split in two"}
ONE_TOKEN = {"pkd": "looks at the first token only"}
KNOBS = {"relation_kl": {"heads": 2}, "query_key_scores": {"heads": 2}}

FEATURES = {"student_feature", "teacher_feature", "student_features", "teacher_features"}
B, T, D, HEADS = 3, 6, 4, 2
LENGTHS = torch.tensor([6, 3, 4])
MASK = torch.arange(T)[None] < LENGTHS[:, None]


def reads(loss: Loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


# What takes heads apart compares different tokens on both sides: test_dual_space.py holds it.
LOSSES = {
    name: loss
    for name, loss in parts("loss").items()
    if FEATURES & set(reads(loss)) and "mask" in reads(loss) and "teacher_head" not in reads(loss)
}


def held_to(promise: Callable[[str], object] = lambda name: True) -> pytest.MarkDecorator:
    held = [pytest.param(loss, id=name) for name, loss in LOSSES.items() if promise(name)]
    assert held, "a law that holds for no loss tests nothing"
    return pytest.mark.parametrize("loss", held)


def is_attention(loss: Loss) -> bool:
    return card(loss).name in ATTENTION


def apply(loss: Loss, student: Tensor, teacher: Tensor, mask: Tensor = MASK) -> Tensor:
    """Call a loss with what it reads, drawn from states [B, T, D] or, for attention, from scores [B, A, T, T]."""
    name = card(loss).name
    if name == "attention_kl":
        student, teacher = (x.softmax(-1) for x in (student, teacher))
    offered = {
        "student_feature": student,
        "teacher_feature": teacher,
        "student_features": (student, student.flip(-1)),
        "teacher_features": (teacher, teacher.flip(-1)),
        "mask": mask,
    }
    return partial(loss, *(offered[read] for read in reads(loss)))(**KNOBS.get(name, {}))


def drawn(loss: Loss, *, seed: int, width: int = D, examples: int = B) -> Tensor:
    """Raw input of one side; attention scores of padded tokens are banned, as a model bans them."""
    shape = (examples, HEADS, T, T) if is_attention(loss) else (examples, T, width)
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw.masked_fill(~MASK[:examples, None, None, :], -1e4) if is_attention(loss) else raw


def pair(loss: Loss) -> tuple[Tensor, Tensor]:
    width = D if is_attention(loss) or card(loss).head or card(loss).name in ONE_WIDTH else 2 * D
    return drawn(loss, seed=7).requires_grad_(), drawn(loss, seed=8, width=width)


def gradient_of(values: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return gradient


def moved(feature: Tensor, shift: int) -> Tensor:
    """All tokens `shift` places later, around the end."""
    return feature.roll((shift, shift), (2, 3)) if feature.ndim == 4 else feature.roll(shift, 1)


def broken_outside(loss: Loss, feature: Tensor, value: float) -> Tensor:
    """The same where tokens count, `value` in the rows of those that do not."""
    rows = MASK[:, None, :, None] if is_attention(loss) else MASK[:, :, None]
    return feature.detach().masked_fill(~rows, value)


@held_to()
def test_every_loss_under_a_mask_is_held_to_these_laws(loss: Loss) -> None:
    assert set(reads(loss)) <= FEATURES | {"mask"}, "teach `apply` what else this loss reads"
    assert get_type_hints(loss, include_extras=True)["return"] == PerExample


@held_to()
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(loss: Loss) -> None:
    student, _ = pair(loss)
    values = apply(loss, student, student.detach().clone())
    torch.testing.assert_close(values, torch.zeros(B).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(gradient_of(values, student), torch.zeros_like(student), atol=1e-8, rtol=0)


@held_to()
def test_every_example_gets_a_value_above_zero(loss: Loss) -> None:
    values = apply(loss, *pair(loss))
    assert values.shape == (B,)
    assert values.min() > 1e-4


@held_to()
def test_the_gradient_is_the_slope_of_the_value(loss: Loss) -> None:
    student, teacher = pair(loss)
    assert torch.autograd.gradcheck(lambda x: apply(loss, x, teacher), student, rtol=1e-4, atol=1e-7)


@held_to()
def test_each_example_is_a_world_of_its_own(loss: Loss) -> None:
    student, teacher = pair(loss)
    rows = torch.tensor([2, 0])
    values = apply(loss, student, teacher)[rows]
    alone = apply(loss, student[rows], teacher[rows], MASK[rows])
    torch.testing.assert_close(alone, values)
    torch.testing.assert_close(gradient_of(alone, student), gradient_of(values, student))


@held_to()
def test_padding_does_not_change_the_loss(loss: Loss) -> None:
    student, teacher = (x.detach() for x in pair(loss))
    for index, length in enumerate(LENGTHS.tolist()):
        cut = (
            slice(index, index + 1),
            *([slice(length)] if student.ndim == 3 else [slice(None), *[slice(length)] * 2]),
        )
        trimmed = apply(loss, student[cut], teacher[cut], MASK[index : index + 1, :length])
        torch.testing.assert_close(trimmed[0], apply(loss, student, teacher)[index])


@held_to()
def test_left_or_right_padding_is_the_same(loss: Loss) -> None:
    student, teacher = (x.detach()[1:2] for x in pair(loss))
    right = apply(loss, student, teacher, MASK[1:2])
    left = apply(loss, moved(student, 3), moved(teacher, 3), MASK[1:2].roll(3, 1))
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@held_to()
def test_what_stands_outside_the_mask_is_never_read(loss: Loss, value: float) -> None:
    student, teacher = pair(loss)
    broken = broken_outside(loss, student, value).requires_grad_()
    values = apply(loss, broken, broken_outside(loss, teacher, value))
    torch.testing.assert_close(values, apply(loss, student, teacher))
    gradient = gradient_of(values, broken)
    # Through a softmax of NaN, which is the test's own, a gradient of 0 is no number.
    rows = MASK[:, None, :].expand(B, HEADS, T) if is_attention(loss) else MASK
    assert gradient[rows].isfinite().all()
    assert card(loss).name == "attention_kl" or not gradient[~rows].any()


@held_to()
def test_an_example_without_a_counted_token_is_zero_with_a_graph(loss: Loss) -> None:
    student, teacher = pair(loss)
    values = apply(loss, student, teacher, torch.zeros_like(MASK))
    assert not values.any()
    assert not gradient_of(values, student).any()


@held_to()
def test_a_student_that_is_not_a_number_is_not_hidden(loss: Loss) -> None:
    student, teacher = pair(loss)
    broken = student.detach().clone()
    broken[1, 0, 0] = math.nan
    assert apply(loss, broken, teacher).isnan().tolist() == [False, True, False]


@held_to()
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    student, teacher = pair(loss)
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(apply(loss, student, teacher).sum(), teacher, allow_unused=True)
    assert gradient is None or not gradient.any()


@held_to()
def test_another_teacher_teaches_something_else(loss: Loss) -> None:
    student, teacher = pair(loss)
    other = drawn(loss, seed=9, width=teacher.shape[-1])
    here, there = (gradient_of(apply(loss, student, t), student) for t in (teacher, other))
    assert (here - there).norm() > 1e-2 * here.norm() > 0


@held_to()
def test_inputs_are_left_as_they_were(loss: Loss) -> None:
    student, teacher = pair(loss)
    before = student.detach().clone(), teacher.clone()
    gradient_of(apply(loss, student, teacher), student)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


# Attention has no scale: its softmax is behind it.
@held_to(lambda name: name != "attention_kl")
@pytest.mark.parametrize("teacher_scale", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("student_scale", [0.0, 1e-3, 1e3])
def test_any_scale_gives_a_finite_value_and_gradient(loss: Loss, student_scale: float, teacher_scale: float) -> None:
    student, teacher = (x.detach().float() for x in pair(loss))
    student = (student_scale * student).requires_grad_()
    values = apply(loss, student, teacher_scale * teacher)
    assert values.isfinite().all() and values.min() >= -1e-6
    assert gradient_of(values, student).isfinite().all()


# Half precision would round the test's own softmax in front of attention_kl.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@held_to(lambda name: name != "attention_kl")
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in pair(loss))
    values = apply(loss, student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), apply(loss, student.double(), teacher.double()), rtol=1e-4, atol=1e-6)


@held_to()
def test_autocast_does_not_round_what_is_inside(loss: Loss) -> None:
    student, teacher = (x.detach().float() for x in pair(loss))
    expected = apply(loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(apply(loss, student, teacher), expected)


@held_to()
def test_double_precision_stays_double(loss: Loss) -> None:
    assert apply(loss, *pair(loss)).dtype == torch.float64


@held_to(lambda name: name not in ONE_TOKEN)
def test_the_other_tokens_of_an_example_are_read(loss: Loss) -> None:
    student, teacher = (x.detach() for x in pair(loss))
    other = student.clone()
    last = (slice(None), 2) if student.ndim == 3 else (slice(None), slice(None), 2)
    other[last] += torch.randn(other[last].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert (apply(loss, other, teacher) - apply(loss, student, teacher)).abs().min() > 1e-6


@held_to()
def test_gradient_steps_bring_the_student_to_its_teacher(loss: Loss) -> None:
    student, teacher = drawn(loss, seed=7).requires_grad_(), drawn(loss, seed=8)
    start = apply(loss, student, teacher).sum()
    for step in range(150):
        gradient = gradient_of(apply(loss, student, teacher), student)
        student = (student - 0.96**step * gradient / gradient.norm().clamp(min=1e-12)).detach().requires_grad_()
    assert apply(loss, student, teacher).sum() < 2e-2 * start


@held_to()
def test_shapes_that_do_not_fit_are_named(loss: Loss) -> None:
    student, teacher = pair(loss)
    shorter = teacher[..., :4, :4] if is_attention(loss) else teacher[:, :4]
    with pytest.raises(SignalError, match=f"{card(loss).name}: found features"):
        apply(loss, student, shorter)


def test_the_lists_of_exceptions_name_losses_that_exist() -> None:
    assert {*ATTENTION, *ONE_WIDTH, *ONE_TOKEN, *KNOBS} <= set(LOSSES)
