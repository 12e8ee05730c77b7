"""Losses between models of different tokenizers. A teacher behind `teachers.aligned` says what they read.

Where student and teacher stand behind the same bytes, their next tokens are compared; where several tokens of the one
spell what tokens of the other spell, their joint probability is. What stands at a position is about the token that the
position predicts, so nothing is shifted here. Positions without a counterpart give 0, and count: a mean over positions
then means the same in every batch.

Dimension key: N positions, S spans, V student classes, K listed tokens, R ranks. p is the teacher's law, q the
student's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.types import PerItem
from potstill.losses.coarse import coarsened, unpadded, with_tail
from potstill.losses.divergence import forward_kl, generalised_jsd
from potstill.losses.logits import full_precision, log_probs, probs
from potstill.losses.spans import BEGINS, at_begin, label_log_probs, log1mexp, span_sums

EPSILON = 1e-6
"""What ALM takes off a log-probability: certainty, whose opposite has no logarithm, is held this far off (tokenkit)."""


@part("loss", paper="Boizard et al. 2024")
def uld(student_logits: Tensor, teacher_sorted_probs: Tensor, /) -> PerItem:
    """sum_r |sort(q)_r - sort(p)_r|, both descending (universal logit distillation). [N, V], [N, R] -> [N]

    The cost of turning one law into the other where all moves cost 1, whatever the tokens are called: it says how sure
    to be, not of what. Add it to other terms, with a weight of at most 0.1. Compared are the R largest.
    """
    values = _ranked_distance(probs(student_logits, 1.0), teacher_sorted_probs)
    return torch.where(teacher_sorted_probs[..., 0] > 0, values, 0.0)


@part("loss", paper="Wan et al. 2024")
def mined(
    student_logits: Tensor,
    teacher_nearest_ids: Tensor,
    teacher_nearest_log_probs: Tensor,
    /,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = False,
) -> PerItem:
    """KL(p || q) where p's tokens are replaced by the student's nearest in edit distance (MinED). [N, V], [N, K] -> [N]

    Both laws keep the listed tokens and one tail for all others. Only positions that predict one token on both sides
    have a lesson.
    """
    student, teacher = coarsened(
        full_precision(student_logits), teacher_nearest_ids, teacher_nearest_log_probs.detach()
    )
    return forward_kl(student, teacher, temperature=temperature, scale_by_t2=scale_by_t2)


@part("loss", paper="Minixhofer et al. 2025")
def alm(
    student_logits: Tensor,
    labels: Tensor,
    teacher_span: Tensor,
    teacher_span_log_probs: Tensor,
    /,
    *,
    temperature: float = 100.0,
) -> PerItem:
    """T KL(coin of p(span)^(1/T) || coin of q(span)^(1/T)), where a span begins (approximate likelihood matching).

    p(span) and q(span) are products over the tokens of each side, so any two tokenizations can be compared. For a large
    T and a = log p(span), b = log q(span) it tends to (a - b) + a log(b / a). [N, V], [N], [N], [N] -> [N]
    """
    teacher, student = _span_log_probs(student_logits, labels, teacher_span, teacher_span_log_probs, temperature)
    return at_begin(temperature * _bernoulli_kl(teacher, student), teacher_span).to(_precision(student_logits))


@part("loss", paper="Minixhofer et al. 2025")
def reverse_alm(
    student_logits: Tensor,
    labels: Tensor,
    teacher_span: Tensor,
    teacher_span_log_probs: Tensor,
    /,
    *,
    temperature: float = 100.0,
) -> PerItem:
    """ALM in the other direction: T KL(coin of q(span)^(1/T) || coin of p(span)^(1/T)), for texts of the student.

    [N, V], [N], [N], [N] -> [N]
    """
    teacher, student = _span_log_probs(student_logits, labels, teacher_span, teacher_span_log_probs, temperature)
    return at_begin(temperature * _bernoulli_kl(student, teacher), teacher_span).to(_precision(student_logits))


@part("loss", paper="Patino et al. 2025, GOLD")
def gold(
    student_logits: Tensor,
    labels: Tensor,
    teacher_span: Tensor,
    teacher_shared_ids: Tensor,
    teacher_shared_log_probs: Tensor,
    teacher_rest_probs: Tensor,
    /,
    *,
    beta: float = 0.5,
    rest_weight: float = 0.1,
) -> PerItem:
    """The generalised JSD of what both sides can say where a span begins, and ULD of what only one can. -> [N]

    Both laws are over: the span itself, with the product of its tokens' probabilities; each token of both vocabularies
    that might have stood in its place; one tail for the rest, so that neither is a mass below 1. `beta` weights the
    teacher. The distance of the sorted rests has `rest_weight` (METHODS_LLM E7 advises at most 0.1).

    The published merge is the law of the span's LAST token times the probability of those before, which compares
    tokens that begin at different bytes; here the alternatives are those of the position that begins the span.
    student_logits [N, V], labels and span [N], shared [N, K], rest [N, R].
    """
    _expect(rest_weight >= 0.0, "gold.rest_weight", rest_weight, "a number of at least 0")
    inside, begins = teacher_span > 0, teacher_span == BEGINS
    log_law = log_probs(student_logits[inside], 1.0)
    own = label_log_probs(log_law, labels[inside])
    at = begins[inside]
    span = span_sums(own, teacher_span[inside])
    ids, log_p = teacher_shared_ids[begins].long(), teacher_shared_log_probs[begins].detach().to(span.dtype)
    held = log_p > -torch.inf
    # The span itself is always listed, and first.
    others = log_law[at].scatter(-1, unpadded(ids, held), -torch.inf)
    student = _with_span(log_law[at], own[at], span, ids, held, others)
    values = generalised_jsd(student, with_tail(log_p), beta=beta)
    if rest_weight:
        values = values + rest_weight * _ranked_distance(others.exp(), teacher_rest_probs[begins])
    return at_begin(values, teacher_span)


def _ranked_distance(student_probs: Tensor, teacher_sorted: Tensor) -> Tensor:
    """sum |sorted student - teacher| over the teacher's R ranks: [..., V], [..., R] -> [...]."""
    ranks = teacher_sorted.shape[-1]
    most = min(ranks, student_probs.shape[-1])
    ranked = torch.nn.functional.pad(student_probs.topk(most, dim=-1).values, (0, ranks - most))
    return (ranked - teacher_sorted.detach().to(ranked.dtype)).abs().sum(-1)


