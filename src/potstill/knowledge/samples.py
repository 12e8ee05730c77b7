"""Several answers to one question, and what each is worth: by a task, a function of the row, or a judge's points."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from potstill.core.catalog import find, part
from potstill.core.errors import RecipeError
from potstill.core.writing import JSON, Example, Message, Reply, Request, Task, Writer
from potstill.knowledge.filtering import tripped
from potstill.knowledge.flow import each
from potstill.knowledge.judge import judged, question_of, rate_additively
from potstill.knowledge.label import MARK
from potstill.knowledge.steps import Sampling, Step, ask_all, conversation, fill, refused
from potstill.tasks.workers import Workers

Measure: TypeAlias = Callable[[Example], Awaitable[Example]]
"""A row to the same with `fields["score"]`, or rejected."""
Score: TypeAlias = str | Callable[[Example], float]
"""A function of the row, or where it is installed, as "package.module:function"."""


@part("elicitor")
def candidates(
    *,
    student: Writer,
    samples: int = 4,
    template: str = "$prompt",
    system: str = "",
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_tokens: int = 1024,
    stop: Sequence[str] = (),
    name: str = "candidates",
) -> Step:
    """Several answers of the student to one prompt, side by side in `fields["candidates"]`: what a judge chooses among.

    One that is no whole answer becomes a rejected row of its own (id `<row>.<sample>`).
    """
    draw = Draw(
        writer=student, samples=samples, template=template, system=system, step=name,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop)),
    )  # fmt: skip

    async def work(row: Example) -> Sequence[Example]:
        drawn = await draw(row)
        whole = [one for one in drawn if not one.rejection]
        rejected = [one for one in drawn if one.rejection]
        if not whole:
            return [*rejected, row.rejected(name, "no whole answer", raw=row.prompt)]
        fields: dict[str, JSON] = {**row.fields, "candidates": [one.answer for one in whole]}
        return [*rejected, joined(row, whole, fields=fields).passed(name)]

    return Step(name=name, writers=(student,), run=lambda rows: each(rows, work))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a writer answers one prompt several times. Called with a row it gives a child per sample, in order."""

    writer: Writer
    samples: int
    sampling: Sampling
    step: str
    template: str = "$prompt"
    system: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"{self.step}.samples: found {self.samples}, expected at least 1.")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise RecipeError(f"{self.step}: {self.samples} samples at temperature 0 would be the same answer.")

    async def __call__(self, row: Example) -> list[Example]:
        text = fill(self.template, **{**row.fields, "prompt": row.prompt})
        request = self.sampling.request(conversation(row, text, system=self.system), step=self.step)
        replies = await ask_all(self.writer, request, samples=self.samples)
        return [self._child(row, number, reply) for number, reply in enumerate(replies)]

    def _child(self, row: Example, number: int, reply: Reply) -> Example:
        told = row.child(number).told(reply, by=self.writer, template=self.template)
        answered = replace(told, answer=reply.text.strip(), reasoning=reply.reasoning.strip())
        return refused(told, self.step, reply) or answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What an answer is worth. `begin` gives a measure for each flow."""

    begin: Callable[[], Measure]
    writers: tuple[Writer, ...] = ()


def reward_of(
    *, task: Task | None, score: Score | None, judge: Writer | None, judgements: int = 3, step: str
) -> Reward:
    """The reward from the one of the three that is given: a task's grade (0 to 1), a function of the row, a judge.

    A judge gives 0 to 5 points, the mean of 3 judgements at temperature 0.7. Raises RecipeError where none or several
    are given.
    """
    given = [word for word, thing in (("task", task), ("score", score), ("judge", judge)) if thing is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RecipeError(f"{step}: found {found} of task, score and judge; expected exactly one to say what is good.")
    if judge is not None:
        return Reward(begin=lambda: _judged_by(judge, judgements, step), writers=(judge,))
    if task is not None:
        return Reward(begin=lambda: _in_threads(lambda row: task.grade(row, row.answer), 0, step))
    assert score is not None, "one of the three is given"
    function = find("elicitor", score, place=f"{step}.score") if isinstance(score, str) else score
    # One at a time: nobody promised that a function of the user may run in several threads.
    return Reward(begin=lambda: _in_threads(function, 1, step))


async def measured(rows: Sequence[Example], measure: Measure) -> list[Example]:
    """All of them at once, in order; the rejected ones stay as they are."""

    async def one(row: Example) -> Example:
        return row if row.rejection else await measure(row)

    return await asyncio.gather(*map(one, rows))


def score_in(row: Example) -> float:
    """What a measure has put there."""
    value = row.fields["score"]
    assert isinstance(value, (int, float)), "a measured row has a score"
    return float(value)


def joined(row: Example, children: Sequence[Example], **changes: object) -> Example:
    """The row made of its children: what they were told is in its lineage, what they cost is its cost."""
    start = len(row.lineage.requests)
    own = [row.lineage, *(child.lineage for child in children)]
    lineage = replace(
        row.lineage,
        requests=own[0].requests + tuple(key for part in own[1:] for key in part.requests[start:]),
        writers=own[0].writers + tuple(who for part in own[1:] for who in part.writers[start:]),
        prompts=own[0].prompts + tuple(text for part in own[1:] for text in part.prompts[start:]),
        dollars=sum(part.dollars for part in own),
    )
    return replace(row, lineage=lineage, **changes)  # type: ignore[arg-type]


def paired(row: Example, answers: Sequence[str], scores: Sequence[float], step: str, *, least_gap: float) -> Example:
    """The row with the best answer as `answer` and `chosen`, the worst as `rejected`; a tie rejects it.

    Of equal answers the first is taken. least_gap: what is nearer than this counts as a tie, and so does equality.
    """
    fields: dict[str, JSON] = {**row.fields, "candidates": list(answers), "scores": list(scores)}
    told = replace(row, fields=fields)
    best, worst = max(scores), min(scores)
    if best == worst or best - worst < least_gap:
        return told.rejected(step, "a tie" if len(answers) > 1 else "fewer than two answers", raw=answers[0])
    chosen, rejected = answers[scores.index(best)], answers[scores.index(worst)]
    return replace(told, answer=chosen, reasoning="", fields={**fields, "chosen": chosen, "rejected": rejected}).passed(
        step
    )


def spoken(row: Example) -> str:
    """What the row's writer said: the reasoning where it is kept apart, then the answer."""
    return f"{row.reasoning}\n{MARK} {row.answer}" if row.reasoning else row.answer


