"""Laws of LAWS.md A and golden numbers for every loss that reads what a teacher of another tokenizer says."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from potstill.core.catalog import parts
from potstill.core.errors import RecipeError
from potstill.losses.alignment import alm, gold, mined, reverse_alm, uld
from potstill.losses.divergence import generalised_jsd
from potstill.losses.spans import log1mexp, span_sums

Loss = Callable[..., Tensor]
V = 7
SPAN = torch.tensor([1, 0, 1, 2, 2, 1, 1, 2, 0, 1])
"""Spans of one, three, one, two and one token, between positions that predict none."""
BEGINS, INSIDE = SPAN == 1, SPAN > 0
LABELS = torch.tensor([3, 0, 1, 5, 2, 6, 0, 4, 2, 5])


def reads(loss: Loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]


WORDS = {
    "teacher_span", "teacher_span_log_probs", "teacher_shared_ids", "teacher_shared_log_probs", "teacher_rest_probs",
    "teacher_sorted_probs", "teacher_nearest_ids", "teacher_nearest_log_probs",
}  # fmt: skip
LOSSES = {name: loss for name, loss in parts("loss").items() if WORDS & set(reads(loss))}
SPANS = {name: loss for name, loss in LOSSES.items() if "teacher_span" in reads(loss)}
every = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in LOSSES.items()])
over_spans = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in SPANS.items()])


def logits(*, seed: int, rows: int = len(SPAN)) -> Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(teacher: Tensor, *, entries: int = 4) -> dict[str, Tensor]:
    """What a teacher with these logits over the student's own tokens says of SPAN, worked out one span at a time."""
    law = teacher.double().log_softmax(-1)
    own = law[torch.arange(len(SPAN)), LABELS]
    places = [*BEGINS.nonzero().flatten().tolist(), len(SPAN)]
    told = {
        "teacher_span": SPAN,
        "teacher_span_log_probs": torch.zeros(len(SPAN)).double(),
        "teacher_shared_ids": torch.zeros(len(SPAN), entries, dtype=torch.int64),
        "teacher_shared_log_probs": torch.full((len(SPAN), entries), -math.inf).double(),
        "teacher_rest_probs": torch.zeros(len(SPAN), V).double(),
        "teacher_sorted_probs": teacher.double().softmax(-1).sort(descending=True).values * BEGINS[:, None],
        "teacher_nearest_ids": law.topk(entries).indices,
        "teacher_nearest_log_probs": law.topk(entries).values.masked_fill(~BEGINS[:, None], -math.inf),
    }
    for start, stop in itertools.pairwise(places):
        inside = [at for at in range(start, stop) if INSIDE[at]]
        label = int(LABELS[start])
        others = [token for token in law[start].argsort(descending=True).tolist() if token != label]
        ids = [label, *others[: entries - 1]]
        told["teacher_span_log_probs"][start] = own[inside].sum()
        told["teacher_shared_ids"][start] = torch.tensor(ids)
        told["teacher_shared_log_probs"][start] = torch.cat([own[inside].sum()[None], law[start, ids[1:]]])
        rest = law[start, others[entries - 1 :]].exp()
        told["teacher_rest_probs"][start, : len(rest)] = rest
    return told


def apply(loss: Loss, student: Tensor, told: dict[str, Tensor], labels: Tensor = LABELS, **knobs: float) -> Tensor:
    offered = {"student_logits": student, "labels": labels, **told}
    return loss(*(offered[name] for name in reads(loss)), **knobs)


