"""A teacher of another tokenizer: it reads the same text in its own tokens, and answers in the student's.

The bytes of the student's tokens are tokenized anew for the teacher. Where both tokenizations have an end, a span ends
(METHODS_LLM E0); what the teacher says of a span stands at the student's position that predicts the span's first token,
so an answer is laid out like the student's batch, can be remembered in a store, and is padded or packed like any other.

`logits` are Sparse over the student's vocabulary: the law of the student's next token that follows from the teacher's
law over its pieces, as the student would spell them (`respelled`). Where a token of the student reaches beyond the
teacher's piece, the tail bucket holds everything, which every divergence takes for no lesson. Features, each [B, T] or
[B, T, ...], zero where no span begins:

    span               1 where a span begins, 2 where it continues, 0 outside (the position that predicts the token)
    span_log_probs     log p(span), by the chain rule over the teacher's tokens
    next_ids,          [K] what `logits` hold, at every token of a span; -inf pads
    next_log_probs
    shared_ids,        [K] the student's ids of: first the span itself, then the teacher's likeliest other tokens that
    shared_log_probs   the student has too, its first token in the span not among them; -inf pads
    rest_probs         [R] the largest probabilities of all the teacher's tokens that are not in shared_ids, descending
    sorted_probs       [R] its largest probabilities, descending, whatever their tokens
    nearest_ids,       [K] at one-to-one spans, the teacher's likeliest tokens as their nearest student tokens (MinED);
    nearest_log_probs  -inf pads

Dimension key: B rows and T positions of the student's batch; R rows and U positions of the teacher's; S spans;
M teacher tokens in spans; V student classes, W teacher classes; K entries kept, R ranks kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, SignalError, unknown
from potstill.core.types import Batch, Dense, Logits, Need, Signal, Source, Sparse, Teacher
from potstill.objective.representations import rows
from potstill.teachers.answers import NEXT, WORDS, Shapes, answers
from potstill.teachers.crossing import Coverage, Crossing, cross
from potstill.teachers.crossing import beside as alongside
from potstill.teachers.respelled import Respelled
from potstill.teachers.spans import Interpreter
from potstill.teachers.spelling import Spelling
from potstill.teachers.vocabularies import Nearest, same_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MEANING = 2
"""Raised when the answers to the same question become others: a store of the old ones is not taken for the new."""


@part("teacher", paper="Boizard et al. 2024; Minixhofer et al. 2025")
def aligned(
    teacher: Teacher,
    *,
    student_tokenizer: str | PreTrainedTokenizerBase,
    teacher_tokenizer: str | PreTrainedTokenizerBase,
    special: Mapping[str, str] | None = None,
    whole_words: bool = False,
    longest: int = 64,
    entries: int = 128,
    ranks: int = 1024,
) -> Aligned:
    """`teacher` for students of another tokenizer. Tokenizers are given as they are, or as the folder they lie in.

    special: special tokens of the student and those of the teacher that play their part, such as
    {"<|im_end|>": "<end_of_turn>"}; begin, end and equal names are matched without it.
    whole_words: spans end only where words end, which spares ALM the bias of ends within words. It merges spans.
    longest: spans of more tokens than this, on either side, teach nothing.
    entries, ranks: how many tokens K and sorted probabilities R are kept at a position.
    Raises DataError for a tokenizer whose bytes cannot be told, or that rewrites text (NFKC, lower case).
    """
    if entries < 2 or ranks < 1 or longest < 1:
        raise RecipeError(
            f"aligned: found entries {entries}, ranks {ranks}, longest {longest}; expected 2, 1, 1 or more."
        )
    interpreter = _interpreter(student_tokenizer, teacher_tokenizer, special, whole_words=whole_words)
    return Aligned(teacher, interpreter, longest=longest, entries=entries, ranks=ranks)


@part("teacher", paper="Zhang et al. 2024")
def beside(
    teacher: Teacher,
    *,
    student_tokenizer: str | PreTrainedTokenizerBase,
    teacher_tokenizer: str | PreTrainedTokenizerBase,
    special: Mapping[str, str] | None = None,
) -> Beside:
    """`teacher` on its own tokens of the same texts, for methods that find the counterparts themselves, such as dskd.

    It answers at its own positions, a row for each row of the batch. The feature "labels" [B, U] says which token it
    predicts where the student is asked for the same bytes. Arguments and errors as in `aligned`.
    """
    return Beside(teacher, _interpreter(student_tokenizer, teacher_tokenizer, special, whole_words=False))


class Beside:
    """Shows a teacher the same texts in its own tokens. Made by `beside`."""

    LONGEST = 64
    """Tokens of a span, as in `aligned`."""

    def __init__(self, teacher: Teacher, interpreter: Interpreter) -> None:
        self.teacher = teacher
        self._interpreter = interpreter

    @property
    def identity(self) -> str:
        return f"beside:{_digest(self.teacher.identity, self._interpreter)}"

    @torch.no_grad()
    def __call__(self, batch: Batch, need: Need) -> Signal:
        """Raises SignalError for a batch of another tokenizer than the student's, and for packed rows."""
        if not need:
            return Signal()
        _check_batch(batch, self._interpreter)
        shown = alongside(batch, self._interpreter, longest=self.LONGEST)
        said = self.teacher(shown, replace(need, features=need.features - {"labels"}))
        return replace(said, features={**said.features, "labels": shown.labels})


