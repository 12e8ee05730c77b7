"""Losses on the states of tokens, against METHODS_CLASSIC B14, P4 and METHODS_LLM B16, B17, C3, C4."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import tokens as k
from potstill.losses import weights as w
from potstill.losses.feature import cka, hidden_mse
from potstill.losses.response import taid

from .conftest import Measure

CKA_X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]).double()
CKA_Y = torch.tensor([[1.0, 2], [0, 1], [2, 2], [1, 0]]).double()


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_cka_meets_the_published_value() -> None:
    found = k.token_cka(CKA_X[None], CKA_Y[None], torch.ones(1, 4, dtype=torch.bool))
    assert found.item() == pytest.approx(1 - 0.672022, abs=2e-6)


def test_token_cka_is_the_cka_of_its_counted_tokens() -> None:
    student, teacher = drawn(2, 6, 3), drawn(2, 6, 5, seed=4)
    mask = torch.tensor([[True] * 6, [True, False, True, True, True, False]])
    expected = [cka(s[m], t[m]).mean() for s, t, m in zip(student, teacher, mask, strict=True)]
    torch.testing.assert_close(k.token_cka(student, teacher, mask), torch.stack(expected))


def test_token_cka_does_not_see_rotation_scale_or_offset() -> None:
    student, teacher = drawn(2, 6, 4), drawn(2, 6, 5, seed=4)
    rotated = 3 * teacher @ torch.linalg.qr(drawn(5, 5, seed=5))[0] + 7
    mask = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(k.token_cka(student, rotated, mask), k.token_cka(student, teacher, mask))


def test_two_tokens_have_no_alignment_to_learn() -> None:
    mask = torch.tensor([[True, True, False]])
    assert k.token_cka(drawn(1, 3, 4), drawn(1, 3, 4, seed=4), mask).item() == pytest.approx(0.0, abs=1e-12)


def test_token_similarity_by_hand() -> None:
    student, teacher = drawn(1, 4, 3), drawn(1, 4, 5, seed=4)
    mask = torch.tensor([[True, False, True, True]])

    def cosines(states: Tensor) -> Tensor:
        kept = states[mask]
        return F.cosine_similarity(kept[:, None], kept[None], dim=-1)

    expected = (cosines(student) - cosines(teacher)).square().mean()
    assert k.token_similarity(student, teacher, mask).item() == pytest.approx(expected.item())


def test_pkd_meets_the_published_mean(measure: Measure) -> None:
    values, _ = measure(k.pkd, [[3.0, 4.0]], [[1.0, 0.0]], torch.tensor([True]))
    assert values.item() == pytest.approx(0.4)


def test_pkd_looks_at_the_first_counted_token() -> None:
    student, teacher = drawn(2, 4, 3), drawn(2, 4, 3, seed=4)
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    first = (slice(0, 2), torch.tensor([0, 2]))
    expected = k.pkd(student[torch.arange(2), first[1]], teacher[torch.arange(2), first[1]], torch.ones(2).bool())
    torch.testing.assert_close(k.pkd(student, teacher, mask), expected)


def test_pkd_of_classified_texts_looks_at_position_zero() -> None:
    student, teacher, mask = drawn(2, 4, 3), drawn(2, 4, 3, seed=4), torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(k.pkd(student, teacher, mask), k.pkd(student[:, 0], teacher[:, 0], mask))


def test_pkd_does_not_see_the_length_of_a_state() -> None:
    student, teacher, mask = drawn(2, 3), drawn(2, 3, seed=4), torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(k.pkd(9 * student, teacher, mask), k.pkd(student, teacher, mask))


def test_states_under_a_mask_without_positions_are_refused_with_a_way_out() -> None:
    with pytest.raises(SignalError, match=r"token_cka: .*\[2, 4, 3\].*mask \[2\].*over: attention_mask"):
        k.token_cka(drawn(2, 4, 3), drawn(2, 4, 3), torch.ones(2, dtype=torch.bool))


def test_hidden_mse_is_the_mean_square_of_layer_normed_states() -> None:
    student, teacher = drawn(5, 8), drawn(5, 8, seed=4)
    expected = (F.layer_norm(student, (8,)) - F.layer_norm(teacher, (8,))).square().mean(-1)
    torch.testing.assert_close(hidden_mse(student, teacher), expected)


def test_hidden_mse_is_not_ruled_by_a_massive_channel() -> None:
    student, teacher = drawn(5, 8), drawn(5, 8, seed=4)
    student[:, 0], teacher[:, 0] = 900.0, 1000.0
    assert hidden_mse(student, teacher).max() < 1e-2


@pytest.mark.parametrize(
    ("mix", "golden", "slope"),
    [
        (0.4, 0.073389, [-0.158494, 0.125396, -0.013239, 0.046337]),
        (0.7, 0.235206, None),
        (1.0, 0.464760, [-0.430817, 0.342376, -0.008750, 0.097191]),
    ],
)
def test_taid_meets_the_published_values(
    mix: float, golden: float, slope: list[float] | None, g4: tuple[Tensor, Tensor], measure: Measure
) -> None:
    values, gradient = measure(taid, g4[0], g4[1], mix=mix)
    assert values.item() == pytest.approx(golden, abs=2e-6)
    if slope is not None:
        torch.testing.assert_close(gradient, torch.tensor(slope).double(), atol=2e-6, rtol=0)


def test_taid_at_no_mix_has_nothing_to_teach(g4: tuple[Tensor, Tensor], measure: Measure) -> None:
    values, gradient = measure(taid, g4[0], g4[1], mix=0.0)
    assert values.item() == 0.0
    assert gradient.abs().max() < 1e-12


def test_taid_takes_classes_that_the_student_bans() -> None:
    student = torch.tensor([1.0, -math.inf, 0.0], requires_grad=True)
    teacher = torch.tensor([1.0, -math.inf, 2.0])
    for mix in (0.0, 0.5, 1.0):
        value = taid(student, teacher, mix=mix)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("mix", [-0.1, 1.1, math.nan])
def test_a_mix_outside_of_zero_to_one_is_refused(mix: float) -> None:
    with pytest.raises(RecipeError, match=r"taid\.mix: found"):
        taid(torch.zeros(3), torch.zeros(3), mix=mix)


def test_weights_meet_the_golden_position(g4: tuple[Tensor, Tensor]) -> None:
    # METHODS_LLM 0.8: max p .643914, H(p) .947537, H(q) 1.109767, total variation .439567.
    student, teacher = g4
    assert w.teacher_confidence(teacher).item() == pytest.approx(0.643914, abs=2e-6)
    assert w.teacher_certainty(teacher).item() == pytest.approx(1 - 0.947537 / math.log(4), abs=2e-6)
    assert w.student_entropy(student).item() == pytest.approx(1.109767 / math.log(4), abs=2e-6)
    assert w.student_teacher_gap(student, teacher).item() == pytest.approx(0.439567, abs=2e-6)
    excess = w.excess_loss(student, teacher, torch.tensor(0)).item()
    assert excess == pytest.approx(math.log(0.643914 / 0.213097), abs=5e-6)


@pytest.mark.parametrize("weight", [w.teacher_certainty, w.student_entropy], ids=["certainty", "entropy"])
def test_impossible_classes_leave_an_entropy_finite(weight) -> None:
    assert weight(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])).item() == pytest.approx(0.5)


def test_no_gradient_passes_a_weight() -> None:
    student = drawn(2, 4).requires_grad_()
    assert not w.student_entropy(student).requires_grad
