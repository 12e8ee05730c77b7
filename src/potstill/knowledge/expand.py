"""Expansion: from a few seed tasks to many. D = {(x, y) : x ~ p_T(x | I + c), y ~ p_T(y | I + x)}, c drawn from a pool
that grows by what was accepted.

The pool makes each request depend on earlier answers. So that many requests are under way and every run still gives
the same rows, call number n sees the pool as it was after call n - lag, whatever the answers take.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, RunError
from potstill.core.writing import JSON, Example, Reply, Request, Rows, Writer
from potstill.knowledge.faults import length_fault, opening_fault, word_fault
from potstill.knowledge.filters import SELF_INSTRUCT_WORDS
from potstill.knowledge.flow import each
from potstill.knowledge.rouge import RougePool
from potstill.knowledge.steps import Sampling, Step, chance, conversation, fill, prompt, refused

ITEM = re.compile(r"^\s*(\d+)\s*[.)]\s*", re.MULTILINE)
NO_INPUT = "<noinput>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The seeds, what was accepted so far, and their texts for the gate."""

    human: tuple[Example, ...]
    machine: list[Example] = field(default_factory=list)
    known: RougePool = field(default_factory=RougePool)


Ask = Callable[[int, Pool], Request]
"""The request of a call, from its number and the pool that it sees."""
Read = Callable[[Reply], list[Example]]
"""The candidates in an answer; a candidate that cannot be one is rejected already."""


@part("elicitor", paper="Wang et al. 2022, arXiv:2212.10560")
def self_instruct(
    *,
    teacher: Writer,
    demonstrations: int = 8,
    machine: int = 2,
    last_item: int = 15,
    above: float = 0.7,
    completion: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.5,
    presence_penalty: float = 2.0,
    max_tokens: int = 1024,
    lag: int = 32,
    patience: int = 50,
    seed: int = 0,
    name: str = "self_instruct",
) -> Step:
    """New instructions after those of the incoming rows, without end: let `until` or `limit` of the flow stop it.

    Each call shows 8 tasks, 2 of them written by the machine (fewer while it has written fewer), in a numbered list to
    be continued to item 15. Dropped are: the last item of an answer that was cut short, 3 words or fewer, more than
    150, words about what a text model cannot do, "Write a program", a first letter that is punctuation or not ASCII,
    and what has a ROUGE-L F above 0.7 with a seed or an accepted row (numbers: repository of the paper). Accepted rows
    carry the mean and the 10 nearest in `fields["rouge_l"]`. completion: send the list as raw text to be continued, for
    a model without a chat template. Raises RunError after `patience` calls in a row without a new task.
    """
    sampling = Sampling(
        temperature=temperature, top_p=top_p, presence_penalty=presence_penalty, max_tokens=max_tokens,
        stop=(f"\n{last_item + 1}", f"{last_item + 1}.", f"{last_item + 1} ."),
    )  # fmt: skip
    template = prompt("self_instruct")

    def ask(call: int, pool: Pool) -> Request:
        dice = chance(seed, name, call)
        written = dice.sample(pool.machine, min(machine, len(pool.machine)))
        shown = written + dice.sample(pool.human, min(demonstrations - len(written), len(pool.human)))
        dice.shuffle(shown)
        lines = "\n".join(f"{number}. {_one_line(row.prompt)}" for number, row in enumerate(shown, start=1))
        return _request(sampling, fill(template, demonstrations=lines, next=len(shown) + 1), completion, name)

    def read(reply: Reply) -> list[Example]:
        texts = [_one_line(text) for text in ITEM.split(reply.text)[::2]]
        whole = [text for text in texts if text]
        cut = whole[-1:] if reply.finish == "length" else []
        rows = [Example(id="", prompt=text[:1].upper() + text[1:]) for text in whole[: len(whole) - len(cut)]]
        return rows + [Example(id="", prompt=text).rejected(name, "cut short", raw=text) for text in cut]

    return _growing(
        name, teacher, template, ask, read, lambda row: _fault(row.prompt), above=above, lag=lag, patience=patience
    )


