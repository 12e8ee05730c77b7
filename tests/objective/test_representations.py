"""The same distribution in any representation; sparse teachers against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from potstill.core.errors import SignalError
from potstill.core.types import Dense, Mixture, Projection, Sparse
from potstill.objective import Objective, term
from tests.objective.helpers import batch, lesson

# G4 of METHODS_LLM 0.8, and the table of B11.
TEACHER = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.5, 1.5, -0.5, 0.0]], dtype=torch.float64)


def top(k: int) -> Sparse:
    log_probs, ids = TEACHER.log_softmax(-1).topk(k, dim=-1)
    return Sparse(ids=ids, log_probs=log_probs, size=4)


def loss(teacher: Sparse, name: str = "forward_kl", **knobs: float) -> float:
    return float(Objective(term(name, **knobs))(lesson(Dense(logits=STUDENT), teacher), batch(torch.zeros(1))))


def test_the_residual_bucket_has_its_published_value() -> None:
    assert loss(top(2)) == pytest.approx(0.434077, abs=1e-6)


def test_one_class_and_a_tail_is_the_bernoulli_divergence() -> None:
    assert loss(top(1)) == pytest.approx(0.429698, abs=1e-6)


def test_keeping_every_class_is_the_full_divergence() -> None:
    assert loss(top(4)) == pytest.approx(0.464760, abs=1e-6)
    assert loss(top(4), "reverse_kl") == pytest.approx(0.454220, abs=1e-6)


def test_the_bucket_gradient_is_q_minus_p_on_kept_classes_and_shared_over_the_tail() -> None:
    student = STUDENT.clone().requires_grad_()
    Objective(term("forward_kl"))(lesson(Dense(logits=student), top(2)), batch(torch.zeros(1))).backward()
    p, q = TEACHER.softmax(-1)[0], STUDENT.softmax(-1)[0]
    tail = q[2:] * (1 - p[2:].sum() / q[2:].sum())
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0], torch.cat([q[:2] - p[:2], tail]))


def test_a_retempered_top_teacher_treats_the_tail_as_one_atom() -> None:
    """METHODS_LLM B11: p_S = [.6, .25, .1] at temperature 2 gives log-probs [-.851185, -1.288919, -1.747065]."""
    kept = torch.tensor([[0.6, 0.25, 0.1]], dtype=torch.float64)
    student = torch.zeros(1, 5, dtype=torch.float64)
    sparse = Sparse(ids=torch.tensor([[0, 1, 2]]), log_probs=kept.log(), size=5)
    found = float(
        Objective(term("forward_kl", temperature=2.0, scale_by_t2=False))(
            lesson(Dense(logits=student), sparse), batch(torch.zeros(1))
        )
    )
    p = torch.tensor([-0.851185, -1.288919, -1.747065], dtype=torch.float64).exp()
    p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
    q = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64).sqrt()
    q = q / q.sum()
    assert found == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)


def test_padding_entries_of_a_ragged_cache_change_nothing() -> None:
    padded = Sparse(
        ids=torch.cat([top(2).ids, torch.tensor([[3, 3]])], dim=-1),
        log_probs=torch.cat([top(2).log_probs, torch.full((1, 2), -torch.inf, dtype=torch.float64)], dim=-1),
        size=5,
    )
    student = torch.cat([STUDENT, torch.full((1, 1), -1e4, dtype=torch.float64)], dim=-1)
    found = Objective(term("forward_kl"))(lesson(Dense(logits=student), padded), batch(torch.zeros(1)))
    assert float(found) == pytest.approx(0.434077, abs=1e-6)


@pytest.mark.parametrize("use", ["forward_kl", "reverse_kl", "generalised_jsd", "total_variation"])
@pytest.mark.parametrize("k", [3, 4, 6])
def test_a_list_without_entries_teaches_nothing_however_long_it_is(use: str, k: int) -> None:
    empty = Sparse(ids=torch.zeros(1, k, dtype=torch.int64), log_probs=torch.full((1, k), -torch.inf), size=4)
    student = STUDENT.clone().requires_grad_()
    value = Objective(term(use))(lesson(Dense(logits=student), empty), batch(torch.zeros(1)))
    (gradient,) = torch.autograd.grad(value, student)
    # Reverse KL reads -inf as -30: e^-30 a class.
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
    assert not gradient.any()


def test_what_a_list_with_room_for_all_classes_leaves_out_is_its_tail() -> None:
    padded = Sparse(
        ids=torch.cat([top(2).ids, torch.tensor([[0, 0]])], dim=-1),
        log_probs=torch.cat([top(2).log_probs, torch.full((1, 2), -torch.inf, dtype=torch.float64)], dim=-1),
        size=4,
    )
    assert loss(padded) == pytest.approx(loss(top(2)), abs=1e-9)


def test_a_confident_student_keeps_a_precise_tail() -> None:
    """1 - sum(q) would be 0 in float32 here; the logsumexp over the others is not."""
    student = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).requires_grad_()
    value = Objective(term("forward_kl"))(lesson(Dense(logits=student), top(1)), batch(torch.zeros(1)))
    value.backward()
    p = float(TEACHER.softmax(-1)[0, 0])
    tail = -40.0 + torch.log(torch.tensor(3.0)).item()
    expected = p * (torch.log(torch.tensor(p)).item() - 0.0) + (1 - p) * (torch.log(torch.tensor(1 - p)).item() - tail)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    assert student.grad is not None and student.grad.isfinite().all()


def test_a_loss_on_raw_logits_refuses_a_sparse_teacher() -> None:
    with pytest.raises(SignalError, match="needs all 4 of the teacher's logits"):
        loss(top(2), "logit_mse")


def test_a_loss_that_compares_examples_refuses_a_top_teacher() -> None:
    """Each row lists other classes, so the first of one is not the first of another."""
    rows, law = batch(torch.zeros(2)), torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    log_probs, ids = law.log_softmax(-1).topk(4, dim=-1)
    said = Sparse(ids=ids, log_probs=log_probs, size=4)
    with pytest.raises(SignalError, match="sinkhorn compares the laws of different examples"):
        Objective(term("sinkhorn"))(lesson(Dense(logits=law), said), rows)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("name", ["logit_mse", "binary_kd"])
def test_a_loss_that_reads_numbers_refuses_a_mean_of_probabilities(name: str, projected: bool) -> None:
    """Of a law the logits are known up to a constant, which would be its gradient's."""
    said = Mixture(members=(Dense(logits=TEACHER), Dense(logits=TEACHER)), weights=torch.tensor([[0.5, 0.5]]))
    student = Projection(hidden=STUDENT, weight=torch.eye(4).double()) if projected else Dense(logits=STUDENT)
    with pytest.raises(SignalError, match="Take an ensemble with mean: logits"):
        Objective(term(name))(lesson(student, said), batch(torch.zeros(1)))
    whole = Objective(term(name))(lesson(student, replace(said, mean="logits")), batch(torch.zeros(1)))
    torch.testing.assert_close(
        whole, Objective(term(name))(lesson(student, Dense(logits=TEACHER)), batch(torch.zeros(1)))
    )


