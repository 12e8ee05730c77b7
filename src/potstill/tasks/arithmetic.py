"""A world of word problems of two or three steps, with solutions that can be checked. It knows no model.

A problem is a start ("Mia has 3 bags of 6 plums."), events ("Mia eats 4 plums."), perhaps a second person or a price,
and a question. Each step of the solution is one equation; the answer stands behind ####, as in GSM8K (Cobbe et al.
2021). Which side of the split a problem is on follows from its equations alone, so no held-out computation is ever
seen in training, under whatever names.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from potstill.tasks import answers

Split: TypeAlias = Literal["train", "test"]

LARGEST = 60
"""No number in a problem or its solution is larger."""
TEST_ONE_IN = 10
"""The share of all computations that is held out."""

NAMES = (
    "Mia", "Tom", "Ann", "Ben", "Eva", "Max", "Zoe", "Sam", "Lea", "Jon", "Ida", "Leo",
    "Amy", "Dan", "Kim", "Ray", "Sue", "Bob", "Ella", "Hugo", "Lucy", "Omar", "Nina", "Paul",
)  # fmt: skip
EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
WHOLE = re.compile(r"-?\d+")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question, one way to solve it that ends in "#### answer", and the exact answer."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """What is counted, what it comes in, and how one gets and loses some."""

    name: str
    holder: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]


THINGS = (
    Thing(name="plums", holder="bags", gains=("buys", "picks"), losses=("eats", "sells")),
    Thing(name="apples", holder="crates", gains=("picks", "gets"), losses=("eats", "drops")),
    Thing(name="eggs", holder="boxes", gains=("buys", "finds"), losses=("breaks", "cooks")),
    Thing(name="pens", holder="packs", gains=("buys", "gets"), losses=("loses", "lends")),
    Thing(name="cards", holder="packs", gains=("wins", "finds"), losses=("loses", "sells")),
    Thing(name="coins", holder="rows", gains=("finds", "wins"), losses=("spends", "loses")),
    Thing(name="books", holder="piles", gains=("buys", "gets"), losses=("lends", "sells")),
    Thing(name="shells", holder="jars", gains=("finds", "gets"), losses=("drops", "breaks")),
    Thing(name="roses", holder="rows", gains=("plants", "buys"), losses=("cuts", "sells")),
    Thing(name="cakes", holder="trays", gains=("bakes", "buys"), losses=("eats", "sells")),
)
MEASURES = (
    ("costs", "dollars", "What is the price of all"),
    ("costs", "cents", "What is the price of all"),
    ("weighs", "grams", "What is the weight of all"),
    ("weighs", "pounds", "What is the weight of all"),
)
"""What one thing has, in which unit, and how the total is asked for."""


def problems(num: int, *, seed: int, split: Split) -> list[Problem]:
    """So many different problems of one side of the split: a pure function of its arguments."""
    draw = random.Random(f"{split}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < num:
        story = _told(draw)
        if story.is_within_limits and _side(story.equations) == split:
            found[story.question] = Problem(question=story.question, solution=story.solution, answer=str(story.amount))
    return list(found.values())


def final_answer(text: str) -> str | None:
    """The whole number that `answers.final_answer` finds, or None where there is none."""
    told = answers.final_answer(text)
    return str(int(told)) if told is not None and WHOLE.fullmatch(told) else None


def grade(problem: Problem, text: str) -> bool:
    """The text ends in the exact answer; how it got there does not count."""
    return final_answer(text) == problem.answer


def holds(text: str) -> bool:
    """Every equation of the text is right, there is one, and the last gives the answer: no question is needed."""
    steps = EQUATION.findall(text)
    right = all(OPERATIONS[sign](int(left), int(other)) == int(result) for left, sign, other, result in steps)
    return bool(steps) and right and steps[-1][3] == final_answer(text)


class _Story:
    """A problem in the making: the text so far and the steps to solve it."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.sentences: list[str] = []
        self.steps: list[tuple[str, str]] = []
        self.numbers = [amount]

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step(self, lead: str, left: int, sign: str, right: int) -> None:
        """One equation, whose result is the amount from here on."""
        self.amount = OPERATIONS[sign](left, right)
        self.steps.append((lead, f"{left}{sign}{right}={self.amount}"))
        self.numbers += [left, right, self.amount]

    @property
    def question(self) -> str:
        return " ".join(self.sentences)

    @property
    def equations(self) -> tuple[str, ...]:
        return tuple(equation for _, equation in self.steps)

    @property
    def solution(self) -> str:
        return " ".join(f"{lead} {equation}." for lead, equation in self.steps) + f" #### {self.amount}"

    @property
    def is_within_limits(self) -> bool:
        return len(self.steps) in (2, 3) and all(0 < number <= LARGEST for number in self.numbers)


def _told(draw: random.Random) -> _Story:
    """One story; it may break the limits."""
    thing = draw.choice(THINGS)
    name, other = draw.sample(NAMES, 2)
    story = _start(draw, name, thing)
    for verb, sign, lead in _events(draw, thing):
        number = draw.randint(2, 30)
        story.say(f"{name} {verb} {number}{' more' if sign == '+' else ''}.")
        story.step(lead, story.amount, sign, number)
    draw.choice((_ask_number, _ask_total, _ask_other, _ask_both))(draw, story, name, other, thing)
    return story


def _start(draw: random.Random, name: str, thing: Thing) -> _Story:
    if draw.random() < 0.5:
        story = _Story(draw.randint(2, 40))
        story.say(f"{name} has {story.amount} {thing.name}.")
        return story
    count, each = draw.randint(2, 9), draw.randint(2, 9)
    story = _Story(each)
    story.say(f"{name} has {count} {thing.holder} of {each} {thing.name}.")
    story.step(f"In {thing.holder}", count, "*", each)
    return story


def _events(draw: random.Random, thing: Thing) -> Iterator[tuple[str, str, str]]:
    """Up to two (verb, sign, how the solution speaks of it)."""
    for _ in range(draw.randint(0, 2)):
        if draw.random() < 0.5:
            yield draw.choice(thing.gains), "+", "With more"
        else:
            yield draw.choice(thing.losses), "-", "Left"


def _ask_number(draw: random.Random, story: _Story, name: str, other: str, thing: Thing) -> None:
    story.say(f"How many {thing.name} does {name} have now?")


def _ask_total(draw: random.Random, story: _Story, name: str, other: str, thing: Thing) -> None:
    verb, unit, question = draw.choice(MEASURES)
    each = draw.randint(2, 5)
    story.say(f"Each {verb} {each} {unit}. {question}?")
    story.step(f"In {unit}", story.amount, "*", each)


def _ask_other(draw: random.Random, story: _Story, name: str, other: str, thing: Thing) -> None:
    _compare(draw, story, other)
    story.say(f"How many {thing.name} does {other} have?")


def _ask_both(draw: random.Random, story: _Story, name: str, other: str, thing: Thing) -> None:
    first = story.amount
    _compare(draw, story, other)
    story.say(f"How many {thing.name} do both have?")
    story.step("Both", first, "+", story.amount)


def _compare(draw: random.Random, story: _Story, other: str) -> None:
    """The second person has so many more, fewer, or times as many."""
    word, sign, high = draw.choice((("more", "+", 20), ("fewer", "-", 20), ("times as many", "*", 5)))
    number = draw.randint(2, high)
    story.say(f"{other} has {number} {word}.")
    story.step(other, story.amount, sign, number)


def _side(equations: tuple[str, ...]) -> Split:
    digest = hashlib.blake2b("|".join(equations).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_ONE_IN == 0 else "train"
