"""Text to learn from: documents, prompts with answers, conversations. The only place that shifts labels against ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch

from potstill.core.catalog import part
from potstill.core.errors import DataError, RecipeError
from potstill.core.types import IGNORED
from potstill.core.vocabulary import fingerprint
from potstill.data.formats import Example, ExampleReader, PreferenceReader
from potstill.data.packing import packed
from potstill.data.parts import Parts
from potstill.data.records import Record
from potstill.data.rendering import LeftOut, Rendered, Renderer, Supervise, template_of
from potstill.data.sequences import WINDOW, PairSource, Stream, TokenRows, TokenSource, rows_of
from potstill.data.text_report import NUM_SAMPLES, Report, Tally, describe
from potstill.data.tokens import Encoded, Ids, Marks, Tokenizer, encode, load_tokenizer, padding_id
from potstill.data.turns import quoted, shared_start

Layout: TypeAlias = Literal["padded", "bucketed", "packed"]
Reader: TypeAlias = ExampleReader | PreferenceReader

CHUNK = 1000
"""Texts that are tokenised at a time: enough for all cores, little memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Rows as they were read, one document to a row, and how."""

    train: TokenRows
    test: TokenRows
    tokenizer: Tokenizer
    renderer: Renderer
    tally: Tally
    examples: tuple[tuple[str, Example], ...]
    """The first of those that were kept, with their places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatData:
    """Token batches ready for use. The test part is padded, in the order of the file."""

    train: TokenSource | PairSource
    test: TokenSource | PairSource
    reading: Reading

    @property
    def tokenizer(self) -> Tokenizer:
        return self.reading.tokenizer

    @property
    def vocabulary(self) -> str:
        """The tokenizer's fingerprint: a teacher of another one refuses."""
        return self.reading.train.vocabulary

    @property
    def report(self) -> Report:
        """What was read, left out and is supervised, with samples."""
        return describe(self)


@part("data", name="chat")
def chat(
    path: str,
    *,
    tokenizer: str | Tokenizer,
    batch: int = 8,
    length: int = 512,
    seed: int = 0,
    supervise: Supervise = "answers",
    layout: Layout = "padded",
    template: str = "own",
    system: str = "",
    test_path: str = "",
    test_share: float = 0.05,
    limit: int | None = None,
    test_limit: int | None = None,
    multiple_of: int = 1,
) -> ChatData:
    """The texts at `path`: .jsonl, .json, .csv (.gz too) or .parquet, a folder of these, or a name on the hub.

    Rows are told by their fields: messages (+ tools), conversations, prompt + completion, question + answer,
    instruction (+ input) + output, or text alone. A row of text is supervised whole, and ends with the tokenizer's
    end-of-sequence token; so does a completion where there is no chat template. finish_reason "length" marks an
    answer that was cut off: it gets no end. Without a template a prompt and its completion are joined as they are, a
    question and its answer by a line's end, and instructions stand under headings.

    tokenizer: that of the student and its teacher, or the model folder or hub name to load it from.
    batch, seed: rows per micro-batch; the order follows from the seed and from nothing else.
    length: tokens per row; what is longer is cut on the right and counted, together with the end it loses.
    supervise: the answers with their end-of-turn marks, only the last of each conversation, or all tokens.
    layout: "padded" to the longest of the batch; "bucketed": so, and rows of like length share a batch (then what
        meets depends on the batch size); "packed": several documents per row of `length`, apart by segments.
    template: the tokenizer's "own" where it has one, "plain" (prompt and completion joined as they are), or a file.
    system: a system message put before conversations that have none.
    test_path, test_share: the test part, if the rows do not say (split "train" or "test"): another path, or else this
        share, by a hash of the content, so that a row never changes sides.
    limit, test_limit: at most so many rows, the first ones. multiple_of: rows are padded to a multiple of it.
    Raises DataError for what lies at `path` and for the tokenizer, RecipeError for the settings.
    """
    check_counts("chat", batch=batch, length=length, multiple_of=multiple_of, limit=limit, test_limit=test_limit)
    reading = read_rows(
        Parts(path=path, test_path=test_path, test_share=test_share, limit=limit, test_limit=test_limit),
        ExampleReader,
        load_tokenizer(tokenizer),
        template=template,
        system=system,
        supervise=supervise,
        length=length,
    )
    train, test = (replace(rows, multiple_of=multiple_of) for rows in (reading.train, reading.test))
    if layout == "packed":
        train = packed(train, length=length, seed=seed)
    window = WINDOW if layout == "bucketed" else 0
    return ChatData(
        train=TokenSource(rows=train, stream=Stream(lengths=train.lengths, batch_size=batch, seed=seed, window=window)),
        test=TokenSource(rows=test, stream=Stream(lengths=test.lengths, batch_size=batch, seed=seed)),
        reading=reading,
    )


def check_same_text(data: ChatData, teacher: Tokenizer) -> None:
    """DataError where the teacher's own chat template writes the first rows otherwise than they are fed to it.

    Nothing is said of a teacher without a template, nor of bare texts.
    """
    renderer = replace(data.reading.renderer, template=template_of(teacher, "own"))
    for place, example in data.reading.examples if renderer.template.text else ():
        ours, theirs = (render(example, place=place) for render in (data.reading.renderer, renderer))
        if isinstance(ours, Rendered) and isinstance(theirs, Rendered) and ours.text != theirs.text:
            first = shared_start(ours.text, theirs.text)
            raise DataError(
                f"{place} is written {quoted(ours.text[first:])} for the student, but {quoted(theirs.text[first:])} by "
                f"the teacher's chat template, from character {first} on. Give the template= that both are to read."
            )


