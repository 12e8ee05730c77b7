"""Figures in words: the headline, the verdict, the table. The command line, Markdown and HTML all say it from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from potstill.report.figures import Estimate, Summary
from potstill.report.numbers import (
    MINUS,
    PLUS_MINUS,
    TIE,
    count,
    milliseconds,
    percents,
    perplexity,
    points,
    seconds,
    signed_perplexity,
    size,
)

Tone: TypeAlias = Literal["", "better", "worse"]

UNKNOWN = "\u2013"
SPREAD_NOTE = (
    f"Mean {PLUS_MINUS} sample standard deviation (n {MINUS} 1) over seeds; {UNKNOWN} where one seed cannot show it."
)
TITLES = {"alone": "Student alone", "distilled": "Distilled student", "teacher": "Teacher"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One row of the table: what it is called, how it is written, which way is better."""

    key: str
    title: str
    write: Callable[[float], str]
    better: Literal[-1, 0, 1]
    """1 where more is better, -1 where less is, 0 where it depends."""
    note: str = ""
    repeats: bool = True
    """Differs from seed to seed, so that a mean needs its spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    title: str
    cells: tuple[str, ...]
    tone: Tone = ""
    """What the cell of the change means; empty where it is within its spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Finished strings, ready for rich, Markdown or HTML."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def table(summary: Summary) -> Table:
    """One row per measure that any arm has, one column per arm; mean and sample sd over seeds, then the change."""
    compared = {"alone", "distilled"} <= summary.arms.keys()
    rows = []
    for measure in MEASURES:
        estimates = [arm.estimate(measure.key) for arm in summary.arms.values()]
        if not any(estimates):
            continue
        cells = [written(estimate, measure) for estimate in estimates]
        change = summary.change(measure.key)
        if compared:
            cells.append(changed(change, measure))
        rows.append(Row(title=measure.title, cells=tuple(cells), tone=_tone(change, measure.better)))
    columns = ["Measure", *(title(name) for name in summary.arms), *(["Change"] if compared else [])]
    return Table(columns=tuple(columns), rows=tuple(rows))


def arms(summary: Summary) -> Table | None:
    """One row per arm: its cost, its leading score, and what it has over the first. None where no arms are named."""
    if not summary.names_arms:
        return None
    lead, shown = lead_of(summary), {measure.key: measure for measure in MEASURES}
    # Rounds are of one student, so its size is no news and the score stays in sight.
    keys = (*(ROUND if in_rounds(summary) else ("parameters",)), "seconds")
    rows = []
    for name in summary.arms:
        cost = [written(summary.estimate(name, key), shown[key]) for key in keys]
        change = summary.change(lead.key, name) if name in summary.students[1:] else None
        cells = (
            *cost,
            lead.cell(summary.estimate(name, lead.key)),
            UNKNOWN if change is None else lead.gain_cell(change),
        )
        rows.append(Row(title=title(name), cells=cells, tone=_tone(change, lead.better)))
    score = f"{lead.name}, {lead.unit}" if lead.unit else lead.name
    over = f"Over {title(summary.students[0]).lower()}{', points' if lead.unit else ''}"
    return Table(columns=("Arm", *(shown[key].title for key in keys), score, over), rows=tuple(rows))


def in_rounds(summary: Summary) -> bool:
    """The arms are one student, round by round."""
    return any(summary.estimate(name, ROUND[0]) for name in summary.students)


def notes(summary: Summary) -> tuple[str, ...]:
    """What the reader of the table must know."""
    lines = [SPREAD_NOTE]
    if summary.names_arms:
        first = title(summary.students[0]).lower()
        lines.append(f"Over {first}: seed by seed; coloured where its mean exceeds its own deviation.")
        lines.append(
            "Perplexity, accuracy and what follows them are taken on each arm's own test part; of arms with other data "
            "they cannot be compared."
        )
    if {"alone", "distilled"} <= summary.arms.keys():
        lines.append("Change: distilled minus alone, seed by seed; coloured where its mean exceeds its own deviation.")
    for measure in MEASURES:
        if measure.note and any(arm.estimate(measure.key) for arm in summary.arms.values()):
            lines.append(f"{measure.title.partition(', ')[0]}: {measure.note}")
    return tuple(lines)


def headline(summary: Summary) -> str:
    """Who gets what, in one sentence."""
    if summary.names_arms:
        return _headline_of_arms(summary)
    lead = lead_of(summary)
    same = "the same student alone" if "distilled" in summary.arms else "the student alone"
    parts: list[str] = []
    for name, subject in (("distilled", "the distilled student"), ("alone", same), ("teacher", "the teacher")):
        estimate = summary.estimate(name, lead.key)
        if estimate is not None:
            parts.append(f"{subject} {'' if parts else lead.verb}{lead.amount(estimate)}")
    if not parts:
        return "No accuracy was measured in this run."
    sentence = ", ".join(parts)
    seeds = {e.num_seeds for name in ("distilled", "alone") if (e := summary.estimate(name, lead.key)) is not None}
    return sentence[0].upper() + sentence[1:] + (f" ({_seeds(seeds)})." if seeds else ".")


