"""LAWS A to D over signal x divergence x regime: each cell equals its definition, or says why it cannot be.

What a loss promises on its card decides its row of the table below, so a new loss is held the day it is added. The
definition of a cell is worked out by hand from the models' tables: dense, in float64, without the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.core.catalog import card, parts
from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import Batch, Dense, Lesson, Need, Signal, Teacher
from potstill.objective import Objective, Term, term
from potstill.objective.selection import positional
from potstill.stores import Sampled
from potstill.teachers import local
from potstill.teachers.remembered import build, remembered
from tests.objective import world
from tests.objective.world import REGIMES, SIGNALS, Bigram, World

EQUAL, COARSE, DRAWS = "equal", "coarse", "draws"
"""As from all of the teacher's logits; as of both laws with one tail; as of the counts, on average as from all."""

ALL = (EQUAL,) * len(SIGNALS)
NOT_LINEAR = "not linear in the teacher"
TABLE = {
    #           dense  proj.  mixture  of logits  top          sampled
    "labels":   ALL,
    "linear":   (EQUAL, EQUAL, EQUAL, EQUAL, COARSE, DRAWS),
    "softmax":  (EQUAL, EQUAL, EQUAL, EQUAL, COARSE, NOT_LINEAR),
    "whole":    (EQUAL, EQUAL, EQUAL, EQUAL, "needs all 259 of the teacher's logits", NOT_LINEAR),
    "numbers":  (EQUAL, EQUAL, "a mean of probabilities has none but", EQUAL, "needs all 259", NOT_LINEAR),
    "examples": (*("compares the examples of a batch",) * 4, "have other classes listed|needs all 259", NOT_LINEAR),
    "regress":  ("the labels are class ids|is not linear|needs all|has none but",) * len(SIGNALS),
    "crossing": (EQUAL, EQUAL, EQUAL, EQUAL, EQUAL, "does not know how likely a token is"),
    "policy":   (EQUAL, EQUAL, EQUAL, "mean of logits", "does not hold the log-prob", "does not hold the log-prob"),
}  # fmt: skip
"""What a loss makes of each signal where it is asked at all."""

OF_TOKENS = {"advantages", "behaviour_log_probs", "reference_log_probs"}
"""What only a source that writes says."""


named = cache(term)
"""The term of a loss as it stands in the catalog."""


def row_of(name: str) -> str:
    """The row of the table, by what a loss reads and promises."""
    loss = parts("loss")[name]
    reads, facts = set(positional(loss)), card(loss)
    if facts.labels == "numbers":
        return "regress"
    if reads & OF_TOKENS:
        return "policy"
    if not named(name).per_item:
        return "examples"
    if any(read.startswith("teacher_") for read in reads - {"teacher_logits"}):
        return "crossing"
    if "teacher_logits" not in reads:
        return "labels"
    if facts.raw:
        return "numbers"
    if not facts.distribution:
        return "whole"
    return "linear" if facts.linear_in_teacher else "softmax"


# What compares layers is no matter of distributions; dskd takes heads apart: tests/teachers/test_aligned.py.
ROWS = {name: row_of(name) for name, loss in parts("loss").items() if not any("feature" in r for r in positional(loss))}


def verdict(name: str, signal: str, regime: str) -> str:
    """What the cell must do: equal a definition, or raise a sentence."""
    row = ROWS[name]
    if row == "policy" and "on policy" not in regime:
        return "but the batch has"
    asks = row not in ("labels", "regress") or (row == "regress" and "teacher_logits" in named(name).reads)
    if regime == "on policy, cached" and asks:
        return "does not remember"
    return TABLE[row][SIGNALS.index(signal)]


CELLS = [
    (name, signal, regime)
    for name, row in ROWS.items()
    # Whoever asks no teacher hears no signal.
    for signal in (SIGNALS[:1] if row == "labels" else SIGNALS)
    for regime in REGIMES
]
VALID = [cell for cell in CELLS if verdict(*cell) in (EQUAL, COARSE, DRAWS)]
INVALID = [cell for cell in CELLS if cell not in VALID]
ONCE = [cell for cell in VALID if cell[2] == ("on policy" if ROWS[cell[0]] == "policy" else "live")]


def over(cells: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "signal", "regime"), cells, ids=["-".join(cell) for cell in cells])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("stores"))