def test_a_weight_of_laws_does_not_make_a_loss_of_labels_refuse_them() -> None:
    said = Mixture(members=(Dense(logits=TEACHER), Dense(logits=TEACHER)), weights=torch.tensor([[0.5, 0.5]]))
    weighed = Objective(term("binary_cross_entropy", weigh="teacher_confidence"))
    rows = batch(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.ones(1, dtype=torch.bool))
    assert weighed(lesson(Dense(logits=STUDENT), said), rows) > 0


def test_a_loss_that_is_not_linear_refuses_a_sampled_teacher() -> None:
    drawn = Sparse(ids=torch.tensor([[0, 1]]), log_probs=torch.tensor([[0.5, 0.5]]).log(), size=4, kind="sampled")
    with pytest.raises(SignalError, match="not linear in the teacher"):
        loss(drawn, "reverse_kl")


def test_a_teacher_sampled_at_another_temperature_is_refused() -> None:
    drawn = Sparse(ids=torch.tensor([[0, 1]]), log_probs=torch.tensor([[0.5, 0.5]]).log(), size=4, kind="sampled")
    with pytest.raises(SignalError, match=r"compares at temperature 2, but the teacher's classes were drawn at 1\."):
        loss(drawn, temperature=2.0)


def test_a_sampled_teacher_is_its_counts() -> None:
    drawn = Sparse(
        ids=torch.tensor([[0, 2]]),
        log_probs=torch.tensor([[0.75, 0.25]], dtype=torch.float64).log(),
        size=4,
        kind="sampled",
    )
    w, lq = torch.tensor([0.75, 0.25], dtype=torch.float64), STUDENT.log_softmax(-1)[0, [0, 2]]
    assert loss(drawn) == pytest.approx(float((w * (w.log() - lq)).sum()), abs=1e-9)
