"""Feedback: a teacher judges, criticises and corrects what the student wrote. D = {(x, y, phi(x, y)) : y ~ p_S(y | x)}.

For several rounds, put the student's next answers through again: `correct(rounds=...)`, or `loops.rounds` with training
in between. Pairs stand in `fields["chosen"]` and `fields["rejected"]`, with the chosen answer as the row's own.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.writing import JSON, Example, Task, Writer
from potstill.knowledge.filtering import checked, text_of
from potstill.knowledge.flow import each
from potstill.knowledge.judge import RUBRIC, Combine, Verdict, compare, compare_softly, judged, question_of, rate
from potstill.knowledge.samples import joined, paired, reward_of, score_in, spoken, words
from potstill.knowledge.steps import Sampling, Step, fill, prompt, put

STOP = "NOTHING TO CHANGE"
ENOUGH = 0.5
"""A grade above this is a right answer."""


@part("elicitor", paper="Zheng et al. 2023, arXiv:2306.05685")
def preference(
    *,
    judge: Writer,
    rubric: str = RUBRIC,
    combine: Combine = "agree",
    judgements: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    name: str = "preference",
) -> Step:
    """The judge compares the row's `fields["candidates"]` in pairs, each pair in both orders, with reasons.

    An answer's score is its mean preference over the others; the best is chosen, the worst rejected, ties are dropped.
    combine: "agree" makes a choice that changes with the order a tie, "average" takes the mean of both orders.
    `fields["preference"]` is the preference for the chosen answer over the rejected one, in 0..1.
    """

    def ask(row: Example, first: str, second: str) -> Awaitable[Verdict]:
        return compare(
            judge, question_of(row), first, second, reference=row.reference, rubric=rubric, combine=combine,
            judgements=judgements, temperature=temperature, max_tokens=max_tokens, step=name,
        )  # fmt: skip

    return _compared(judge, ask, name)


@part("elicitor", paper="Lee et al. 2023, arXiv:2309.00267 (RLAIF)")
def soft_preference(
    *, judge: Writer, rubric: str = RUBRIC, clamp: Sequence[float] = (0.0, 1.0), name: str = "soft_preference"
) -> Step:
    """As `preference`, from the log-probabilities of "1" and "2", averaged over both orders: a soft label.

    clamp: bounds of each probability (Constitutional AI: 0.4 and 0.6 behind a chain of thought). Where the server gives
    no log-probabilities the number that was written counts as certain.
    """
    if len(clamp) != 2 or not 0 <= clamp[0] <= clamp[1] <= 1:
        raise RecipeError(f"{name}.clamp: found {list(clamp)}, expected two rising numbers in 0..1.")
    low, high = clamp

    def ask(row: Example, first: str, second: str) -> Awaitable[Verdict]:
        return compare_softly(
            judge, question_of(row), first, second, reference=row.reference, rubric=rubric, clamp=(low, high), step=name
        )

    return _compared(judge, ask, name)


@part("elicitor")
def rubric_scores(
    *,
    judge: Writer,
    rubrics: Mapping[str, str],
    on: str = "answer",
    lowest: int = 1,
    highest: int = 5,
    judgements: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    name: str = "rubric_scores",
) -> Step:
    """Rates the answer by several rubrics, each asked apart: `fields["rubrics"]` by name, and their mean in "score".

    rubrics: what counts, by name. A row that some rubric gets no readable rating for is rejected.
    """
    if not rubrics:
        raise RecipeError(f"{name}.rubrics: found none, expected a name and what counts for each.")

    async def decide(row: Example) -> Example:
        ratings = await asyncio.gather(
            *(
                rate(
                    judge, question_of(row), text_of(row, on), reference=row.reference, rubric=rubric, lowest=lowest,
                    highest=highest, judgements=judgements, temperature=temperature, max_tokens=max_tokens, step=name,
                )
                for rubric in rubrics.values()
            )
        )  # fmt: skip
        told = row
        for rating in ratings:
            told = judged(told, rating.replies, judge, rating.template)
        scores: dict[str, JSON] = {}
        for word, rating in zip(rubrics, ratings, strict=True):
            if rating.score is None:
                return told.rejected(name, f"no rating to be read for '{word}'", raw=words(rating.replies))
            scores[word] = rating.score
        mean = fmean(rating.score for rating in ratings if rating.score is not None)
        return replace(told, fields={**told.fields, "rubrics": scores, "score": mean})

    return checked(name, lambda: decide, writers=(judge,))


@part("elicitor")
def critique(
    *,
    teacher: Writer,
    on: str = "answer",
    rubric: str = RUBRIC,
    temperature: float | None = None,
    max_tokens: int = 1024,
    name: str = "critique",
) -> Step:
    """What should be better about the answer, in words: `fields["critique"]`, empty where nothing should be."""
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)

    async def decide(row: Example) -> Example:
        told, said = await criticised(
            row, text_of(row, on), teacher, sampling, rubric=rubric, step=name, reference=row.reference
        )
        return told if told.rejection else replace(told, fields={**told.fields, "critique": said})

    return checked(name, lambda: decide, writers=(teacher,))


@part("elicitor")
def correct(
    *,
    teacher: Writer,
    rubric: str = RUBRIC,
    rounds: int = 1,
    task: Task | None = None,
    template: str = "",
    temperature: float | None = None,
    max_tokens: int = 1024,
    name: str = "correct",
) -> Step:
    """The teacher criticises the student's answer (`row.answer`) and writes it anew, for so many rounds.

    The corrected answer becomes the row's, and `chosen` beside the student's own as `rejected`;
    `fields["critiques"]` holds the remarks. An answer with nothing to change passes as it is, without a pair.
    task: what it grades above 0.5 passes unasked; only mistakes go to the teacher (Chen et al. 2023, arXiv:2310.18628).
    template: one request in place of critique and revision, with the gaps $prompt, $answer and $reference.
    """
    check_rounds(rounds, name)
    if template and rounds > 1:
        raise RecipeError(f"{name}.rounds: found {rounds}, expected 1 with a template, which is asked once.")
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    reward = None if task is None else reward_of(task=task, score=None, judge=None, step=name)

    async def written(row: Example) -> Example:
        if not template:
            return await refined(row, teacher, teacher, sampling, rubric=rubric, rounds=rounds, step=name)
        text = fill(template, prompt=row.prompt, answer=spoken(row), reference=row.reference)
        told, reply = await put(teacher, row, text, sampling=sampling, step=name, template=template)
        return told if told.rejection else _changed(row, told, reply.text.strip(), remarks=())

    def begin() -> Callable[[Example], Awaitable[Example]]:
        measure = None if reward is None else reward.begin()

        async def decide(row: Example) -> Example:
            if not row.answer:
                return row.rejected(name, "no answer to correct")
            graded = row if measure is None else await measure(row)
            is_right = measure is not None and not graded.rejection and score_in(graded) > ENOUGH
            return row if is_right else graded if graded.rejection else await written(row)

        return decide

    return checked(name, begin, writers=(teacher,))


async def refined(
    row: Example,
    critic: Writer,
    writer: Writer,
    sampling: Sampling,
    *,
    rubric: str,
    rounds: int,
    step: str,
    shows_reference: bool = True,
) -> Example:
    """The row's answer criticised and revised until there is nothing to change, or for so many rounds.

    shows_reference: to the critic.
    """
    draft, remarks = spoken(row), list[JSON]()
    reference = row.reference if shows_reference else ""
    now = replace(row, answer=draft, reasoning="")
    for _ in range(rounds):
        now, said = await criticised(now, now.answer, critic, sampling, rubric=rubric, step=step, reference=reference)
        if now.rejection or not said:
            break
        remarks.append(said)
        now = await revised(now, said, writer, sampling, step=step)
        if now.rejection:
            break
    return now if now.rejection else _changed(row, now, now.answer, remarks=remarks)


def check_rounds(rounds: int, step: str) -> None:
    if rounds < 1:
        raise RecipeError(f"{step}.rounds: found {rounds}, expected at least 1.")


async def criticised(
    row: Example, answer: str, critic: Writer, sampling: Sampling, *, rubric: str, step: str, reference: str
) -> tuple[Example, str]:
    """The told row, and the remarks on the answer: empty where nothing is to change."""
    template = prompt("critique")
    known = f"\nThe right answer, which the writer did not see:\n{reference}\n" if reference else ""
    text = fill(template, question=question_of(row), answer=answer, rubric=rubric, reference=known, stop=STOP)
    told, reply = await put(critic, row, text, sampling=sampling, step=step, template=template)
    if told.rejection:
        return told, ""
    # Some say a word more: the mark alone on the last line is what stops.
    last = reply.text.strip().rpartition("\n")[2]
    return told, "" if last.strip(" .*\"'").upper() == STOP else reply.text.strip()


async def revised(
    row: Example, remarks: str, writer: Writer, sampling: Sampling, *, step: str, template: str = ""
) -> Example:
    """The row with its answer written anew after the remarks."""
    template = template or prompt("revise")
    text = fill(template, question=question_of(row), answer=row.answer, critique=remarks)
    told, reply = await put(writer, row, text, sampling=sampling, step=step, template=template)
    return told if told.rejection else replace(told, answer=reply.text.strip())


def _changed(row: Example, told: Example, answer: str, *, remarks: Sequence[JSON]) -> Example:
    """The told row with the answer that takes the place of the row's own, and both as a pair where they differ."""
    draft = spoken(row)
    fields: dict[str, JSON] = {**told.fields, "draft": draft, "critiques": list(remarks)}
    if answer == draft:
        return replace(told, answer=row.answer, reasoning=row.reasoning, fields=fields)
    return replace(told, answer=answer, reasoning="", fields={**fields, "chosen": answer, "rejected": draft})