def teacher_of(made: World, name: str, signal: str, regime: str) -> Teacher:
    if ROWS[name] == "crossing":
        return made.across(signal, regime)
    return made.same_tokens(signal, regime, temperature_of(named(name)))


def temperature_of(asked: Term) -> float:
    return asked.temperature if "teacher_logits" in asked.reads else 1.0


def batch_of(made: World, name: str, regime: str, teacher: Teacher) -> Batch:
    return made.batch(regime, praised_by=teacher if ROWS[name] == "policy" else None)


def lesson_of(objective: Objective, learner: Bigram, teacher: Teacher, batch: Batch) -> Lesson:
    asked = objective.need("teacher")
    said = teacher(batch, asked).detach() if asked else Signal()
    return Lesson(student=learner(batch, objective.need("student")), teacher=said)


def learnt(learner: Bigram, value: Tensor) -> dict[str, Tensor]:
    """The value, and its gradient at every parameter of the student."""
    found = torch.autograd.grad(value, [*learner.parameters()])
    return {"value": value.detach(), **dict(zip(dict(learner.named_parameters()), found, strict=True))}


def asked(name: str, teacher: Teacher, batch: Batch, *, applied: bool) -> dict[str, Tensor]:
    """By the objective."""
    objective, learner = Objective(named(name), chunk_bytes=1), world.student(applied=applied)
    return learnt(learner, objective(lesson_of(objective, learner, teacher, batch), batch))


def by_hand(name: str, signal: str, regime: str, teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
    """By the loss alone, from dense logits in float64: the mean over the counted positions."""
    learner, loss, wanted = world.student(), parts("loss")[name], named(name)
    here, temperature = batch.mask, temperature_of(wanted)
    tokens = batch.inputs["input_ids"][here]
    said = world.law(signal, world.bytes_(), temperature)[tokens]
    offered = {"student_logits": learner.table()[tokens], "teacher_logits": said, "labels": batch.labels[here]}
    match verdict(name, signal, regime):
        case "coarse":
            offered["student_logits"], offered["teacher_logits"] = world.coarse(offered["student_logits"], said)
        case "draws":
            offered["teacher_logits"] = world.counts_at(teacher, batch, temperature)
    if ROWS[name] == "crossing":
        needed = Objective(wanted).need("teacher")
        found = world.across_by_hand(signal)(batch, needed).features
        offered |= {f"teacher_{word}": values[here] for word, values in found.items()}
    if ROWS[name] == "policy":
        offered |= numbers_by_hand(offered)
    return learnt(learner, loss(*(offered[read] for read in positional(loss))).mean())


def numbers_by_hand(offered: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `rewarded` says of each token: the student wrote it, the teacher's log-ratio praises it."""
    q, p = (
        offered[side].detach().log_softmax(-1).gather(-1, offered["labels"][:, None])[:, 0]
        for side in ("student_logits", "teacher_logits")
    )
    return {"behaviour_log_probs": q, "reference_log_probs": p, "advantages": p - q}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, within: float = 1e-5) -> None:
    """Equal within a share of the largest entry: the teacher's side is in float32."""
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) + 1e-3
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=within * scale)


# Every cell.


@over(VALID)
def test_a_cell_equals_its_definition(name: str, signal: str, regime: str, made: World) -> None:
    teacher = teacher_of(made, name, signal, regime)
    batch = batch_of(made, name, regime, teacher)
    expected = by_hand(name, signal, regime, teacher, batch)
    # The law rounded to half precision, as a top store keeps it, no longer sums to 1.
    within = 1e-3 if (ROWS[name], signal) == ("crossing", "top") else 1e-5
    for applied in (False, True):
        assert_same(asked(name, teacher, batch, applied=applied), expected, within=within)


@over(INVALID)
def test_a_cell_that_cannot_be_says_why(name: str, signal: str, regime: str, made: World) -> None:
    teacher = teacher_of(made, name, signal, regime)
    for applied in (False, True):
        with pytest.raises((SignalError, RecipeError, DataError), match=verdict(name, signal, regime)) as raised:
            asked(name, teacher, batch_of(made, name, regime, teacher), applied=applied)
        assert str(raised.value).endswith("."), "a sentence"


def test_no_row_and_no_verdict_of_the_table_is_idle() -> None:
    assert set(ROWS.values()) == set(TABLE)
    assert {verdict(*cell) for cell in VALID} == {EQUAL, COARSE, DRAWS}


