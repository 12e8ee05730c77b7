"""Features: not only what the teacher says, but how sure it is. D = {(x, y, phi(x, y; theta_T))}.

    filled = fill_signals(elicited, teacher, "features", tokenizer=student.tokenizer)
    fit(Offline(student, remembered(filled.signals)), Objective(term("forward_kl")), filled.data.train, ...)

A white-box teacher's logits and layers go to a signal store (`fill_signals`), and so do the log-probabilities that a
server told with its answers (`fill_told`). These are enough, too, for a law over a few options (`soft_labels`).
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.types import Teacher
from potstill.core.writing import JSON, Example, Lineage, Reply, TokenLogProb, Writer
from potstill.data.chat import ChatData, chat
from potstill.data.exports import Reasoning, export_rows
from potstill.data.tokens import Tokenizer
from potstill.knowledge.flow import each
from potstill.knowledge.judge import MOST_ALTERNATIVES
from potstill.knowledge.steps import Sampling, Step, conversation, fill, prompt
from potstill.stores.requests import Requests
from potstill.stores.sketch import Sampled, Sketch, Top
from potstill.teachers.remembered import Built, build
from potstill.teachers.told import Account, Told

ROWS, SIGNALS = "rows.jsonl", "signals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a teacher says about every row of a flow, and the rows as data that will find it again."""

    data: ChatData
    signals: Path
    """For `teachers.remembered`."""
    built: Built
    account: Account | None = None
    """Of what a server told: how many rows have it, and why the others have not."""


def fill_signals(
    rows: Iterable[Example],
    teacher: Teacher,
    folder: str | Path,
    *,
    tokenizer: str | Tokenizer,
    sketch: Sketch | None = Sampled(),  # noqa: B008 - frozen
    layers: Sequence[str] = (),
    reasoning: Reasoning = "text",
    batch: int = 8,
    length: int = 512,
    seed: int = 0,
    template: str = "own",
    test_share: float = 0.05,
    device: torch.device | str = "cpu",
) -> Filled:
    """Ask a white-box teacher about the living rows, and store what it says; call it again to go on after a kill.

    Writes rows.jsonl and signals/ into `folder`. Train on `data` as it is returned: signals are found by the content
    of tokenised rows, so another length or template would miss them. sketch, layers: what is kept of the logits
    (None: nothing) and which layers, as for `remembered.build`. Rows for testing are stored too.
    Raises DataError where no row is left, UserError where the store there was made otherwise.
    """
    place = Path(folder)
    file = export_rows(rows, place / ROWS, format="chat", reasoning=reasoning).path
    data = chat(
        str(file), tokenizer=tokenizer, batch=batch, length=length, seed=seed, template=template, test_share=test_share
    )
    return _filled(data, teacher, place, batch=batch, sketch=sketch, layers=layers, device=device)


def fill_told(
    rows: Iterable[Example],
    folder: str | Path,
    *,
    tokenizer: str | Tokenizer,
    store: str | Requests = "",
    k: int = 20,
    at_least: float = 0.9,
    reasoning: Reasoning = "text",
    batch: int = 8,
    length: int = 512,
    seed: int = 0,
    template: str = "own",
    test_share: float = 0.05,
) -> Filled:
    """Store the log-probabilities that a server told with the living rows' answers, asked with log_probs: nothing is
    asked now. Call it again to go on after a kill.

    tokenizer: the served model's, which the student must have. store, k, at_least: see `teachers.told`. The rest is
    that of `fill_signals`. Rows that were told nothing stay in the data, for terms that learn from labels.
    Raises SignalError, with the reasons counted, where too few rows were told.
    """
    place = Path(folder)
    lineages: dict[str, Lineage] = {}

    def noted() -> Iterator[Example]:
        for row in rows:
            lineages[row.id] = row.lineage
            yield row

    file = export_rows(noted(), place / ROWS, format="chat", reasoning=reasoning).path
    data = chat(
        str(file), tokenizer=tokenizer, batch=batch, length=length, seed=seed, template=template, test_share=test_share
    )
    requests = store if isinstance(store, Requests) else Requests(store or None)
    teacher = Told(file, lineages, reading=data.reading, k=k, store=requests)
    teacher.account.check(at_least, place=str(file))
    return replace(_filled(data, teacher, place, batch=batch, sketch=Top(k=k)), account=teacher.account)


def _filled(
    data: ChatData,
    teacher: Teacher,
    place: Path,
    *,
    batch: int,
    sketch: Sketch | None,
    layers: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Filled:
    """What the teacher says about both parts of the data, in `place`."""
    built = Built(batches=0, rows=0, positions=0)
    for source in (data.train, data.test):
        if not len(source):
            continue
        one = build(
            place / SIGNALS, teacher, source, batches=math.ceil(len(source) / batch), sketch=sketch, layers=layers,
            template=data.reading.renderer.template.fingerprint, device=device,
        )  # fmt: skip
        built = Built(
            batches=built.batches + one.batches,
            rows=built.rows + one.rows,
            positions=built.positions + one.positions,
        )
    return Filled(data=data, signals=place / SIGNALS, built=built)


@part("elicitor")
def soft_labels(*, teacher: Writer, options: Sequence[str], name: str = "soft_labels") -> Step:
    """The teacher's probability of each option: `fields["probabilities"]` by option, summing to 1; the answer is the
    likeliest.

    It is asked for a letter, and the server's log-probabilities of the letters are read; one that is not among the 20
    listed counts as impossible. `fields["covered"]` is how much probability the letters had together.
    """
    if not 2 <= len(options) <= MOST_ALTERNATIVES or len(set(options)) < len(options):
        raise RecipeError(f"{name}.options: found {list(options)}, expected 2 to {MOST_ALTERNATIVES} that differ.")
    letters = string.ascii_uppercase[: len(options)]
    template, sampling = prompt("soft_labels"), Sampling(temperature=0.0, max_tokens=4, log_probs=MOST_ALTERNATIVES)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))

    async def work(row: Example) -> Sequence[Example]:
        text = fill(template, prompt=row.prompt, options=listed)
        reply = await teacher.ask(sampling.request(conversation(row, text), step=name))
        told = row.told(reply, by=teacher, template=template)
        if reply.failure is not None:
            return [told.rejected(name, reply.failure.reason, raw=reply.failure.message)]
        token = _letter(reply, letters)
        if token is None:
            reason = "no log-probabilities" if reply.log_probs is None else "no letter of an option"
            return [told.rejected(name, reason, raw=reply.text)]
        chances = [_chance(token, letter) for letter in letters]
        covered = math.fsum(chances)
        table: dict[str, JSON] = {option: one / covered for option, one in zip(options, chances, strict=True)}
        likeliest = options[chances.index(max(chances))]
        fields: dict[str, JSON] = {**told.fields, "probabilities": table, "covered": covered}
        return [replace(told, answer=likeliest, fields=fields).passed(name)]

    return Step(name=name, writers=(teacher,), run=lambda rows: each(rows, work))


def _letter(reply: Reply, letters: str) -> TokenLogProb | None:
    """The first token that is a letter of an option."""
    return next((token for token in reply.log_probs or () if token.token.strip() in [*letters]), None)


def _chance(token: TokenLogProb, letter: str) -> float:
    """Of all spellings of the letter, with and without a space."""
    listed = dict(token.top) | {token.token: token.log_prob}
    return math.fsum(math.exp(log_prob) for word, log_prob in listed.items() if word.strip() == letter)
