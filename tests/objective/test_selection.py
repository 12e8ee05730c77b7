"""Weights, selection, tags and masks of a term, and schedules of its knobs: the law of splits holds for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Dense, Lesson, PerExample, PerItem, Projection, Signal, Sparse
from potstill.losses import weights as w
from potstill.losses.divergence import forward_kl
from potstill.losses.response import cross_entropy
from potstill.objective import Counts, Objective, Term, linear, taid_schedule, term, top
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

ROWS, LENGTH, CLASSES = 8, 6, 7
TASK = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def ragged() -> Batch:
    labels = torch.randint(CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    labels[0, 0] = labels[5, 3] = IGNORED
    lengths = torch.tensor([6, 2, 5, 1, 4, 6, 3, 4])
    real = torch.arange(LENGTH)[None] < lengths[:, None]
    answer = real & (torch.arange(LENGTH)[None] >= 1)
    whole = batch(labels, answer, task=TASK)
    return replace(whole, inputs={"attention_mask": real.long()})


def cut(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def part_of(whole: Batch, rows: slice) -> Batch:
    return replace(
        whole,
        inputs=cut(whole.inputs, rows),
        labels=whole.labels[rows],
        mask=whole.mask[rows],
        extras=cut(whole.extras, rows),
    )


def step(objective: Objective, size: int, *, projected: bool) -> tuple[float, list[Tensor]]:
    """Value and gradients of one optimizer step in micro-batches of `size` rows."""
    whole = ragged()
    student = trainable(projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=2))
    teacher = projection(ROWS, LENGTH, width=4, num_classes=CLASSES, seed=1)
    slices = [slice(start, start + size) for start in range(0, ROWS, size)]
    batches = [part_of(whole, rows) for rows in slices]
    counts = objective.counts(batches)
    total = 0.0
    for rows, part in zip(slices, batches, strict=True):
        said, heard = (replace(head, hidden=head.hidden[rows]) for head in (student, teacher))
        features = {"last": student.hidden[rows]}, {"last": teacher.hidden[rows, :, :3]}
        logits = (said, heard) if projected else (applied(said), applied(heard))
        signals = [Signal(logits=one, features=layer) for one, layer in zip(logits, features, strict=True)]
        loss = objective(Lesson(student=signals[0], teacher=signals[1]), part, counts)
        loss.backward()
        total += float(loss)
    return total, gradients(student)


TERMS: dict[str, Callable[[], Term]] = {
    "weighed by the teacher": lambda: term(soft_error, weigh="teacher_confidence"),
    "labels weighed by the student": lambda: term(label_error, weigh="student_entropy"),
    "labels weighed by the teacher": lambda: term(label_error, weigh="teacher_certainty"),
    "selected by the student": lambda: term(soft_error, select=top("student_entropy", fraction=0.4)),
    "selected by labels": lambda: term(soft_error, select=top("excess_loss", fraction=0.6)),
    "selected and weighed": lambda: term(
        soft_error, weigh="student_teacher_gap", select=top("teacher_confidence", fraction=0.5)
    ),
    "one task": lambda: term(label_error, only={"task": 1}),
    "states of all tokens": lambda: term(layer_error, at=["last"], over="attention_mask"),
    "states selected and weighed": lambda: term(
        layer_error, at=["last"], weigh="teacher_certainty", select=top("student_entropy", fraction=0.3)
    ),
    "cka of all tokens": lambda: term("token_cka", at=["last"], over="attention_mask"),
    "relations of answers": lambda: term("relation_kl", at=["last"], causal=True),
}


@pytest.mark.parametrize("projected", [True, False], ids=["projected", "dense"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", TERMS)
def test_any_split_of_a_step_gives_the_same_value_and_gradient(kind: str, size: int, projected: bool) -> None:
    objective = Objective(TERMS[kind](), term(label_error, 0.1), chunk_bytes=16 * CLASSES * 8)
    whole, expected = step(objective, ROWS, projected=False)
    value, found = step(objective, size, projected=projected)
    assert value == pytest.approx(whole, abs=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def dense_pair() -> tuple[Lesson, Tensor, Tensor]:
    student, teacher = (applied(projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=s)) for s in (2, 1))
    return lesson(student, teacher), student.logits, teacher.logits


def test_a_weight_multiplies_the_values_and_the_divisor_stays_the_count() -> None:
    compared, student, teacher = dense_pair()
    rows = ragged()
    found = Objective(term(soft_error, weigh="teacher_confidence"))(compared, rows)
    weight = teacher[rows.mask].softmax(-1).amax(-1)
    torch.testing.assert_close(found, (weight * soft_error(student[rows.mask], teacher[rows.mask])).mean())


def test_a_weight_carries_no_gradient() -> None:
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    Objective(term(label_error, weigh="student_entropy"))(lesson(Dense(logits=student)), batch(labels)).backward()
    weight = w.student_entropy(student.detach())
    (expected,) = torch.autograd.grad((weight * label_error(student, labels)).mean(), student)
    torch.testing.assert_close(student.grad, expected)


def test_a_weighed_term_asks_for_what_the_weight_reads() -> None:
    assert Objective(term(cross_entropy, weigh="teacher_confidence")).need("teacher").logits
    assert not Objective(term(cross_entropy, weigh="student_entropy")).need("teacher").logits


def test_a_weighed_term_is_called_by_both_names() -> None:
    assert Objective(term(soft_error, weigh="teacher_confidence")).labels == ("soft_error*teacher_confidence",)


def test_a_weight_of_ones_own_may_read_an_extra() -> None:
    def importance(importance: Tensor, /) -> Tensor:
        return importance

    logits, given = torch.randn(4, 5), torch.tensor([1.0, 0.0, 2.0, 3.0])
    rows = batch(torch.tensor([0, 1, 2, 3]), importance=given)
    found = Objective(term(label_error, weigh=importance))(lesson(Dense(logits=logits)), rows)
    torch.testing.assert_close(found, (given * label_error(logits, rows.labels)).mean())


def test_labels_weighed_by_a_remembered_teacher_are_refused() -> None:
    # Coarsening to the teacher's top classes would move the labels.
    sparse = Sparse(ids=torch.tensor([[0, 2]]), log_probs=torch.tensor([[-0.5, -1.5]]), size=5)
    compared = lesson(Dense(logits=torch.randn(1, 5)), sparse)
    with pytest.raises(SignalError, match="needs all 5 of the teacher's logits"):
        Objective(term(cross_entropy, weigh="teacher_confidence"))(compared, batch(torch.tensor([4])))


def test_a_divergence_weighed_by_a_top_k_teacher_sees_its_confidence() -> None:
    law = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    sparse = Sparse(ids=torch.tensor([[0, 2]]), log_probs=law[:, [0, 2]].log(), size=4)
    student = torch.randn(1, 4)
    plain, weighed = (
        Objective(term(forward_kl, weigh=weigh))(lesson(Dense(logits=student), sparse), batch(torch.tensor([0])))
        for weigh in (None, "teacher_confidence")
    )
    torch.testing.assert_close(weighed, 0.5 * plain)


def test_a_sampled_teacher_gives_no_weights() -> None:
    sampled = Sparse(ids=torch.tensor([[0, 2]]), log_probs=torch.tensor([[-0.5, -1.5]]), size=4, kind="sampled")
    compared = lesson(Dense(logits=torch.randn(1, 4)), sampled)
    with pytest.raises(SignalError, match=r"forward_kl\*teacher_confidence is not linear in the teacher"):
        Objective(term(forward_kl, weigh="teacher_confidence"))(compared, batch(torch.tensor([0])))


def test_a_sampled_teacher_may_be_weighed_by_the_student() -> None:
    sampled = Sparse(ids=torch.tensor([[0, 2]]), log_probs=torch.tensor([[-0.5, -1.5]]), size=4, kind="sampled")
    student = torch.zeros(1, 4)
    found = Objective(term(forward_kl, weigh="student_entropy"))
    plain = Objective(term(forward_kl))
    rows, compared = batch(torch.tensor([0])), lesson(Dense(logits=student), sampled)
    torch.testing.assert_close(found(compared, rows), plain(compared, rows))


@pytest.mark.parametrize("kind", ["weigh", "select"])
def test_losses_on_whole_examples_have_no_positions_to_weigh_or_select(kind: str) -> None:
    given = {"weigh": "student_entropy"} if kind == "weigh" else {"select": top("student_entropy", fraction=0.5)}
    with pytest.raises(RecipeError, match="one value per example"):
        term(spread, **given)


def test_a_misspelt_weight_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"here\.weigh: .*Did you mean 'student_entropy'"):
        term(soft_error, weigh="student_entrpy", place="here")


def test_a_loss_is_no_weight() -> None:
    with pytest.raises(RecipeError, match="layer_error is no weight of positions"):
        term(soft_error, weigh=layer_error)


def test_the_top_fraction_of_each_example_is_kept_and_counted() -> None:
    compared, student, teacher = dense_pair()
    rows = ragged()
    objective = Objective(term(soft_error, select=top("student_entropy", fraction=0.4)))
    values, kept = [], 0
    for row in range(ROWS):
        inside = rows.mask[row]
        best = w.student_entropy(student[row, inside]).argsort(descending=True)[: math.ceil(0.4 * int(inside.sum()))]
        values.append(soft_error(student[row, inside][best], teacher[row, inside][best]))
        kept += len(best)
    assert objective.counts([rows]).divisors.tolist() == [kept]
    torch.testing.assert_close(objective(compared, rows), torch.cat(values).mean())


def test_the_fraction_of_a_round_number_is_not_rounded_up() -> None:
    counted = torch.ones(1, 30, dtype=torch.bool)
    # 0.1 * 30 is a little above 3 in floating point.
    assert top("student_entropy", fraction=0.1).num_kept(counted).tolist() == [3.0]


def test_of_equal_scores_the_earlier_is_kept() -> None:
    counted = torch.tensor([[False, True, True, True], [True, True, False, False]])
    kept = top("student_entropy", fraction=0.5).kept(counted, torch.zeros(5))
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_scores_that_are_no_number_are_not_hidden() -> None:
    counted = torch.ones(1, 3, dtype=torch.bool)
    kept = top("student_entropy", fraction=0.3).kept(counted, torch.tensor([2.0, math.nan, math.inf]))
    assert kept.tolist() == [[False, True, False]]


def test_infinitely_low_scores_do_not_lose_to_padding() -> None:
    counted = torch.tensor([[False, True, True]])
    kept = top("student_entropy", fraction=1.0).kept(counted, torch.full((2,), -math.inf))
    assert kept.tolist() == [[False, True, True]]


def test_nan_at_masked_positions_stays_out_of_a_selection() -> None:
    student = projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=2)
    student.hidden[~ragged().mask] = torch.nan
    student = trainable(student)
    teacher = applied(projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=1))
    for said in (student, applied(student)):
        loss = Objective(term(soft_error, select=top("student_entropy", fraction=0.5)))(lesson(said, teacher), ragged())
        assert loss.isfinite()


def test_a_fully_masked_batch_gives_zero_with_a_graph() -> None:
    student = trainable(projection(2, 3, width=4, num_classes=5, seed=0))
    rows = batch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    objective = Objective(term(soft_error, select=top("student_entropy", fraction=0.5)))
    loss = objective(lesson(student, applied(projection(2, 3, width=2, num_classes=5, seed=1))), rows)
    loss.backward()
    assert loss == 0 and not any(g.any() for g in gradients(student))


def test_selection_among_single_positions_is_refused() -> None:
    objective = Objective(term(soft_error, select=top("student_entropy", fraction=0.5)))
    with pytest.raises(SignalError, match="have one each"):
        objective.counts([batch(torch.tensor([0, 1]))])


@pytest.mark.parametrize("fraction", [0.0, 1.5, math.nan, True])
def test_a_fraction_outside_of_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(RecipeError, match=r"select\.fraction"):
        top("student_entropy", fraction=fraction)


@pytest.mark.parametrize("projected", [True, False])
def test_two_tasks_have_a_mean_each(projected: bool) -> None:
    """Distilling step by step: alpha CE(answers) + (1 - alpha) CE(rationales), two divisors (METHODS_LLM A4)."""
    head = projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=2)
    rows = ragged()
    objective = Objective(term(cross_entropy, 0.7, only={"task": 0}), term(cross_entropy, 0.3, only={"task": 1}))
    each = cross_entropy(applied(head).logits, rows.labels)
    counted = rows.mask & (rows.labels != IGNORED)
    means = [each[counted & (task == TASK)[:, None]].mean() for task in (0, 1)]
    found = objective.evaluate(lesson(head if projected else applied(head)), rows)
    torch.testing.assert_close(found.terms, torch.stack(means))
    torch.testing.assert_close(found.total, 0.7 * means[0] + 0.3 * means[1])


def test_a_task_that_a_batch_has_none_of_adds_nothing() -> None:
    head = applied(projection(ROWS, LENGTH, width=3, num_classes=CLASSES, seed=2))
    assert Objective(term(cross_entropy, only={"task": 9}))(lesson(head), ragged()) == 0


def test_a_missing_tag_is_named() -> None:
    with pytest.raises(SignalError, match="only where 'tsk' is 1"):
        Objective(term(cross_entropy, only={"tsk": 1})).counts([ragged()])


def test_a_missing_mask_is_named_with_what_there_is() -> None:
    with pytest.raises(SignalError, match="over 'atention_mask', but the batch has attention_mask, task"):
        Objective(term(layer_error, at=["last"], over="atention_mask")).counts([ragged()])


def test_tokens_of_classified_texts_are_compared_over_their_own_mask() -> None:
    # One label per text, states per token: an encoder.
    states, heard = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    rows = replace(batch(torch.tensor([0, 1, 0]), torch.tensor([True, True, False])), inputs={"attention_mask": real})
    compared = Lesson(student=Signal(features={"a": states}), teacher=Signal(features={"a": heard}))
    found = Objective(term(layer_error, at=["a"], over="attention_mask"))(compared, rows)
    inside = real.bool() & rows.mask[:, None]
    torch.testing.assert_close(found, layer_error(states[inside], heard[inside]).mean())


def test_logits_of_classified_texts_have_no_tokens_to_count() -> None:
    rows = replace(batch(torch.tensor([0, 1])), inputs={"attention_mask": torch.ones(2, 4)})
    with pytest.raises(SignalError, match="Remove 'over', or compare features"):
        Objective(term(cross_entropy, over="attention_mask")).counts([rows])


def test_padding_says_nothing_to_a_relation_between_texts() -> None:
    states, heard = torch.randn(4, 3, 5), torch.randn(4, 3, 6)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [True, True, True]])

    def value(states: Tensor, heard: Tensor, mask: Tensor) -> Tensor:
        compared = Lesson(student=Signal(features={"a": states}), teacher=Signal(features={"a": heard}))
        return Objective(term("cka", at=["a"]))(compared, batch(torch.zeros(mask.shape, dtype=torch.long), mask))

    plain = value(states, heard, mask)
    garbage = [x.masked_fill(~mask[..., None], math.nan) for x in (states, heard)]
    longer = [torch.cat([x, torch.full((4, 2, x.shape[-1]), math.nan)], 1) for x in garbage]
    torch.testing.assert_close(value(longer[0], longer[1], torch.cat([mask, torch.zeros(4, 2).bool()], 1)), plain)


def test_a_mask_is_given_to_a_loss_that_reads_it() -> None:
    def counted(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
        return mask.sum(1) + 0.0 * (student_feature - teacher_feature).sum((1, 2))

    states = torch.randn(ROWS, LENGTH, 2)
    compared = Lesson(student=Signal(features={"a": states}), teacher=Signal(features={"a": states}))
    found = Objective(term(counted, at=["a"], over="attention_mask"))(compared, ragged())
    assert found.item() == pytest.approx(31 / 8)


# Schedules of knobs.


def sharp(student_logits: Tensor, /, *, sharpness: float = 1.0) -> PerItem:
    return sharpness * student_logits[:, 0]


@pytest.mark.parametrize("projected", [True, False])
def test_a_knob_follows_its_schedule_through_the_counts(projected: bool) -> None:
    head = projection(2, width=3, num_classes=4, seed=0)
    rows = batch(torch.tensor([0, 1]))
    objective = Objective(term(sharp, sharpness=linear(start=1.0, end=3.0)))
    counts = objective.counts([rows], step=5, steps=10)
    assert counts.knobs == ({"sharpness": 2.0},)
    found = objective(lesson(head if projected else applied(head)), rows, counts)
    torch.testing.assert_close(found, 2.0 * applied(head).logits[:, 0].mean())


def test_a_weighed_loss_keeps_its_scheduled_knob() -> None:
    head, rows = applied(projection(2, width=3, num_classes=4, seed=0)), batch(torch.tensor([0, 1]))
    objective = Objective(term(sharp, weigh="student_entropy", sharpness=linear(start=1.0, end=3.0)))
    half, begin = (objective(lesson(head), rows, objective.counts([rows], step=s, steps=10)) for s in (5, 0))
    torch.testing.assert_close(half, 2.0 * begin)


def test_a_knob_that_is_a_function_by_nature_is_no_schedule() -> None:
    def pooled(student_logits: Tensor, /, *, pool: Callable[[Tensor], Tensor] = torch.neg) -> PerItem:
        return pool(student_logits[:, 0])

    assert not term(pooled, pool=torch.abs).scheduled


def shares(*losses: float) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64)


def annealed() -> Objective:
    return Objective(term(cross_entropy), term("taid", mix=taid_schedule()))


def mix(counts: Counts) -> float:
    return counts.knobs[1]["mix"]


def test_taid_meets_the_published_update() -> None:
    # METHODS_LLM B16: J 2.0 -> 1.8 at a = .4 moves a by 1.500750e-4; a run so long that the line stays at its start.
    objective, rows, steps = annealed(), batch(torch.tensor([0])), 10**12
    memory = objective.start()
    for step, loss in enumerate((2.0, 1.8)):
        assert mix(objective.counts([rows], step=step, steps=steps, memory=memory)) == pytest.approx(0.4, abs=1e-9)
        memory = objective.after_step(memory, shares(7.0, loss), step=step, steps=steps)
    moved = mix(objective.counts([rows], step=2, steps=steps, memory=memory))
    assert moved - 0.4 == pytest.approx(1.500750e-4, abs=1e-9)


def test_taid_is_never_below_the_line() -> None:
    objective, rows = annealed(), batch(torch.tensor([0]))
    assert mix(objective.counts([rows], step=1, steps=100, memory=objective.start())) == pytest.approx(0.406)


def test_taid_never_decreases_and_ends_at_its_end() -> None:
    objective, rows = annealed(), batch(torch.tensor([0]))
    memory, seen = objective.start(), []
    for step in range(50):
        seen.append(mix(objective.counts([rows], step=step, steps=50, memory=memory)))
        loss = 2.0 + math.sin(step)
        memory = objective.after_step(memory, shares(0.0, loss), step=step, steps=50)
    assert seen == sorted(seen)
    assert mix(objective.counts([rows], step=50, steps=50, memory=memory)) == 1.0


def test_taid_takes_a_loss_of_zero() -> None:
    objective = annealed()
    memory = objective.start()
    for step in range(3):
        memory = objective.after_step(memory, shares(0.0, 0.0), step=step, steps=10)
    assert all(map(math.isfinite, memory["taid.mix"].values()))


def test_memory_is_passed_along_not_kept() -> None:
    objective = annealed()
    begun = objective.start()
    objective.after_step(begun, shares(0.0, 1.0), step=0, steps=10)
    assert objective.start() == begun == {"taid.mix": {"share": 0.4, "trend": 0.0, "loss": math.inf}}


def test_an_adaptive_schedule_without_its_memory_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"taid\.mix follows the loss. .*objective\.start\(\)"):
        annealed().counts([batch(torch.tensor([0]))], step=1, steps=10)


def test_a_weight_may_adapt_too() -> None:
    objective, rows = Objective(term(sharp, taid_schedule(start=0.2))), batch(torch.tensor([0]))
    memory = objective.after_step(objective.start(), shares(1.0), step=0, steps=10)
    assert objective.counts([rows], step=5, steps=10, memory=memory).weights == (pytest.approx(0.6),)


def test_plain_schedules_need_no_memory() -> None:
    objective = Objective(term(sharp, sharpness=linear(start=1.0, end=3.0)))
    assert objective.start() == {}
    assert objective.counts([batch(torch.tensor([0]))], step=5, steps=10).knobs == ({"sharpness": 2.0},)


@pytest.mark.parametrize("given", [{"start": 0.8, "end": 0.4}, {"start": -0.1}, {"end": 1.1}])
def test_shares_outside_of_zero_to_one_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="taid_schedule"):
        taid_schedule(**given)


def test_a_term_in_words_says_all_that_sets_it_apart() -> None:
    made = term(
        sharp, 0.5, over="attention_mask", only={"task": 1}, select=top("student_entropy", fraction=0.2), sharpness=2.0
    )
    assert made.describe() == "x 0.5 over attention_mask only task=1 top 0.2 by student_entropy sharpness=2.0"


def test_no_word_of_a_term_changes_from_process_to_process() -> None:
    words = [term(sharp, linear(start=0.0, end=1.0), sharpness=linear(start=0.0, end=1.0)).describe() for _ in range(2)]
    assert words == ["x scheduled sharpness=scheduled"] * 2
    assert "0x" not in term("taid", mix=taid_schedule()).describe()


def test_the_selection_of_a_projection_never_holds_all_logits() -> None:
    widest: list[int] = []

    def watched(student_logits: Tensor, /) -> Tensor:
        widest.append(len(student_logits))
        return student_logits[:, 0]

    head = projection(4, 40, width=3, num_classes=5, seed=0)
    rows = batch(torch.zeros(4, 40, dtype=torch.long))
    Objective(term(label_error, select=top(watched, fraction=0.1)), chunk_bytes=1)(lesson(head), rows)
    assert isinstance(head, Projection)
    assert max(widest) == 16 and sum(widest) == 160