def aligned(ids: Ids, supervised: Marks) -> Ids:
    """Ids [T], which of them are supervised [T] -> labels [T]: what the model is to say at each place, the NEXT token.

    The one shift: labels[t] = ids[t + 1] where that token is supervised, else IGNORED. The first token is never an
    answer, and nothing follows the last, so labels never reach into another document.
    """
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORED)
    return labels


def read_rows(
    parts: Parts,
    reader: Callable[[], Reader],
    tokenizer: Tokenizer,
    *,
    template: str,
    system: str,
    supervise: Supervise,
    length: int,
) -> Reading:
    """Everything that `parts` names, as rows of tokens. Of the examples of one record all are kept, or none."""
    renderer = Renderer(template=template_of(tokenizer, template), supervise=supervise, system=system)
    if system and not renderer.template.text:
        raise RecipeError("chat.system: without a chat template there is no place for it. Give template=, or leave it.")
    tally = Tally()
    train, test = (
        Collector(reader(), renderer, tokenizer, tally, length=length, limit=limit)
        for limit in (parts.limit, parts.test_limit)
    )
    for record, is_test in parts.records(tally):
        if train.is_full and test.is_full:
            break
        (test if is_test else train).read(record)
    rows, held = train.rows(), test.rows()
    if not rows.num_rows:
        raise DataError(f"{parts.path}: no row for training is left. {tally.reasons or 'There is no row at all.'}")
    group = len(train.kept[0])
    if not held.num_rows and parts.may_hold_back(tally) and rows.num_rows > group:
        # Too few rows for the share: the smallest key goes, so that the choice is by content here too.
        held, rows = _one_apart(rows, group)
    return Reading(
        train=rows, test=held, tokenizer=tokenizer, renderer=renderer, tally=tally, examples=tuple(train.examples)
    )


class Collector:
    """Rows on their way to tokens: rendered one by one, tokenised many at a time."""

    def __init__(
        self,
        reader: Reader,
        renderer: Renderer,
        tokenizer: Tokenizer,
        tally: Tally,
        *,
        length: int,
        limit: int | None,
    ) -> None:
        self.reader = reader
        self.renderer = renderer
        self.tokenizer = tokenizer
        self.tally = tally
        self.length = length
        self.limit = limit
        self.examples: list[tuple[str, Example]] = []
        self.waiting: list[tuple[str, list[Rendered]]] = []
        self.kept: list[list[tuple[Ids, Ids]]] = []

    @property
    def is_full(self) -> bool:
        """As many rows are kept as are wanted."""
        if self.limit is not None and len(self.kept) < self.limit <= len(self.kept) + len(self.waiting):
            self._tokenise()
        return self.limit is not None and len(self.kept) >= self.limit

    def read(self, record: Record) -> None:
        if self.is_full:
            return
        examples = self.reader(record)
        self.tally.formats[self.reader.name] += 1
        group: list[Rendered] = []
        for example in examples:
            rendered = self.renderer(example, place=record.place)
            if isinstance(rendered, LeftOut):
                self.tally.leave_out(rendered.reason, record.place)
                return
            group.append(rendered)
        for note in dict.fromkeys(note for rendered in group for note in rendered.notes):
            self.tally.note(note, record.place)
        self.waiting.append((record.place, group))
        if len(self.examples) < NUM_SAMPLES:
            self.examples += [(record.place, example) for example in examples]
        if len(self.waiting) >= CHUNK:
            self._tokenise()

    def rows(self) -> TokenRows:
        """All that was kept, one document to a row."""
        self._tokenise()
        vocabulary = fingerprint(self.tokenizer)
        return rows_of(
            [document for group in self.kept[: self.limit] for document in group],
            salt=f"{vocabulary}/{self.renderer.template.text}",
            pad_id=padding_id(self.tokenizer),
            vocabulary=vocabulary,
        )

    def _tokenise(self) -> None:
        encoded = iter(encode([text for _, group in self.waiting for text in group], self.tokenizer))
        for place, group in self.waiting:
            self._keep([next(encoded) for _ in group], place)
        self.waiting.clear()

    def _keep(self, group: list[Encoded], place: str) -> None:
        is_cut = any(len(encoded.ids) > self.length for encoded in group)
        if is_cut and len(group) > 1:
            # Two answers are compared to their ends: cutting one of them would decide the comparison.
            self.tally.leave_out(f"an answer does not fit into {self.length} tokens", place)
            return
        documents = [self._document(encoded) for encoded in group]
        if all((labels != IGNORED).any() for _, labels in documents):
            self.kept.append(documents)
            self.tally.num_cut += is_cut
        elif is_cut:
            self.tally.leave_out(f"no supervised token within the first {self.length}", place)
        else:
            self.tally.leave_out("no token is supervised", place)

    def _document(self, encoded: Encoded) -> tuple[Ids, Ids]:
        """Ids and labels, cut to `length`: a row that is cut has no end, and none is made up."""
        ids = encoded.ids[: self.length]
        return ids, aligned(ids, encoded.supervised[: self.length])


def check_counts(place: str, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RecipeError(f"{place}.{name}: {number} found, a whole number of at least 1 expected.")


def _one_apart(rows: TokenRows, group: int) -> tuple[TokenRows, TokenRows]:
    """The group of rows with the smallest key, and all others."""
    groups = torch.arange(rows.num_rows).view(-1, group)
    first = min(range(len(groups)), key=lambda number: rows.keys[number * group])
    others = torch.arange(len(groups)) != first
    return rows.take(groups[first]), rows.take(groups[others].flatten())
