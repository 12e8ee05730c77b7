"""Losses with labels and published recipes on logits, against METHODS_CLASSIC section A and fixtures P4."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from potstill.core.errors import SignalError
from potstill.core.types import IGNORED
from potstill.losses import response as r
from potstill.losses.divergence import forward_kl
from potstill.losses.logits import standardise

from .conftest import Measure

Pair = tuple[Tensor, Tensor]

DIST = ([[2.0, 1, 0], [0, 1, 3]], [[3.0, 1, 0], [0, 2, 2]])
LSKD = ([[1.0, 2, 4]], [[4.0, 1, 2]])


def test_cross_entropy_is_minus_the_log_probability_of_the_label(measure: Measure) -> None:
    values, gradient = measure(r.cross_entropy, [[0.0, math.log(3.0)], [0.0, 0.0]], torch.tensor([1, 0]))
    torch.testing.assert_close(values, torch.tensor([math.log(4 / 3), math.log(2)]).double())
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25], [-0.5, 0.5]]).double())


def test_label_smoothing_meets_the_published_value(measure: Measure) -> None:
    values, _ = measure(r.cross_entropy, [[2.0, 0, 0, 1]], torch.tensor([0]), smoothing=0.1)
    assert values.item() == pytest.approx(0.618812, abs=2e-6)


def test_label_smoothing_is_distilling_a_uniform_teacher() -> None:
    # CE_smooth = (1 - e) CE + e (KL(u || q) + ln K)
    student, labels, smoothing = torch.tensor([[2.0, 0, 0, 1]]).double(), torch.tensor([0]), 0.1
    uniform = forward_kl(student, torch.zeros_like(student)) + math.log(4)
    mixed = (1 - smoothing) * r.cross_entropy(student, labels) + smoothing * uniform
    torch.testing.assert_close(r.cross_entropy(student, labels, smoothing=smoothing), mixed)


def test_an_ignored_label_costs_nothing_and_moves_nothing(measure: Measure) -> None:
    values, gradient = measure(r.cross_entropy, [[1.0, 2.0], [1.0, 2.0]], torch.tensor([IGNORED, 0]), smoothing=0.1)
    assert values[0] == 0
    assert not gradient[0].any()
    assert gradient[1].any()


def test_cross_entropy_keeps_the_leading_dimensions() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    whole = r.cross_entropy(logits, labels)
    assert whole.shape == (2, 3)
    torch.testing.assert_close(whole[1], r.cross_entropy(logits[1], labels[1]))


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("loss", [r.cross_entropy, r.virtual_teacher], ids=lambda loss: loss.__name__)
def test_a_label_out_of_range_raises(loss, label: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)|index"):
        loss(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("temperature", "golden"), [(1, 1.150421), (2, 1.280627), (4, 1.319630), (20, 1.332778), (100, 1.333311)]
)
def test_kd_meets_the_published_values(temperature: float, golden: float, mirrored: Pair) -> None:
    assert r.kd(*mirrored, temperature=temperature).item() == pytest.approx(golden, abs=2e-6)


def test_kd_at_its_default_temperature_has_the_published_gradient(mirrored: Pair, measure: Measure) -> None:
    values, gradient = measure(r.kd, *mirrored)
    assert values.item() == pytest.approx(1.319630, abs=2e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-0.659815, 0, 0.659815]]).double(), atol=2e-6, rtol=0)


def test_kd_between_opposite_classes_is_that_of_mutual_learning() -> None:
    value = r.kd(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), temperature=1.0)
    assert value.item() == pytest.approx(0.462117, abs=2e-6)


def test_kd_becomes_logit_matching_at_high_temperature(mirrored: Pair, measure: Measure) -> None:
    student, teacher = mirrored
    _, gradient = measure(r.kd, student, teacher, temperature=1e3)
    torch.testing.assert_close(gradient, (student - teacher) / 3, atol=2e-3, rtol=0)


def test_soft_cross_entropy_is_forward_kl_plus_the_teacher_entropy(g4: Pair, measure: Measure) -> None:
    value, gradient = measure(r.soft_cross_entropy, *g4)
    assert value.item() == pytest.approx(1.412297, abs=2e-6)
    torch.testing.assert_close(gradient, measure(forward_kl, *g4)[1])


def test_soft_cross_entropy_at_a_temperature_has_the_gradient_of_kd(mirrored: Pair, measure: Measure) -> None:
    soft = measure(r.soft_cross_entropy, *mirrored, temperature=4.0)[1]
    torch.testing.assert_close(soft, measure(r.kd, *mirrored)[1])


@pytest.mark.parametrize(
    ("alpha", "beta", "golden"), [(1.0, 0.0, 1.030747), (0.0, 1.0, 0.497412), (1.0, 8.0, 5.010043)]
)
def test_dkd_meets_the_published_parts(alpha: float, beta: float, golden: float, mirrored: Pair) -> None:
    value = r.dkd(*mirrored, torch.tensor([0]), alpha=alpha, beta=beta)
    assert value.item() == pytest.approx(golden, abs=4e-6)


def test_dkd_with_the_teacher_share_as_beta_is_kd(mirrored: Pair, measure: Measure) -> None:
    # KD = TCKD + (1 - p_label) NCKD
    student, teacher = mirrored
    rest = 1 - torch.softmax(teacher / 4, -1)[0, 0].item()
    parts = measure(r.dkd, student, teacher, torch.tensor([0]), alpha=1.0, beta=rest)
    torch.testing.assert_close(parts, measure(r.kd, student, teacher))


def test_the_rest_of_dkd_does_not_see_the_label_logit(mirrored: Pair) -> None:
    student, teacher = mirrored
    raised = student + torch.tensor([50_000.0, 0, 0])
    before, after = (r.dkd(z, teacher, torch.tensor([0]), alpha=0.0) for z in (student, raised))
    torch.testing.assert_close(before, after)


def test_dkd_of_a_student_sure_of_the_label_is_exact(measure: Measure) -> None:
    # At T = 1: q = (1, e^-200, e^-200), p = (1/3, 1/3, 1/3): TCKD = log(1/3)/3 + 2/3 (log(2/3) - log(2 e^-200)).
    values, gradient = measure(
        r.dkd, [[200.0, 0, 0]], [[0.0, 0, 0]], torch.tensor([0]), temperature=1.0, alpha=1.0, beta=1.0
    )
    by_hand = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - math.log(2) + 200)
    assert values.item() == pytest.approx(by_hand)
    torch.testing.assert_close(gradient, torch.tensor([[2 / 3, -1 / 3, -1 / 3]]).double())


@pytest.mark.parametrize(
    ("knobs", "golden"),
    [
        ({"intra": 0.0}, 0.223798),
        ({"inter": 0.0}, 0.666667),
        ({}, 0.890464),
        ({"temperature": 4.0, "intra": 0.0}, 16 * 0.162122),
        ({"temperature": 4.0, "inter": 0.0}, 16 * 0.666665),
        ({"temperature": 4.0}, 13.260584),
    ],
)
def test_the_mean_of_dist_meets_the_published_value(knobs: dict[str, float], golden: float, measure: Measure) -> None:
    values, _ = measure(r.dist, *DIST, **knobs)
    assert values.mean().item() == pytest.approx(golden, abs=1e-5)


def test_dist_sees_probabilities_only_up_to_scale_and_offset() -> None:
    student = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.4, 0.4, 0.2]]).double()
    teacher = 0.5 * student + 0.5 / 3
    assert r.dist(student.log(), teacher.log()).abs().max() < 1e-5  # the 1e-8 in the denominator


def test_dist_refuses_positions() -> None:
    with pytest.raises(SignalError, match="dist: found logits of shape"):
        r.dist(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("ddof", "golden"), [(1, 1.096409), (0, 1.652746)])
def test_lskd_meets_the_published_values(ddof: int, golden: float, measure: Measure) -> None:
    assert measure(r.lskd, *LSKD, ddof=ddof)[0].item() == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize(("ddof", "edge"), [(1, 1.0), (0, 1.224745)])
def test_standardised_logits_have_the_published_spread(ddof: int, edge: float) -> None:
    standard = standardise(torch.tensor([[1.0, 2.0, 3.0]]).double(), ddof=ddof)
    torch.testing.assert_close(standard, torch.tensor([[-edge, 0.0, edge]]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scale", "offset"), [(0.01, 0.0), (7.0, -3.0)])
def test_lskd_sees_logits_only_up_to_scale_and_offset(scale: float, offset: float) -> None:
    teacher = torch.tensor(LSKD[1]).double()
    assert r.lskd(scale * teacher + offset, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_logit_mse_is_the_mean_over_classes(mirrored: Pair, g4: Pair) -> None:
    assert r.logit_mse(*mirrored).item() == pytest.approx(2.666667, abs=2e-6)
    assert r.logit_mse(*g4).item() == pytest.approx(0.9375)


def test_centred_logit_mse_meets_the_published_value(g4: Pair) -> None:
    assert r.centred_logit_mse(*g4).item() == pytest.approx(0.921875)


def test_half_the_centred_logit_mse_is_forward_kl_at_high_temperature(g4: Pair) -> None:
    hot = forward_kl(*g4, temperature=1e4).item()
    assert r.centred_logit_mse(*g4).item() / 2 == pytest.approx(hot, abs=2e-5)


@pytest.mark.parametrize("loss", [r.logit_mse, r.centred_logit_mse, r.lskd], ids=lambda loss: loss.__name__)
def test_classes_banned_on_both_sides_leave_logit_statistics_alone(loss, g4: Pair, measure: Measure) -> None:
    student, teacher = g4
    banned = torch.full((3,), -math.inf).double()
    values, gradient = measure(loss, torch.cat((student, banned)), torch.cat((teacher, banned)))
    alone, alone_gradient = measure(loss, student, teacher)
    torch.testing.assert_close(values, alone)
    torch.testing.assert_close(gradient, torch.cat((alone_gradient, torch.zeros(3).double())))


def test_logits_without_a_class_in_common_differ_by_nothing(measure: Measure) -> None:
    for loss in (r.logit_mse, r.centred_logit_mse):
        values, gradient = measure(loss, [[1.0, -math.inf]], [[-math.inf, 1.0]])
        assert values.item() == 0.0
        assert not gradient.any()


def test_binary_kd_meets_the_published_sum_and_gradient(mirrored: Pair, measure: Measure) -> None:
    values, gradient = measure(r.binary_kd, *mirrored)
    assert values.item() == pytest.approx(0.780461, abs=2e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-0.390230, 0, 0.390230]]).double(), atol=2e-6, rtol=0)


def test_binary_cross_entropy_sums_over_the_known_classes(measure: Measure) -> None:
    labels = torch.tensor([[1.0, 0.0, float(IGNORED), math.nan]])
    values, gradient = measure(r.binary_cross_entropy, [[0.0, math.log(3.0), 5.0, -5.0]], labels)
    assert values.item() == pytest.approx(math.log(2) + math.log(4))
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.75, 0, 0]]).double())


@pytest.mark.parametrize(("temperature", "hit", "miss"), [(20, 0.010502, 0.009995), (40, 0.010248, 0.009998)])
def test_the_virtual_teacher_believes_the_published_target(
    temperature: float, hit: float, miss: float, measure: Measure
) -> None:
    # At equal logits the gradient is q - p with q = 1/100 everywhere, which shows p.
    _, gradient = measure(r.virtual_teacher, torch.zeros(1, 100), torch.tensor([3]), temperature=temperature)
    belief = 0.01 - gradient[0]
    assert belief[3].item() == pytest.approx(hit, abs=1e-6)
    assert belief[4].item() == pytest.approx(miss, abs=1e-6)


@pytest.mark.parametrize(("student", "margin", "golden"), [(2.0, 0.0, 1.0), (1.2, 0.0, 0.0), (1.2, 0.3, 0.04)])
def test_bounded_regression_stops_where_the_teacher_is_beaten(
    student: float, margin: float, golden: float, measure: Measure
) -> None:
    values, gradient = measure(r.bounded_regression, [[student]], [[1.5]], [[1.0]], margin=margin)
    assert values.item() == pytest.approx(golden)
    assert gradient.item() == pytest.approx(2 * (student - 1.0) if golden else 0.0)
