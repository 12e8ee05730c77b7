"""Laws of the one reduction: counts first, any split, masks, weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import Dense, Lesson, PerItem, Signal
from potstill.objective import Objective, linear, term
from tests.objective.helpers import (
    IGNORED,
    applied,
    batch,
    gradients,
    label_error,
    layer_error,
    lesson,
    projection,
    soft_error,
    spread,
    trainable,
)


def two_terms() -> Objective:
    return Objective(term(soft_error, 0.9), term(label_error, 0.1))


def ragged(num_rows: int, length: int, num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(num_classes, (num_rows, length), generator=generator)
    lengths = torch.arange(num_rows) % length + 1
    mask = torch.arange(length)[None] < lengths[:, None]
    labels[0, 0] = IGNORED
    return labels, mask


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_split_of_a_step_gives_the_same_value_and_gradient(size: int, projected: bool) -> None:
    labels, mask = ragged(8, 5, 7)
    teacher = projection(8, 5, width=4, num_classes=7, seed=1)

    def step(size: int) -> tuple[float, list[Tensor]]:
        student = trainable(projection(8, 5, width=3, num_classes=7, seed=2))
        parts = [slice(start, start + size) for start in range(0, 8, size)]
        batches = [batch(labels[part], mask[part]) for part in parts]
        objective = two_terms()
        counts = objective.counts(batches)
        total = 0.0
        for part, rows in zip(parts, batches, strict=True):
            said = type(student)(hidden=student.hidden[part], weight=student.weight, bias=student.bias)
            heard = type(teacher)(hidden=teacher.hidden[part], weight=teacher.weight, bias=teacher.bias)
            compared = lesson(said, heard) if projected else lesson(applied(said), applied(heard))
            loss = objective(compared, rows, counts)
            loss.backward()
            total += float(loss.detach())
        return total, gradients(student)

    whole, expected = step(8)
    value, found = step(size)
    assert value == pytest.approx(whole, abs=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_value_is_the_mean_over_counted_positions_per_term() -> None:
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    labels, mask = torch.randint(5, (3, 4)), torch.rand(3, 4) > 0.4
    labels[mask.nonzero()[0][0], mask.nonzero()[0][1]] = IGNORED
    counted = mask & (labels != IGNORED)
    expected = 0.9 * soft_error(student[mask], teacher[mask]).mean()
    expected = expected + 0.1 * label_error(student[counted], labels[counted]).mean()
    found = two_terms()(lesson(Dense(logits=student), Dense(logits=teacher)), batch(labels, mask))
    torch.testing.assert_close(found, expected)


def test_nan_at_masked_positions_reaches_neither_value_nor_gradient() -> None:
    labels, mask = ragged(4, 3, 5)
    for projected in (True, False):
        student = projection(4, 3, width=4, num_classes=5, seed=0)
        student.hidden[~mask] = torch.nan
        student = trainable(student)
        teacher = applied(projection(4, 3, width=4, num_classes=5, seed=1))
        loss = two_terms()(lesson(student if projected else applied(student), teacher), batch(labels, mask))
        loss.backward()
        assert loss.isfinite()
        assert student.hidden.grad is not None and student.hidden.grad[mask].isfinite().all()


def test_padding_does_not_change_the_loss() -> None:
    labels, mask = ragged(4, 3, 5)
    student, teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    plain = two_terms()(lesson(Dense(logits=student), Dense(logits=teacher)), batch(labels, mask))

    def padded(tensor: Tensor, value: float) -> Tensor:
        return torch.cat([tensor, torch.full((4, 2, *tensor.shape[2:]), value).to(tensor.dtype)], dim=1)

    wide = lesson(Dense(logits=padded(student, 9.0)), Dense(logits=padded(teacher, -9.0)))
    assert two_terms()(wide, batch(padded(labels, 0), padded(mask, 0))) == plain


@pytest.mark.parametrize("projected", [True, False])
def test_a_fully_masked_batch_gives_zero_with_a_graph(projected: bool) -> None:
    student = trainable(projection(2, 3, width=4, num_classes=5, seed=0))
    rows = batch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    said = student if projected else applied(student)
    loss = two_terms()(lesson(said, applied(projection(2, 3, width=2, num_classes=5, seed=1))), rows)
    loss.backward()
    assert loss == 0
    assert all((g == 0).all() for g in gradients(student))


def test_a_layer_term_on_an_empty_batch_gives_zero_with_a_graph() -> None:
    feature = torch.randn(2, 3, requires_grad=True)
    compared = Lesson(student=Signal(features={"a": feature}), teacher=Signal(features={"a": torch.randn(2, 3)}))
    loss = Objective(term(layer_error, at=["a"]))(compared, batch(torch.zeros(2), torch.zeros(2, dtype=torch.bool)))
    loss.backward()
    assert loss == 0 and feature.grad is not None


def test_a_weight_of_zero_is_the_same_as_no_term() -> None:
    with_zero = Objective(term(soft_error), term(label_error, 0.0), term(layer_error, 0, at=["a"]))
    assert with_zero.labels == ("soft_error",)
    assert with_zero.need("student") == Objective(term(soft_error)).need("student")


def test_an_objective_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to learn"):
        Objective(term(soft_error, 0.0))


def test_need_is_what_the_terms_read_and_no_more() -> None:
    objective = Objective(term(label_error), term(layer_error, at={"s1": "t1", "s2": "t2"}))
    student, teacher = objective.need("student"), objective.need("teacher")
    assert student.logits and not teacher.logits
    assert student.features == {"s1", "s2"} and teacher.features == {"t1", "t2"}
    assert not Objective(term(label_error)).need("teacher")


def test_weights_follow_their_schedule_through_the_counts() -> None:
    objective = Objective(term(soft_error, linear(start=0.0, end=1.0)))
    rows = batch(torch.zeros(2, dtype=torch.long))
    compared = lesson(Dense(logits=torch.randn(2, 3)), Dense(logits=torch.randn(2, 3)))
    full = Objective(term(soft_error))(compared, rows)
    half = objective(compared, rows, objective.counts([rows], step=5, steps=10))
    torch.testing.assert_close(half, 0.5 * full)


def test_several_layers_are_summed() -> None:
    features = {name: torch.randn(3, 4) for name in "abcd"}
    compared = Lesson(student=Signal(features=features), teacher=Signal(features=features))
    objective = Objective(term(layer_error, at={"a": "b", "c": "d"}))
    expected = layer_error(features["a"], features["b"]).mean() + layer_error(features["c"], features["d"]).mean()
    torch.testing.assert_close(objective(compared, batch(torch.zeros(3))), expected)


def test_per_example_losses_count_examples() -> None:
    logits = torch.randn(6, 3)
    found = Objective(term(spread))(lesson(Dense(logits=logits)), batch(torch.zeros(6)))
    torch.testing.assert_close(found, spread(logits).mean())


def test_extras_are_bound_by_name_and_selected_by_the_mask() -> None:
    def weighted(student_logits: Tensor, advantages: Tensor, /) -> PerItem:
        return student_logits[:, 0] * advantages

    logits, mask, advantages = torch.randn(4, 2), torch.tensor([True, False, True, True]), torch.randn(4)
    found = Objective(term(weighted))(lesson(Dense(logits=logits)), batch(torch.zeros(4), mask, advantages=advantages))
    torch.testing.assert_close(found, (logits[mask, 0] * advantages[mask]).mean())


def test_a_missing_extra_is_named() -> None:
    def weighted(student_logits: Tensor, advantages: Tensor, /) -> PerItem:
        return student_logits[:, 0] * advantages

    with pytest.raises(SignalError, match="'advantages'"):
        Objective(term(weighted))(lesson(Dense(logits=torch.randn(2, 2))), batch(torch.zeros(2)))


@pytest.mark.parametrize("projected", [True, False])
def test_different_class_counts_are_refused(projected: bool) -> None:
    student = projection(2, width=3, num_classes=10, seed=0)
    teacher = projection(2, width=3, num_classes=100, seed=0)
    with pytest.raises(SignalError, match="student has 10 classes, the teacher 100"):
        Objective(term(soft_error))(lesson(student if projected else applied(student), teacher), batch(torch.zeros(2)))


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_classes_is_refused(label: int, projected: bool) -> None:
    student = projection(2, width=3, num_classes=5, seed=0)
    rows = batch(torch.tensor([0, label]))
    with pytest.raises(DataError, match=f"label {label} is outside the student's 5 classes"):
        Objective(term(label_error))(lesson(student if projected else applied(student)), rows)


def test_a_missing_layer_is_named_with_what_was_captured() -> None:
    compared = Lesson(student=Signal(features={"layer2": torch.randn(2, 3)}), teacher=Signal())
    with pytest.raises(SignalError, match=r"teacher.*'layer2'"):
        Objective(term(layer_error, at=["layer2"]))(compared, batch(torch.zeros(2)))


def test_too_few_examples_for_a_relation_are_refused() -> None:
    compared = Lesson(
        student=Signal(features={"a": torch.randn(1, 3)}), teacher=Signal(features={"a": torch.randn(1, 3)})
    )
    with pytest.raises(SignalError, match="at least 3 in a micro-batch; this one has 1"):
        Objective(term("rkd", at=["a"]))(compared, batch(torch.zeros(1)))


def test_repeated_losses_get_numbered_labels() -> None:
    assert Objective(term(soft_error), term(soft_error)).labels == ("soft_error", "soft_error#2")


def test_the_outcome_reports_each_term_unweighted() -> None:
    rows = batch(torch.tensor([0, 1]))
    for projected in (True, False):
        student = projection(2, width=3, num_classes=4, seed=0)
        teacher = applied(projection(2, width=3, num_classes=4, seed=1))
        objective = Objective(term(soft_error, 5.0), term(label_error, 7.0))
        outcome = objective.evaluate(lesson(student if projected else applied(student), teacher), rows)
        expected = [
            soft_error(applied(student).logits, teacher.logits).mean(),
            label_error(applied(student).logits, rows.labels).mean(),
        ]
        torch.testing.assert_close(outcome.terms, torch.stack(expected))
        torch.testing.assert_close(outcome.total, 5.0 * expected[0] + 7.0 * expected[1])
