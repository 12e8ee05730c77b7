"""Losses on answers with labels, and published recipes on logits. Nothing here reduces over what is counted.

Dimension key: B examples, N counted items, C classes, D regressed numbers; "..." any leading dimensions.
All compute in float32 (float64 stays). p is the teacher's law, q the student's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.types import IGNORED, PerExample, PerItem
from potstill.losses.divergence import forward_kl
from potstill.losses.draws import kd_of_draws, soft_cross_entropy_of_draws
from potstill.losses.logits import (
    IMPOSSIBLE,
    frozen,
    full_precision,
    log_probs,
    one_row_per_example,
    probs,
    standardise,
    teacher_log_probs,
    tempered,
    with_gradient,
)


@part("loss", distribution=True, zero_at_equality=False)
def cross_entropy(student_logits: Tensor, labels: Tensor, /, *, smoothing: float = 0.0) -> PerItem:
    """-log q of the label, [..., C], [...] -> [...]; 0 where the label is IGNORED. IndexError for a label beyond C.

    `smoothing` puts smoothing / C on every class, the label's too (Szegedy et al. 2016). The other convention,
    e / (C - 1) on the wrong classes only, is smoothing = e C / (C - 1).
    """
    flat = F.cross_entropy(
        full_precision(student_logits).reshape(-1, student_logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="none",
    )
    return flat.view(labels.shape)


@part("loss", paper="Hinton et al. 2015", distribution=True, linear_in_teacher=True, of_draws=kd_of_draws)
def kd(student_logits: Tensor, teacher_logits: Tensor, /, *, temperature: float = 4.0) -> PerItem:
    """T^2 KL(p || q) at the temperature most image papers use: forward_kl under its first name."""
    return forward_kl(student_logits, teacher_logits, temperature=temperature)


@part(
    "loss",
    paper="Hinton et al. 2015",
    distribution=True,
    linear_in_teacher=True,
    zero_at_equality=False,
    of_draws=soft_cross_entropy_of_draws,
)
def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, /, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> PerItem:
    """-sum p log q, times temperature squared: forward_kl plus the teacher's entropy, same gradient. -> [...]"""
    with torch.no_grad():
        log_q = log_probs(student_logits, temperature)
        p = teacher_log_probs(teacher_logits, temperature).exp_()
        value = -(p * log_q).sum(-1)
        slope = log_q.exp_().sub_(p)
    return with_gradient(student_logits, value, slope, temperature=temperature, scale_by_t2=scale_by_t2)


@part("loss", paper="Shing et al. 2025", distribution=True)
def taid(student_logits: Tensor, teacher_logits: Tensor, /, *, mix: float = 0.4) -> PerItem:
    """KL(p_mix || q), p_mix = softmax((1 - mix) z_s + mix z_t), the student in it a constant (TAID). -> [...]

    At mix 1 it is forward_kl. The method lets `mix` grow by the schedule taid_schedule; 0.4 is where that starts.
    RecipeError for a mix outside 0..1.
    """
    if not 0.0 <= mix <= 1.0:
        raise RecipeError(f"taid.mix: found {mix}, expected the teacher's share, from 0 to 1.")
    if mix == 1.0:
        # Otherwise 0 times a student's -inf would be no number.
        return forward_kl(student_logits, teacher_logits)
    student, teacher = full_precision(student_logits.detach()), frozen(teacher_logits)
    between = (1.0 - mix) * student + mix * teacher if mix else student
    return forward_kl(student_logits, between)


# Not marked distribution: it needs the label's own class, which a sparse teacher may have put in its tail.
@part("loss", paper="Zhao et al. 2022")
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    /,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> PerItem:
    """T^2 (alpha TCKD + beta NCKD): label against the rest, and the rest among itself (DKD). -> [...]

    KL(p || q) = TCKD + (1 - p_label) NCKD, so alpha = beta = 1 is not plain KD.
    """
    student_split, student_rest = _split_at(log_probs(student_logits, temperature), labels)
    teacher_split, teacher_rest = _split_at(teacher_log_probs(teacher_logits, temperature), labels)
    target = forward_kl(student_split, teacher_split)
    non_target = forward_kl(student_rest, teacher_rest)
    return temperature**2 * (alpha * target + beta * non_target)


@part("loss", paper="Huang et al. 2022", min_examples=2)
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    /,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> PerExample:
    """T^2 (inter (1 - corr over classes) + intra (1 - mean corr over examples)) of probabilities (DIST).

    [B, C] -> [B]: each example has its own inter part; the intra part belongs to the batch and is shared, so
    the mean is the published scalar.
    """
    one_row_per_example(student_logits, reader="dist")
    q, p = probs(student_logits, temperature), probs(frozen(teacher_logits), temperature)
    inter_class = 1.0 - _correlation(q, p, dim=1)
    intra_class = 1.0 - _correlation(q, p, dim=0).mean()
    return temperature**2 * (inter * inter_class + intra * intra_class)


@part("loss", paper="Sun et al. 2024")
def lskd(student_logits: Tensor, teacher_logits: Tensor, /, *, temperature: float = 2.0, ddof: int = 1) -> PerItem:
    """T^2 KL(p || q) of logits standardised per row (logit standardisation): [..., C] -> [...].

    ddof 1 divides by C - 1 as the published code does, 0 by C as the paper writes.
    """
    student = standardise(full_precision(student_logits), ddof=ddof)
    return forward_kl(student, standardise(frozen(teacher_logits), ddof=ddof), temperature=temperature)