def _with_span(log_law: Tensor, own: Tensor, span: Tensor, ids: Tensor, held: Tensor, others: Tensor) -> Tensor:
    """The student's law over the span (in the first place of `ids`), other listed tokens and a tail: [S, K + 1].

    `others` is its law with the listed tokens at -inf. The span's first token may also go on differently than the span
    does: that share of its mass belongs to the tail.
    """
    alternatives = log_law.gather(-1, ids[:, 1:]).masked_fill(~held[:, 1:], -torch.inf)
    unlisted = others.logsumexp(-1)
    goes_on = span - own
    is_longer = goes_on < 0
    otherwise = own + log1mexp(torch.where(is_longer, goes_on, -1.0))
    # A finite stand-in below every mass: logaddexp of two infinities has no gradient.
    tail = torch.where(is_longer, torch.logaddexp(unlisted.clamp(min=-1e4), otherwise.clamp(min=-1e4)), unlisted)
    return torch.cat([span[:, None], alternatives, tail[:, None]], dim=-1)


def _span_log_probs(
    student_logits: Tensor, labels: Tensor, span: Tensor, teacher_span_log_probs: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's log p(span) / T, in float64: [S] each.

    The precision is for 1 - e^x, which at T = 100 has lost two digits; spans are few.
    """
    _expect(temperature > 0.0, "alm.temperature", temperature, "a number above 0")
    inside = span > 0
    own = label_log_probs(log_probs(student_logits[inside], 1.0), labels[inside])
    student = span_sums(own.double(), span[inside])
    teacher = teacher_span_log_probs[span == BEGINS].detach().double()
    return teacher / temperature - EPSILON, student / temperature - EPSILON


def _bernoulli_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of two coins by the log-probabilities of heads, below 0: [S], [S] -> [S]."""
    heads = log_p.exp() * (log_p - log_q)
    tails = -torch.expm1(log_p) * (log1mexp(log_p) - log1mexp(log_q))
    return heads + tails


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _expect(holds: bool, place: str, found: float, expected: str) -> None:
    if not holds:
        raise RecipeError(f"{place}: found {found}, expected {expected}.")
