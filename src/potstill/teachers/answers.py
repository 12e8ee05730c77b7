"""From a teacher's laws over its own tokens to what is said at a student's positions: see `aligned` for the words.

Dimension key: B rows and T positions of the student's batch; S spans, M teacher tokens in them (C of them in a chunk,
of which S' begin a span); V student classes, W teacher classes; K entries kept, R ranks kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.core.types import Logits, Sparse
from potstill.objective.chunked import slices
from potstill.objective.representations import dense, rows, width
from potstill.teachers.crossing import Crossing
from potstill.teachers.respelled import Respelled, next_tokens
from potstill.teachers.vocabularies import Nearest

NEXT = ("next_ids", "next_log_probs")
SHARED = ("shared_ids", "shared_log_probs", "rest_probs")
NEAREST = ("nearest_ids", "nearest_log_probs")
WORDS = ("span", "span_log_probs", *NEXT, *SHARED, "sorted_probs", *NEAREST)

CHUNK_BYTES = 64 * 2**20
"""Positions go through the teacher's head in chunks: about eight buffers of [C, W] float32 stay within this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """How much is said at a position, and how tokens are translated."""

    size: int
    """Student classes V."""
    entries: int
    ranks: int
    same: Tensor
    """int64 [W]: the student's token of the same bytes, or -1."""
    nearest: Nearest
    respelled: Respelled


