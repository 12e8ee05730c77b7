"""Losses on relations, against METHODS_CLASSIC C1 to C5, the invariant matrix P1 and fixtures P4."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import relation as r

from .test_feature import MAP_S, MAP_T, drawn, rotation

Loss = Callable[..., Tensor]

TRIANGLE_S = torch.tensor([[0.0, 0], [1, 0], [0, 1]]).double()
TRIANGLE_T = torch.tensor([[0.0, 0], [2, 0], [0, 1]]).double()
PAIR_S = torch.tensor([[1.0, 0], [1, 1]]).double()
PAIR_T = torch.eye(2).double()


def over(*losses: Loss) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.__name__)


RKD = (r.rkd_distance, r.rkd_angle, r.rkd)
OVER_EXAMPLES = (*RKD, r.sp, r.cc, r.cc_bilinear, r.pkt)


def relative_distances(vectors: Tensor) -> Tensor:
    distances = (vectors[:, None] - vectors[None]).square().sum(-1).sqrt()
    return distances / distances[distances > 0].mean()


@pytest.mark.parametrize(("loss", "golden"), [(r.rkd_distance, 0.018484), (r.rkd_angle, 0.003801), (r.rkd, 0.652173)])
def test_the_mean_of_rkd_meets_the_published_value(loss: Loss, golden: float) -> None:
    assert loss(TRIANGLE_S, TRIANGLE_T).mean().item() == pytest.approx(golden, abs=4e-6)


def test_rkd_takes_the_weights_of_its_parts() -> None:
    parts = r.rkd_distance(TRIANGLE_S, TRIANGLE_T) + 2 * r.rkd_angle(TRIANGLE_S, TRIANGLE_T)
    torch.testing.assert_close(r.rkd(TRIANGLE_S, TRIANGLE_T, distance=1.0, angle=2.0), parts)


def test_the_distances_of_rkd_are_over_the_published_means() -> None:
    # mu_s = 1.138071, mu_t = 1.745356; all gaps are below 1, where Huber's loss is half the square.
    student = torch.cdist(TRIANGLE_S, TRIANGLE_S) / 1.138071
    teacher = torch.cdist(TRIANGLE_T, TRIANGLE_T) / 1.745356
    by_hand = 0.5 * (student - teacher).square().mean(-1)
    torch.testing.assert_close(r.rkd_distance(TRIANGLE_S, TRIANGLE_T), by_hand, atol=2e-6, rtol=0)


def test_the_mean_distance_of_the_student_carries_its_gradient() -> None:
    # A mean held fixed would make a larger student change the loss; a free radius has no slope along itself.
    student, teacher = drawn(5, 3).requires_grad_(), drawn(5, 4, seed=4)
    (gradient,) = torch.autograd.grad(r.rkd_distance(student, teacher).sum(), student)
    assert gradient.abs().max() > 1e-2
    assert (gradient * student).sum().abs() < 1e-12


@over(*RKD)
def test_rkd_does_not_see_rotation_offset_and_scale(loss: Loss) -> None:
    student, teacher = drawn(6, 5), drawn(6, 3, seed=4)
    moved = 7 * student @ rotation(5) + drawn(5, seed=5)
    assert (loss(moved, teacher) - loss(student, teacher)).abs().max() < 1e-12


@over(r.sp)
def test_similarity_does_not_see_rotation_and_scale(loss: Loss) -> None:
    student, teacher = drawn(6, 5), drawn(6, 3, seed=4)
    torch.testing.assert_close(loss(7 * student @ rotation(5), teacher), loss(student, teacher))


@over(r.cc, r.pkt)
def test_cosines_do_not_see_rotation_and_the_scale_of_any_example(loss: Loss) -> None:
    student, teacher = drawn(6, 5), drawn(6, 3, seed=4)
    lengths = drawn(6, 1, seed=5).exp()
    torch.testing.assert_close(loss(lengths * student @ rotation(5), teacher), loss(student, teacher))


def test_the_bilinear_form_sees_scale_but_not_rotation() -> None:
    student, teacher = drawn(6, 5), drawn(6, 3, seed=4)
    torch.testing.assert_close(r.cc_bilinear(student @ rotation(5), teacher), r.cc_bilinear(student, teacher))
    assert (r.cc_bilinear(2 * student, teacher) - r.cc_bilinear(student, teacher)).abs().max() > 1


@over(*OVER_EXAMPLES)
def test_the_mean_does_not_see_the_order_of_the_examples(loss: Loss) -> None:
    student, teacher, order = drawn(5, 4), drawn(5, 3, seed=4), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher)[order])


@over(*OVER_EXAMPLES)
def test_maps_are_vectors_of_all_their_entries(loss: Loss) -> None:
    student, teacher = drawn(5, 2, 3, 4), drawn(5, 3, 2, 2, seed=4)
    torch.testing.assert_close(loss(student, teacher), loss(student.flatten(1), teacher.flatten(1)))


@over(r.rkd_distance, r.rkd_angle)
def test_rkd_of_a_doubled_batch_is_that_of_the_batch(loss: Loss) -> None:
    # Copies are at distance exactly 0, so they stay out of the mean distance.
    student, teacher = drawn(4, 3), drawn(4, 3, seed=4)
    doubled = loss(student.repeat(2, 1), teacher.repeat(2, 1)).mean()
    torch.testing.assert_close(doubled, loss(student, teacher).mean())


def test_sp_of_a_doubled_batch_is_half() -> None:
    student, teacher = drawn(4, 3), drawn(4, 3, seed=4)
    doubled = r.sp(student.repeat(2, 1), teacher.repeat(2, 1)).mean()
    torch.testing.assert_close(doubled, r.sp(student, teacher).mean() / 2)


@over(*RKD)
def test_examples_that_coincide_in_the_student_alone_have_a_tame_gradient(loss: Loss) -> None:
    student, teacher = drawn(5, 3), drawn(5, 3, seed=4)
    student[1] = student[0]
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher).sum(), student)
    assert gradient.abs().max() < 100


def test_rkd_takes_float32_rows_that_are_far_from_the_origin() -> None:
    student, teacher = drawn(5, 3), drawn(5, 4, seed=4)
    far = (student.float() + 1000).double()  # What float32 can tell of it.
    torch.testing.assert_close(r.rkd(far.float(), teacher.float()).double(), r.rkd(far, teacher), rtol=1e-3, atol=1e-4)


def test_the_angles_of_rkd_are_those_at_each_vertex() -> None:
    student, teacher = drawn(4, 3), drawn(4, 2, seed=4)

    def cosine(vectors: Tensor, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        one, other = vectors[j] - vectors[i], vectors[k] - vectors[i]
        return (one @ other / (one.norm() * other.norm())).item()

    def huber(gap: float) -> float:
        return 0.5 * gap**2 if abs(gap) < 1 else abs(gap) - 0.5

    values = [
        sum(huber(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for j in range(4) for k in range(4)) / 16
        for i in range(4)
    ]
    torch.testing.assert_close(r.rkd_angle(student, teacher), torch.tensor(values).double())


class Largest(TorchDispatchMode):
    """Records the most entries that any tensor made inside had."""

    def __init__(self) -> None:
        super().__init__()
        self.num_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, (tuple, list)) else (made,)
        self.num_entries = max(self.num_entries, *(t.numel() for t in tensors if isinstance(t, Tensor)), 0)
        return made


def test_the_angles_of_rkd_never_make_a_difference_for_every_triple() -> None:
    student, teacher = drawn(8, 64).requires_grad_(), drawn(8, 64, seed=4)
    with Largest() as largest:
        r.rkd_angle(student, teacher).sum().backward()
    assert 8 * 8 * 64 <= largest.num_entries < 2 * 8 * 8 * 64


def test_the_distances_of_rkd_never_make_a_difference_for_every_pair() -> None:
    student, teacher = drawn(8, 64).requires_grad_(), drawn(8, 64, seed=4)
    with Largest() as largest:
        r.rkd_distance(student, teacher).sum().backward()
    assert 0 < largest.num_entries <= 8 * 64


def test_the_mean_of_sp_meets_the_published_value() -> None:
    assert r.sp(PAIR_S, PAIR_T).mean().item() == pytest.approx(0.199233, abs=2e-6)


def test_the_mean_of_cc_meets_the_published_value() -> None:
    assert r.cc(PAIR_S, PAIR_T).mean().item() == pytest.approx(0.053161, abs=2e-6)


@pytest.mark.parametrize(("order", "golden"), [(2, 0.952577 - 0.775400), (30, 1 - 0.791113)])
def test_the_kernel_of_cc_meets_the_published_entries(order: int, golden: float) -> None:
    # Two equal examples against two at 45 degrees: only the off-diagonal differs, by diagonal minus off-diagonal.
    same = torch.tensor([[1.0, 0], [1, 0]]).double()
    gap = r.cc(PAIR_S, same, order=order).mul(2).sqrt()
    torch.testing.assert_close(gap, torch.full((2,), golden).double(), atol=3e-6, rtol=0)


def test_the_kernel_of_cc_becomes_the_gaussian() -> None:
    student, teacher = (x / x.norm(dim=-1, keepdim=True) for x in (drawn(5, 3), drawn(5, 4, seed=4)))
    gap = (-0.7 * torch.cdist(student, student) ** 2).exp() - (-0.7 * torch.cdist(teacher, teacher) ** 2).exp()
    torch.testing.assert_close(r.cc(student, teacher, gamma=0.7, order=30), gap.square().mean(-1))


def test_an_order_of_cc_without_cosines_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"cc\.order: found 0"):
        r.cc(PAIR_S, PAIR_T, order=0)


def test_the_bilinear_form_is_the_squared_distance_of_gram_matrices() -> None:
    # [[1, 1], [1, 2]] against the identity: 1 + 1 + 1 over 4 entries, 1 and 2 over each row's 2.
    torch.testing.assert_close(r.cc_bilinear(PAIR_S, PAIR_T), torch.tensor([0.5, 1.0]).double())


def test_pkt_meets_the_published_mean_and_sum() -> None:
    values = r.pkt(PAIR_S, PAIR_T)
    assert values.mean().item() == pytest.approx(0.016686, abs=2e-6)
    assert 4 * values.mean().item() == pytest.approx(0.066746, abs=2e-6)


def test_pkt_of_opposite_examples_is_finite_and_right() -> None:
    student = torch.tensor([[1.0, 0], [-1, 0]]).double().requires_grad_()
    values = r.pkt(student, PAIR_T)
    # p = (2/3, 1/3) for the teacher, (1, 0) for the student; over 2 entries.
    by_hand = (2 / 3 * math.log(2 / 3) + 1 / 3 * math.log((1 / 3) / 1e-7)) / 2
    torch.testing.assert_close(values, torch.full((2,), by_hand).double(), atol=1e-6, rtol=0)
    assert torch.autograd.grad(values.sum(), student)[0].isfinite().all()


def test_pkt_survives_cosines_that_rounding_takes_below_minus_one() -> None:
    for seed in range(50):
        one = drawn(1, 64, seed=seed).float()
        assert r.pkt(torch.cat((one, -one)), drawn(2, 3).float()).isfinite().all()


def test_the_flow_meets_the_published_gram_matrix() -> None:
    # Against layers of zeros the loss is the squared Frobenius norm of G = [[.75, 1.25], [.75, .75]].
    nothing = torch.zeros(1, 2, 2, 2).double()
    value = r.fsp((MAP_S, MAP_T), (nothing, nothing))
    assert value.item() == pytest.approx(3 * 0.75**2 + 1.25**2)


def test_the_flow_has_the_published_entries() -> None:
    # Where the teacher's first layer is 0 but for one channel, G_t is one row; what is left shows G_s row by row.
    first = MAP_S.clone()
    first[:, 1] = 0
    value = r.fsp((MAP_S, MAP_T), (first, MAP_T))
    assert value.item() == pytest.approx(0.75**2 + 0.75**2)


def test_the_flow_is_bilinear() -> None:
    one, other = drawn(3, 2, 4, 4), drawn(3, 5, 4, 4, seed=4)
    nothing = (torch.zeros_like(one), torch.zeros_like(other))
    torch.testing.assert_close(r.fsp((3 * one, other), nothing), 9 * r.fsp((one, other), nothing))


def test_the_flow_does_not_see_both_layers_change_sign() -> None:
    student, teacher = (drawn(3, 2, 4, 4), drawn(3, 5, 4, 4)), (drawn(3, 2, 4, 4, seed=4), drawn(3, 5, 4, 4, seed=5))
    torch.testing.assert_close(r.fsp((-student[0], -student[1]), teacher), r.fsp(student, teacher))


def test_the_flow_goes_from_each_layer_to_the_next() -> None:
    student = tuple(drawn(3, c, 4, 4, seed=c) for c in (2, 5, 3))
    teacher = tuple(drawn(3, c, 4, 4, seed=10 + c) for c in (2, 5, 3))
    pairs = r.fsp(student[:2], teacher[:2]) + r.fsp(student[1:], teacher[1:])
    torch.testing.assert_close(r.fsp(student, teacher), pairs)


def test_the_larger_map_of_a_flow_is_max_pooled() -> None:
    large = torch.tensor([[[[1.0, 5, 0, 2], [3, 0, 7, 0]]]])
    pooled, other = torch.tensor([[[[5.0, 7]]]]), torch.tensor([[[[1.0, 2]]]])
    nothing = (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert r.fsp((large, other), nothing).item() == pytest.approx(((5 * 1 + 7 * 2) / 2) ** 2)
    torch.testing.assert_close(r.fsp((other, large), nothing), r.fsp((other, pooled), nothing))


def test_student_and_teacher_may_flow_through_maps_of_other_sizes() -> None:
    fine = drawn(3, 2, 2, 2), drawn(3, 5, 2, 2, seed=4)
    coarse = tuple(x.repeat_interleave(2, 2).repeat_interleave(3, 3) for x in fine)
    assert r.fsp(coarse, fine).abs().max() < 1e-12


def test_a_flow_of_other_channels_is_refused_with_both_shapes() -> None:
    student, teacher = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
    with pytest.raises(SignalError, match=r"fsp: .*\[2, 3, 4, 4\].*\[2, 6, 4, 4\]"):
        r.fsp((student, student), (student, teacher))


def test_a_flow_needs_two_layers() -> None:
    with pytest.raises(RecipeError, match="fsp: 'at' names 1 layer"):
        r.fsp((MAP_S,), (MAP_T,))


def test_a_flow_between_other_numbers_of_tokens_is_refused() -> None:
    layers = torch.zeros(2, 16, 3), torch.zeros(2, 4, 3)
    with pytest.raises(SignalError, match=r"fsp: .*\[2, 16, 3\].*\[2, 4, 3\].*positions"):
        r.fsp(layers, layers)