@part("loss", paper="Ba & Caruana 2014", raw=True)
def logit_mse(student_logits: Tensor, teacher_logits: Tensor, /) -> PerItem:
    """Mean over classes of (z_s - z_t)^2, [..., C] -> [...]. The paper's halved sum is C / 2 times that.

    Classes that either side puts at -inf are left out.
    """
    gap, num_classes = _logit_gap(student_logits, teacher_logits)
    return gap.square().sum(-1) / num_classes


@part("loss", paper="Ba & Caruana 2014")
def centred_logit_mse(student_logits: Tensor, teacher_logits: Tensor, /) -> PerItem:
    """`logit_mse` of logits minus their row mean: half of it is forward_kl in the limit of high temperature."""
    gap, num_classes = _logit_gap(student_logits, teacher_logits)
    # The variance as sum of squares about the mean; classes left out have gap 0 and must stay out.
    mean = gap.sum(-1, keepdim=True) / num_classes.unsqueeze(-1)
    return (gap - mean).masked_fill(_left_out(student_logits, teacher_logits), 0.0).square().sum(-1) / num_classes


@part("loss", paper="Li & Hoiem 2016", raw=True)
def binary_kd(student_logits: Tensor, teacher_logits: Tensor, /, *, temperature: float = 2.0) -> PerItem:
    """T^2 sum over classes of the Bernoulli KL between sigmoids, for multi-label data: [..., C] -> [...].

    Published means over classes are this over C: take the weight C times smaller to match.
    """
    student = _all_finite(tempered(student_logits, temperature))
    teacher = _all_finite(tempered(frozen(teacher_logits), temperature))
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (present + absent).sum(-1)


@part("loss", zero_at_equality=False, labels="numbers", raw=True)
def binary_cross_entropy(student_logits: Tensor, labels: Tensor, /) -> PerItem:
    """Sum over classes of the logistic loss against labels in [0, 1], for multi-label data: [..., C] -> [...].

    Entries that are IGNORED or NaN are unknown and add nothing. The mean over classes is this over C.
    """
    unknown = (labels == IGNORED) | labels.isnan()
    logits = _all_finite(full_precision(student_logits))
    targets = labels.to(logits.dtype).masked_fill(unknown, 0.0)
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return each.masked_fill(unknown, 0.0).sum(-1)


@part("loss", paper="Yuan et al. 2020", zero_at_equality=False)
def virtual_teacher(
    student_logits: Tensor, labels: Tensor, /, *, temperature: float = 20.0, confidence: float = 0.99
) -> PerItem:
    """KL(softmax(p_d / T) || q), p_d = `confidence` on the label and the rest shared evenly (Tf-KD reg).

    [..., C], [...] -> [...]. As published, the teacher's softmax is over probabilities, which makes it almost
    flat; the student has no temperature and there is no T^2. The published weight is for the mean over C
    classes: divide it by C.
    """
    others = (1.0 - confidence) / (student_logits.shape[-1] - 1)
    belief = torch.full_like(full_precision(student_logits.detach()), others)
    belief.scatter_(-1, labels.unsqueeze(-1), confidence)
    return forward_kl(student_logits, belief / temperature)


@part("loss", paper="Chen et al. 2017", labels="numbers", raw=True)
def bounded_regression(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /, *, margin: float = 0.0
) -> PerItem:
    """|r_s - r|^2 where it plus `margin` exceeds the teacher's |r_t - r|^2, else 0. [..., D] thrice -> [...].

    The "logits" are the D regressed numbers themselves and the labels their true values: the teacher is only
    a bound that the student should reach.
    """
    student = full_precision(student_logits)
    truth = labels.to(student.dtype)
    student_error = (student - truth).square().sum(-1)
    teacher_error = (frozen(teacher_logits) - truth).square().sum(-1)
    return student_error.masked_fill(student_error.detach() + margin <= teacher_error, 0.0)


def _split_at(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities as logits of "label or not" [..., 2], and of the classes that are not it [..., C]."""
    at = labels.unsqueeze(-1)
    rest = logs.scatter(-1, at, -math.inf)
    # log(1 - p_label) as a sum over the rest: exact also for a student that is sure of the label.
    return torch.cat((logs.gather(-1, at), torch.logsumexp(rest, -1, keepdim=True)), -1), rest


def _correlation(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Pearson correlation along one axis, with 1e-8 added to the denominator (DIST's code): [B, C] -> [B] or [C]."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (lengths + 1e-8)


def _left_out(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return (student_logits == -math.inf) | (teacher_logits == -math.inf)


def _logit_gap(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """z_s - z_t, 0 for the classes left out, and how many are in: [..., C], [...]."""
    left_out = _left_out(student_logits, teacher_logits)
    student = full_precision(student_logits).masked_fill(left_out, 0.0)
    teacher = frozen(teacher_logits).masked_fill(left_out, 0.0)
    return student - teacher, (~left_out).sum(-1).clamp(min=1)


def _all_finite(logits: Tensor) -> Tensor:
    """A class at -inf as one whose sigmoid is exactly 0; NaN stays NaN."""
    finite: Tensor = torch.nan_to_num(logits, nan=math.nan, posinf=math.inf, neginf=IMPOSSIBLE)
    return finite