def words(replies: Sequence[Reply]) -> str:
    """What was said, or why nothing was: the raw text of a rejection."""
    return "\n---\n".join(reply.failure.message if reply.failure else reply.text for reply in replies)


def plainly(sampling: Sampling, text: str, step: str) -> Request:
    """The text as the only thing that is said."""
    return sampling.request((Message(role="user", content=text),), step=step)


def _in_threads(worth: Callable[[Example], float], workers: int, step: str) -> Measure:
    free = Workers(workers)

    async def measure(row: Example) -> Example:
        try:
            value = float(await free.run(worth, row))
        except Exception as error:  # noqa: BLE001 - tripped raises what concerns every row
            return tripped(row, step, error)
        if not math.isfinite(value):
            return row.rejected(step, "score is no finite number", raw=row.answer)
        return replace(row, fields={**row.fields, "score": value})

    return measure


def _judged_by(judge: Writer, judgements: int, step: str) -> Measure:
    async def measure(row: Example) -> Example:
        rating = await rate_additively(
            judge, question_of(row), row.answer, reference=row.reference, judgements=judgements, step=step
        )
        told = judged(row, rating.replies, judge, rating.template)
        if rating.score is None:
            return told.rejected(step, "no rating to be read", raw=words(rating.replies))
        fields: dict[str, JSON] = {**told.fields, "score": rating.score, "ratings": list(rating.scores)}
        return replace(told, fields=fields)

    return measure
