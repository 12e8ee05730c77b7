"""Losses on features, against METHODS_CLASSIC B1, B6, B9, B15, METHODS_LLM C3, C4 and fixtures P4."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import feature as f

from .conftest import Measure

MAP_S = torch.tensor([[[[1.0, 2], [0, 1]], [[0, 1], [2, 1]]]]).double()
MAP_T = torch.tensor([[[[2.0, 0], [1, 1]], [[1, 1], [0, 2]]]]).double()
"""METHODS_CLASSIC B2: one example, two channels, 2 x 2."""

CKA_X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]).double()
CKA_Y = torch.tensor([[1.0, 2], [0, 1], [2, 2], [1, 0]]).double()


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(drawn(width, width))[0]


def test_hint_meets_the_published_mean(measure: Measure) -> None:
    values, gradient = measure(f.hint, [[1.0, 2, 3]], [[0.0, 2, 5]])
    assert values.item() == pytest.approx(1.666667, abs=2e-6)
    torch.testing.assert_close(gradient, torch.tensor([[2 / 3, 0, -4 / 3]]).double())


def test_hint_sum_meets_the_published_half_sum(measure: Measure) -> None:
    values, gradient = measure(f.hint_sum, [[1.0, 2, 3]], [[0.0, 2, 5]])
    assert values.item() == pytest.approx(2.5)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0, -2]]).double())


def test_the_half_sum_is_half_as_many_means_as_there_are_entries() -> None:
    student, teacher = drawn(3, 4, 5, 2), drawn(3, 4, 5, 2, seed=4)
    torch.testing.assert_close(f.hint_sum(student, teacher), f.hint(student, teacher) * 4 * 5 * 2 / 2)


def test_the_larger_map_is_average_pooled_rows_and_columns_apart() -> None:
    student = torch.tensor([[[[0.0, 2, 4, 6]]]])  # 1 x 4 against 2 x 2: both meet at 1 x 2.
    teacher = torch.tensor([[[[1.0, 5], [1, 7]]]])
    assert f.hint(student, teacher).item() == pytest.approx(((1 - 1) ** 2 + (5 - 6) ** 2) / 2)


@pytest.mark.parametrize("loss", [f.hint, f.hint_sum, f.smooth_l1, f.cosine], ids=lambda loss: loss.__name__)
def test_one_wide_channel_is_not_broadcast_over_many(loss) -> None:
    with pytest.raises(SignalError, match=rf"{loss.__name__}: .*\[2, 1, 4, 4\].*\[2, 3, 4, 4\].*projector"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))


def test_a_vector_against_a_map_is_refused_with_both_shapes() -> None:
    with pytest.raises(SignalError, match=r"hint: .*\[2, 3\].*\[2, 3, 4, 4\].*Choose layers"):
        f.hint(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))


def test_tokens_of_another_number_are_refused() -> None:
    with pytest.raises(SignalError, match="tokens not in number"):
        f.hint(torch.zeros(2, 5, 3), torch.zeros(2, 6, 3))


def test_smooth_l1_is_linear_far_from_the_teacher(measure: Measure) -> None:
    # Rows (a, -a) standardise to (1, -1) whatever a: against (-1, 1) each entry is 2 apart, 2 - 1/2 in Huber's loss.
    values, _ = measure(f.smooth_l1, [[5.0, -5.0]], [[-70.0, 70.0]])
    assert values.item() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize(("beta", "golden"), [(1.0, 0.04 / 2), (0.1, 0.2 - 0.05)])
def test_smooth_l1_is_quadratic_up_to_beta(beta: float, golden: float, measure: Measure) -> None:
    # Both rows have mean 0 and mean square 1, since 1.2^2 + 0.56 = 2; the first two entries are 0.2 apart.
    rest = math.sqrt(0.56)
    gap = 1 - rest
    values, _ = measure(f.smooth_l1, [[1.0, -1, 1, -1]], [[1.2, -1.2, rest, -rest]], beta=beta)
    other = gap**2 / 2 if beta == 1.0 else gap - 0.05
    assert values.item() == pytest.approx((golden + other) / 2, abs=1e-5)


def test_smooth_l1_sees_features_only_up_to_scale_and_offset() -> None:
    teacher = drawn(2, 5, 3, 3)
    torch.testing.assert_close(f.smooth_l1(40 * teacher + 7, teacher), torch.zeros(2).double(), atol=1e-8, rtol=0)


def test_smooth_l1_is_not_ruled_by_one_huge_channel() -> None:
    student, teacher = drawn(2, 6, 8), drawn(2, 6, 8, seed=4)
    teacher[..., 0] += 1000
    assert f.smooth_l1(student, teacher).max() < 5
    assert f.hint(student, teacher).min() > 1e5


def test_cosine_meets_the_published_value(measure: Measure) -> None:
    values, gradient = measure(f.cosine, [[3.0, 4.0]], [[1.0, 0.0]])
    assert values.item() == pytest.approx(0.4)
    # -(t - cos u) / |s| with u = (.6, .8).
    torch.testing.assert_close(gradient, torch.tensor([[-0.128, 0.096]]).double())


def test_cosine_of_maps_runs_over_channels_at_each_position() -> None:
    student, teacher = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4, seed=4)
    by_hand = (1 - F.cosine_similarity(student, teacher, dim=1)).mean((1, 2))
    torch.testing.assert_close(f.cosine(student, teacher), by_hand)


def test_cosine_of_tokens_runs_over_their_width() -> None:
    student, teacher = drawn(2, 7, 5), drawn(2, 7, 5, seed=4)
    by_hand = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean(-1)
    torch.testing.assert_close(f.cosine(student, teacher), by_hand)


def test_cosine_does_not_see_the_length_of_any_vector() -> None:
    student, teacher = drawn(2, 7, 5), drawn(2, 7, 5, seed=4)
    lengths = drawn(2, 7, 1, seed=5).exp()
    torch.testing.assert_close(f.cosine(lengths * student, teacher), f.cosine(student, teacher))


def test_cosine_is_exact_for_nearly_parallel_vectors_in_float32() -> None:
    # 1 - cos of an angle of 1e-4 is 5e-9, which 1 minus a float32 cosine cannot show.
    value = f.cosine(torch.tensor([[1.0, 1e-4]]), torch.tensor([[1.0, 0.0]]))
    assert value.item() == pytest.approx(5e-9, rel=1e-3)


def vid_alpha() -> Tensor:
    return torch.tensor([4.993229]).double()


def test_vid_at_its_mean_is_half_the_log_variance() -> None:
    teacher = drawn(2, 3, 4, 4)
    variance = F.softplus(vid_alpha()).expand(3) + 1e-5
    torch.testing.assert_close(
        f.vid(teacher, variance, teacher), torch.full((2,), 0.804719).double(), atol=2e-6, rtol=0
    )


def test_vid_is_the_gaussian_log_likelihood_without_its_constant() -> None:
    mean, teacher, variance = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=4), torch.tensor([0.5, 2.0, 3.0]).double()
    law = torch.distributions.Normal(mean, variance.sqrt().view(3, 1, 1))
    by_hand = -(law.log_prob(teacher) + 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
    torch.testing.assert_close(f.vid(mean, variance, teacher), by_hand)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_vid_takes_one_variance_per_channel_in_either_shape(shape: tuple[int, ...]) -> None:
    mean, teacher = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=4)
    variance = torch.tensor([0.5, 2.0, 3.0]).double()
    torch.testing.assert_close(f.vid(mean, variance.view(shape), teacher), f.vid(mean, variance, teacher))


def test_vid_weighs_each_channel_by_its_own_variance(measure: Measure) -> None:
    _, gradient = measure(f.vid, [[1.0, 1.0]], torch.tensor([1.0, 4.0]), torch.zeros(1, 2))
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.125]]).double())


def test_the_best_variance_of_vid_is_the_residual_variance() -> None:
    mean, teacher = drawn(6, 3, 2, 2), drawn(6, 3, 2, 2, seed=4)
    residual = (teacher - mean).square().mean((0, 2, 3)).requires_grad_()
    (slope,) = torch.autograd.grad(f.vid(mean, residual, teacher).sum(), residual)
    torch.testing.assert_close(slope, torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_vid_may_be_negative() -> None:
    teacher = drawn(2, 3)
    assert (f.vid(teacher, torch.full((3,), 0.1), teacher) < -1).all()


def test_the_variance_of_vid_learns() -> None:
    alpha = vid_alpha().expand(3).clone().requires_grad_()
    value = f.vid(drawn(2, 3, 4, 4), F.softplus(alpha) + 1e-5, drawn(2, 3, 4, 4, seed=4))
    (slope,) = torch.autograd.grad(value.sum(), alpha)
    assert (slope.abs() > 1e-3).all()


def test_nst_meets_the_published_value() -> None:
    assert f.nst(MAP_S, MAP_T).item() == pytest.approx(0.625, abs=2e-6)


def test_nst_does_not_see_the_order_or_scale_of_student_channels() -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    changed = student[:, [2, 0, 3, 1]] * torch.tensor([0.1, 3.0, 7.0, 1.0]).view(4, 1, 1)
    torch.testing.assert_close(f.nst(changed, teacher), f.nst(student, teacher))


def test_nst_of_degree_two_matches_gram_matrices() -> None:
    # <x x^T, y y^T> = (x . y)^2: the squared distance of the mean outer products of the channels' unit maps.
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)

    def gram(maps: Tensor) -> Tensor:
        units = F.normalize(maps.flatten(2), dim=-1)
        return torch.einsum("ncp,ncq->npq", units, units) / units.shape[1]

    by_hand = (gram(student) - gram(teacher)).square().sum((1, 2))
    torch.testing.assert_close(f.nst(student, teacher), by_hand)


def test_nst_of_degree_one_matches_mean_maps() -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    means = [F.normalize(maps.flatten(2), dim=-1).mean(1) for maps in (student, teacher)]
    torch.testing.assert_close(f.nst(student, teacher, degree=1), (means[0] - means[1]).square().sum(-1))


def test_the_offset_of_nst_adds_the_lower_degree() -> None:
    # (x . y + c)^2 = (x . y)^2 + 2 c (x . y) + c^2, and the constant cancels.
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    parts = f.nst(student, teacher) + 2 * 0.7 * f.nst(student, teacher, degree=1)
    torch.testing.assert_close(f.nst(student, teacher, offset=0.7), parts)


def test_nst_refuses_features_without_positions() -> None:
    with pytest.raises(SignalError, match=r"nst: .*at least two positions"):
        f.nst(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("degree", [0, -1, 1.5])
def test_nst_refuses_a_degree_that_is_no_polynomial(degree: float) -> None:
    with pytest.raises(RecipeError, match=r"nst\.degree: found"):
        f.nst(MAP_S, MAP_T, degree=degree)  # type: ignore[arg-type]


def test_cka_meets_the_published_value() -> None:
    assert 1 - f.cka(CKA_X, CKA_Y).mean().item() == pytest.approx(0.672022, abs=2e-6)


@pytest.mark.parametrize("widths", [(3, 4), (40, 50)])
def test_cka_is_the_feature_form_of_its_definition(widths: tuple[int, int]) -> None:
    x, y = drawn(9, widths[0]), drawn(9, widths[1], seed=4)
    a, b = x - x.mean(0), y - y.mean(0)
    by_hand = 1 - (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(f.cka(x, y).mean(), by_hand)


def test_cka_does_not_see_rotation_scale_and_offset() -> None:
    teacher = drawn(6, 5)
    assert f.cka(3 * teacher @ rotation(5) + 7, teacher).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-9, 1e12])
def test_cka_keeps_its_value_at_any_scale_of_float32(scale: float) -> None:
    value = f.cka(scale * CKA_X.float(), CKA_Y.float()).mean().item()
    assert value == pytest.approx(1 - 0.672022, abs=2e-6)


def test_cka_of_two_examples_says_nothing() -> None:
    assert f.cka(drawn(2, 5), drawn(2, 5, seed=4)).abs().max() < 1e-12


def test_cka_of_identical_examples_moves_nothing() -> None:
    # Centred by way of the mean alone, rounding would look like features and have an enormous slope.
    copies = drawn(1, 60).float().expand(7, 60).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f.cka(copies, drawn(7, 60, seed=4).float()).sum(), copies)
    assert not gradient.any()