def verdict(summary: Summary) -> str:
    """Whether distilling was worth it, said plainly also where it was not."""
    if summary.names_arms:
        return _verdict_on_arms(summary)
    lead = lead_of(summary)
    change = summary.change(lead.key)
    if change is None:
        return _why_no_gain(summary)
    gained = change.mean * lead.better
    if gained <= 0:
        said = f"Distillation did not gain: {lead.gain(change)} against the student alone."
    elif change.sd is not None and gained <= change.sd:
        said = f"Distillation did not clearly gain: {lead.gain(change)}, which is within the spread over seeds."
    else:
        said = f"Distillation gained{lead.colon} {lead.gain(change)}."
    if change.num_seeds == 1:
        return f"{said} One seed cannot show how much of it is chance."
    return f"{said} It was better on {wins(summary)} seeds."


def _headline_of_arms(summary: Summary) -> str:
    lead = lead_of(summary)
    estimates = {name: summary.estimate(name, lead.key) for name in summary.students}
    told = [f"{lead.amount(each)} ({title(name).lower()})" for name, each in estimates.items() if each is not None]
    if not told:
        return f"No {lead.name.lower()} was measured in this run."
    teacher = summary.estimate("teacher", lead.key)
    ways = f"Trained {len(told)} ways, the" if len(told) > 1 else "The"
    ways = "Round by round, the" if in_rounds(summary) else ways
    sentence = f"{ways} student {lead.verb}{', '.join(told)}"
    sentence += "" if teacher is None else f"; the teacher {lead.amount(teacher)}"
    return f"{sentence}; {_seeds({each.num_seeds for each in estimates.values() if each is not None})}."


def _verdict_on_arms(summary: Summary) -> str:
    lead, (first, *others) = lead_of(summary), summary.students
    changes = {name: change for name in others if (change := summary.change(lead.key, name)) is not None}
    if not changes:
        return "This run has no two arms with a seed in common, so it cannot say what any of them gained."
    told = [f"{title(name).lower()} {lead.gain(change)}" for name, change in changes.items()]
    said = f"Against {title(first).lower()}: {', '.join(told)}."
    if all(change.num_seeds == 1 for change in changes.values()):
        return f"{said} One seed cannot show how much of it is chance."
    return said


