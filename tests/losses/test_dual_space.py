"""Dual-space distillation against a direct reading of its equations, one example and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from potstill.core.types import IGNORED
from potstill.losses import dual_space
from potstill.losses.dual_space import dskd

B, T, U, D, E, V, W = 2, 5, 4, 3, 2, 6, 7
MAPS = ("to_teacher", "from_teacher")
ORDER = ("queries", "embeddings", "to_teacher", "from_teacher", "states", "head", "their_states", "their_head")
COUNTED = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
THEIRS = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]]).bool()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(B, T, 2 * E), (B, U, E), (E, D), (D, E), (B, T, D), (V, D), (B, U, E), (W, E)]
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(ORDER, shapes, strict=True)
    }
    labels = torch.randint(V, (B, T), generator=generator).masked_fill(~COUNTED, IGNORED)
    theirs = torch.randint(W, (B, U), generator=generator).masked_fill(~THEIRS, IGNORED)
    return {**made, "their_labels": theirs, "labels": labels, "mask": COUNTED}


def apply(given: dict[str, Tensor], **knobs: float) -> Tensor:
    return dskd(*given.values(), **knobs)


def by_hand(given: dict[str, Tensor], temperature: float) -> Tensor:
    """METHODS_LLM E2, example by example and token by token: [N]."""
    values = []
    for b in range(B):
        ours, theirs = COUNTED[b].nonzero().flatten(), (given["their_labels"][b] != IGNORED).nonzero().flatten()
        following = torch.cat([given["embeddings"][b, 1:], torch.zeros(1, E).double()])
        pairs = torch.cat([given["embeddings"][b], following], -1)
        keys = pairs / pairs[theirs].std()
        read = given["their_states"][b] / given["their_states"][b, theirs].std() + following / following[theirs].std()
        scores = torch.stack([torch.stack([given["queries"][b, t] @ keys[u] for u in theirs]) for t in ours])
        scores = scores / math.sqrt(2 * E)
        back = torch.zeros(()).double()
        for column, u in enumerate(theirs):
            weights = scores[:, column].softmax(-1)
            brought = given["their_head"] @ (given["to_teacher"] @ (weights @ given["states"][b, ours]))
            back = back + kl(given["their_head"] @ given["their_states"][b, u], brought, temperature)
        for row, t in enumerate(ours):
            carried = given["head"] @ (given["from_teacher"] @ (scores[row].softmax(-1) @ read[theirs]))
            label = given["labels"][b, t]
            value = back / len(ours) - carried.log_softmax(-1)[label]
            if carried.argmax() == label:
                value = value + kl(carried, given["head"] @ given["states"][b, t], temperature)
            values.append(value)
    return torch.stack(values)


def kl(target: Tensor, other: Tensor, temperature: float) -> Tensor:
    p, log_q = (target / temperature).log_softmax(-1), (other / temperature).log_softmax(-1)
    return (p.exp() * (p - log_q)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_published_sum(temperature: float) -> None:
    given = inputs()
    # One label is what the carried teacher says, so that the middle part takes part.
    expected = by_hand(given, temperature)
    torch.testing.assert_close(apply(given, temperature=temperature), expected)


def test_a_right_answer_of_the_carried_teacher_is_taught_to_the_student() -> None:
    given = inputs()
    reached = []
    for label in range(V):
        given["labels"][0, 1] = label
        torch.testing.assert_close(apply(given), by_hand(given, 2.0))
        leaf = given["states"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(apply({**given, "states": leaf}).sum(), leaf)
        reached.append(gradient[0, 1])
    # Of all labels one is the likeliest: there the student's state learns something else than everywhere.
    distances = [sum(float((one - other).norm() > 1e-9) for other in reached) for one in reached]
    assert sorted(distances) == [1.0] * (V - 1) + [V - 1.0]


def test_the_student_and_the_projections_learn_and_no_head_or_teacher_does() -> None:
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in inputs().items()}
    given["head"] = given["head"].detach()
    given["their_head"] = given["their_head"].detach()
    floats = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    found = torch.autograd.grad(apply(given).sum(), list(floats.values()), allow_unused=True)
    moved = {name for name, gradient in zip(floats, found, strict=True) if gradient is not None and gradient.any()}
    assert moved == {"queries", "to_teacher", "from_teacher", "states"}


def test_the_gradient_of_the_states_is_the_slope_of_the_value() -> None:
    given = inputs()
    states = given["states"].requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: apply({**given, "states": leaf}), states)


def test_what_does_not_count_may_be_no_number() -> None:
    given, broken = inputs(), inputs()
    for name, where in (("queries", ~COUNTED), ("states", ~COUNTED), ("their_states", ~THEIRS)):
        broken[name][where] = math.nan
    leaf = broken["states"].requires_grad_()
    values = apply(broken)
    torch.testing.assert_close(values, apply(given))
    assert torch.autograd.grad(values.sum(), leaf)[0].isfinite().all()


def test_padding_on_either_side_of_the_right_changes_nothing() -> None:
    given = inputs()
    longer = dict(given)
    for name in ("queries", "states", "embeddings", "their_states"):
        longer[name] = torch.nn.functional.pad(given[name], (0, 0, 0, 3))
    for name, fill in (("labels", IGNORED), ("their_labels", IGNORED), ("mask", 0)):
        longer[name] = torch.nn.functional.pad(given[name], (0, 2 if name == "their_labels" else 3), value=fill)
    longer["embeddings"], longer["their_states"] = longer["embeddings"][:, :-1], longer["their_states"][:, :-1]
    torch.testing.assert_close(apply(longer), apply(given))


def test_each_example_is_a_world_of_its_own() -> None:
    given = inputs()
    alone = []
    for row in range(B):
        cut = {name: t if t.shape[0] != B or name in MAPS else t[row : row + 1] for name, t in given.items()}
        alone.append(apply(cut))
    torch.testing.assert_close(torch.cat(alone), apply(given))


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_of_any_size_give_the_same_value_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(size: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(dual_space, "rows_for", lambda num_classes: size)
        given = inputs()
        leaves = [given[name].requires_grad_() for name in ("queries", "states", *MAPS)]
        values = apply(given)
        upstream = torch.arange(1.0, len(values) + 1).double()
        return values, *torch.autograd.grad(values @ upstream, leaves)

    for one, whole in zip(found(chunk), found(10**6), strict=True):
        torch.testing.assert_close(one, whole)


def test_an_example_without_a_counterpart_gives_a_finite_value() -> None:
    given = inputs()
    given["their_labels"][0] = IGNORED
    leaf = given["states"].requires_grad_()
    values = apply(given)
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), leaf)[0].isfinite().all()


def test_half_precision_is_computed_in_full() -> None:
    given = inputs()
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in half.items()}
    values = apply(half)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), apply(exact), rtol=1e-4, atol=1e-5)