def gradient_of(values: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return gradient


# Laws


@every
def test_every_one_of_them_is_held_to_these_laws(loss: Loss) -> None:
    assert set(reads(loss)) <= WORDS | {"student_logits", "labels"}, "teach `said` what else this loss reads"


@every
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(loss: Loss) -> None:
    student = logits(seed=1).requires_grad_()
    values = apply(loss, student, said(student.detach()))
    torch.testing.assert_close(values, torch.zeros(len(SPAN)).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of(values, student), torch.zeros(len(SPAN), V).double(), atol=1e-9, rtol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_loss_is_negative(loss: Loss, dtype: torch.dtype) -> None:
    for seed in range(20):
        told = said(logits(seed=seed))
        for noise in (0.0, 1e-3, 1.0):
            student = (logits(seed=seed) + noise * logits(seed=99)).to(dtype)
            assert apply(loss, student, told).min() >= -1e-6


@every
def test_values_stand_where_spans_begin_and_nowhere_else(loss: Loss) -> None:
    values = apply(loss, logits(seed=1), said(logits(seed=2)))
    assert values.shape == (len(SPAN),)
    assert ((values > 0) == BEGINS).all()


@every
def test_the_gradient_is_the_slope_of_the_value(loss: Loss) -> None:
    told = said(logits(seed=2))
    assert torch.autograd.gradcheck(lambda z: apply(loss, z, told), logits(seed=1).requires_grad_(), atol=1e-6)


@every
def test_the_gradient_over_the_classes_sums_to_zero(loss: Loss) -> None:
    student = logits(seed=1).requires_grad_()
    gradient = gradient_of(apply(loss, student, said(logits(seed=2))), student)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(SPAN)).double(), atol=1e-9, rtol=0)


@every
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss) -> None:
    told, shifts = said(logits(seed=2)), torch.linspace(-300, 300, len(SPAN))[:, None]
    torch.testing.assert_close(apply(loss, logits(seed=1) + shifts, told), apply(loss, logits(seed=1), told))


@every
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    told = said(logits(seed=2))
    tensors = [told[name].requires_grad_() for name in reads(loss) if name in told and told[name].is_floating_point()]
    student = logits(seed=1).requires_grad_()
    found = torch.autograd.grad(apply(loss, student, told).sum(), [student, *tensors], allow_unused=True)
    assert found[0].any()
    assert all(gradient is None or not gradient.any() for gradient in found[1:])


@over_spans
def test_what_stands_outside_the_spans_may_be_no_number(loss: Loss) -> None:
    told, student = said(logits(seed=2)), logits(seed=1)
    broken = student.clone()
    broken[~INSIDE] = math.nan
    broken.requires_grad_()
    values = apply(loss, broken, told)
    torch.testing.assert_close(values, apply(loss, student, told))
    assert gradient_of(values, broken).isfinite().all()


@over_spans
def test_the_gradient_reaches_every_token_of_a_span(loss: Loss) -> None:
    student = logits(seed=1).requires_grad_()
    gradient = gradient_of(apply(loss, student, said(logits(seed=2))), student)
    assert torch.equal(gradient.abs().sum(-1) > 1e-8, INSIDE)


@every
def test_a_student_that_is_not_a_number_is_not_hidden(loss: Loss) -> None:
    broken = logits(seed=1)
    broken[2, 1] = math.nan
    assert apply(loss, broken, said(logits(seed=2)))[2].isnan()


@every
@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_extreme_logits_give_a_finite_value_and_gradient(loss: Loss, scale: float) -> None:
    for student, teacher in ((scale, 1.0), (1.0, scale), (scale, -scale), (scale, scale)):
        leaf = (student * logits(seed=1)).float().requires_grad_()
        values = apply(loss, leaf, {name: t.float() if t.is_floating_point() else t
                                    for name, t in said(teacher * logits(seed=1)).items()})  # fmt: skip
        assert values.isfinite().all()
        assert gradient_of(values, leaf).isfinite().all()


@every
def test_no_spans_give_zeros_with_a_graph(loss: Loss) -> None:
    told = said(logits(seed=2))
    none = {
        name: torch.zeros_like(t) if t.dim() == 1 or "ids" in name or "probs" in name else t for name, t in told.items()
    }
    for name in ("teacher_shared_log_probs", "teacher_nearest_log_probs"):
        none[name] = torch.full_like(told[name], -math.inf)
    student = logits(seed=1).requires_grad_()
    values = apply(loss, student, none)
    assert not values.any()
    assert not gradient_of(values, student).any()


