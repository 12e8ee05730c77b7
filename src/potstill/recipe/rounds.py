"""The section `rounds`, a number or a mapping: the student is asked, taught from its rows and scored, and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from potstill.core.errors import DataError, RecipeError
from potstill.core.writing import Example
from potstill.recipe.calls import EXAMPLES
from potstill.recipe.elicitation import Elicitation, asks_student
from potstill.recipe.signature import check_knobs, typed
from potstill.recipe.text import Tree

BEGINNINGS = {"base": "its first weights", "last": "the weights of the round before"}
AGAINST = {
    "arms": "rounds are one student beside itself, as it was before.",
    "baseline": "rounds are compared with the student before the first.",
}
"""Sections that compare otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How often the student is asked and taught anew, as `loops.rounds` plays it.

    start: each round trains from the student's first weights (base: STaR, rejection sampling, ReST-EM) or goes on with
    the last one's (last: ReST, RAFT, feedback). seeds: each round has so many of its own, the next ones in turn (RAFT);
    0: every round has all of them (STaR).
    """

    num_rounds: int
    start: Literal["base", "last"] = "base"
    seeds: int = 0

    def written(self) -> dict[str, Tree]:
        return {**asdict(self)}

    def rows(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines for `potstill check`."""
        seeds = f"{self.seeds:,} of their own" if self.seeds else "all, in every round"
        return (("rounds", str(self.num_rounds)), ("each trains from", BEGINNINGS[self.start]), ("seeds", seeds))

    def part(self, seeds: Iterable[Example], number: int) -> Iterator[Example]:
        """The seeds of the round of this number, from 0."""
        return itertools.islice(seeds, number * self.seeds, (number + 1) * self.seeds) if self.seeds else iter(seeds)

    def check_seeds(self, seeds: Iterable[Example]) -> None:
        """Raises DataError where they do not suffice for all rounds."""
        wanted = self.num_rounds * self.seeds
        found = sum(1 for _ in itertools.islice(seeds, wanted))
        if found < wanted:
            raise DataError(
                f"rounds.seeds: {self.num_rounds} rounds of {self.seeds:,} want {wanted:,} seeds, but there are "
                f"{found:,}. Give more, or a smaller number, or 0 for all of them in every round."
            )


def check_rounds(content: Mapping[str, Tree], elicitation: Elicitation | None) -> Rounds | None:
    """The section `rounds` of a recipe; None where there is none. Raises RecipeError: place, found, expected."""
    given = content.get("rounds")
    if given is None:
        return None
    if isinstance(given, dict):
        rounds, place = Rounds(**check_knobs(Rounds, given, place="rounds")), "rounds.num_rounds"
    else:
        rounds, place = Rounds(num_rounds=typed(given, int, place="rounds")), "rounds"
    if rounds.num_rounds < 1:
        raise RecipeError(f"{place}: found {rounds.num_rounds}, expected at least 1.")
    if rounds.seeds < 0:
        raise RecipeError(f"rounds.seeds: found {rounds.seeds}, expected how many each round has, or 0 for all.")
    if elicitation is None:
        raise RecipeError(f"rounds: there is no elicit, so no round has anything to learn. Give {EXAMPLES['elicit']}.")
    if not asks_student(elicitation):
        raise RecipeError(
            "rounds: no step of elicit asks the student, so every round would have the same rows. Give one that does, "
            "such as {use: star, task: {use: references}}, or teacher: student in a step."
        )
    if content.get("student") is not None and content.get("task") is None:
        raise RecipeError(f"rounds: there is no task to score the student by after each one. Give {EXAMPLES['task']}.")
    for key, why in AGAINST.items():
        if content.get(key) is not None:
            raise RecipeError(f"{key}: {why} Remove {key}, or rounds.")
    _check_teacher(content)
    return rounds


def _check_teacher(content: Mapping[str, Tree]) -> None:
    """A teacher that is asked in each round is there before the first, and knows no row beforehand."""
    teacher = content.get("teacher")
    for key in ("fit", "remember"):
        if isinstance(teacher, dict) and teacher.get(key):
            raise RecipeError(
                f"teacher.{key}: each round has rows of its own, and there are none before the first. Name a teacher "
                "that comes trained and answers live."
            )
