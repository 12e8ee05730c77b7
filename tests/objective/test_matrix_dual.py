"""The row of the matrix that takes heads apart: dskd over signals and regimes. Its equations: test_dual_space.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Lesson, Teacher
from potstill.data.rollout import rollout
from potstill.losses.dual_space import dskd
from potstill.objective import Objective, term, top
from potstill.schemes import Offline
from potstill.stores import Hidden
from potstill.teachers import ensemble, local
from potstill.teachers.aligned import Beside, beside
from potstill.teachers.remembered import build
from tests.objective import world
from tests.objective.world import Bigram, Sketched, Stories

PLAIN = "takes the {}'s head apart, which must be a plain matrix"
REFUSED = {
    "dense": PLAIN.format("teacher"),
    "mixture": "layer 'hidden/0' does not say whose it is",
    "top": "left out 'hidden/0'",
    "sampled": "left out 'hidden/0'",
}


def objective() -> Objective:
    return Objective(term("dskd", at=["hidden/0"]))


def plain(seed: int, *, applied: bool = False) -> Bigram:
    return Bigram(world.pieces(), seed, applied=applied, bias=False)


def teachers() -> dict[str, Teacher]:
    one, other = local(plain(2)), local(plain(3))
    listed = local(plain(2, applied=True))
    return {
        "dense": listed,
        "projection": one,
        "mixture": ensemble([one, other]),
        "top": Sketched(listed, world.Top(k=4)),
        "sampled": Sketched(listed, world.Sampled(draws=4)),
    }


def alongside(teacher: Teacher) -> Beside:
    return beside(teacher, student_tokenizer=world.bytes_(), teacher_tokenizer=world.pieces())


def learner() -> Bigram:
    """In float64, with its maps."""
    return Bigram(world.bytes_(), 1, bias=False).double()


def scheme_for(student: Bigram, teacher: Teacher, batch: Batch) -> Offline:
    scheme = Offline(student, alongside(teacher))
    scheme.prepare(objective(), batch)
    return scheme


def batch_of(regime: str) -> Batch:
    if regime == "live":
        return Stories().batch(0)
    return rollout(world.student(), Stories(prompt=4), tokens=7, seed=3).batch(0)


def lesson_of(scheme: Offline, batch: Batch) -> Lesson:
    [lesson] = scheme.lessons(batch, objective().need("student"), objective().need("teacher"))
    return lesson


def learnt(scheme: Offline, value: Tensor) -> list[Tensor]:
    parameters = list(scheme.learners().parameters())
    # No head learns from it.
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return [value.detach(), *found]


@pytest.mark.parametrize("regime", ["live", "on policy"])
def test_it_is_the_mean_over_the_counted_tokens_of_the_loss_alone(regime: str) -> None:
    batch = batch_of(regime)
    scheme = scheme_for(learner(), teachers()["projection"], batch)
    lesson = lesson_of(scheme, batch)
    ours, theirs = lesson.student, lesson.teacher
    [key] = {name.rpartition(".")[0] for name in ours.features}
    values = dskd(
        ours.features[f"{key}.student_feature"], theirs.features["hidden/0"],
        ours.features[f"{key}.student_to_teacher"], ours.features[f"{key}.student_from_teacher"],
        ours.logits.hidden, ours.logits.weight.detach(), theirs.logits.hidden, theirs.logits.weight,
        theirs.features["labels"], batch.labels, batch.mask,
    )  # fmt: skip
    assert len(values) == int(batch.mask.sum())
    found, expected = learnt(scheme, objective()(lesson, batch)), learnt(scheme, values.mean())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(bool(gradient.any()) for gradient in found[1:]) >= 4, "the states and the three maps learn"


@pytest.mark.parametrize("regime", ["live", "on policy"])
@pytest.mark.parametrize("signal", REFUSED)
def test_a_teacher_without_one_plain_head_and_its_embeddings_is_refused(signal: str, regime: str) -> None:
    with pytest.raises(SignalError, match=REFUSED[signal]):
        scheme_for(learner(), teachers()[signal], batch_of(regime))


def test_a_student_whose_head_is_not_plain_is_refused() -> None:
    with pytest.raises(SignalError, match=PLAIN.format("student")):
        scheme_for(world.student(), teachers()["projection"], batch_of("live"))


def test_what_stands_at_positions_of_its_own_cannot_be_remembered(tmp_path: Path) -> None:
    with pytest.raises(SignalError, match="only layers that speak of each position can be remembered"):
        build(tmp_path, alongside(teachers()["projection"]), Stories(), batches=1, sketch=Hidden(), layers=["hidden/0"])


def test_a_step_in_parts_equals_the_whole() -> None:
    batch = batch_of("live")
    scheme = scheme_for(learner(), teachers()["projection"], batch)
    parts = [world.part(batch, chosen) for chosen in ([2, 0], [1])]
    counts = objective().counts(parts)
    value = torch.stack([objective()(lesson_of(scheme, part), part, counts) for part in parts]).sum()
    whole = objective()(lesson_of(scheme, batch), batch)
    for one, other in zip(learnt(scheme, value), learnt(scheme, whole), strict=True):
        torch.testing.assert_close(one, other)


def test_padding_and_what_stands_in_it_change_nothing() -> None:
    batch = batch_of("live")
    scheme = scheme_for(learner(), teachers()["projection"], batch)
    wider = world.padded(batch, 2, 3)
    lesson = lesson_of(scheme, wider)
    hidden = torch.where(wider.mask[..., None], lesson.student.logits.hidden, math.nan)
    broken = replace(lesson.student, logits=replace(lesson.student.logits, hidden=hidden))
    found = objective()(Lesson(student=broken, teacher=lesson.teacher), wider)
    for one, other in zip(
        learnt(scheme, found), learnt(scheme, objective()(lesson_of(scheme, batch), batch)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_step_in_which_nothing_counts_is_0_with_a_graph() -> None:
    batch = batch_of("live")
    scheme = scheme_for(learner(), teachers()["projection"], batch)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))
    value, *gradients = learnt(scheme, objective()(lesson_of(scheme, empty), empty))
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_rows_of_another_tag_are_not_counted() -> None:
    batch = batch_of("live")
    tagged = replace(batch, extras={"task": torch.tensor([1, 0, 1])})
    scheme = scheme_for(learner(), teachers()["projection"], batch)
    only = Objective(term("dskd", at=["hidden/0"], only={"task": 1}))
    chosen = world.part(batch, [0, 2])
    found, expected = only(lesson_of(scheme, tagged), tagged), objective()(lesson_of(scheme, chosen), chosen)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("knob", [{"weigh": "student_entropy"}, {"select": top("student_entropy", fraction=0.5)}])
def test_positions_of_whole_examples_are_not_weighed_or_selected(knob: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="looks at whole examples"):
        term("dskd", at=["hidden/0"], **knob)


PEAK = """
import sys, torch
from pathlib import Path
from potstill.losses.dual_space import dskd
torch.set_num_threads(1)
rows, classes, width = int(sys.argv[1]), 16000, 16
def floats(*shape): return torch.randn(*shape, requires_grad=True)
length = 128
B = rows // length
mask = torch.ones(B, length, dtype=torch.bool)
labels = torch.randint(classes, (B, length))
given = [floats(B, length, 2 * width), torch.randn(B, length, width), floats(width, width), floats(width, width),
         floats(B, length, width), torch.randn(classes, width), torch.randn(B, length, width),
         torch.randn(classes, width), labels, labels, mask]
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
dskd(*given).mean().backward()
print((resident("VmHWM") - before) / 1024)
"""


def peak_mib(rows: int) -> float:
    # What is freed goes back at once: holes between what is kept would count as held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PEAK, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def test_memory_is_flat_in_the_number_of_tokens() -> None:
    """[2048, 16000] floats are 125 MiB each, and densely there were a dozen of them."""
    small, large = peak_mib(512), peak_mib(2048)
    assert large < small + 25 and large < 125
