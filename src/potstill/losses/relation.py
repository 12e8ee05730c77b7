"""Losses on how the examples of a batch relate to each other, and layers of one network to each other.

Dimension key as in shapes.py. Those over examples take any [B, ...] as B vectors, whose widths may differ between
student and teacher, and return [B] values whose mean is the published scalar. They see the micro-batch only, not
other ranks. All compute in float32 (float64 stays).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import PerExample, PerItem
from potstill.losses.shapes import embeddings, positions, product, readable, to_smaller, unit

LEAST_PROBABILITY = 1e-7
"""Added inside the logarithm of PKT, as published: an opposite neighbour has probability 0."""


@part("loss", paper="Park et al. 2019", min_examples=3)
def rkd(
    student_feature: Tensor, teacher_feature: Tensor, /, *, distance: float = 25.0, angle: float = 50.0
) -> PerExample:
    """distance * rkd_distance + angle * rkd_angle, by default at the weights for classification.

    [B, ...], [B, ...] -> [B]. Metric learning takes 1 and 2.
    """
    by_distance = rkd_distance(student_feature, teacher_feature)
    return distance * by_distance + angle * rkd_angle(student_feature, teacher_feature)


# Two examples have one distance, which over its own mean is always 1: the least batch with a lesson is three.
@part("loss", paper="Park et al. 2019", min_examples=3)
def rkd_distance(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """Huber loss between distances over their mean (RKD-D): [B, ...], [B, ...] -> [B].

    Each network's mean is over its distances above 0 and carries its gradient; the loss is over all B^2 entries,
    the diagonal included. Rotation, offset and scale of either side change nothing.
    """
    student, teacher = (_relative_distances(x) for x in embeddings(student_feature, teacher_feature))
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


@part("loss", paper="Park et al. 2019", min_examples=3)
def rkd_angle(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """Huber loss between the cosines of the angles at each example i of all triples (RKD-A).

    [B, ...], [B, ...] -> [B], over all B^3 entries; a triple that repeats an example has cosine 0, or 1 where both
    arms are the same. Memory is B^2 D + B^3. Rotation, offset and scale of either side change nothing.
    """
    student, teacher = (_angles(x) for x in embeddings(student_feature, teacher_feature))
    return F.smooth_l1_loss(student, teacher, reduction="none").mean((1, 2))


@part("loss", paper="Tung & Mori 2019", min_examples=2)
def sp(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """||G_s - G_t||_F^2 / B^2, G the Gram matrix with its rows at length 1 (similarity preserving).

    [B, ...], [B, ...] -> [B]. The usual weight is 3000. Rotation and scale of either side change nothing.
    """
    student, teacher = (unit(product(x, x.mT)) for x in embeddings(student_feature, teacher_feature))
    return (student - teacher).square().mean(-1)


@part("loss", paper="Peng et al. 2019", min_examples=2)
def cc(student_feature: Tensor, teacher_feature: Tensor, /, *, gamma: float = 0.4, order: int = 2) -> PerExample:
    """||K_s - K_t||_F^2 / B^2, K the Gaussian kernel of unit vectors by Taylor (correlation congruence).

    k(x, y) = sum over p up to `order` of e^(-2 gamma) (2 gamma)^p / p! (x . y)^p. [B, ...], [B, ...] -> [B]. As both
    kernels are [B, B] no head is needed. Benchmarks' weight 0.02 belongs to another formula. RecipeError for an
    order below 1.
    """
    if order < 1:
        raise RecipeError(f"cc.order: found {order}, expected a whole number from 1 on; the paper's is 2.")
    student, teacher = map(unit, embeddings(student_feature, teacher_feature))
    gap = _taylor_kernel(student, gamma, order) - _taylor_kernel(teacher, gamma, order)
    return gap.square().mean(-1)


@part("loss", paper="Peng et al. 2019", min_examples=2)
def cc_bilinear(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """||F_s F_s^T - F_t F_t^T||_F^2 / B^2, features as they are (correlation congruence, bilinear kernel).

    [B, ...], [B, ...] -> [B]. The scale of both sides counts: take layers of like width and like normalisation.
    """
    student, teacher = (product(x, x.mT) for x in embeddings(student_feature, teacher_feature))
    return (student - teacher).square().mean(-1)


@part("loss", paper="Passalis & Tefas 2018", min_examples=2)
def pkt(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """KL between each example's distribution over all, p_j|i ~ (cos_ij + 1) / 2, itself included (PKT).

    [B, ...], [B, ...] -> [B]. The mean over all B^2 entries, as published code has it with weight 30000; the paper's
    sum is B^2 times that. Rotation of either side and scale of any example change nothing.
    """
    student, teacher = map(_neighbours, embeddings(student_feature, teacher_feature))
    log_ratio = (teacher + LEAST_PROBABILITY).log() - (student + LEAST_PROBABILITY).log()
    return (teacher * log_ratio).mean(-1)


@part("loss", paper="Yim et al. 2017")
def fsp(student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], /) -> PerItem:
    """Sum over consecutive layers of ||G_s - G_t||_F^2, G = F_1 F_2^T / (H W) (flow of solution procedure).

    Layers as named by `at`, two at least: [N, C, ...] each -> [N]. Of two maps of one network the larger is
    max-pooled. Student and teacher must have the same channels at each layer (SignalError); their sizes may differ.
    """
    if len(student_features) < 2:
        raise RecipeError(
            f"fsp: 'at' names {len(student_features)} layer, expected two or more: it compares how one layer "
            "becomes the next."
        )
    layers = [_same_channels(s, t) for s, t in zip(student_features, teacher_features, strict=True)]
    student, teacher = (_flows([layer[side] for layer in layers]) for side in (0, 1))
    gaps = [(s - t).square().sum((1, 2)) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(gaps).sum(0)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Euclidean distances over the mean of those above 0: [B, D] -> [B, B]. All 0 where all examples coincide."""
    # Not by way of the Gram matrix: its rounding gives identical rows a distance, and an infinite slope.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.masked_fill(mean == 0, math.inf)