class Aligned:
    """Asks a teacher about the same text in its own tokens. Made by `aligned`."""

    def __init__(self, teacher: Teacher, interpreter: Interpreter, *, longest: int, entries: int, ranks: int) -> None:
        self.teacher = teacher
        self._interpreter = interpreter
        self._longest = longest
        size, same = len(interpreter.student), same_bytes(interpreter)
        self._shapes = Shapes(
            size=size,
            # One class stays outside, so that there always is a tail for what the teacher says nothing about.
            entries=min(entries, size - 1),
            ranks=min(ranks, max(size, len(interpreter.teacher))),
            same=same,
            nearest=Nearest(interpreter, same),
            respelled=Respelled(interpreter, same),
        )

    @property
    def identity(self) -> str:
        """Follows from the teacher's, both tokenizers and all that was asked of `aligned`."""
        shapes = self._shapes
        said = _digest(self.teacher.identity, self._interpreter, MEANING, self._longest, shapes.entries, shapes.ranks)
        return f"aligned:{said}"

    def coverage(self, batch: Batch) -> Coverage:
        """How much of a batch the teacher can speak about. Asks no model."""
        return self._cross(batch).coverage

    def reading(self, source: Source) -> Source:
        """What the teacher is shown of a source, in its own tokens: to fill the store of a remembered teacher.

        `build(path, teacher, asker.reading(source), ...)`, and later `aligned(remembered(path), ...)` on the same rows.
        """
        return _Reading(self, source)

    @torch.no_grad()
    def __call__(self, batch: Batch, need: Need) -> Signal:
        """Raises SignalError for a batch of another tokenizer than the student's, and for features it does not know."""
        for name in sorted(need.features - set(WORDS)):
            raise SignalError(
                f"{unknown('aligned', name, WORDS, noun='feature')} Layers of the teacher stand at its own positions, "
                "so they cannot be compared across tokenizers."
            )
        if not need:
            return Signal()
        crossing = self._cross(batch)
        asked = need.features | (set(NEXT) if need.logits else set())
        found = answers(crossing, self._ask(crossing), asked, self._shapes)
        features = {name: found[name] for name in need.features}
        return Signal(logits=self._logits(found) if need.logits else None, features=features)

    def _cross(self, batch: Batch) -> Crossing:
        _check_batch(batch, self._interpreter)
        return cross(batch, self._interpreter, longest=self._longest)

    def _ask(self, crossing: Crossing) -> Logits:
        """The teacher's laws at the positions that matter: M rows."""
        if not len(crossing.first):
            return Dense(logits=torch.zeros(0, len(self._interpreter.teacher), device=crossing.own.device))
        said = self.teacher(crossing.batch, Need(logits=True)).logits
        if said is None:
            raise SignalError("aligned: the teacher gave no logits.")
        if isinstance(said, Sparse) and said.kind != "top":
            raise SignalError(
                "aligned: a sampled teacher does not know how likely a token is. Take a top-k or live one."
            )
        return rows(said, crossing.batch.mask)

    def _logits(self, found: Mapping[str, Tensor]) -> Sparse:
        ids, log_probs = (found[name] for name in NEXT)
        return Sparse(ids=ids, log_probs=log_probs, size=self._shapes.size, kind="top")


@dataclass(frozen=True, slots=True)
class _Reading:
    """Batches as an aligned teacher's own teacher reads them."""

    asker: Aligned
    source: Source

    def batch(self, index: int) -> Batch:
        return self.asker._cross(self.source.batch(index)).batch


def _interpreter(
    student_tokenizer: str | PreTrainedTokenizerBase,
    teacher_tokenizer: str | PreTrainedTokenizerBase,
    special: Mapping[str, str] | None,
    *,
    whole_words: bool,
) -> Interpreter:
    theirs = Spelling(_loaded(teacher_tokenizer), title="aligned.teacher_tokenizer")
    theirs.check_faithful()
    made = Interpreter(
        student=Spelling(_loaded(student_tokenizer), title="aligned.student_tokenizer"),
        teacher=theirs,
        special=dict(special or {}),
        whole_words=whole_words,
    )
    _check_special(made)
    return made


def _check_batch(batch: Batch, interpreter: Interpreter) -> None:
    student = interpreter.student
    if "input_ids" not in batch.inputs:
        raise SignalError("aligned reads the input 'input_ids'. Give it tokens: data of chats or texts.")
    if batch.vocabulary and batch.vocabulary != student.fingerprint:
        raise SignalError(
            f"{student.title}: the batch was made with another tokenizer. Give the one that the data are read with."
        )


def _digest(teacher: str, both: Interpreter, *more: int) -> str:
    said = teacher, both.student.fingerprint, both.teacher.fingerprint, sorted(both.special.items()), both.whole_words
    return hashlib.blake2b(repr((*said, *more)).encode(), digest_size=16).hexdigest()


def _loaded(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, str):
        return tokenizer
    from potstill.students.pretrained import find_folder, read_tokenizer

    return read_tokenizer(find_folder(tokenizer))


def _check_special(interpreter: Interpreter) -> None:
    sides = (("student", interpreter.student, list(interpreter.special)),
             ("teacher", interpreter.teacher, list(interpreter.special.values())))  # fmt: skip
    for side, spelling, names in sides:
        for name in names:
            if name not in spelling.specials.values():
                raise unknown("aligned.special", name, spelling.specials.values(), noun=f"special token of the {side}")