@every
def test_no_rows_give_an_empty_value_with_a_graph(loss: Loss) -> None:
    student = logits(seed=1)[:0].requires_grad_()
    values = apply(loss, student, {name: tensor[:0] for name, tensor in said(logits(seed=2)).items()}, LABELS[:0])
    assert values.shape == (0,)
    assert gradient_of(values, student).shape == (0, V)


@every
def test_texts_can_follow_each_other(loss: Loss) -> None:
    student, told = logits(seed=1), said(logits(seed=2))
    whole = apply(loss, student, told)
    cut = 6  # a span begins here
    halves = [
        apply(loss, student[at], {name: tensor[at] for name, tensor in told.items()}, LABELS[at])
        for at in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(torch.cat(halves), whole)


@every
def test_half_precision_is_computed_in_full(loss: Loss) -> None:
    student, told = logits(seed=1).bfloat16(), said(logits(seed=2))
    values = apply(loss, student, told)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), apply(loss, student.double(), told), rtol=1e-3, atol=1e-6)


@every
def test_a_store_may_give_ids_and_spans_as_numbers_with_a_point(loss: Loss) -> None:
    student, told = logits(seed=1).float(), said(logits(seed=2))
    stored = {name: tensor.float() for name, tensor in told.items()}
    torch.testing.assert_close(apply(loss, student, stored), apply(loss, student, told))


@every
def test_gradient_steps_bring_the_student_to_its_teacher(loss: Loss) -> None:
    student, told = logits(seed=1).requires_grad_(), said(logits(seed=2))
    start = apply(loss, student, told).mean()
    for step in range(300):
        gradient = gradient_of(apply(loss, student, told), student)
        student = (student - 0.98**step * gradient / gradient.norm().clamp(min=1e-12)).detach().requires_grad_()
    assert apply(loss, student, told).mean() < 5e-2 * start


# ULD


def test_uld_is_the_sum_of_sorted_differences() -> None:
    # METHODS_LLM E1: |.5-.6| + |.3-.2| + |.2-.1| + |0-.1|
    student, teacher = torch.tensor([[0.3, 0.5, 0.2]]).log(), torch.tensor([[0.6, 0.2, 0.1, 0.1]])
    assert uld(student, teacher).item() == pytest.approx(0.4)


def test_uld_does_not_care_what_tokens_are_called() -> None:
    teacher = logits(seed=2).softmax(-1).sort(descending=True).values
    torch.testing.assert_close(uld(logits(seed=1).roll(2, -1), teacher), uld(logits(seed=1), teacher))


# MinED


def test_mined_is_forward_kl_with_a_tail() -> None:
    # METHODS_LLM B11: the residual bucket on G4 with the teacher's two likeliest classes.
    student = torch.tensor([[0.5, 1.5, -0.5, 0.0]]).double()
    teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).double().log_softmax(-1)
    value = mined(student, torch.tensor([[0, 1]]), teacher[:, :2])
    assert value.item() == pytest.approx(0.434077, abs=1e-6)


# ALM


def coins(teacher: float, student: float, **knobs: float) -> float:
    """ALM of one span of one token whose log-probabilities these are."""
    law = torch.tensor([[student, math.log(-math.expm1(student))]], dtype=torch.float64)
    return alm(law, torch.tensor([0]), torch.tensor([1]), torch.tensor([teacher], dtype=torch.float64), **knobs).item()


@pytest.mark.parametrize(
    ("teacher", "student", "kl"),
    # METHODS_LLM E5 at T = 100: the KL part of the binary cross-entropy, times T.
    [(-1.0, -1.5, 0.00094056), (-1.0, -1.0, 0.0), (-5.0, -5.0, 0.0)],
)
def test_alm_has_its_golden_values(teacher: float, student: float, kl: float) -> None:
    assert coins(teacher, student) == pytest.approx(100 * kl, abs=1e-6)


