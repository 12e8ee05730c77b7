"""Self-knowledge: a student learns from those of its own answers that prove right. D = {(x, y, phi(x, y)) : y ~ p_S}.

These are the generate-and-filter halves; `loops.rounds` joins them to training. Whether each round trains from the base
model (STaR, rejection sampling, ReST-EM) or goes on with the last one (RAFT, ReST) is the choice of the play.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Message, Rows, Task, Writer
from potstill.knowledge.calculations import equations, holds
from potstill.knowledge.flow import each
from potstill.knowledge.label import MARK, reasoned
from potstill.knowledge.samples import Draw, Measure, Score, measured, reward_of, score_in, spoken
from potstill.knowledge.steps import Sampling, Step, ask_all, chance, conversation, fill, prompt

GIVEN_AWAY = re.compile(r"\b(hint|(was|is|were|as) (given|told)|given answer|told the answer|right answer is)\b", re.I)
"""Words of a rationale that knows its answer beforehand."""


@part("elicitor", paper="Zelikman et al. 2022, arXiv:2203.14465 (STaR)")
def star(
    *,
    student: Writer,
    task: Task,
    demonstrations: Sequence[Mapping[str, str]] = (),
    rationalise: float = 1.0,
    template: str = "",
    hint: str = "",
    above: float = 0.5,
    temperature: float = 0.01,
    top_p: float = 0.9,
    max_tokens: int = 96,
    stop: Sequence[str] = (),
    seed: int = 0,
    name: str = "star",
) -> Step:
    """The student reasons; where its answer is wrong, it reasons again with the right one as a hint.

    Kept are rows whose answer the task grades above 0.5, without the hint; `fields["rationalised"]` says which had one.
    A first attempt that failed stays as a rejected row (id `<row>.0`). demonstrations: {"prompt", "reasoning",
    "answer"}, about ten. rationalise: share of the failures that get a hint. template and hint: the two requests,
    with the gaps $prompt and $answer (the right one). Numbers: repository of the paper. Train each round from the base
    model.
    """
    for pair in demonstrations:
        if set(pair) != {"prompt", "reasoning", "answer"}:
            raise RecipeError(f"{name}.demonstrations: found {sorted(pair)}, expected prompt, reasoning and answer.")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop))
    plain, hinted = template or prompt("chain_of_thought"), hint or prompt("star_hint")
    reward = reward_of(task=task, score=None, judge=None, step=name)

    async def attempt(row: Example, template: str, measure: Measure) -> Example:
        shown = [turn for pair in demonstrations for turn in _turns(pair, template)]
        text = fill(template, **{**row.fields, "prompt": row.prompt, "answer": row.reference})
        messages = conversation(replace(row, turns=(*shown, *row.turns)), text)
        reply = await student.ask(sampling.request(messages, step=name))
        told = reasoned(row.told(reply, by=student, template=template), reply, name)
        graded = told if told.rejection else await measure(told)
        wrong = not graded.rejection and score_in(graded) <= above
        return graded.rejected(name, "wrong answer", raw=reply.text) if wrong else graded

    async def work(row: Example, measure: Measure) -> Sequence[Example]:
        first = await attempt(row, plain, measure)
        if not first.rejection:
            return [_kept(first, rationalised=False).passed(name)]
        failed = replace(first, id=f"{row.id}.0", lineage=replace(first.lineage, parents=(row.id,)))
        if not row.reference:
            return [failed, row.rejected(name, "no reference to give as a hint", raw=failed.raw)]
        if chance(seed, name, row.id).random() >= rationalise:
            return [failed, row.rejected(name, "wrong answer, not rationalised", raw=failed.raw)]
        second = await attempt(row, hinted, measure)
        if not second.rejection and GIVEN_AWAY.search(second.reasoning) and not GIVEN_AWAY.search(row.prompt):
            second = second.rejected(name, "speaks of the hint", raw=second.reasoning)
        return [failed, second if second.rejection else _kept(second, rationalised=True).passed(name)]

    def run(rows: AsyncIterator[Example]) -> Rows:
        measure = reward.begin()
        return each(rows, lambda row: work(row, measure))

    return Step(name=name, writers=(student,), run=run)


@part("elicitor", paper="Yuan et al. 2023, arXiv:2308.01825 (RFT)")
def rejection_sampling(
    *,
    student: Writer,
    task: Task,
    samples: int = 100,
    template: str = "",
    system: str = "",
    above: float = 0.5,
    temperature: float = 0.7,
    top_p: float | None = None,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    name: str = "rejection_sampling",
) -> Step:
    """Many solutions of one question; kept are the right ones that reason differently, each a row (id `<row>.<n>`).

    Right: the task grades the answer above 0.5, and every calculation that is written down checks out. Of those with
    the same sequence of equations the text is kept that is farthest, in edit distance, from all other right ones.
    To pool several models, concatenate their flows. Train from the base model on the originals and these.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop))
    instruction = template or prompt("chain_of_thought")
    reward = reward_of(task=task, score=None, judge=None, step=name)
    _check_samples(samples, temperature, name)

    async def work(row: Example, measure: Measure) -> Sequence[Example]:
        text = fill(instruction, **{**row.fields, "prompt": row.prompt})
        replies = await ask_all(
            student, sampling.request(conversation(row, text, system=system), step=name), samples=samples
        )
        drawn = [
            reasoned(row.child(number).told(reply, by=student, template=instruction), reply, name)
            for number, reply in enumerate(replies)
        ]
        graded = [_right(one, above, name) for one in await measured(drawn, measure)]
        return await asyncio.to_thread(_different, graded, name)

    def run(rows: AsyncIterator[Example]) -> Rows:
        measure = reward.begin()
        return each(rows, lambda row: work(row, measure))

    return Step(name=name, writers=(student,), run=run)


