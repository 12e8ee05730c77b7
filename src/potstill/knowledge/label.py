"""Labeling: the inputs are there, the teacher answers them. D = {(x, y) : x ~ X, y ~ p_T(y | I + c + x)}."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Message, Reply, Writer
from potstill.knowledge.filtering import spelled
from potstill.knowledge.flow import each, grouped
from potstill.knowledge.steps import Sampling, Step, ask_all, chance, conversation, fill, prompt, refused

MARK = "####"
"""What stands before the final answer of a reasoned one, as in GSM8K."""


@part("elicitor", paper="Wei et al. 2022, arXiv:2201.11903")
def label(
    *,
    teacher: Writer,
    samples: int = 1,
    chain_of_thought: bool = False,
    template: str = "",
    system: str = "",
    demonstrations: Sequence[Mapping[str, str]] = (),
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    log_probs: int | None = None,
    name: str = "label",
) -> Step:
    """The teacher answers each row's prompt; of several samples each becomes a row of its own.

    template: an instruction around the prompt, with the gap $prompt and gaps for the row's fields. demonstrations:
    {"prompt", "answer"} pairs, shown as earlier turns. chain_of_thought: asks for reasoning, then the answer after
    "#### "; they go to `reasoning` and `answer` of the row, and an answer without the mark is rejected.
    """
    if samples < 1:
        raise RecipeError(f"{name}.samples: found {samples}, expected at least 1.")
    if samples > 1 and temperature == 0:
        raise RecipeError(f"{name}: {samples} samples at temperature 0 would be the same answer {samples} times.")
    sampling = Sampling(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop), seed=seed, log_probs=log_probs
    )  # fmt: skip
    shown = tuple(turn for pair in demonstrations for turn in _turns(pair, name))
    instruction = template or (prompt("chain_of_thought") if chain_of_thought else "$prompt")

    def read(row: Example, reply: Reply) -> Example:
        told = row.told(reply, by=teacher, template=instruction)
        if chain_of_thought:
            found = reasoned(told, reply, name)
            return found if found.rejection else found.passed(name)
        if (dropped := refused(told, name, reply)) is not None:
            return dropped
        return told.passed(name, answer=reply.text.strip(), reasoning=reply.reasoning.strip())

    async def work(row: Example) -> Iterable[Example]:
        text = fill(instruction, **{**row.fields, "prompt": row.prompt})
        messages = conversation(row, text, system=system, shown=shown)
        replies = await ask_all(teacher, sampling.request(messages, step=name), samples=samples)
        rows = [row] if samples == 1 else [row.child(number) for number in range(samples)]
        return [read(one, reply) for one, reply in zip(rows, replies, strict=True)]

    return Step(name=name, writers=(teacher,), run=lambda rows: each(rows, work))


@part("elicitor", paper="Wang et al. 2022, arXiv:2203.11171")
def self_consistency(*, at_least: float = 0.0, name: str = "self_consistency") -> Step:
    """Of the samples of one question keep the first whose answer most of them give; the others are rejected.

    at_least: share of the living samples that must agree, in 0..1. The share goes to `fields["agreement"]`. Answers are
    compared as text, case and spaces apart: normalise them before where 1,000 and 1000 should be one.
    """

    async def work(rows: Sequence[Example]) -> Iterable[Example]:
        votes = Counter(spelled(row.answer) for row in rows)
        winner, count = votes.most_common(1)[0]  # of equals the one that came first
        share = count / len(rows)
        chosen = next(row for row in rows if spelled(row.answer) == winner)
        if share < at_least:
            return [row.rejected(name, f"fewer than {at_least:.0%} agree", raw=row.answer) for row in rows]
        return [
            row.passed(name, fields={**row.fields, "agreement": share})
            if row is chosen
            else row.rejected(name, "outvoted" if spelled(row.answer) != winner else "said already", raw=row.answer)
            for row in rows
        ]

    return Step(name=name, run=lambda rows: grouped(rows, _question, work))


@part("elicitor", paper="Mukherjee et al. 2023, arXiv:2306.02707 (Orca)")
def system_messages(
    *, bank: Mapping[str, str], shares: Mapping[str, Mapping[str, float]], seed: int = 0, name: str = "system_messages"
) -> Step:
    """Gives each row a system message drawn from a bank, with shares per source: what explanation tuning asks with.

    bank: messages by name. shares: for each `fields["source"]` (or "" for all others) the share of each name; shares of
    a source are taken relative to their sum. The draw depends on the seed and the row's id alone.
    """
    for source, table in shares.items():
        wrong = sorted(set(table) - set(bank)) or (table if not sum(table.values()) > 0 else None)
        if wrong:
            raise RecipeError(f"{name}.shares[{source!r}]: found {wrong}, expected shares of: {', '.join(bank)}.")

    async def work(row: Example) -> Iterable[Example]:
        source = str(row.fields.get("source", ""))
        table = shares.get(source, shares.get(""))
        if table is None:
            return [row.rejected(name, f"no shares for the source '{source}'", raw=row.prompt)]
        (chosen,) = chance(seed, name, row.id).choices(list(table), weights=list(table.values()))
        return [row.passed(name, system=bank[chosen], fields={**row.fields, "system_message": chosen})]

    return Step(name=name, run=lambda rows: each(rows, work))


def reasoned(told: Example, reply: Reply, step: str) -> Example:
    """A told row whose reply reasons, aloud or before it speaks, and gives the answer after "#### "; else rejected."""
    if (dropped := refused(told, step, reply)) is not None:
        return dropped
    reasoning, mark, answer = reply.text.rpartition(MARK)
    if not mark or not answer.strip():
        return told.rejected(step, f"no answer after {MARK}", raw=reply.text)
    thought = "\n".join(filter(None, (reply.reasoning.strip(), reasoning.strip())))
    return replace(told, answer=answer.strip(), reasoning=thought)


def _turns(pair: Mapping[str, str], name: str) -> tuple[Message, Message]:
    if set(pair) != {"prompt", "answer"}:
        raise RecipeError(f"{name}.demonstrations: found the keys {sorted(pair)}, expected 'prompt' and 'answer'.")
    return Message(role="user", content=pair["prompt"]), Message(role="assistant", content=pair["answer"])


def _question(row: Example) -> str:
    return row.lineage.parents[0] if row.lineage.parents else row.id
