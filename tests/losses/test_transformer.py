"""Losses inside a transformer layer, against METHODS_CLASSIC B11 to B13, P4 and METHODS_LLM C5."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import transformer as tr

TEACHER = torch.tensor([[[1.0, 0, 1], [0, 1, 0], [1, 1, 0]]]).double()
STUDENT = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]]).double()
"""METHODS_LLM C5: three tokens, widths 3 and 2."""

Q_TEACHER = torch.tensor([[[1.0, 0, 0, 1], [0, 1, 1, 0]]]).double()
Q_STUDENT = torch.tensor([[[1.0, 1], [0, 1]]]).double()
"""METHODS_CLASSIC B13: two tokens, two relation heads."""

ALL = torch.ones(1, 3, dtype=torch.bool)


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("causal", "golden"), [(True, 0.001338), (False, 0.013235)])
def test_relations_meet_the_published_values(causal: bool, golden: float) -> None:
    assert tr.relation_kl(STUDENT, TEACHER, ALL, causal=causal).item() == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize(("row", "golden"), [(1, 0.0), (2, 0.001914), (3, 0.002101)])
def test_causal_relations_meet_the_published_rows(row: int, golden: float) -> None:
    # The mean over the first rows, times their number, grows by the next row alone: later tokens are not seen.
    def total(rows: int) -> float:
        return rows * tr.relation_kl(STUDENT[:, :rows], TEACHER[:, :rows], ALL[:, :rows], causal=True).item()

    assert total(row) - (total(row - 1) if row > 1 else 0.0) == pytest.approx(golden, abs=2e-6)


def test_relations_split_into_heads_anew_meet_the_published_value() -> None:
    found = tr.relation_kl(Q_STUDENT, Q_TEACHER, torch.ones(1, 2, dtype=torch.bool), heads=2)
    assert found.item() == pytest.approx(0.046388, abs=2e-6)


def test_the_value_relation_of_unit_vectors_meets_the_published_rows() -> None:
    # B12: V = I_2 with d_k = 2 has the row [.669762, .330238] and its mirror; against even rows KL = ln 2 - H.
    values, flat = torch.eye(2).double()[None], torch.zeros(1, 2, 2).double()
    entropy = -sum(p * math.log(p) for p in (0.669762, 0.330238))
    found = tr.relation_kl(flat, values, torch.ones(1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(math.log(2) - entropy, abs=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_relations_by_hand(causal: bool) -> None:
    student, teacher = drawn(1, 5, 6), drawn(1, 5, 8, seed=4)
    expected = 0.0
    for head in range(2):
        laws = []
        for x, width in ((student, 3), (teacher, 4)):
            part = x[0, :, head * width : (head + 1) * width]
            scores = part @ part.T / math.sqrt(width)
            laws.append([scores[i, : i + 1 if causal else None].softmax(-1) for i in range(5)])
        expected += sum(float((t * (t / s).log()).sum()) for s, t in zip(*laws, strict=True))
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert tr.relation_kl(student, teacher, mask, heads=2, causal=causal).item() == pytest.approx(expected / 10)


def test_packed_segments_do_not_relate_to_each_other() -> None:
    student, teacher = drawn(1, 7, 4), drawn(1, 7, 4, seed=4)
    packed = tr.relation_kl(student, teacher, torch.tensor([[1, 1, 1, 2, 2, 2, 0]]), heads=2)
    alone = [
        tr.relation_kl(student[:, part], teacher[:, part], torch.ones(1, 3, dtype=torch.bool), heads=2)
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(packed, torch.stack(alone).mean(0))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"relation_kl\.heads: found 4, but the student's width is 6"):
        tr.relation_kl(drawn(1, 3, 6), drawn(1, 3, 8), ALL, heads=4)


def test_attention_kl_is_the_mean_over_heads_and_counted_tokens() -> None:
    student, teacher = drawn(2, 3, 4, 4).softmax(-1), drawn(2, 3, 4, 4, seed=4).softmax(-1)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    each = F.kl_div(student.log(), teacher, reduction="none").sum(-1).mean(1)
    expected = torch.stack([each[0].mean(), each[1, :2].mean()])
    torch.testing.assert_close(tr.attention_kl(student, teacher, mask), expected)


def test_attention_that_rounded_to_zero_stays_finite() -> None:
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]])
    value = tr.attention_kl(student, teacher, torch.ones(1, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite() and gradient.isfinite().all()


def test_attention_of_another_number_of_heads_is_refused_with_a_way_out() -> None:
    with pytest.raises(SignalError, match=r"attention_kl: .*\[1, 2, 3, 3\].*\[1, 4, 3, 3\].*relation_kl"):
        tr.attention_kl(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3), ALL)


def test_attention_scores_meet_the_published_value() -> None:
    student = torch.tensor([[[[1.0, 2], [0, -10000]]]]).double()
    teacher = torch.tensor([[[[0.0, 2], [1, -10000]]]]).double()
    assert tr.attention_scores(student, teacher, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(0.5)


def test_a_banned_score_is_a_zero_on_its_own_side_only() -> None:
    student, teacher = torch.tensor([[[[3.0]]]]), torch.tensor([[[[-10000.0]]]])
    assert tr.attention_scores(student, teacher, torch.ones(1, 1, dtype=torch.bool)).item() == pytest.approx(9.0)


def test_scores_from_queries_and_keys_are_the_scores() -> None:
    # Widths 6 and 4, two heads of 3 and 2.
    queries = drawn(2, 5, 6), drawn(2, 5, 4, seed=4)
    keys = drawn(2, 5, 6, seed=5), drawn(2, 5, 4, seed=6)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])

    def scores(side: int) -> Tensor:
        width = queries[side].shape[-1] // 2
        heads = [slice(0, width), slice(width, None)]
        return torch.stack([queries[side][..., h] @ keys[side][..., h].mT / math.sqrt(width) for h in heads], 1)

    found = tr.query_key_scores((queries[0], keys[0]), (queries[1], keys[1]), mask, heads=2)
    torch.testing.assert_close(found, tr.attention_scores(scores(0), scores(1), mask))


def test_queries_and_keys_of_several_layers_are_summed() -> None:
    student, teacher = [drawn(1, 3, 4, seed=s) for s in range(4)], [drawn(1, 3, 4, seed=s) for s in range(4, 8)]
    both = tr.query_key_scores(tuple(student), tuple(teacher), ALL, heads=2)
    parts = [tr.query_key_scores(tuple(student[k:][:2]), tuple(teacher[k:][:2]), ALL, heads=2) for k in (0, 2)]
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_queries_without_keys_are_refused() -> None:
    with pytest.raises(RecipeError, match="query_key_scores: 'at' names 1 layers, expected pairs"):
        tr.query_key_scores((drawn(1, 3, 4),), (drawn(1, 3, 4),), ALL)