def _angles(vectors: Tensor) -> Tensor:
    """[i, j, k] is the cosine at i between the arms to j and to k: [B, D] -> [B, B, B]."""
    arms = unit(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return product(arms, arms.mT)


def _taylor_kernel(units: Tensor, gamma: float, order: int) -> Tensor:
    """[B, D] -> [B, B]: 1 is approached on the diagonal as `order` grows."""
    cosines = product(units, units.mT)
    terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


def _neighbours(vectors: Tensor) -> Tensor:
    """Rows of probabilities: [B, D] -> [B, B]."""
    units = unit(vectors)
    # Rounding takes the cosine of opposite examples below -1, and a probability below 0.
    likeness = (0.5 * (product(units, units.mT) + 1.0)).clamp(min=0.0)
    return likeness / likeness.sum(-1, keepdim=True)


def _same_channels(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = readable(student_feature, teacher_feature)
    if positions(student).shape[-1] != positions(teacher).shape[-1]:
        raise SignalError(
            f"fsp: found features of shape {list(student.shape)} from the student and {list(teacher.shape)} from the "
            "teacher, expected the same channels: no head can stand here. Choose layers of equal width."
        )
    return student, teacher


def _flows(features: Sequence[Tensor]) -> list[Tensor]:
    """G [N, C_1, C_2] of each two consecutive layers of one network."""
    return [_flow(first, second) for first, second in pairwise(features)]


def _flow(first: Tensor, second: Tensor) -> Tensor:
    if first.ndim == second.ndim == 4:
        first, second = to_smaller(first, second, pool=F.adaptive_max_pool2d)
    one, other = positions(first), positions(second)
    if one.shape[1] != other.shape[1]:
        raise SignalError(
            f"fsp: found consecutive layers of shape {list(first.shape)} and {list(second.shape)} in one network, "
            "expected as many positions in both. Choose maps, which are pooled, or layers with as many tokens."
        )
    return product(one.mT, other) / one.shape[1]