@part("elicitor", paper="Taori et al. 2023 (Stanford Alpaca)")
def alpaca(
    *,
    teacher: Writer,
    num: int = 20,
    demonstrations: int = 3,
    above: float = 0.7,
    completion: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 3072,
    logit_bias: Mapping[str, float] | None = None,
    lag: int = 32,
    patience: int = 50,
    seed: int = 0,
    name: str = "alpaca",
) -> Step:
    """New tasks with input and output, 20 to a call, after 3 seeds; without end: let `until` or `limit` stop it.

    One stage: the same answer brings instruction, input (`fields["input"]`) and output (`row.answer`). Filters and gate
    are self_instruct's, on the instruction. Demonstrations come from the seeds only. logit_bias: the published run put
    -100 on the end-of-text token (its id depends on the model), so that all 20 tasks are written.
    """
    sampling = Sampling(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=(f"\n{num + 1}", f"{num + 1}."),
        logit_bias=logit_bias or {},
    )  # fmt: skip
    template = prompt("alpaca")

    def ask(call: int, pool: Pool) -> Request:
        shown = chance(seed, name, call).sample(pool.human, min(demonstrations, len(pool.human)))
        blocks = "\n".join(_block(number, row) for number, row in enumerate(shown, start=1))
        text = fill(template, num=num, demonstrations=blocks, next=len(shown) + 1)
        return _request(sampling, text, completion, name)

    def read(reply: Reply) -> list[Example]:
        blocks = [block for block in f"Instruction: {reply.text}".split("###") if block.strip()]
        rows = [_task(block, name) for block in blocks]
        if reply.finish == "length" and rows and not rows[-1].rejection:
            rows[-1] = rows[-1].rejected(name, "cut short", raw=blocks[-1].strip())
        return rows

    return _growing(
        name, teacher, template, ask, read, lambda row: _fault(row.prompt), above=above, lag=lag, patience=patience
    )


@part("elicitor", paper="Wang et al. 2022, arXiv:2212.10560")
def classify_task(
    *,
    teacher: Writer,
    demonstrations: Sequence[Mapping[str, str]] = (),
    temperature: float = 0.0,
    max_tokens: int = 3,
    name: str = "classify_task",
) -> Step:
    """Whether a task asks for a label: True or False in `fields["is_classification"]`.

    demonstrations: {"prompt", "label"} pairs with the labels Yes and No; the paper shows 31.
    """
    sampling, template = Sampling(temperature=temperature, max_tokens=max_tokens), prompt("classify_task")
    shown = demonstrations or DEFAULT_KINDS
    lines = "\n".join(f"Task: {pair['prompt']}\nIs it one of choosing a label? {pair['label']}\n" for pair in shown)

    async def work(row: Example) -> Sequence[Example]:
        text = fill(template, demonstrations=lines, prompt=row.prompt)
        reply = await teacher.ask(sampling.request(conversation(Example(id=row.id), text), step=name))
        told = row.told(reply, by=teacher, template=template)
        word = reply.text.strip().strip(".").lower()
        # Three tokens are all it gets, so a cut is no fault here.
        if reply.finish != "length" and (dropped := refused(told, name, reply)) is not None:
            return [dropped]
        if not word.startswith(("yes", "no")):
            return [told.rejected(name, "neither yes nor no", raw=reply.text)]
        return [replace(told, fields={**row.fields, "is_classification": word.startswith("yes")}).passed(name)]

    return Step(name=name, writers=(teacher,), run=lambda rows: each(rows, work))