def test_alm_and_the_entropy_are_the_published_cross_entropy() -> None:
    # METHODS_LLM E5: (-1, -1.5) gives .05671753, of which the entropy at a = -1 is .05577697.
    a = -0.01 - 1e-6
    entropy = -(math.exp(a) * a + -math.expm1(a) * math.log(-math.expm1(a)))
    assert entropy == pytest.approx(0.05577697, abs=1e-8)
    assert coins(-1.0, -1.5) / 100 + entropy == pytest.approx(0.05671753, abs=1e-8)


def test_alm_has_the_limit_of_a_large_temperature() -> None:
    # (a - b) + a log(b / a) at (-1, -1.5)
    assert coins(-1.0, -1.5, temperature=1000.0) == pytest.approx(0.094535, rel=2e-3)


def test_alm_at_temperature_one_is_the_kl_of_the_span_against_all_else() -> None:
    p, q = 0.3, 0.6
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert coins(math.log(p), math.log(q), temperature=1.0) == pytest.approx(expected, abs=1e-5)


def test_reverse_alm_swaps_the_sides() -> None:
    law = torch.tensor([[-1.0, math.log(-math.expm1(-1.0))]], dtype=torch.float64)
    back = reverse_alm(law, torch.tensor([0]), torch.tensor([1]), torch.tensor([-1.5]).double())
    assert back.item() == pytest.approx(coins(-1.0, -1.5), rel=1e-9)


def test_a_span_counts_with_the_product_of_its_tokens() -> None:
    student, told = logits(seed=1), said(logits(seed=2))
    own = student.log_softmax(-1)[torch.arange(len(SPAN)), LABELS]
    expected = coins(told["teacher_span_log_probs"][2].item(), own[2:5].sum().item())
    assert apply(alm, student, told)[2].item() == pytest.approx(expected)


# GOLD


def test_gold_of_single_tokens_is_the_generalised_jsd_of_all_classes() -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    single = BEGINS.clone()
    single[[2, 6]] = False
    values = apply(gold, student, said(teacher, entries=V - 1), rest_weight=0.0)
    torch.testing.assert_close(values[single], generalised_jsd(student, teacher)[single])


def test_gold_merges_a_span_by_the_chain_rule_where_it_begins() -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    told = said(teacher)
    laws = []
    for model in (student, teacher):
        law = model.softmax(-1)
        span = law[2, 1] * law[3, 5] * law[4, 2]
        alternatives = law[2, told["teacher_shared_ids"][2, 1:]]
        events = torch.cat([span[None], alternatives])
        laws.append(torch.cat([events, 1 - events.sum()[None]]).log())
    expected = generalised_jsd(*laws, beta=0.3)
    torch.testing.assert_close(apply(gold, student, told, beta=0.3, rest_weight=0.0)[2], expected)


def test_gold_adds_the_distance_of_what_only_one_side_says() -> None:
    student, told = logits(seed=1), said(logits(seed=2))
    without, weighted = (apply(gold, student, told, rest_weight=weight) for weight in (0.0, 0.25))
    listed = told["teacher_shared_ids"][5].tolist()
    rest = torch.tensor([p for token, p in enumerate(student[5].softmax(-1).tolist()) if token not in listed])
    theirs = told["teacher_rest_probs"][5, : len(rest)]
    distance = (rest.double().sort(descending=True).values - theirs).abs().sum()
    torch.testing.assert_close((weighted - without)[5], 0.25 * distance, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("call", [lambda: coins(-1, -1, temperature=0.0), lambda: apply(gold, logits(seed=1),
                         said(logits(seed=2)), rest_weight=-1.0)])  # fmt: skip
def test_impossible_knobs_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(RecipeError, match="expected a number"):
        call()


# Helpers


def test_log1mexp_keeps_its_digits_at_both_ends() -> None:
    for x in (-1e-12, -1e-3, -math.log(2), -3.0, -40.0):
        expected = math.log(-math.expm1(x))
        assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_spans_are_summed_in_order() -> None:
    sums = span_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, 2, 1, 2]))
    assert sums.tolist() == [3.0, 12.0]