@part("elicitor", paper="Dong et al. 2023, arXiv:2304.06767 (RAFT)")
def raft(
    *,
    student: Writer,
    task: Task | None = None,
    score: Score | None = None,
    judge: Writer | None = None,
    samples: int = 8,
    system: str = "",
    temperature: float = 1.0,
    top_p: float | None = None,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    name: str = "raft",
) -> Step:
    """Of several answers to each prompt the one of the highest reward is kept; `fields["score"]` says how high.

    Exactly one of task, score and judge says what is good. The others stay as rejected rows. Go on from the last model.
    """
    return _best(
        student, 1, None, task=task, score=score, judge=judge, samples=samples, system=system, name=name,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop)),
    )  # fmt: skip


@part("elicitor", paper="Gulcehre et al. 2023, arXiv:2308.08998 (ReST); Singh et al. 2023, arXiv:2312.06585 (ReST-EM)")
def rest(
    *,
    student: Writer,
    task: Task | None = None,
    score: Score | None = None,
    judge: Writer | None = None,
    thresholds: Sequence[float] = (0.5,),
    improve: int = 0,
    samples: int = 32,
    at_most: int = 10,
    system: str = "",
    temperature: float = 1.0,
    top_p: float | None = None,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    name: str = "rest",
) -> Step:
    """Grow: 32 answers to each prompt. Improve: those with a reward above the threshold, at most 10 per prompt.

    thresholds: rising, one for each improve step; improve: which of them this is, from 0 (beyond the last: the last).
    The same student grows the same answers, which the request store remembers: an improve step costs nothing anew.
    ReST-EM (the defaults) has one threshold and trains from the base model; ReST goes on from the last one.
    """
    if not thresholds or list(thresholds) != sorted(set(thresholds)):
        raise RecipeError(f"{name}.thresholds: found {list(thresholds)}, expected numbers that rise.")
    if improve < 0 or at_most < 1:
        raise RecipeError(f"{name}: found improve {improve} and at_most {at_most}, expected 0 and 1 at least.")
    return _best(
        student, at_most, thresholds[min(improve, len(thresholds) - 1)], task=task, score=score, judge=judge,
        samples=samples, system=system, name=name,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop)),
    )  # fmt: skip


def _best(
    student: Writer,
    num: int,
    above: float | None,
    *,
    task: Task | None,
    score: Score | None,
    judge: Writer | None,
    samples: int,
    sampling: Sampling,
    system: str,
    name: str,
) -> Step:
    """The `num` samples of the highest reward, of those above a threshold; earlier ones win among equals."""
    reward = reward_of(task=task, score=score, judge=judge, step=name)
    draw = Draw(writer=student, samples=samples, sampling=sampling, system=system, step=name)

    def chosen(drawn: Sequence[Example]) -> list[Example]:
        worth = {one.id: score_in(one) for one in drawn if not one.rejection}
        fit = [which for which, value in worth.items() if above is None or value > above]
        best = set(sorted(fit, key=lambda which: -worth[which])[:num])
        return [_chosen(one, worth, best, fit, name) for one in drawn]

    async def work(row: Example, measure: Measure) -> Sequence[Example]:
        return chosen(await measured(await draw(row), measure))

    def run(rows: AsyncIterator[Example]) -> Rows:
        measure = reward.begin()
        return each(rows, lambda row: work(row, measure))

    return Step(name=name, writers=(student, *reward.writers), run=run)


def _chosen(one: Example, worth: Mapping[str, float], best: set[str], fit: Sequence[str], name: str) -> Example:
    if one.rejection:
        return one
    if one.id in best:
        return one.passed(name)
    reason = "not among the best" if one.id in fit else "reward at or below the threshold"
    return one.rejected(name, reason, raw=one.answer)


def _right(row: Example, above: float, name: str) -> Example:
    if row.rejection:
        return row
    if score_in(row) <= above:
        return row.rejected(name, "wrong answer", raw=spoken(row))
    wrong = next((pair for pair in equations(row.reasoning) if not holds(*pair)), None)
    return row if wrong is None else row.rejected(name, "a calculation is wrong", raw=spoken(row))


def _different(rows: Sequence[Example], name: str) -> list[Example]:
    """Of the right rows one for each sequence of equations: the text farthest from all other right ones."""
    from rapidfuzz.distance import Levenshtein

    right = [row for row in rows if not row.rejection]
    ways: dict[tuple[tuple[str, str], ...], list[Example]] = {}
    for row in right:
        ways.setdefault(equations(row.reasoning), []).append(row)

    def distance(row: Example) -> int:
        return sum(Levenshtein.distance(spoken(row), spoken(other)) for other in right)

    kept = {(max(same, key=distance) if len(same) > 1 else same[0]).id for same in ways.values()}
    return [
        row if row.rejection
        else row.passed(name) if row.id in kept
        else row.rejected(name, "same equations as another", raw=spoken(row))
        for row in rows
    ]  # fmt: skip


def _kept(row: Example, *, rationalised: bool) -> Example:
    return replace(row, fields={**row.fields, "rationalised": rationalised})


def _turns(pair: Mapping[str, str], template: str) -> tuple[Message, Message]:
    asked = fill(template, prompt=pair["prompt"], answer=pair["answer"])
    said = f"{pair['reasoning']}\n{MARK} {pair['answer']}"
    return Message(role="user", content=asked), Message(role="assistant", content=said)


def _check_samples(samples: int, temperature: float, name: str) -> None:
    if samples < 1 or (samples > 1 and temperature == 0):
        raise RecipeError(f"{name}: found {samples} samples at temperature {temperature:g}; several need one above 0.")
