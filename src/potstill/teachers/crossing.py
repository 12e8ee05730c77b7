"""A batch of student tokens as the teacher reads it, and where on both sides the same bytes are predicted.

Each text of a packed row becomes a row of the teacher's own. Nothing is shifted but here: token i of a text is what the
position of token i - 1 predicts, on both sides.

Dimension key: B rows and T positions of the student's batch; R rows and U positions of the teacher's; S spans;
M teacher tokens in spans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.core.errors import SignalError
from potstill.core.types import IGNORED, Batch
from potstill.teachers.spans import Interpreter, Rendering, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a batch the teacher can speak about. The share of one-to-one spans is the first number to look at."""

    positions: int
    """Counted positions of the student."""
    in_spans: int
    """Those of them that a span covers: where ALM and GOLD learn."""
    spans: int
    one_to_one: int
    """Spans of one token on both sides: where MinED learns."""
    texts: int
    broken: int
    """Texts that the teacher reads only in part, or not at all: their bytes come back otherwise, or are no UTF-8."""

    def lines(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines for `potstill check`."""
        return (
            ("positions in spans", f"{self.in_spans:,} of {self.positions:,}"),
            ("one-to-one spans", f"{self.one_to_one:,} of {self.spans:,}"),
            ("texts not read to their end", f"{self.broken:,} of {self.texts:,}"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """The teacher's batch and the spans whose student side is counted as a whole."""

    batch: Batch
    """[R, U]; its mask marks the positions that predict a token of some span, M of them."""
    own: Tensor
    """bool [B, T]: student positions that predict a token of some span, in the order of the spans."""
    starts: Tensor
    """bool [B, T]: those that predict the first token of a span, S of them."""
    one_to_one: Tensor
    """bool [S]."""
    comparable: Tensor
    """bool [S]: the vocabularies may be compared where the span begins."""
    first: Tensor
    """int64 [S]: the student's first token of each span."""
    tokens: tuple[tuple[int, ...], ...]
    """[S]: all of them."""
    path: Tensor
    """int64 [M]: the teacher's token that each position of the mask predicts."""
    span_of: Tensor
    """int64 [M]: the span it belongs to."""
    begins: Tensor
    """bool [M]: it is the first of its span."""
    coverage: Coverage


def cross(batch: Batch, interpreter: Interpreter, *, longest: int) -> Crossing:
    """Render every text of a batch and keep the spans of at most `longest` tokens that it counts, on its device."""
    found = [(text, interpreter.render(text.ids)) for text in texts_of(batch)]
    limit = interpreter.teacher.limit
    kept = [
        (text, made, [span for span in made.spans if _is_taught(span, text, longest=longest, limit=limit)])
        for text, made in found
    ]
    taught = [(text, made, spans) for text, made, spans in kept if spans]
    spans = [span for _, _, some in taught for span in some]
    own, starts = torch.zeros((2, *batch.mask.shape), dtype=torch.bool)
    for text, _, some in taught:
        for span in some:
            own[text.row, text.columns[span.student_start - 1 : span.student_stop - 1]] = True
            starts[text.row, text.columns[span.student_start - 1]] = True
    device = batch.mask.device
    lengths = torch.tensor([span.teacher_stop - span.teacher_start for span in spans], dtype=torch.int64)
    span_of = torch.arange(len(spans)).repeat_interleave(lengths)
    begins = torch.ones_like(span_of, dtype=torch.bool)
    begins[1:] = span_of[1:] != span_of[:-1]
    return Crossing(
        batch=_teacher_batch([(made, some) for _, made, some in taught], interpreter, device),
        own=own.to(device),
        starts=starts.to(device),
        one_to_one=torch.tensor([span.one_to_one for span in spans], dtype=torch.bool, device=device),
        comparable=torch.tensor([span.comparable for span in spans], dtype=torch.bool, device=device),
        first=_ids([text.ids[span.student_start] for text, _, some in taught for span in some], device),
        tokens=tuple(
            tuple(text.ids[span.student_start : span.student_stop]) for text, _, some in taught for span in some
        ),
        path=_ids(
            [
                token
                for _, made, some in taught
                for span in some
                for token in made.ids[span.teacher_start : span.teacher_stop]
            ],
            device,
        ),
        span_of=span_of.to(device),
        begins=begins.to(device),
        coverage=Coverage(
            positions=int(batch.mask.sum()),
            in_spans=int(own.sum()),
            spans=len(spans),
            one_to_one=sum(span.one_to_one for span in spans),
            texts=len(found),
            broken=sum(not made.whole for _, made in found),
        ),
    )


def beside(batch: Batch, interpreter: Interpreter, *, longest: int) -> Batch:
    """The teacher's row of each row of a batch, [B, U]; its labels are the tokens of spans that the batch counts.

    Raises SignalError for a row that holds several texts: the teacher would have several rows of it.
    """
    texts = list(texts_of(batch))
    if [text.row for text in texts] != list(range(len(batch.mask))):
        raise SignalError("This teacher reads one text per row. Switch packing off where the data are read.")
    limit = interpreter.teacher.limit
    shown = []
    for text in texts:
        made = interpreter.render(text.ids)
        spans = [span for span in made.spans if _is_taught(span, text, longest=longest, limit=limit)]
        shown.append((made, spans))
    return _teacher_batch(shown, interpreter, batch.mask.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text of a row: its tokens, the columns they stand in, and which of them are counted targets."""

    row: int
    ids: list[int]
    columns: list[int]
    counted: list[bool]


def texts_of(batch: Batch) -> Iterator[Text]:
    """Every text of every row. A label behind the last token is a token too: data may leave it out of the inputs."""
    ids = batch.inputs["input_ids"]
    real = batch.inputs.get("segments", batch.inputs.get("attention_mask", torch.ones_like(ids)))
    rows = zip(ids.tolist(), real.tolist(), batch.labels.tolist(), batch.mask.tolist(), strict=True)
    for row, (tokens, segments, labels, mask) in enumerate(rows):
        for number in sorted(set(segments) - {0}):
            columns = [column for column, segment in enumerate(segments) if segment == number]
            text = [tokens[column] for column in columns]
            if mask[columns[-1]] and labels[columns[-1]] != IGNORED:
                text.append(labels[columns[-1]])
            counted = [mask[at] and labels[at] == token for at, token in zip(columns, text[1:], strict=False)]
            yield Text(row=row, ids=text, columns=columns, counted=[False, *counted])


def _is_taught(span: Span, text: Text, *, longest: int, limit: int) -> bool:
    """Both sides predict all of it, within what the teacher reads, and the student is asked for all of it."""
    lengths = span.student_stop - span.student_start, span.teacher_stop - span.teacher_start
    return (
        span.student_start > 0
        and span.teacher_start > 0
        and max(lengths) <= longest
        and span.teacher_stop <= limit
        and all(text.counted[span.student_start : span.student_stop])
    )


def _teacher_batch(
    taught: Sequence[tuple[Rendering, list[Span]]], interpreter: Interpreter, device: torch.device
) -> Batch:
    """What the teacher is shown: each text up to the last token that it must predict, padded on the right."""
    # Of a text without a span it sees one token: a row must not be empty.
    rows = [made.ids[: spans[-1].teacher_stop if spans else 1] or [0] for made, spans in taught]
    width = max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    real = torch.zeros_like(ids)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for number, (row, (_, spans)) in enumerate(zip(rows, taught, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, : len(row) - 1] = torch.tensor(row[1:])
        real[number, : len(row)] = 1
        for span in spans:
            mask[number, span.teacher_start - 1 : span.teacher_stop - 1] = True
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(
        keys=tuple(hashlib.blake2b(str(row).encode(), digest_size=16).hexdigest() for row in rows),
        inputs={"input_ids": ids, "attention_mask": real, "position_ids": positions},
        labels=labels.masked_fill(~mask, IGNORED),
        mask=mask,
        vocabulary=interpreter.teacher.fingerprint,
    ).to(device)


def _ids(tokens: list[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)
