"""Evol-Instruct: a task is rewritten, round after round, into harder and rarer ones, each answered by the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Reply, Writer
from potstill.knowledge.faults import is_short_and_sorry
from potstill.knowledge.flow import each
from potstill.knowledge.steps import Sampling, Step, chance, conversation, fill, prompt, refused

IN_DEPTH = {
    "constraint": "add one more condition or requirement.",
    "deepen": "where it asks about something, ask about it more deeply and more broadly.",
    "concretise": "replace something general in it by something more specific.",
    "reasoning": "where a little thinking would do, make it need several steps of reasoning.",
}
IN_BREADTH = "breadth"
LEAKED = re.compile(
    r"\b(harder task|new task|given task|(first|second) task|task below|rewritten (task|prompt))\b", re.I
)
"""Words of our own prompts that have no place in a task."""


@part("elicitor", paper="Xu et al. 2023, arXiv:2304.12244 (WizardLM)")
def evol_instruct(
    *,
    teacher: Writer,
    rounds: int = 4,
    judge: Writer | None = None,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_tokens: int = 2048,
    seed: int = 0,
    name: str = "evol_instruct",
) -> Step:
    """Each row stays and brings up to one evolved and answered task per round (ids `<row>.1` and so on).

    A round chooses one of 4 rewritings in depth and 1 in breadth, all equally likely, and asks the teacher for the task
    and then for its answer, both at temperature 1, top_p 0.95, 2,048 tokens (repository). The eliminator of the paper
    (section 3.2) drops an evolution without gain over its parent, as `judge` says (default: the teacher, temperature
    0); one with words of the prompt; an answer that says "sorry" in fewer than 80 words; one of punctuation and stop
    words only. What is dropped is kept as a rejected row, and the next round starts again from its parent.
    """
    if rounds < 1:
        raise RecipeError(f"{name}.rounds: found {rounds}, expected at least 1.")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    verdict = Sampling(temperature=0.0, max_tokens=8)
    comparing = judge or teacher

    async def evolve(parent: Example, number: int, root: Example) -> Example:
        way = chance(seed, name, root.id, number).choice([*IN_DEPTH, IN_BREADTH])
        template = prompt("evolve_breadth" if way == IN_BREADTH else "evolve_depth")
        fields = {**root.fields, "evolution": way, "round": number}
        row = parent.child(number, answer="", reasoning="", reference="", fields=fields)
        row = replace(row, id=f"{root.id}.{number}")
        text = fill(template, prompt=parent.prompt, method=IN_DEPTH.get(way, ""))
        reply = await teacher.ask(sampling.request(conversation(Example(id=""), text), step=name))
        row = row.told(reply, by=teacher, template=template, prompt=_bare(reply.text))
        return refused(row, name, reply) or await gained(row, parent)

    async def gained(row: Example, parent: Example) -> Example:
        if LEAKED.search(row.prompt) and not LEAKED.search(parent.prompt):
            return row.rejected(name, "has words of the prompt", raw=row.prompt)
        template = prompt("evolve_equal")
        text = fill(template, first=parent.prompt, second=row.prompt)
        reply = await comparing.ask(verdict.request(conversation(Example(id=""), text), step=name))
        row = row.told(reply, by=comparing, template=template)
        word = reply.text.strip().lower()
        if reply.failure is not None or not word.startswith(("equal", "different")):
            return row.rejected(name, "no verdict on its gain", raw=reply.text)
        return row.rejected(name, "no gain over its parent", raw=row.prompt) if word.startswith("equal") else row

    async def answer(row: Example) -> Example:
        reply = await teacher.ask(sampling.request(conversation(row, row.prompt), step=name))
        row = row.told(reply, by=teacher, template="$prompt", answer=reply.text.strip())
        return refused(row, name, reply) or _eliminated(row, reply, name) or row.passed(name)

    async def work(root: Example) -> Iterable[Example]:
        rows, parent = [root], root
        for number in range(1, rounds + 1):
            row = await evolve(parent, number, root)
            if not row.rejection:
                row = await answer(row)
            rows.append(row)
            parent = parent if row.rejection else row
        return rows

    writers = (teacher,) if judge is None else (teacher, judge)
    return Step(name=name, writers=writers, run=lambda rows: each(rows, work))


def _eliminated(row: Example, reply: Reply, name: str) -> Example | None:
    words = re.findall(r"[a-z']+", reply.text.lower())
    if is_short_and_sorry(reply.text):
        return row.rejected(name, "the answer says sorry", raw=reply.text)
    has_number = any(character.isdigit() for character in reply.text)
    if not has_number and all(word in _stop_words() for word in words):
        return row.rejected(name, "the answer says nothing", raw=reply.text)
    return None


def _bare(text: str) -> str:
    """The task without a title that some models put before it."""
    return re.sub(r"^\s*(#+\s*)?((harder|new|rewritten)\s+)?task\s*#*\s*:\s*", "", text.strip(), flags=re.I)


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)