@part("elicitor", paper="Wang et al. 2022, arXiv:2212.10560")
def instances(
    *,
    teacher: Writer,
    at_most: int = 5,
    temperature: float = 0.0,
    presence_penalty: float = 1.5,
    max_tokens: int = 350,
    max_tokens_of_labels: int = 300,
    name: str = "instances",
) -> Step:
    """Inputs and outputs for a task, each a row: `fields["input"]` and `answer`.

    A task of choosing a label (`fields["is_classification"]`) is asked label first, so that all labels occur; others
    input first. Dropped are instances whose input is their output, empty outputs, outputs that end with a colon, and
    all with the same input and different outputs.
    """
    open_ended = Sampling(temperature=temperature, presence_penalty=presence_penalty, max_tokens=max_tokens)
    of_labels = replace(open_ended, max_tokens=max_tokens_of_labels)

    async def work(row: Example) -> Sequence[Example]:
        labels_first = row.fields.get("is_classification") is True
        template = prompt("instances_label_first" if labels_first else "instances_input_first")
        sampling = of_labels if labels_first else open_ended
        text = fill(template, prompt=row.prompt)
        reply = await teacher.ask(sampling.request(conversation(Example(id=row.id), text), step=name))
        told = row.told(reply, by=teacher, template=template)
        if reply.failure is not None:
            return [told.rejected(name, reply.failure.reason, raw=reply.failure.message)]
        pairs = _pairs(reply.text, first="Label" if labels_first else "Input")
        if reply.finish == "length":
            pairs = pairs[:-1]
        if not pairs:
            return [told.rejected(name, "no instance", raw=reply.text)]
        both = [(right, left) if labels_first else (left, right) for left, right in pairs[:at_most]]
        return [_instance(told, number, pair, both, name) for number, pair in enumerate(both)]

    return Step(name=name, writers=(teacher,), run=lambda rows: each(rows, work))


DEFAULT_KINDS = (
    {"prompt": "Say whether the review is positive or negative.", "label": "Yes"},
    {"prompt": "Write a short poem about the sea.", "label": "No"},
    {"prompt": "Which of these four cities lies in Asia?", "label": "Yes"},
    {"prompt": "Summarise the paragraph in one sentence.", "label": "No"},
    {"prompt": "Decide if the second sentence follows from the first.", "label": "Yes"},
    {"prompt": "Give three reasons to get up early.", "label": "No"},
    {"prompt": "Is the word a noun, a verb or an adjective?", "label": "Yes"},
    {"prompt": "Translate the sentence into French.", "label": "No"},
)


def _growing(
    name: str,
    teacher: Writer,
    template: str,
    ask: Ask,
    read: Read,
    fault: Callable[[Example], str],
    *,
    above: float,
    lag: int,
    patience: int,
) -> Step:
    """Seeds in, new tasks out. Calls are under way `lag` deep; their answers are folded into the pool in order."""
    if lag < 1 or patience < 1:
        raise RecipeError(f"{name}: lag and patience must be at least 1, found {lag} and {patience}.")

    def fold(call: int, reply: Reply, pool: Pool) -> list[Example]:
        """The rows of one answer, judged in order; the accepted ones join the pool."""
        if reply.failure is not None:
            failed = Example(id=f"{name}.{call}").told(reply, by=teacher, template=template)
            return [failed.rejected(name, reply.failure.reason, raw=reply.failure.message)]
        # One answer brings many rows: the first bears its cost.
        told = []
        for number, candidate in enumerate(read(reply)):
            share = reply if number == 0 else replace(reply, dollars=0.0)
            row = replace(candidate, id=f"{name}.{call}.{number}").told(share, by=teacher, template=template)
            told.append(judged(row, pool))
        return told

    def judged(row: Example, pool: Pool) -> Example:
        if row.rejection:
            return row
        if wrong := fault(row):
            return row.rejected(name, wrong, raw=row.prompt)
        likeness = pool.known.likeness(row.prompt)
        if likeness.most > above:
            return row.rejected(name, f"too near to an earlier task (above {above:g})", raw=row.prompt)
        near: dict[str, JSON] = {"mean": likeness.mean, "nearest": [list(pair) for pair in likeness.nearest]}
        kept = replace(row, fields={**row.fields, "rouge_l": near}).passed(name)
        pool.known.add(kept.id, kept.prompt)
        pool.machine.append(kept)
        return kept

    async def run(rows: AsyncIterator[Example]) -> Rows:
        seeds = []
        async for row in rows:
            if row.rejection:
                yield row
            else:
                seeds.append(row)
        if not seeds:
            raise RecipeError(f"{name}: there are no seed tasks. Give rows with a prompt each.")
        pool = Pool(human=tuple(seeds), known=RougePool((row.id, row.prompt) for row in seeds))
        under_way: deque[asyncio.Task[Reply]] = deque()
        fruitless = 0
        try:
            for call in itertools.count():
                while len(under_way) < lag:
                    under_way.append(asyncio.create_task(_asked(teacher, ask(call + len(under_way), pool))))
                told = fold(call, await under_way.popleft(), pool)
                for row in told:
                    yield row
                fruitless = 0 if any(not row.rejection for row in told) else fruitless + 1
                if fruitless >= patience:
                    last = told[-1].rejection if told else "an empty answer"
                    raise RunError(
                        f"{name}: {patience} calls in a row gave no new task (the last: {last}). See rejected.jsonl."
                        "partial; give more seeds, a better teacher, or ask for fewer rows."
                    )
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    return Step(name=name, writers=(teacher,), run=run)


