"""A teacher whose word is on file: the log-probabilities that its server told with the answers that it wrote.

Any OpenAI-compatible server tells, on request, the likeliest tokens at each place of its own answer. A row that was
elicited so has a law at each token of its answer, found by the row's content; read by the student's tokenizer it is a
list of classes and a tail. It is asked of the request store, where it was paid for once.

A token counts only where the student's tokenizer has that very token at that very place: a row whose answer is cut, or
said, otherwise has no law at all, and why is counted. Nothing is said where the server did not speak (of the mark that
ends a turn, mostly): a list without entries, which teaches nothing. Dimension key: B rows, T positions, K kept classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import MissingRowsError, RecipeError, SignalError
from potstill.core.types import IGNORED, Batch, Need, Signal, Sparse
from potstill.core.writing import JSON, Lineage, Message, Raw, Reply, Request, TokenLogProb, content_id
from potstill.data.chat import Reading
from potstill.data.examples import accepted
from potstill.stores.requests import Requests
from potstill.teachers import wire_replies
from potstill.teachers.answered import Row, answered, name_of
from potstill.teachers.crossing import texts_of
from potstill.teachers.fake import FakeTransport
from potstill.teachers.token_names import TokenNames

ACCEPTED = "accepted.jsonl"
LOOKED_AT = 1000
"""Rows that are read before training: their share is known to 2 % then, in seconds."""
MOST_WITHOUT_ID = 0.1
"""Of the listed tokens: a served model with the student's vocabulary leaves only a few names unclear."""
MOST_TOGETHER = 1.01
"""Probabilities add up to 1; some servers round their logarithms to two digits."""

NOT_ASKED = "no teacher was asked for it"
NOT_STORED = "its answer is not in the request store"
UNREADABLE = "its stored answer cannot be read"
SILENT = "the server told no log-probabilities"
OTHERWISE = "its answer is not, token by token, what the teacher wrote"
OTHER_TOKENS = "the server names tokens that the student's tokenizer does not have"
NO_LAW = "what the server told are no probabilities"
REWRITTEN = "the chat template rewrites its answer"


