"""A teacher's law over its own pieces as the law of a student's next token, at every token that spells a piece.

A student that writes smaller tokens spells "there" as t-h-e-r-e. Of the teacher's law over pieces, all that begins with
"t" speaks for t; once t stands there, all that begins with "th" speaks for h among what begins with "t"; and so on. On
texts that follow the teacher's pieces this adds up to the teacher's own law of the next byte: where a piece ended
before, its end is in the text, and the next piece's law takes over (compare Phan et al. 2024, "Exact Byte-Level
Probabilities from Tokenized Language Models"). No mass is lost, where a map of equal pieces leaves out whatever only
the teacher has.

Dimension key: V student classes, W teacher classes, D the longest spelling, C continuations of a prefix, N positions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from potstill.teachers.spans import Interpreter
from potstill.teachers.spelling import Spelling
from potstill.teachers.vocabularies import by_bytes

Prefix: TypeAlias = tuple[int, ...]
"""Tokens of the student."""

LEAST_MASS = 1e-9
"""Of a prefix: what is rarer is lost in the rounding of running sums, so nothing is told of how it goes on."""

ENDED = -1
"""Stands where a spelling has no more tokens. Below every token, so that a piece comes before those it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """The tokens that may follow a prefix, and for each the run of pieces, in order, that go on with it: [C] each."""

    tokens: Tensor
    starts: Tensor
    stops: Tensor

    def to(self, device: torch.device) -> Continuations:
        return replace(self, tokens=self.tokens.to(device), starts=self.starts.to(device), stops=self.stops.to(device))