async def _asked(teacher: Writer, request: Request) -> Reply:
    return await teacher.ask(request)


def _request(sampling: Sampling, text: str, completion: bool, name: str) -> Request:
    if completion:
        return sampling.request(prompt=text, step=name)
    return sampling.request(conversation(Example(id=""), text), step=name)


def _fault(text: str) -> str:
    """What Self-Instruct drops by the instruction's own text."""
    return (
        length_fault(text, min_words=4, max_words=150) or opening_fault(text) or word_fault(text, SELF_INSTRUCT_WORDS)
    )


def _block(number: int, row: Example) -> str:
    given = str(row.fields.get("input", "")) or NO_INPUT
    parts = (f"Instruction: {_one_line(row.prompt)}", f"Input:\n{given}", f"Output:\n{row.answer}")
    return "\n".join(["###", *(f"{number}. {part}" for part in parts)])


def _task(block: str, name: str) -> Example:
    """An Alpaca block: instruction, input, output."""
    found = re.fullmatch(
        r"(?:\s*\d+\s*\.)?\s*Instruction:\s*(.*?)\s*(?:\d+\s*\.)?\s*Input:\s*(.*?)\s*(?:\d+\s*\.)?\s*Output:\s*(.*)",
        block.strip(), re.DOTALL,
    )  # fmt: skip
    if found is None:
        return Example(id="").rejected(name, "not instruction, input and output", raw=block.strip())
    instruction, given, output = (text.strip() for text in found.groups())
    given = "" if given.lower() == NO_INPUT else given
    row = Example(id="", prompt=instruction, answer=output, fields={"input": given})
    return row if output else row.rejected(name, "empty output", raw=block.strip())


def _pairs(text: str, *, first: str) -> list[tuple[str, str]]:
    """(first, second) texts of "Input: ... Output: ..." or "Label: ... Input: ..." in the order of the answer."""
    second = "Output" if first == "Input" else "Input"
    found = re.findall(
        rf"^{first}:\s*(.*?)\s*^{second}:\s*(.*?)\s*(?=^{first}:|^Example \d+|^Task:|\Z)",
        text,
        re.DOTALL | re.MULTILINE,
    )
    return [(left.strip(), right.strip()) for left, right in found]


def _instance(
    row: Example, number: int, pair: tuple[str, str], others: Sequence[tuple[str, str]], name: str
) -> Example:
    given, output = pair
    given = "" if given.lower() in ("none", NO_INPUT, "n/a") else given
    made = row.child(number, answer=output, fields={**row.fields, "input": given})
    made = replace(made, lineage=replace(made.lineage, dollars=row.lineage.dollars if number == 0 else 0.0))
    if not output:
        return made.rejected(name, "empty output", raw=given)
    if given == output:
        return made.rejected(name, "the output is the input", raw=output)
    if output.endswith(":"):
        return made.rejected(name, "the output ends with a colon", raw=output)
    if any(other != pair and other[0] == pair[0] for other in others):
        return made.rejected(name, "the same input has different outputs", raw=f"{given}\n{output}")
    return made.passed(name)


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(":")