@part("teacher")
def told(
    path: str, *, reading: Reading, k: int = 20, at_least: float = 0.9, rows: str = "", store: str | Requests = ""
) -> Told:
    """What a writer told of the rows at `path`, at most `k` classes a token: rows exported from a flow that asked with
    log_probs.

    reading: of the data that are trained on, which a recipe gives. rows: the flow's folder, or its accepted.jsonl;
    empty: where `path` is. store: the requests' file, as for the writer; empty: the user's. at_least: the share of rows
    that must have a law; the others are taught by labels alone. Raises SignalError, with the reasons counted, where
    fewer have.
    """
    lineages = {row.id: row.lineage for row in accepted(rows or str(Path(path).parent / ACCEPTED))}
    requests = store if isinstance(store, Requests) else Requests(store or None)
    teacher = Told(path, lineages, reading=reading, k=k, store=requests)
    teacher.account.check(at_least, place=path)
    return teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What was told of some tokens in a row of a text: ids and log-probabilities [n, K], the likeliest first."""

    first: int
    """The place of the first of these tokens in the text."""
    ids: Tensor
    log_probs: Tensor
    num_listed: int
    """Alternatives that the server listed."""
    num_without_id: int
    """Those of them that count with the tail, for no id, or several, are called so."""
    sampling: str
    """How the answer was drawn. Most servers tell the model's own law; some the one that they drew from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What is known of the training rows."""

    rows: int
    """Those that were looked at."""
    told: int
    positions: int
    """Supervised tokens of the rows that are told."""
    heard: int
    """Those of them that have a law."""
    num_listed: int
    num_without_id: int
    untold: Mapping[str, int]
    """How many rows have no law, by why."""
    samplings: Mapping[str, int]
    """How many rows were drawn how."""

    def check(self, at_least: float, *, place: str) -> None:
        """Raises SignalError where fewer rows have a law, RecipeError for no share."""
        if not 0.0 <= at_least <= 1.0:
            raise RecipeError(f"told.at_least: found {at_least}, expected a share from 0 to 1.")
        if self.told >= at_least * self.rows:
            return
        reasons = "; ".join(f"{count:,}: {why}" for why, count in self.untold.items())
        raise SignalError(
            f"{place}: of {self.rows:,} rows {self.told:,} have the teacher's log-probabilities, {at_least:.0%} were "
            f"expected ({reasons}). Ask with log_probs, keep answers as they came and give the served model's "
            "tokenizer; or lower at_least, and labels alone teach the others."
        )

    def lines(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines for `potstill check`."""
        return (
            ("rows with log-probabilities", f"{self.told:,} of {self.rows:,}"),
            *((f"  without: {why}", f"{count:,}") for why, count in self.untold.items()),
            ("supervised tokens that have a law", f"{self.heard:,} of {self.positions:,}"),
            ("listed tokens without an id", f"{self.num_without_id:,} of {self.num_listed:,}"),
            *((f"rows drawn at {sampling}", f"{count:,}") for sampling, count in self.samplings.items()),
        )


class Told:
    """Answers from the request store. Slow to ask, for a reply is a long text: remember it (stores.signals).

    lineages: of the rows at `path`, by their id.
    """

    def __init__(
        self, path: str | Path, lineages: Mapping[str, Lineage], *, reading: Reading, k: int, store: Requests
    ) -> None:
        if k < 1:
            raise RecipeError(f"told.k: found {k}, expected at least 1.")
        self._path = path
        self._reading = reading
        self._k = min(k, len(reading.tokenizer))
        self._store = store
        self._rows = answered(path, lineages, reading)
        asked = {pair for one in lineages.values() for pair in zip(one.writers, one.prompts, strict=False)}
        self.identity = f"told:{content_id([list(pair) for pair in sorted(asked)])}:top{k}"

    def __call__(self, batch: Batch, need: Need) -> Signal:
        """Sparse [B, T, K]. Raises MissingRowsError for rows that are not at the path."""
        if need.features:
            raise SignalError(
                f"This teacher has told probabilities only, no '{min(need.features)}'. Take terms over logits, or a "
                "teacher that runs here."
            )
        if not need:
            return Signal()
        if batch.vocabulary != self._reading.train.vocabulary:
            raise SignalError("The batch is written by another tokenizer than the one that the answers were read with.")
        said = silence(batch, k=self._k, size=len(self._reading.tokenizer))
        for text in texts_of(batch):
            law = self._law(text.ids)
            if isinstance(law, str):
                continue
            # Token i is what the position of token i - 1 predicts.
            heard = [row for row in range(len(law.ids)) if text.counted[law.first + row]]
            columns = [text.columns[law.first + row - 1] for row in heard]
            said.ids[text.row, columns] = law.ids[heard].to(said.ids.device)
            said.log_probs[text.row, columns] = law.log_probs[heard].to(said.ids.device)
        return Signal(logits=said)

    @cached_property
    def account(self) -> Account:
        """Of at most LOOKED_AT training rows, evenly spread."""
        rows = self._reading.train
        count = min(rows.num_rows, LOOKED_AT)
        untold, samplings, sums = Counter[str](), Counter[str](), np.zeros(4, dtype=np.int64)
        for document in (number * rows.num_rows // count for number in range(count)):
            span = slice(int(rows.borders[document]), int(rows.borders[document + 1]))
            law = self._law(rows.ids[span].tolist())
            if isinstance(law, str):
                untold[law] += 1
                continue
            supervised = rows.labels[span] != IGNORED
            heard = supervised[law.first - 1 : law.first - 1 + len(law.ids)]
            sums += np.array([int(supervised.sum()), int(heard.sum()), law.num_listed, law.num_without_id])
            samplings[law.sampling] += 1
        positions, heard_of, num_listed, num_without_id = sums.tolist()
        return Account(
            rows=count,
            told=samplings.total(),
            positions=positions,
            heard=heard_of,
            num_listed=num_listed,
            num_without_id=num_without_id,
            untold=dict(untold.most_common()),
            samplings=dict(samplings.most_common()),
        )

    def _law(self, ids: Sequence[int]) -> Law | str:
        """What was told of a text, or why there is nothing. Of several answers that went into a row the last is meant,
        unless only an earlier one says it."""
        row = self._rows.get(name_of(ids))
        if row is None:
            raise MissingRowsError(
                f"{self._path} does not hold a row of {len(ids)} tokens that the teacher is asked about. Train on the "
                "rows of this file, with the template and length that they were read with."
            )
        faults = [NOT_ASKED]
        for key in reversed(row.requests):
            law = self._read(key, ids, row)
            if isinstance(law, Law):
                return law
            faults.append(law)
        return max(faults, key=_FAULTS.index)

    def _read(self, key: str, ids: Sequence[int], row: Row) -> Law | str:
        found = self._store.exchange(key)
        if found is None:
            return NOT_STORED
        asked, raw = found
        try:
            reply = _reply(asked, raw)
        except ValueError:
            return UNREADABLE
        if not reply.log_probs:
            return SILENT
        if not row.stop:
            return REWRITTEN
        return self._matched(reply.log_probs, ids, row, sampling=_sampling(asked))

    def _matched(self, tokens: Sequence[TokenLogProb], ids: Sequence[int], row: Row, *, sampling: str) -> Law | str:
        """The law of the tokens that are the row's, which all of the answer's own text must be."""
        names = self._names
        meant = (own in names.meant(one.token) for one, own in zip(tokens, ids[row.first :], strict=False))
        count = next((number for number, is_it in enumerate(chain(meant, [False])) if not is_it))
        if row.first + count < min(row.stop, len(ids)):
            is_known = count >= len(tokens) or bool(names.meant(tokens[count].token))
            return OTHERWISE if is_known else OTHER_TOKENS
        listed = [name for one in tokens[:count] for name, _ in one.top]
        num_without_id = sum(names.id_of(name) is None for name in listed)
        if num_without_id > MOST_WITHOUT_ID * len(listed):
            return OTHER_TOKENS
        # The first token of a text is predicted by nobody.
        first = max(row.first, 1)
        told_of = tokens[first - row.first : count]
        filled_ids = torch.zeros(len(told_of), self._k, dtype=torch.int64)
        log_probs = torch.full((len(told_of), self._k), -torch.inf)
        for place, one in enumerate(told_of):
            entries = names.entries(one, own=ids[first + place])
            if not math.fsum(math.exp(min(value, 1.0)) for value in entries.values()) <= MOST_TOGETHER:
                return NO_LAW
            best = sorted(entries.items(), key=lambda entry: -entry[1])[: self._k]
            filled_ids[place, : len(best)] = torch.tensor([token for token, _ in best], dtype=torch.int64)
            log_probs[place, : len(best)] = torch.tensor([value for _, value in best])
        return Law(
            first=first,
            ids=filled_ids,
            log_probs=log_probs,
            num_listed=len(listed),
            num_without_id=num_without_id,
            sampling=sampling,
        )

    @cached_property
    def _names(self) -> TokenNames:
        return TokenNames(self._reading.tokenizer)


class Unasked:
    """In the place of a teacher whose answers are yet to be bought: it says nothing, in the shape of what it will."""

    identity = "unasked"

    def __init__(self, *, size: int, k: int) -> None:
        self._size, self._k = size, k

    def __call__(self, batch: Batch, need: Need) -> Signal:
        return Signal(logits=silence(batch, k=self._k, size=self._size) if need.logits else None)


def silence(batch: Batch, *, k: int, size: int) -> Sparse:
    """Lists without entries at all positions: [B, T, K]."""
    shape, device = (*batch.mask.shape, k), batch.mask.device
    return Sparse(
        ids=torch.zeros(shape, dtype=torch.int64, device=device),
        log_probs=torch.full(shape, -torch.inf, device=device),
        size=size,
    )


def _reply(asked: Mapping[str, JSON], raw: Raw) -> Reply:
    """A stored answer, of a server or of a stand-in. Raises ValueError for one that nobody can read."""
    extra = asked.get("extra")
    # Of the request only its form matters for reading.
    messages = (Message(role="user"),) if asked.get("messages") else ()
    request = Request(
        messages=messages, prompt="" if messages else "asked", extra=extra if isinstance(extra, dict) else {}
    )
    try:
        return wire_replies.read(request, raw.body)
    except ValueError:
        return FakeTransport(str).read(request, raw)


def _sampling(asked: Mapping[str, JSON]) -> str:
    """temperature 0.7, top_p 0.9: what was said of how the answer is to be drawn."""
    said = [f"{name} {asked[name]}" for name in ("temperature", "top_p", "top_k", "min_p") if name in asked]
    return ", ".join(said) or "the server's own settings"


_FAULTS: Sequence[str] = (
    NOT_ASKED, NOT_STORED, UNREADABLE, SILENT, REWRITTEN, OTHERWISE, OTHER_TOKENS, NO_LAW,
)  # fmt: skip
"""Of several answers' faults the one that came nearest to a law is told."""
