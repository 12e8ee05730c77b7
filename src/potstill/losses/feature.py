"""Losses that compare one layer's features with another's, one value per example. Nothing here reduces over examples.

Dimension key as in shapes.py. Features are maps [N, C, H, W], tokens [N, T, C] or vectors [N, C]; of two maps the
larger is average-pooled to the smaller. All compute in float32 (float64 stays).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.types import PerExample, PerItem
from potstill.losses.shapes import embeddings, positions, product, same_grid, same_shape, unit


@part("loss", paper="Romero et al. 2015", head="projector")
def hint(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    """Mean squared difference over channels and positions, as benchmarks train FitNets.

    [N, ...], [N, ...] -> [N]. In one stage its weight is 100. The paper's half sum is `hint_sum`, C H W / 2 times
    this. SignalError if widths differ.
    """
    student, teacher = same_shape(student_feature, teacher_feature, reader="hint")
    return (student - teacher).square().flatten(1).mean(-1)


@part("loss", paper="Romero et al. 2015", head="projector")
def hint_sum(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    """Half the summed squared difference (FitNets, eq. 3).

    [N, ...], [N, ...] -> [N]; it grows with the size of the feature. SignalError if widths differ.
    """
    student, teacher = same_shape(student_feature, teacher_feature, reader="hint_sum")
    return 0.5 * (student - teacher).square().flatten(1).sum(-1)


@part("loss", paper="Girshick 2015", head="projector")
def smooth_l1(student_feature: Tensor, teacher_feature: Tensor, /, *, beta: float = 1.0) -> PerItem:
    """Huber loss over `beta` of features standardised at each position over their channels, mean over both.

    [N, ...], [N, ...] -> [N]. Standardising (a layer norm without parameters, epsilon 1e-5) keeps the few huge
    channels of language models from being all that is fitted. SignalError if widths differ.
    """
    student, teacher = map(positions, same_shape(student_feature, teacher_feature, reader="smooth_l1"))
    width = student.shape[-1:]
    each = F.smooth_l1_loss(F.layer_norm(student, width), F.layer_norm(teacher, width), beta=beta, reduction="none")
    return each.flatten(1).mean(-1)


@part("loss", head="projector")
def hidden_mse(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    """`hint` of features standardised at each position over their channels: for the hidden states of transformers.

    [N, ...], [N, ...] -> [N], mean over channels and positions. Without standardising (a layer norm without parameters,
    epsilon 1e-5) the few channels that language models drive to a thousand times the rest are all that is fitted.
    SignalError if widths differ.
    """
    student, teacher = map(positions, same_shape(student_feature, teacher_feature, reader="hidden_mse"))
    width = student.shape[-1:]
    return (F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().flatten(1).mean(-1)


@part("loss", paper="Sanh et al. 2019", head="projector")
def cosine(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    """1 - cosine over the channels, mean over positions.

    [N, ...], [N, ...] -> [N]. As half the squared distance of the unit vectors, which is exact near 0 and never
    below it; a zero vector is at 1/2 from any direction and at 0 from another zero vector. SignalError if widths
    differ.
    """
    student, teacher = map(positions, same_shape(student_feature, teacher_feature, reader="cosine"))
    return 0.5 * (unit(student) - unit(teacher)).square().sum(-1).mean(-1)


@part("loss", paper="Ahn et al. 2019", head="variational", zero_at_equality=False)
def vid(student_feature: Tensor, student_variance: Tensor, teacher_feature: Tensor, /) -> PerItem:
    """-log N(t; mu, variance) without its constant: mean of (log variance + (t - mu)^2 / variance) / 2.

    `student_feature` is the mean mu [N, C, ...], `student_variance` one positive number per channel, [C] or
    [C, 1, 1]. -> [N], over channels and positions; below 0 where the variance is small, as a density may be. The
    paper sums instead: the weight 1 is for this mean. SignalError if widths differ.
    """
    mean, teacher = map(positions, same_shape(student_feature, teacher_feature, reader="vid"))
    variance = student_variance.to(mean.dtype).flatten()
    return 0.5 * (variance.log() + (teacher - mean).square() / variance).flatten(1).mean(-1)


@part("loss", paper="Huang & Wang 2017")
def nst(student_feature: Tensor, teacher_feature: Tensor, /, *, degree: int = 2, offset: float = 0.0) -> PerItem:
    """Squared MMD between the channels' unit maps under (x . y + offset)^degree (neuron selectivity).

    [N, C_s, ...], [N, C_t, ...] -> [N]; widths may differ. Degree 1 is the linear kernel. The teacher's own term
    stays, so that equality gives 0. The usual weight is 50; the paper halves it. SignalError without positions,
    RecipeError for a degree that is no whole number from 1 on.
    """
    if degree < 1 or degree != int(degree):
        raise RecipeError(f"nst.degree: found {degree}, expected a whole number from 1 on; the paper's is 2.")
    rows = same_grid(student_feature, teacher_feature, reader="nst")
    student, teacher = (unit(x.mT) for x in rows)

    def alike(one: Tensor, other: Tensor) -> Tensor:
        """The kernel's mean over all pairs of channels. A matrix product: no [C, C, P] is ever made."""
        return (product(one, other.mT) + offset).pow(degree).mean((1, 2))

    return alike(teacher, teacher) + alike(student, student) - 2.0 * alike(student, teacher)


@part("loss", paper="Kornblith et al. 2019", min_examples=3)
def cka(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    """1 - linear CKA, which is the cosine between the Gram matrices of the centred examples.

    Each example is one vector; for the tokens inside each example see token_cka.
    [B, ...], [B, ...] -> [B], whose mean is the published scalar: half the squared distance of the two directions, of
    which each example has its row. Widths may differ; rotation, scale and offset of either side change nothing. Two
    examples are always perfectly aligned, hence three at least.
    """
    student, teacher = (_gram_direction(x) for x in embeddings(student_feature, teacher_feature))
    return 0.5 * len(student) * (student - teacher).square().sum(-1)


def _gram_direction(vectors: Tensor) -> Tensor:
    """Gram matrix of the centred rows, scaled to Frobenius norm 1: [B, D] -> [B, B]."""
    # From the first row first: identical rows then centre to exactly zero, not to rounding errors.
    moved = vectors - vectors[:1]
    # Scaled before the product, whose entries are squares: no overflow, and no tiny value taken for zero.
    centred = _unit_matrix(moved - moved.mean(0))
    return _unit_matrix(product(centred, centred.mT))


def _unit_matrix(matrix: Tensor) -> Tensor:
    return unit(matrix.flatten()).view_as(matrix)