def answers(crossing: Crossing, said: Logits, asked: Collection[str], shapes: Shapes) -> dict[str, Tensor]:
    """`asked` of the WORDS, each [B, T, ...], from the teacher's M rows.

    A span of which the teacher does not know the probability, because a top-k teacher holds one of its tokens in the
    tail, is no span.
    """
    device = crossing.own.device
    chain, parts, nexts = [], [], []
    step = max(16, CHUNK_BYTES // (32 * width(said)))
    for which in slices(len(crossing.path), step):
        law = _law(rows(said, which)).to(device)
        chain.append(law.gather(-1, crossing.path[which, None]).squeeze(-1))
        at = crossing.begins[which]
        spans = crossing.span_of[which][at]
        parts.append(_alternatives(law[at], crossing, spans, asked, shapes))
        if not set(NEXT).isdisjoint(asked):
            nexts.append(_next_tokens(law[at], crossing, spans, shapes))
    log_probs = torch.zeros(len(crossing.first), device=device).index_add_(0, crossing.span_of, torch.cat(chain))
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "shared_log_probs" in found:
        found["shared_log_probs"][:, 0] = log_probs
    placed = _placed(crossing, {**found, "span_log_probs": log_probs})
    for name, rows_of in zip(NEXT, zip(*nexts, strict=True), strict=False):
        values = torch.cat(rows_of)
        placed[name] = values.new_full((*crossing.own.shape, shapes.entries), FILL.get(name, 0))
        placed[name][crossing.own] = values
    return placed


def _law(logits: Logits) -> Tensor:
    """log p, float32 [C, W]; -inf for what a top-k teacher leaves in its tail."""
    if isinstance(logits, Sparse):
        unsaid = logits.log_probs.new_full((len(logits.ids), logits.size), -torch.inf)
        return unsaid.scatter_reduce(-1, logits.ids, logits.log_probs, "amax").float()
    return torch.log_softmax(dense(logits).float(), dim=-1)


def _next_tokens(law: Tensor, crossing: Crossing, spans: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """What the teacher's law [S', W] says of each token of some spans: nothing where both texts begin otherwise."""
    pieces = crossing.path[crossing.begins][spans].tolist()
    comparable = crossing.comparable[spans].tolist()
    tokens = [crossing.tokens[span] for span in spans.tolist()]
    known = [piece if is_comparable else -1 for piece, is_comparable in zip(pieces, comparable, strict=True)]
    return next_tokens(shapes.respelled, law, known, tokens, entries=shapes.entries)


def _alternatives(
    law: Tensor, crossing: Crossing, spans: Tensor, asked: Collection[str], shapes: Shapes
) -> dict[str, Tensor]:
    """What the teacher might have said where some spans begin, from its law there [S', W]: each [S', ...]."""
    probs = law.exp()
    made = {}
    if "sorted_probs" in asked:
        made["sorted_probs"] = _ranked(probs, shapes.ranks)
    if not set(NEAREST).isdisjoint(asked):
        told = probs * crossing.one_to_one[spans, None]
        made["nearest_ids"], made["nearest_log_probs"] = _as_nearest(told, shapes)
    if not set(SHARED).isdisjoint(asked):
        said = crossing.path[crossing.begins][spans, None]
        others = probs.scatter(-1, said, 0.0)
        first = crossing.first[spans, None]
        ids, log_probs, kept = _as_shared(others, first, crossing.comparable[spans, None], shapes)
        made["shared_ids"], made["shared_log_probs"] = ids, log_probs
        made["rest_probs"] = _ranked(others.masked_fill(kept, 0.0), shapes.ranks)
    return made


def _as_shared(others: Tensor, first: Tensor, comparable: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens of both vocabularies beside the span itself, which has the first place.

    Probabilities without the span's first token [S', W], the student's first token [S', 1], bool [S', 1] -> ids and
    log-probabilities [S', K] (the first one's is not known here), and which teacher tokens are among them [S', W].
    """
    same = _fitted(shapes.same, others)
    known = same >= 0
    mine = others.new_zeros(len(others), shapes.size)
    mine.index_add_(1, same[known], others[:, known])
    mine = (mine * comparable).scatter(-1, first, 0.0)
    best, ids = mine.topk(shapes.entries - 1, dim=-1)
    # What has no mass pads, as the span's own token: it cannot hide another one.
    ids = torch.cat([first, torch.where(best > 0, ids, first)], dim=-1)
    kept = torch.zeros_like(mine, dtype=torch.bool).scatter(-1, ids, True)
    log_probs = torch.nn.functional.pad(best.log(), (1, 0))
    return ids, log_probs, kept[:, same.clamp(min=0)] & known


def _as_nearest(probs: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """The likeliest tokens as their nearest student tokens, masses of one token added up: [S', W] -> [S', K] twice."""
    # Classes beyond the tokenizer's are no tokens.
    probs = probs[:, : len(shapes.same)]
    best, tokens = probs.topk(min(shapes.entries, probs.shape[-1]), dim=-1)
    ids = shapes.nearest(tokens)
    mine = probs.new_zeros(len(probs), shapes.size).scatter_add(-1, ids.clamp(min=0), best * (ids >= 0))
    mass, kept = mine.topk(shapes.entries, dim=-1)
    return torch.where(mass > 0, kept, kept[:, :1]), mass.log()


def _ranked(probs: Tensor, ranks: int) -> Tensor:
    """The largest probabilities, descending, zeros behind: [S', W] -> [S', R]."""
    most = min(ranks, probs.shape[-1])
    return torch.nn.functional.pad(probs.topk(most, dim=-1).values, (0, ranks - most))


def _fitted(same: Tensor, law: Tensor) -> Tensor:
    """The map for as many classes as the teacher has, which may exceed its tokens: the others have no partner."""
    missing = law.shape[-1] - len(same)
    return torch.nn.functional.pad(same, (0, max(missing, 0)), value=-1)[: law.shape[-1]].to(law.device)


FILL = {"next_log_probs": -torch.inf, "shared_log_probs": -torch.inf, "nearest_log_probs": -torch.inf}
"""Where no span begins, a list of tokens is empty; everything else is 0."""


def _placed(crossing: Crossing, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spread what was found for spans [S, ...] over the student's positions [B, T, ...]."""
    known = found["span_log_probs"] > -torch.inf
    number = (crossing.starts.reshape(-1).cumsum(0) - 1).view_as(crossing.starts)
    covered = crossing.own.clone()
    covered[crossing.own] = known[number[crossing.own]]
    starts = crossing.starts & covered
    placed = {"span": 2 * covered.long() - starts.long()}
    for name, values in found.items():
        whole = values.new_full((*starts.shape, *values.shape[1:]), FILL.get(name, 0))
        whole[starts] = values[known]
        placed[name] = whole
    return placed