def _compared(judge: Writer, ask: Callable[[Example, str, str], Awaitable[Verdict]], name: str) -> Step:
    """Every pair of candidates by `ask`; the best and the worst by the mean over the others."""

    async def work(row: Example) -> Sequence[Example]:
        answers = row.fields.get("candidates")
        if not isinstance(answers, list) or len(answers) < 2:
            return [row.rejected(name, "fewer than two candidates", raw=row.answer)]
        texts = [str(answer) for answer in answers]
        pairs = list(itertools.combinations(range(len(texts)), 2))
        verdicts = await asyncio.gather(*(ask(row, texts[one], texts[other]) for one, other in pairs))
        told = joined(row, [judged(row.child(0), one.replies, judge, one.template) for one in verdicts])
        table: dict[tuple[int, int], float] = {}
        for (one, other), verdict in zip(pairs, verdicts, strict=True):
            if verdict.preference is None:
                return [told.rejected(name, "no verdict to be read", raw=words(verdict.replies))]
            table[one, other], table[other, one] = verdict.preference, 1 - verdict.preference
        everyone = range(len(texts))
        scores = [fmean(table[one, other] for other in everyone if other != one) for one in everyone]
        rated = paired(told, texts, [_rounded(score) for score in scores], name, least_gap=0.0)
        if rated.rejection:
            return [rated]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        return [replace(rated, fields={**rated.fields, "preference": table[best, worst]})]

    return Step(name=name, writers=(judge,), run=lambda rows: each(rows, work))


def _rounded(score: float) -> float:
    """Without the last digits, in which equal scores may differ."""
    assert math.isfinite(score), "a mean of probabilities is a number"
    return round(score, 9)