def wins(summary: Summary) -> str:
    """On how many of the paired seeds the distilled student is strictly better."""
    lead = lead_of(summary)
    changes = summary.changes(lead.key)
    return f"{sum(change.amount * lead.better > 0 for change in changes)} of {len(changes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """The measure that a run is judged by, and how it is spoken of."""

    key: str
    name: str
    better: Literal[-1, 1]
    scale: float
    """From the score to the number that is written."""
    write: Callable[[float], str]
    """A score as that number."""
    signed: Callable[[float], str]
    """A difference of scores, with its sign."""
    unit: str
    """Behind the number of a score."""
    change_unit: str
    """Behind the number of a change."""
    verb: str
    colon: str = ""

    def amount(self, estimate: Estimate) -> str:
        """A score in a sentence: 96.1 % +- 0.3."""
        spread = "" if estimate.sd is None else f"{TIE}{PLUS_MINUS}{TIE}{self.write(estimate.sd)}"
        return f"{self.write(estimate.mean)}{TIE * bool(self.unit)}{self.unit}{spread}"

    def gain(self, change: Estimate) -> str:
        """A change in a sentence: +1.9 points +- 0.4."""
        spread = "" if change.sd is None else f"{TIE}{PLUS_MINUS}{TIE}{self.write(change.sd)}"
        return f"{self.signed(change.mean)}{TIE}{self.change_unit}{spread}"

    def cell(self, estimate: Estimate | None) -> str:
        """A score in a column of the table of runs."""
        if estimate is None:
            return UNKNOWN
        return f"{self.write(estimate.mean)} {PLUS_MINUS} {UNKNOWN if estimate.sd is None else self.write(estimate.sd)}"

    def gain_cell(self, change: Estimate) -> str:
        """A change in such a column."""
        return f"{self.signed(change.mean)} {PLUS_MINUS} {UNKNOWN if change.sd is None else self.write(change.sd)}"


def lead_of(summary: Summary) -> Lead:
    """Language models are judged by the problems they solve, else by perplexity, all others by their accuracy."""
    if any(arm.estimate(SOLVED.key) for arm in summary.arms.values()):
        return SOLVED
    by_perplexity = any(arm.estimate(PERPLEXITY.key) for arm in summary.arms.values())
    return PERPLEXITY if by_perplexity else ACCURACY


def title(arm: str) -> str:
    return TITLES.get(arm, arm.replace("_", " ").replace("-", " ").capitalize())


def tone(summary: Summary) -> Tone:
    """Whether the change of the leading measure exceeds its own spread, and which way."""
    lead = lead_of(summary)
    return _tone(summary.change(lead.key), lead.better)


def written(estimate: Estimate | None, measure: Measure) -> str:
    """A cell of the table: mean and spread, or the sign for what is not known."""
    if estimate is None:
        return UNKNOWN
    mean = measure.write(estimate.mean)
    if not measure.repeats:
        return mean
    return f"{mean} {PLUS_MINUS} {UNKNOWN if estimate.sd is None else measure.write(estimate.sd)}"


def changed(change: Estimate | None, measure: Measure) -> str:
    """A cell of the last column: a signed difference."""
    if change is None:
        return UNKNOWN
    if change.mean == 0.0 and not measure.repeats:
        return "same"
    amount = measure.write(abs(change.mean))
    sign = "" if amount == measure.write(0.0) else "+" if change.mean > 0 else MINUS
    if not measure.repeats:
        return f"{sign}{amount}"
    return f"{sign}{amount} {PLUS_MINUS} {UNKNOWN if change.sd is None else measure.write(change.sd)}"


def _tone(change: Estimate | None, better: int) -> Tone:
    if change is None or change.sd is None or not better or abs(change.mean) <= change.sd:
        return ""
    return "better" if change.mean * better > 0 else "worse"


def _seeds(numbers: set[int]) -> str:
    if numbers == {1}:
        return "one seed"
    return f"{' and '.join(str(number) for number in sorted(numbers))} seeds"


def _why_no_gain(summary: Summary) -> str:
    for name, missing in (("alone", "student alone"), ("distilled", "distilled student")):
        if name not in summary.arms:
            return f"This run has no {missing}, so it cannot say what distilling gained."
    return "No seed was scored both alone and distilled, so the run cannot say what distilling gained."


ACCURACY = Lead(
    key="accuracy",
    name="Accuracy",
    better=1,
    scale=100.0,
    write=percents,
    signed=points,
    unit="%",
    change_unit="points",
    verb="gets ",
)
SOLVED = Lead(
    key="solved",
    name="Problems solved",
    better=1,
    scale=100.0,
    write=percents,
    signed=points,
    unit="%",
    change_unit="points",
    verb="solves ",
)
PERPLEXITY = Lead(
    key="perplexity",
    name="Perplexity",
    better=-1,
    scale=1.0,
    write=perplexity,
    signed=signed_perplexity,
    unit="",
    change_unit="in perplexity",
    verb="reaches a perplexity of ",
    colon=":",
)
ROUND = ("rows", "accepted", "dollars")
"""What a round of rows has that other arms have not."""
MEASURES = (
    Measure(key="rows", title="Rows", write=count, better=0, note="rows that a round accepted and trained on."),
    Measure(key="accepted", title="Accepted, %", write=percents, better=0, note="share of a round's rows."),
    Measure(key="dollars", title="Dollars", write="{:,.4f}".format, better=0, note="paid in a round, to all writers."),
    Measure(
        key="solved",
        title="Problems solved, %",
        write=percents,
        better=1,
        note="mean grade of the task's problems, answered by the likeliest next token each time.",
    ),
    Measure(
        key="cut_short",
        title="Answers cut short, %",
        write=percents,
        better=-1,
        note="answers of the task that had no end within max_tokens.",
    ),
    Measure(
        key="perplexity",
        title="Perplexity",
        write=perplexity,
        better=-1,
        note="exp of the mean negative log-likelihood of the supervised tokens of the test part.",
    ),
    Measure(
        key="bits_per_byte",
        title="Bits per byte",
        write="{:.3f}".format,
        better=-1,
        note="the same likelihood by bytes of text: models of different tokenizers can be compared by it alone.",
    ),
    Measure(key="accuracy", title="Accuracy, %", write=percents, better=1),
    Measure(
        key="agreement",
        title="Agreement, %",
        write=percents,
        better=1,
        note="how often student and teacher choose the same class or token.",
    ),
    Measure(
        key="kl_to_teacher",
        title="KL to teacher, nats",
        write="{:.3f}".format,
        better=-1,
        note="mean forward KL divergence from the teacher at temperature 1; less is closer.",
    ),
    Measure(
        key="nll",
        title="NLL, nats",
        write="{:.3f}".format,
        better=-1,
        note="mean negative log-likelihood of the labels.",
    ),
    Measure(
        key="ece",
        title="ECE, %",
        write=percents,
        better=-1,
        note="expected calibration error, the gap between confidence and accuracy in equal bins.",
    ),
    Measure(key="parameters", title="Parameters", write=count, better=0, repeats=False),
    Measure(key="bytes", title="Size", write=size, better=0, repeats=False),
    Measure(
        key="latency_ms",
        title="Latency, ms",
        write=milliseconds,
        better=0,
        note="median of one example on this machine.",
    ),
    Measure(
        key="tokens_per_second",
        title="Tokens per second",
        write=count,
        better=0,
        note="read in one forward pass of one example on this machine.",
    ),
    Measure(key="seconds", title="Training, s", write=seconds, better=0, note="seconds of training per seed."),
)
