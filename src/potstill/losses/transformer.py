"""Losses on what happens inside a transformer layer: who attends to whom, and how tokens relate. One value per example.

Dimension key: B examples, T tokens, D width, A heads. The mask [B, T] says which tokens count; where it holds the
numbers of packed segments instead, tokens of different ones never meet. Each example is a world of its own, whose value
is the mean over its tokens and heads. All compute in float32 (float64 stays); nothing outside the mask is ever read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import PerExample
from potstill.losses.divergence import forward_kl
from potstill.losses.shapes import product, readable
from potstill.losses.tokens import num_tokens, same_tokens

LEAST_PROBABILITY = 1e-12
"""A student's attention below this counts as this: it may have rounded to 0 where the teacher looks."""

BANNED_SCORE = -1e2
"""Attention scores down to here are an additive mask's, not a measurement (TinyBERT's code)."""


@part("loss", paper="Wang et al. 2020")
def attention_kl(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
    """KL(teacher || student) of each token's attention, mean over heads and counted tokens (MiniLM).

    Attention after its softmax: [B, A, T, T], [B, A, T, T], [B, T] -> [B]. MiniLM adds relation_kl of the values, both
    at the last layer and at weight 1. SignalError if heads or tokens differ: relation_kl has no such condition.
    """
    q, p = _same_maps(student_feature, teacher_feature, mask, reader="attention_kl")
    unread = (mask == 0)[:, None, :, None]
    q, p = q.masked_fill(unread, 0.0), p.masked_fill(unread, 0.0)
    log_ratio = p.clamp(min=LEAST_PROBABILITY).log() - q.clamp(min=LEAST_PROBABILITY).log()
    # sum(q - p) is 0, both being laws; with it every summand is above 0, and its gradient 0 at the teacher.
    each = (p * log_ratio + q - p).sum(-1).mean(1)
    return each.sum(-1) / num_tokens(mask)


@part("loss", paper="Wang et al. 2021")
def relation_kl(
    student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /, *, heads: int = 1, causal: bool = False
) -> PerExample:
    """KL(teacher || student) between relations softmax(X X^T / sqrt(D / heads)) of queries, keys or values (MiniLMv2).

    [B, T, D_s], [B, T, D_t], [B, T] -> [B], mean over relation heads and counted tokens. Both widths are split anew
    into `heads`, so neither widths nor attention heads need agree; the paper takes 48, or 64 for large teachers. The
    method is the sum over the queries, keys and values of one layer (three pairs of `at`). `causal` for decoders: a
    token relates to those before it and itself; take the projections before rotary positions. With the attention's own
    heads on values it is MiniLM's value relation. RecipeError where a width is no multiple of `heads`.
    """
    student, teacher = same_tokens(student_feature, teacher_feature, mask, reader="relation_kl")
    banned = ~_related(mask, causal=causal)[:, None]
    student_scores, teacher_scores = (
        _relations(x, heads, side=side).masked_fill(banned, -math.inf)
        for x, side in ((student, "student"), (teacher, "teacher"))
    )
    # Tokens that do not count relate to themselves alone: their rows are equal, and add 0.
    return forward_kl(student_scores, teacher_scores).mean(1).sum(-1) / num_tokens(mask)


@part("loss", paper="Jiao et al. 2020")
def attention_scores(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, /) -> PerExample:
    """Mean squared difference of attention scores before their softmax (TinyBERT), over heads and pairs of tokens.

    [B, A, T, T], [B, A, T, T], [B, T] -> [B]. As in the published code a score of -100 or less, which a mask put there,
    is read as 0 on its own side; other than there, padding is left out of the mean. SignalError if heads or tokens
    differ.
    """
    student, teacher = _same_maps(student_feature, teacher_feature, mask, reader="attention_scores")
    student, teacher = (x.masked_fill(x <= BANNED_SCORE, 0.0) for x in (student, teacher))
    return _mean_square(student, teacher, mask)


@part("loss", paper="Jiao et al. 2020")
def query_key_scores(
    student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], mask: Tensor, /, *, heads: int = 12
) -> PerExample:
    """`attention_scores` worked out from queries and keys, for models that do not show their scores.

    `at` names the queries and the keys of a layer in turn, [B, T, D] each; several layers are summed. -> [B]. Both
    networks must have as many `heads` (TinyBERT's condition), their widths may differ. RecipeError for an odd number of
    layers, or a width that is no multiple of `heads`.
    """
    if len(student_features) % 2:
        raise RecipeError(
            f"query_key_scores: 'at' names {len(student_features)} layers, expected pairs: the queries of a layer, "
            "then its keys."
        )
    named = [
        same_tokens(s, t, mask, reader="query_key_scores")
        for s, t in zip(student_features, teacher_features, strict=True)
    ]
    layers = [
        _mean_square(
            _scores(query_s, key_s, heads, reader="query_key_scores", side="student"),
            _scores(query_t, key_t, heads, reader="query_key_scores", side="teacher"),
            mask,
        )
        for (query_s, query_t), (key_s, key_t) in zip(named[::2], named[1::2], strict=True)
    ]
    return torch.stack(layers).sum(0)


def _related(mask: Tensor, *, causal: bool) -> Tensor:
    """Which tokens may meet: counted ones of one segment, and each itself. [B, T] -> bool [B, T, T]."""
    together = (mask[:, :, None] == mask[:, None, :]) & (mask != 0)[:, :, None]
    if causal:
        together = together.tril()
    return together | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)


def _relations(states: Tensor, heads: int, *, side: str) -> Tensor:
    return _scores(states, states, heads, reader="relation_kl", side=side)


def _scores(queries: Tensor, keys: Tensor, heads: int, *, reader: str, side: str) -> Tensor:
    """Q K^T / sqrt(width of a head): [B, T, D], [B, T, D] -> [B, heads, T, T]."""
    if queries.shape[-1] != keys.shape[-1] or queries.shape[-1] % heads:
        widths = " and ".join(str(width) for width in dict.fromkeys((queries.shape[-1], keys.shape[-1])))
        raise RecipeError(
            f"{reader}.heads: found {heads}, but the {side}'s width is {widths}. Choose a number that divides the "
            "widths of both sides."
        )
    query, key = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (queries, keys))
    # The root to both sides before the product: its entries are squares.
    root = query.shape[-1] ** -0.25
    return product(root * query, (root * key).mT)


def _same_maps(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor, *, reader: str) -> tuple[Tensor, Tensor]:
    """[B, A, T, T] of both over the tokens of the mask. SignalError otherwise."""
    student, teacher = readable(student_feature, teacher_feature)
    num_tokens_here = mask.shape[-1]
    if student.shape != teacher.shape or student.ndim != 4 or student.shape[2:] != (num_tokens_here, num_tokens_here):
        raise SignalError(
            f"{reader}: found features of shape {list(student.shape)} from the student and {list(teacher.shape)} from "
            f"the teacher under a mask {list(mask.shape)}, expected [B, heads, T, T] of both with as many heads. "
            "relation_kl compares layers whose heads differ."
        )
    return student, teacher


def _mean_square(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over heads and pairs of counted tokens of one segment of the squared difference: [B, A, T, T] -> [B]."""
    pairs = (mask[:, :, None] == mask[:, None, :]) & (mask != 0)[:, :, None]
    outside = ~pairs[:, None]
    gap = student.masked_fill(outside, 0.0) - teacher.masked_fill(outside, 0.0)
    return gap.square().mean(1).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
