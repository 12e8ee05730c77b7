"""Rows that were exported from a flow, as the student reads them: where an answer stands, and who was asked for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from potstill.core.writing import Lineage
from potstill.data.chat import CHUNK, Reading
from potstill.data.formats import Answer, Example, ExampleReader, Text
from potstill.data.records import Record, read_records
from potstill.data.rendering import LeftOut, Rendered, Renderer
from potstill.data.tokens import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the file: where the answer's own text stands among its tokens, and the answers that went into it."""

    first: int
    stop: int
    """0 where the template does not keep the answer."""
    requests: tuple[str, ...]


def answered(path: str | Path, lineages: Mapping[str, Lineage], reading: Reading) -> dict[bytes, Row]:
    """The rows of a file by their tokens, cut as the data's: a row that is cut is as long as the longest."""
    longest = max(int(rows.borders.diff().max()) for rows in (reading.train, reading.test) if rows.num_rows)
    renderer, reader = replace(reading.renderer, supervise="last"), ExampleReader()
    index: dict[bytes, Row] = {}
    records = read_records(str(path))
    while some := list(islice(records, CHUNK)):
        found = [(record, _answer(record, reader, renderer)) for record in some]
        kept = [(record, rendered) for record, rendered in found if rendered is not None]
        encoded = encode([rendered for _, rendered in kept], reading.tokenizer)
        for (record, rendered), text in zip(kept, encoded, strict=True):
            own = text.supervised.nonzero()[0]
            own = own[own < len(text.ids) - 1] if rendered.ends else own  # the end is no text
            lineage = lineages.get(str(record.fields.get("id", "")), Lineage())
            row = Row(
                first=int(own[0]) if len(own) else 0,
                stop=int(own[-1]) + 1 if len(own) else 0,
                requests=lineage.requests,
            )
            index.setdefault(name_of(text.ids[:longest].tolist()), row)
    return index


def _answer(record: Record, reader: ExampleReader, renderer: Renderer) -> Rendered | None:
    """A row as text, its span what the answer says, without what the template ends it with. None: it is left out."""
    (example,) = reader(record)
    rendered = renderer(example, place=record.place)
    if isinstance(rendered, LeftOut):
        return None
    if not rendered.spans:
        return rendered
    start, stop = rendered.spans[-1]
    said = _said(example).strip()
    at = rendered.text.rfind(said, start, stop)
    return replace(rendered, spans=((start, at + len(said) if said and at >= 0 else stop),))


def _said(example: Example) -> str:
    """What the last answer of a row says; empty where it is no plain text."""
    if isinstance(example, Text):
        return example.text
    if isinstance(example, Answer):
        return example.answer
    content = [message.get("content") for message in example.messages if message["role"] == "assistant"][-1]
    return content if isinstance(content, str) else ""


def name_of(ids: Sequence[int]) -> bytes:
    """A text by its tokens."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()
