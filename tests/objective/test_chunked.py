"""The fused engine equals the dense computation for every loss of positions or spans, and keeps its memory."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.core.catalog import parts
from potstill.core.types import Dense, Logits, Projection, Sparse
from potstill.objective import Objective, chunked, term
from tests.objective.helpers import applied, batch, gradients, lesson, projection, soft_error, trainable


def fused_losses() -> list[str]:
    """Every loss of the catalog that the engine fuses: a new one is held to these laws the day it is added."""
    layered = {
        name
        for name, loss in parts("loss").items()
        if any("feature" in reads for reads in inspect.signature(loss).parameters)
    }
    return [name for name in parts("loss") if name not in layered and term(name).in_chunks]


FUSED = fused_losses()

HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {"bias": True},
    "scale": {"bias": True, "scale": 0.25},
    "softcap": {"bias": True, "scale": 2.0, "softcap": 30.0},
}


def compared(
    objective: Objective, student: Projection, said: Logits, teacher: Logits | None
) -> tuple[float, list[Tensor]]:
    for tensor in (student.hidden, student.weight, student.bias):
        if tensor is not None:
            tensor.grad = None
    labels = torch.arange(student.hidden.shape[0]) % student.weight.shape[0]
    if any(each.card.labels == "numbers" for each in objective.terms):
        labels = torch.nn.functional.one_hot(labels, student.weight.shape[0]).double()
    rows = batch(labels, torch.ones(student.hidden.shape[0], dtype=torch.bool), **about_tokens(len(labels)))
    loss = objective(lesson(said, teacher, **outputs(len(rows.mask))), rows)
    loss.backward()
    return float(loss.detach()), gradients(student)


def about_tokens(num_rows: int) -> dict[str, Tensor]:
    """What a source says of the tokens that a student wrote."""
    drawn = torch.randn(3, num_rows, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {
        "advantages": drawn[0],
        "behaviour_log_probs": drawn[1] - 2.0,
        "reference_log_probs": drawn[2] - 2.0,
    }


def outputs(num_rows: int) -> dict[str, Tensor]:
    """What a teacher of another tokenizer says beside its logits, for the losses that read it."""
    law = torch.rand(num_rows, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    span = torch.tensor([1, 2, 2, 0, 1, 2, 1, 1, 2])[:num_rows]
    # The span itself is listed first, by the label of its first token.
    first = torch.arange(num_rows)[:, None] % 5
    return {
        "sorted_probs": law.sort(descending=True).values,
        "nearest_ids": torch.arange(3).expand(num_rows, 3),
        "nearest_log_probs": law[:, :3].log(),
        "span": span,
        "span_log_probs": law[:, 0].log(),
        "shared_ids": torch.cat([first, (first + 1) % 5], dim=1),
        "shared_log_probs": law[:, :2].log(),
        "rest_probs": law[:, 2:].sort(descending=True).values,
    }


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_path_equals_the_dense_one(
    name: str, head: str, rows: int, small_chunks: Callable[[int], list[int]]
) -> None:
    student = trainable(projection(7, width=4, num_classes=6, seed=0, **HEADS[head]))
    teacher = projection(7, width=5, num_classes=6, seed=1, **HEADS[head])
    ran = small_chunks(rows)
    value, found = compared(Objective(term(name)), student, student, teacher)
    assert ran == [rows]
    expected_value, expected = compared(Objective(term(name)), student, applied(student), applied(teacher))
    assert ran == [rows]
    assert value == pytest.approx(expected_value, abs=1e-10, rel=1e-10)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_every_loss_over_spans_is_fused() -> None:
    assert {"alm", "reverse_alm", "gold"} <= set(FUSED)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 8))
def test_slices_cover_every_row_once_tear_no_run_and_are_no_longer_than_they_must(span: list[int], size: int) -> None:
    begins = torch.tensor(span) != 2
    found = chunked.whole_runs(begins, size)
    rows = [row for part in found for row in range(part.start, part.stop)]
    assert rows == list(range(len(span)))
    assert all(begins[part.start] for part in found[1:])
    assert all(part.stop - part.start <= size or not begins[part.start + 1 : part.stop].any() for part in found)


@pytest.mark.parametrize("name", [n for n in FUSED if term(n).card.distribution and "teacher_logits" in term(n).reads])
def test_a_top_teacher_that_keeps_everything_equals_the_dense_one(name: str) -> None:
    student = trainable(projection(6, width=4, num_classes=5, seed=0))
    teacher = applied(projection(6, width=3, num_classes=5, seed=1))
    log_probs, ids = teacher.logits.log_softmax(-1).sort(dim=-1, descending=True)
    sparse = Sparse(ids=ids, log_probs=log_probs, size=5)
    value, found = compared(Objective(term(name)), student, student, sparse)
    expected_value, expected = compared(Objective(term(name)), student, applied(student), teacher)
    if "labels" in term(name).reads:
        pytest.skip("a loss that reads labels needs the vocabulary order, which a sorted teacher does not keep")
    assert value == pytest.approx(expected_value, abs=1e-9)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    student = projection(5, width=4, num_classes=6, seed=0)
    student.hidden.requires_grad_()
    teacher = projection(5, width=3, num_classes=6, seed=1)
    Objective(term(soft_error))(lesson(student, teacher), batch(torch.zeros(5))).backward()
    assert student.weight.grad is None and student.hidden.grad is not None


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (
        trainable(projection(5, width=4, num_classes=6, seed=0)),
        projection(5, width=3, num_classes=6, seed=1),
    )
    trainable(teacher)
    Objective(term("forward_kl"))(lesson(student, teacher), batch(torch.zeros(5))).backward()
    assert teacher.hidden.grad is None and teacher.weight.grad is None


def test_the_incoming_scalar_multiplies_the_gradient() -> None:
    teacher = projection(5, width=3, num_classes=6, seed=1)
    found = []
    for factor in (1.0, 3.0):
        student = trainable(projection(5, width=4, num_classes=6, seed=0))
        (factor * Objective(term(soft_error))(lesson(student, teacher), batch(torch.zeros(5)))).backward()
        found.append(gradients(student))
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(3.0 * one, three)


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    student = trainable(projection(5, width=4, num_classes=6, seed=0))
    loss = Objective(term(soft_error))(
        lesson(student, projection(5, width=3, num_classes=6, seed=1)), batch(torch.zeros(5))
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_no_gradient_is_computed_under_no_grad() -> None:
    student = trainable(projection(5, width=4, num_classes=6, seed=0))
    with torch.no_grad():
        loss = Objective(term(soft_error))(
            lesson(student, projection(5, width=3, num_classes=6, seed=1)), batch(torch.zeros(5))
        )
    assert not loss.requires_grad


def test_a_compiled_chunk_equals_the_plain_one() -> None:
    student, teacher = (
        trainable(projection(9, width=4, num_classes=6, seed=0)),
        projection(9, width=4, num_classes=6, seed=1),
    )
    plain = compared(Objective(term("forward_kl")), student, student, teacher)
    compiled = compared(Objective(term("forward_kl"), compiled=True), student, student, teacher)
    assert compiled[0] == pytest.approx(plain[0], abs=1e-9)
    for one, other in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_half_precision_head_keeps_the_gradient_of_its_logits(name: str) -> None:
    """Near convergence a bf16 head product ruins the gradient; a float32-output product must not (METHODS_LLM 0.6)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 64, generator=generator).bfloat16()
    weight = (torch.randn(2000, 64, generator=generator) / 2).bfloat16()
    nudge = (0.02 * torch.randn(16, 64, generator=generator)).bfloat16()

    def gradient(dtype: torch.dtype) -> Tensor:
        student = trainable(Projection(hidden=(hidden + nudge).to(dtype), weight=weight.to(dtype)))
        teacher = Projection(hidden=hidden.to(dtype), weight=weight.to(dtype))
        Objective(term(name))(lesson(student, teacher), batch(torch.zeros(16))).backward()
        assert student.hidden.grad is not None
        return student.hidden.grad.double()

    exact, half = gradient(torch.float64), gradient(torch.bfloat16)
    # What is left is the rounding of the returned gradient itself: 2^-8 per entry, about 0.2 % in norm.
    assert (half - exact).norm() / exact.norm() < 0.006