# Draws, on average.


@pytest.mark.parametrize("regime", REGIMES[:3])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row == "linear"])
def test_the_mean_gradient_over_draws_is_the_full_one(name: str, regime: str, made: World, tmp_path: Path) -> None:
    """256 rows that differ in their draws alone. Along 40 directions their mean is within 4 standard errors."""
    teacher = teacher_of(made, name, "sampled", "live")
    batch = world.copies(batch_of(made, name, regime, teacher), 2, 256)
    if regime == "cached":
        full = local(world.members(world.bytes_(), applied=True)[0])
        build(tmp_path, full, Fixed(batch), batches=1, sketch=Sampled(draws=8, temperature=temperature_of(named(name))))
        teacher = remembered(tmp_path)
    learner = world.student()
    leaf = learner.table().detach()[batch.inputs["input_ids"]].requires_grad_()

    def gradients(said: Signal) -> Tensor:
        value = Objective(named(name))(Lesson(student=Signal(logits=Dense(logits=leaf)), teacher=said), batch)
        return len(leaf) * torch.autograd.grad(value, leaf)[0].flatten(1)

    found = gradients(teacher(batch, Need(logits=True)))
    law = world.law("dense", world.bytes_(), 1.0)[batch.inputs["input_ids"]]
    exact = gradients(Signal(logits=Dense(logits=law)))[0]
    drawn = torch.randn(found.shape[1], 39, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = torch.cat([exact[:, None], drawn], dim=1)
    error = (found @ along).std(dim=0) / len(found) ** 0.5
    assert ((found.mean(0) - exact) @ along).abs().div(error).max() < 4.0
    assert (found.std(0) > 0).any(), "draws that never differ say nothing about their mean"


@dataclass(frozen=True)
class Fixed:
    """A source of one batch."""

    only: Batch

    def batch(self, index: int) -> Batch:
        return self.only


# What a step is made of does not matter.


@over(ONCE)
def test_a_step_in_parts_equals_the_whole(name: str, signal: str, regime: str, made: World) -> None:
    teacher = teacher_of(made, name, signal, regime)
    batch = batch_of(made, name, regime, teacher)
    batches = [world.part(batch, chosen) for chosen in ([2, 0], [1])]
    for applied in (False, True):
        objective, learner = Objective(named(name)), world.student(applied=applied)
        counts = objective.counts(batches)
        lessons = [lesson_of(objective, learner, teacher, one) for one in batches]
        values = [objective(lesson, one, counts) for lesson, one in zip(lessons, batches, strict=True)]
        whole = asked(name, teacher, batch, applied=applied)
        assert_same(learnt(learner, torch.stack(values).sum()), whole, within=1e-6)


@over(ONCE)
def test_padding_and_what_stands_in_it_change_nothing(name: str, signal: str, regime: str, made: World) -> None:
    teacher = teacher_of(made, name, signal, regime)
    batch = batch_of(made, name, regime, teacher)
    wider = world.padded(batch, 2, 3)
    for applied in (False, True):
        objective, learner = Objective(named(name)), world.student(applied=applied)
        lesson = lesson_of(objective, learner, teacher, wider)
        broken = Lesson(
            student=world.spoiled(lesson.student, wider.mask), teacher=world.spoiled(lesson.teacher, wider.mask)
        )
        assert_same(
            learnt(learner, objective(broken, wider)), asked(name, teacher, batch, applied=applied), within=1e-6
        )


@over(ONCE)
def test_chunks_that_do_not_divide_equal_the_whole(
    name: str, signal: str, regime: str, made: World, small_chunks: Callable[[int], list[int]]
) -> None:
    teacher = teacher_of(made, name, signal, regime)
    batch = batch_of(made, name, regime, teacher)
    dense = asked(name, teacher, batch, applied=True)
    for size in (3, 7):
        ran = small_chunks(size)
        assert_same(asked(name, teacher, batch, applied=False), dense, within=1e-6)
        assert ran == [size], "the fused path ran"


@over(ONCE)
def test_a_step_in_which_nothing_counts_is_0_with_a_graph(name: str, signal: str, regime: str, made: World) -> None:
    teacher = teacher_of(made, name, signal, regime)
    batch = batch_of(made, name, regime, teacher)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))
    for applied in (False, True):
        assert not any(tensor.any() for tensor in asked(name, teacher, empty, applied=applied).values())
