"""Divergences against METHODS_LLM 0.8 and B0-B9, closed forms on few classes, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import divergence as d

from .conftest import Measure

Pair = tuple[Tensor, Tensor]

FORWARD = [-0.430817, 0.342376, -0.008750, 0.097191]
REVERSE = [-0.332440, 0.254853, -0.043904, 0.121490]
HALF_JEFFREYS = [(f + r) / 2 for f, r in zip(FORWARD, REVERSE, strict=True)]
# Adaptive KL at mu 0.5: the head is the teacher's first class, its share of the gap .490047 (B6).
ADAPTIVE = [0.490047 * f + 0.509953 * r for f, r in zip(FORWARD, REVERSE, strict=True)]

GOLDEN_VALUES = [
    (d.forward_kl, {}, 0.464760),
    (d.reverse_kl, {}, 0.454220),
    (d.jeffreys, {}, 0.918980 / 2),
    (d.jsd, {}, 0.109535),
    (d.generalised_jsd, {"beta": 0.1}, 0.040976),
    (d.generalised_jsd, {"beta": 0.25}, 0.083530),
    (d.generalised_jsd, {"beta": 0.75}, 0.082597),
    (d.generalised_jsd, {"beta": 0.9}, 0.040237),
    (d.generalised_jsd, {"normalise": True, "beta": 0.0}, 0.464760),
    (d.generalised_jsd, {"normalise": True, "beta": 0.1}, 0.455288),
    (d.generalised_jsd, {"normalise": True, "beta": 0.25}, 0.445492),
    (d.generalised_jsd, {"normalise": True, "beta": 0.5}, 0.438142),
    (d.generalised_jsd, {"normalise": True, "beta": 0.75}, 0.440518),
    (d.generalised_jsd, {"normalise": True, "beta": 0.9}, 0.447073),
    (d.generalised_jsd, {"normalise": True, "beta": 1.0}, 0.454220),
    (d.skew_kl, {}, 0.362169),
    (d.skew_kl, {"alpha": 0.0}, 0.464760),
    (d.skew_reverse_kl, {}, 0.357344),
    (d.skew_reverse_kl, {"alpha": 0.0}, 0.454220),
    (d.skew_reverse_kl, {"detach_mixture": True}, 0.357344),
    (d.adaptive_kl, {}, 0.459385),
    # Head {0, 1, 2} from its mass .967941: the tail keeps .097191 of the gap .879134.
    (d.adaptive_kl, {"mu": 0.95}, 0.464760 - (0.097191 / 0.879134) * (0.464760 - 0.454220)),
    (d.total_variation, {}, 0.439567),
    (d.hellinger, {}, 0.112121),
    (d.renyi, {}, 0.764260),
    (d.renyi, {"order": 0.5}, 2 * 0.118920),
    (d.renyi, {"order": 1.0}, 0.464760),
    (d.alpha_beta, {"alpha": 1.0, "beta": 0.0}, 0.464760),
    (d.alpha_beta, {"alpha": 0.0, "beta": 1.0}, 0.454220),
    (d.alpha_beta, {"alpha": 1.0, "beta": 1.0}, 0.156174),
    (d.alpha_beta, {"alpha": 0.5, "beta": 0.5}, 0.448485),
    (d.alpha_beta, {}, 0.508582),
    (d.alpha_beta, {"alpha": 0.2, "beta": 0.0}, 1.379809),
    (d.alpha_beta, {"alpha": 0.0, "beta": 0.7}, 0.669461),
    (d.alpha_beta, {"alpha": 0.3, "beta": -0.3}, 1.906432),
    (d.alpha_beta, {"alpha": 0.0, "beta": 0.0}, 1.988669),
    (d.alpha_beta, {"alpha": 2.0, "beta": -1.0}, 0.573702),
]

GOLDEN_GRADIENTS = [
    (d.forward_kl, {}, FORWARD),
    (d.reverse_kl, {}, REVERSE),
    (d.jeffreys, {}, HALF_JEFFREYS),
    (d.jsd, {}, [-0.086231, 0.069382, -0.006470, 0.023318]),
    (d.skew_kl, {}, [-0.307876, 0.246907, -0.013484, 0.074452]),
    (d.skew_reverse_kl, {}, [-0.266574, 0.212366, -0.028654, 0.082862]),
    (d.skew_reverse_kl, {"detach_mixture": True}, [-0.297039, 0.232770, -0.035518, 0.099786]),
    (d.adaptive_kl, {}, ADAPTIVE),
    (d.alpha_beta, {"alpha": 1.0, "beta": 0.0}, FORWARD),
    (d.alpha_beta, {"alpha": 0.0, "beta": 1.0}, REVERSE),
]

KNOBS = [
    (d.forward_kl, {"temperature": 3.0}),
    (d.reverse_kl, {"temperature": 3.0, "scale_by_t2": False}),
    (d.jeffreys, {"weight": 0.3, "temperature": 2.0}),
    (d.generalised_jsd, {"beta": 0.2, "temperature": 2.0}),
    (d.generalised_jsd, {"beta": 0.9, "normalise": True}),
    (d.skew_kl, {"alpha": 0.4, "temperature": 2.0}),
    (d.skew_reverse_kl, {"alpha": 0.4, "temperature": 2.0}),
    (d.alpha_beta, {"alpha": 0.3, "beta": -0.3, "temperature": 2.0}),
    (d.alpha_beta, {"alpha": 0.0, "beta": 0.6}),
    (d.alpha_beta, {"alpha": 0.4, "beta": 0.0}),
    (d.alpha_beta, {"alpha": 0.0, "beta": 0.0}),
    (d.renyi, {"order": 0.5, "temperature": 2.0}),
]


def title(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={knob}" for name, knob in value.items()) or "defaults"
    return getattr(value, "__name__", "") or " "


@pytest.mark.parametrize(("loss", "knobs", "golden"), GOLDEN_VALUES, ids=title)
def test_the_published_value_is_met(loss, knobs, golden: float, g4: Pair, measure: Measure) -> None:
    value, _ = measure(loss, *g4, **knobs)
    assert value.item() == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize(("loss", "knobs", "golden"), GOLDEN_GRADIENTS, ids=title)
def test_the_published_gradient_is_met(loss, knobs, golden: list[float], g4: Pair, measure: Measure) -> None:
    _, gradient = measure(loss, *g4, **knobs)
    torch.testing.assert_close(gradient, torch.tensor(golden).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("loss", "knobs"), KNOBS, ids=title)
def test_the_gradient_is_right_away_from_the_defaults(loss, knobs) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, **knobs), student)


@pytest.mark.parametrize(("loss", "golden"), [(d.forward_kl, 0.120806), (d.reverse_kl, 0.117765)], ids=title)
def test_t_squared_is_a_factor_that_can_be_left_out(loss, golden: float, g4: Pair) -> None:
    assert loss(*g4, temperature=2.0, scale_by_t2=False).item() == pytest.approx(golden, abs=2e-6)
    assert loss(*g4, temperature=2.0).item() == pytest.approx(4 * golden, abs=8e-6)


@pytest.mark.parametrize(("temperature", "golden"), [(1, 1.150421), (2, 1.280627), (4, 1.319630), (20, 1.332778)])
def test_forward_kl_at_a_temperature(temperature: float, golden: float, mirrored: Pair) -> None:
    assert d.forward_kl(*mirrored, temperature=temperature).item() == pytest.approx(golden, abs=2e-6)


def test_the_plain_jeffreys_sum_is_twice_the_even_one(g4: Pair) -> None:
    both = d.forward_kl(*g4) + d.reverse_kl(*g4)
    torch.testing.assert_close(2 * d.jeffreys(*g4), both)


def test_jeffreys_weight_is_the_share_of_forward_kl(g4: Pair) -> None:
    torch.testing.assert_close(d.jeffreys(*g4, weight=1.0), d.forward_kl(*g4))
    torch.testing.assert_close(d.jeffreys(*g4, weight=0.0), d.reverse_kl(*g4))


def test_jsd_beta_weights_the_teacher() -> None:
    # Teacher (1, 0, 0), student (0, 0, 1): m = (beta, 0, 1 - beta), so D is the entropy of beta.
    teacher, student = torch.tensor([[40.0, 0, 0]]).double(), torch.tensor([[0, 0, 40.0]]).double()
    beta = 0.2
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert d.generalised_jsd(student, teacher, beta=beta).item() == pytest.approx(entropy, abs=1e-9)
    # Not symmetric in who is sure: teacher (1, 0), student (1/2, 1/2), worked by hand.
    sure, open_minded = torch.tensor([[40.0, 0]]).double(), torch.tensor([[0.0, 0]]).double()
    mixed = beta + (1 - beta) / 2
    by_hand = beta * math.log(1 / mixed) + (1 - beta) * 0.5 * (math.log(0.5 / mixed) + math.log(0.5 / (1 - mixed)))
    assert d.generalised_jsd(open_minded, sure, beta=beta).item() == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(("beta", "limit"), [(1e-5, d.forward_kl), (1 - 1e-5, d.reverse_kl)], ids=["near 0", "near 1"])
def test_normalised_jsd_is_continuous_with_both_kls(beta: float, limit, g4: Pair, measure: Measure) -> None:
    near = measure(d.generalised_jsd, *g4, beta=beta, normalise=True)
    at = measure(limit, *g4)
    torch.testing.assert_close(near, at, atol=1e-4, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.1])
def test_a_constant_jsd_is_refused(beta: float, g4: Pair) -> None:
    with pytest.raises(RecipeError, match=r"generalised_jsd\.beta: found .* normalise"):
        d.generalised_jsd(*g4, beta=beta)


@pytest.mark.parametrize("loss", [d.skew_kl, d.skew_reverse_kl], ids=title)
def test_skew_divergences_are_bounded_by_minus_log_alpha(loss) -> None:
    apart = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    assert loss(*apart).item() == pytest.approx(2.302585, abs=1e-5)


@pytest.mark.parametrize("loss", [d.skew_kl, d.skew_reverse_kl], ids=title)
def test_skew_divergences_start_from_the_plain_ones(loss, g4: Pair, measure: Measure) -> None:
    torch.testing.assert_close(measure(loss, *g4, alpha=1e-6), measure(loss, *g4, alpha=0.0), atol=1e-4, rtol=0)


def test_the_adaptive_head_holds_the_class_that_crosses_mu() -> None:
    # Teacher (.4, .3, .2, .1): .4 does not reach .5, .7 does, so the head is {0, 1} in any order of the vocabulary.
    p, q = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).double(), torch.tensor([[0.3, 0.2, 0.15, 0.35]]).double()
    head_share = (0.2 + 0.05) / (0.1 + 0.2 + 0.05 + 0.05)
    forward, reverse = (p * (p / q).log()).sum().item(), (q * (q / p).log()).sum().item()
    assert d.adaptive_kl(q.log(), p.log()).item() == pytest.approx(head_share * forward + (1 - head_share) * reverse)


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        ((0.4, 0.0), (0.4, 1e-5)),
        ((0.0, 0.6), (1e-5, 0.6)),
        ((0.3, -0.3), (0.3, -0.3 + 1e-5)),
        ((0.0, 0.0), (1e-5, 1e-5)),
        ((0.0, 0.0), (1e-5, -1e-5)),
        ((0.0, 0.0), (1e-5, 0.0)),
    ],
)
def test_alpha_beta_is_continuous_at_its_limits(limit, near, g4: Pair, measure: Measure) -> None:
    at = measure(d.alpha_beta, *g4, alpha=limit[0], beta=limit[1])
    beside = measure(d.alpha_beta, *g4, alpha=near[0], beta=near[1])
    torch.testing.assert_close(beside, at, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.3, 0.0), (0.0, 0.4), (0.3, -0.3), (0.0, 0.0)])
def test_exchanging_the_laws_exchanges_alpha_and_beta(alpha: float, beta: float, g4: Pair) -> None:
    student, teacher = g4
    there = d.alpha_beta(student, teacher, alpha=alpha, beta=beta)
    torch.testing.assert_close(d.alpha_beta(teacher, student, alpha=beta, beta=alpha), there)


def test_renyi_runs_into_forward_kl_at_order_one(g4: Pair, measure: Measure) -> None:
    near, at = measure(d.renyi, *g4, order=1 + 1e-5), measure(d.forward_kl, *g4)
    torch.testing.assert_close(near, at, atol=1e-4, rtol=0)


NEAR_EQUALITY = [
    (d.forward_kl, {}),
    (d.reverse_kl, {}),
    (d.jeffreys, {"weight": 0.9}),
    (d.adaptive_kl, {}),
    (d.jsd, {}),
    (d.generalised_jsd, {"beta": 0.01, "normalise": True}),
    (d.skew_kl, {}),
    (d.skew_reverse_kl, {}),
    (d.alpha_beta, {}),
    (d.total_variation, {}),
    (d.hellinger, {}),
]


@pytest.mark.parametrize(("loss", "knobs"), NEAR_EQUALITY, ids=title)
def test_float32_keeps_two_digits_of_a_nearly_learnt_lesson(loss, knobs) -> None:
    # KL is 5e-7 here. The plain sum p log(p/q) would be off by 5e-7 or more, as V makes the normalisers inexact.
    generator = torch.Generator().manual_seed(1)
    teacher, noise = 0.5 * torch.randn(2, 4, 32_000, generator=generator)
    student = teacher + 2e-3 * noise
    exact = loss(student.double(), teacher.double(), **knobs)
    torch.testing.assert_close(loss(student, teacher, **knobs).double(), exact, rtol=0.01, atol=0)


def test_renyi_is_right_within_rounding_near_equality() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, noise = 0.5 * torch.randn(2, 4, 32_000, generator=generator)
    student = teacher + 2e-3 * noise
    exact = d.renyi(student.double(), teacher.double())
    torch.testing.assert_close(d.renyi(student, teacher).double(), exact, rtol=0, atol=6e-7)


def test_bounded_divergences_take_no_t_squared(g4: Pair) -> None:
    student, teacher = g4
    for loss in (d.total_variation, d.hellinger):
        torch.testing.assert_close(loss(student, teacher, temperature=2.0), loss(student / 2, teacher / 2))


def test_a_class_the_teacher_bans_costs_reverse_kl_thirty_nats() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    assert d.reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 30))


def test_finite_log_probabilities_are_never_clamped() -> None:
    # p = (1/2, 1/2), q = (1, e^-20000): sum p log(p/q) = 10000 - log 2.
    student, teacher = torch.tensor([[20_000.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert d.forward_kl(student, teacher).item() == pytest.approx(10_000 - math.log(2), rel=1e-6)


def test_sinkhorn_sums_to_the_published_toy() -> None:
    # METHODS_LLM B9: the published scalar sums the rows; the mean over them is the transport cost.
    student, teacher = torch.eye(2).double(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    assert d.sinkhorn(student, teacher).sum().item() == pytest.approx(0.22792, abs=5e-6)


def test_the_sinkhorn_mean_does_not_grow_with_the_batch() -> None:
    # Twice the same rows: the plan splits each row's mass between the copies, at the same cost.
    student, teacher = torch.eye(2).double(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    twice = d.sinkhorn(student.repeat(2, 1), teacher.repeat(2, 1), rounds=200).mean()
    torch.testing.assert_close(twice, d.sinkhorn(student, teacher, rounds=200).mean())


def test_with_little_blur_sinkhorn_matches_rows_whatever_their_order() -> None:
    teacher = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]]).double()
    assert d.sinkhorn(teacher[[2, 0, 1]], teacher, blur=0.01).abs().max() < 1e-12


@pytest.mark.parametrize(("blur", "golden"), [(0.1, 0.6), (1.0, 0.695362)])
def test_the_transport_plan_meets_the_published_cost(blur: float, golden: float) -> None:
    here, there = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    places = torch.arange(3.0).double()
    cost = (places[:, None] - places).abs()
    plan = d.transport_plan(cost, here, there, blur=blur, rounds=500)
    assert (plan * cost).sum().item() == pytest.approx(golden, abs=1e-5)


def test_the_transport_plan_has_the_masses_it_was_given() -> None:
    here, there = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.9, 0.1]).double()
    cost = torch.tensor([[0.0, 1.0], [0.3, 0.2], [2.0, 0.0]]).double()
    plan = d.transport_plan(cost, here, there, blur=0.2, rounds=500)
    torch.testing.assert_close(plan.sum(1), here)
    torch.testing.assert_close(plan.sum(0), there)


def test_sinkhorn_refuses_positions() -> None:
    with pytest.raises(SignalError, match="sinkhorn: found logits of shape"):
        d.sinkhorn(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        (d.forward_kl, {"temperature": 0.0}),
        (d.forward_kl, {"temperature": math.nan}),
        (d.jeffreys, {"weight": 1.5}),
        (d.skew_kl, {"alpha": 1.0}),
        (d.skew_reverse_kl, {"alpha": -0.1}),
        (d.adaptive_kl, {"mu": 0.0}),
        (d.renyi, {"order": 0.0}),
        (d.sinkhorn, {"blur": 0.0}),
    ],
    ids=title,
)
def test_a_knob_out_of_range_is_named(loss, knobs) -> None:
    (name,) = knobs
    with pytest.raises(RecipeError, match=rf"{name}: found .*, expected"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), **knobs)


def test_autocast_does_not_reach_into_a_divergence(g4: Pair) -> None:
    student, teacher = (z.float() for z in g4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (d.forward_kl, d.reverse_kl, d.jsd, d.total_variation):
            assert loss(student, teacher).item() == pytest.approx(loss(*g4).item(), abs=1e-6)


def test_a_value_can_be_backpropagated_twice_when_the_graph_is_kept(g4: Pair) -> None:
    student, teacher = g4
    student.requires_grad_()
    value = d.forward_kl(student, teacher, temperature=2.0)
    first = torch.autograd.grad(value, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, student), first)


def test_without_a_gradient_to_keep_nothing_is_attached(g4: Pair) -> None:
    student, teacher = g4
    with torch.no_grad():
        assert not d.forward_kl(student.requires_grad_(), teacher).requires_grad