def test_accumulating_in_bfloat16_would_have_been_seen() -> None:
    """The guard above has teeth: the naive product misses the bar by far."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 64, generator=generator).bfloat16()
    weight = (torch.randn(2000, 64, generator=generator) / 2).bfloat16()
    nudge = (0.02 * torch.randn(16, 64, generator=generator)).bfloat16()
    naive = ((hidden + nudge) @ weight.T).float().softmax(-1) - (hidden @ weight.T).float().softmax(-1)
    exact = ((hidden + nudge).double() @ weight.T.double()).softmax(-1) - (hidden.double() @ weight.T.double()).softmax(
        -1
    )
    assert (naive - exact).norm() / exact.norm() > 0.05


def test_the_chunk_follows_the_budget_and_the_strip_the_cache() -> None:
    on_cpu = chunked.sizes_for(32_000, device="cpu", budget_bytes=64 * 2**20)
    assert (on_cpu.chunk, on_cpu.strip) == (256, 16)
    on_gpu = chunked.sizes_for(128_000, device="cuda", budget_bytes=2**30)
    assert (on_gpu.chunk, on_gpu.strip) == (128, 128)
    assert chunked.sizes_for(10**6, device="cpu", budget_bytes=1).chunk == 16


@pytest.mark.parametrize("num_classes", [32_000, 128_000, 151_936, 262_144])
def test_by_default_enough_rows_go_through_the_heads_at_once_whatever_the_vocabulary(num_classes: int) -> None:
    """With 64 rows at V = 128,000 the products took a quarter longer: they read the weights four times as often."""
    budget = Objective(term("forward_kl")).chunk_bytes
    assert chunked.sizes_for(num_classes, device="cpu", budget_bytes=budget).chunk == 256


@given(st.integers(1, 10**6), st.integers(1, 2**31), st.sampled_from(["cpu", "cuda"]))
def test_the_buffers_of_a_chunk_stay_within_the_budget(num_classes: int, budget: int, device: str) -> None:
    chunk = chunked.sizes_for(num_classes, device=device, budget_bytes=budget).chunk
    assert chunk == 16 or chunk * num_classes * 4 * chunked.CHUNK_BUFFERS[device] <= budget


def test_a_large_budget_buys_no_more_rows_than_enough_unless_they_are_cheap() -> None:
    assert chunked.sizes_for(128_000, device="cpu", budget_bytes=2**40).chunk == 256
    assert chunked.sizes_for(1_000, device="cpu", budget_bytes=2**40).chunk == 8192


PEAK = """
import sys, torch
from pathlib import Path
from potstill.core.types import Batch, Dense, Lesson, Projection, Signal
from potstill.objective import Objective, term
torch.set_num_threads(1)
rows, path, loss = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(16000, 16, requires_grad=True)
batch = Batch(keys=(), inputs={}, labels=torch.zeros(rows).long(), mask=torch.ones(rows, dtype=torch.bool))
span = torch.tensor([1, 2, 2, 2]).repeat(rows // 4)
words = dict(span=span, span_log_probs=-torch.rand(rows), shared_ids=torch.tensor([[0, 1]]).expand(rows, 2),
             shared_log_probs=-1 - torch.rand(rows, 2), rest_probs=torch.zeros(rows, 8))
teacher = Projection(hidden=torch.randn(rows, 16), weight=torch.randn(16000, 16))
student = Projection(hidden=hidden, weight=weight)
if path == "dense":
    student = Dense(logits=hidden @ weight.T)
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
objective = Objective(term(loss), chunk_bytes=16 * 2**20)
objective(Lesson(student=Signal(logits=student), teacher=Signal(logits=teacher, features=words)), batch).backward()
print((resident("VmHWM") - before) / 1024)
"""


def peak_mib(rows: int, path: str, loss: str) -> float:
    command = [sys.executable, "-c", PEAK, str(rows), path, loss]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("loss", ["forward_kl", "alm", "gold"])
def test_memory_is_flat_in_the_number_of_rows(loss: str) -> None:
    """[2048, 16000] floats are 125 MiB each."""
    small, large = peak_mib(512, "fused", loss), peak_mib(2048, "fused", loss)
    assert large < small + 25 and large < 125


def test_the_dense_path_holds_several_buffers_of_all_rows() -> None:
    assert peak_mib(2048, "dense", "forward_kl") > 2 * 125


def test_nothing_of_the_chunk_outlives_the_loss() -> None:
    gc.collect()
    student, teacher = (
        trainable(projection(64, width=4, num_classes=977, seed=0)),
        projection(64, width=4, num_classes=977, seed=1),
    )
    loss = Objective(term("forward_kl"))(lesson(student, teacher), batch(torch.zeros(64)))
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (64, 977)]
    assert not alive and loss.requires_grad


def test_sampled_targets_are_unbiased_for_forward_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 6, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    objective = Objective(term("forward_kl"))
    objective(lesson(Dense(logits=student), Dense(logits=teacher)), batch(torch.zeros(1))).backward()
    assert student.grad is not None
    exact, draws = student.grad.clone(), 4000
    counts = torch.multinomial(teacher.softmax(-1)[0], draws, replacement=True, generator=generator).bincount(
        minlength=6
    )
    sampled = Sparse(ids=torch.arange(6)[None], log_probs=(counts.double() / draws).log()[None], size=6, kind="sampled")
    student.grad = None
    objective(lesson(Dense(logits=student), sampled), batch(torch.zeros(1))).backward()
    assert student.grad is not None
    assert (student.grad - exact).abs().max() < 0.02


def test_head_fields_survive_row_selection() -> None:
    head = projection(4, width=2, num_classes=3, seed=0, scale=0.5, softcap=3.0)
    from potstill.objective.representations import rows

    kept = rows(head, slice(1, 3))
    assert isinstance(kept, Projection)
    assert replace(kept, hidden=head.hidden) == head