class Respelled:
    """Every piece of a teacher in the student's tokens, in the order of a dictionary. Made when it is first asked.

    A piece is spelled as the student's tokenizer spells it by itself, or, where that gives other bytes back, by the
    longest tokens first. Special tokens are spelled as their partner; without one they have no spelling.
    """

    def __init__(self, interpreter: Interpreter, same: Tensor) -> None:
        self._interpreter = interpreter
        self._same = same
        self._known: dict[Prefix, Continuations] = {}

    def length(self, piece: int, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, spell the beginning of a piece; none of an unknown one."""
        spelling = self._spellings[piece] if 0 <= piece < len(self._spellings) else ()
        agree = takewhile(lambda both: both[0] == both[1], zip(spelling, tokens, strict=False))
        return sum(1 for _ in agree)

    def sums(self, probs: Tensor) -> Tensor:
        """Running sums in this order, of [N, W]: float64 [N, 1 + pieces of the tokenizer]. A head may lack the last
        pieces, which then have no mass."""
        missing = max(0, len(self._order) - probs.shape[-1])
        ordered = torch.nn.functional.pad(probs.double(), (0, missing))[:, self._order.to(probs.device)]
        return torch.nn.functional.pad(ordered.cumsum(dim=-1), (1, 0))

    def after(self, prefix: Prefix) -> Continuations:
        """What may follow a prefix; kept once it was worked out."""
        if prefix not in self._known:
            self._known[prefix] = self._found(prefix)
        return self._known[prefix]

    def _found(self, prefix: Prefix) -> Continuations:
        first = bisect_left(self._sorted, prefix)
        last = bisect_left(self._sorted, (*prefix[:-1], prefix[-1] + 1)) if prefix else len(self._sorted)
        column = self._columns[len(prefix), first:last]
        changes = np.flatnonzero(np.diff(column, prepend=ENDED))
        starts = changes + first
        return Continuations(
            tokens=torch.from_numpy(column[changes]),
            starts=torch.from_numpy(starts),
            stops=torch.from_numpy(np.append(starts[1:], last)),
        )

    @cached_property
    def _spellings(self) -> list[Prefix]:
        return _spellings(self._interpreter, self._same)

    @cached_property
    def _places(self) -> list[int]:
        return sorted(range(len(self._spellings)), key=self._spellings.__getitem__)

    @cached_property
    def _order(self) -> Tensor:
        return torch.tensor(self._places)

    @cached_property
    def _sorted(self) -> list[Prefix]:
        return [self._spellings[piece] for piece in self._places]

    @cached_property
    def _columns(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """The n-th token of each spelling, in order: [D + 1, W]."""
        depth = max(map(len, self._sorted), default=0)
        columns = np.full((depth + 1, len(self._sorted)), ENDED, dtype=np.int64)
        for place, spelling in enumerate(self._sorted):
            columns[: len(spelling), place] = spelling
        return columns


def next_tokens(
    respelled: Respelled, law: Tensor, pieces: Sequence[int], tokens: Sequence[Prefix], *, entries: int
) -> tuple[Tensor, Tensor]:
    """The student's likeliest next tokens at every token of some spans, from the law of each span's first piece.

    log p [S, W], that piece [S] and the student's tokens of the span [S, ...] -> ids and log-probabilities [P, K], a
    row for each of the P tokens. What an entry is to be multiplied up to is the mass of all pieces that begin as the
    text does and go on; what a top-k teacher does not say of them is left out, so it lies in the tail. A row without
    entries (-inf) has no lesson: there the text has left the piece.
    """
    sums = respelled.sums(law.exp())
    unsaid = (1.0 - sums[:, -1]).clamp(min=0.0)
    at: dict[Prefix, tuple[list[int], list[int]]] = {}
    place = 0
    for row, (piece, span) in enumerate(zip(pieces, tokens, strict=True)):
        for depth in range(respelled.length(piece, span)):
            rows, places = at.setdefault(tuple(span[:depth]), ([], []))
            rows.append(row)
            places.append(place + depth)
        place += len(span)
    ids = torch.zeros(place, entries, dtype=torch.int64, device=law.device)
    log_probs = torch.full((place, entries), -torch.inf, device=law.device)
    for prefix, (rows, places) in at.items():
        following = respelled.after(prefix).to(law.device)
        mine = sums[rows]
        mass = mine[:, following.stops] - mine[:, following.starts]
        # At a span's begin all mass counts: what has no spelling is in the tail.
        total = mass.sum(dim=-1) + unsaid[rows] if prefix else torch.ones_like(unsaid[rows])
        mass = torch.where(total[:, None] >= LEAST_MASS, mass, 0.0)
        best, which = (mass / total.clamp(min=LEAST_MASS)[:, None]).topk(min(entries, mass.shape[-1]), dim=-1)
        ids[places, : best.shape[-1]] = following.tokens[which]
        log_probs[places, : best.shape[-1]] = best.log().float()
    return ids, log_probs


def _spellings(interpreter: Interpreter, same: Tensor) -> list[Prefix]:
    """The student's tokens of every teacher piece; () for what stands for no bytes and has no partner."""
    student, pieces = interpreter.student, interpreter.teacher.pieces
    found: list[Prefix] = [(partner,) if partner >= 0 else () for partner in same.tolist()]
    asked = {number: piece for number, piece in enumerate(pieces) if piece and not found[number]}
    texts = {number: text for number, piece in asked.items() if (text := _text(piece, student)) is not None}
    by_itself = dict(zip(texts, student.encode_all(list(texts.values())), strict=True))
    known = by_bytes(student)
    longest = max(map(len, known), default=1)
    for number, piece in asked.items():
        ids = tuple(by_itself.get(number, ()))
        spelled = b"".join(student.pieces[token] or b"" for token in ids)
        found[number] = ids if spelled == piece else _longest_first(piece, known, longest)
    return found


def _longest_first(piece: bytes, known: Mapping[bytes, int], longest: int) -> Prefix:
    """The longest token that the bytes begin with, again and again; () where some byte has none."""
    ids: list[int] = []
    at = 0
    while at < len(piece):
        stop = next((end for end in range(min(len(piece), at + longest), at, -1) if piece[at:end] in known), at)
        if stop == at:
            return ()
        ids.append(known[piece[at:stop]])
        at = stop
    return tuple(ids)


def _text(piece: bytes, student: Spelling) -> str | None:
    """What the student's tokenizer is to be given so that it spells the piece; None where that is no text."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    return text.removeprefix(" ") if student.leads else text
