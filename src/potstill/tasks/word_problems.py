"""The world of `tasks.arithmetic` as a task: problems that are told, and graded by their exact answer."""

from __future__ import annotations

from collections.abc import Iterator

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Task
from potstill.tasks.arithmetic import Split, final_answer, problems
from potstill.tasks.graded import Graded


@part("task")
def word_problems(num: int, *, seed: int = 0, split: Split = "train") -> Task:
    """So many word problems of two or three steps. `reference` is the number; a worked solution is in "solution".

    split: no computation of the test side is ever on the training side, under whatever names.
    """
    if num < 1:
        raise RecipeError(f"word_problems.num: found {num}, expected at least 1.")

    def read() -> Iterator[Example]:
        for problem in problems(num, seed=seed, split=split):
            yield Example.of(problem.question, reference=problem.answer, fields={"solution": problem.solution})

    def grade(example: Example, answer: str) -> float:
        return float(final_answer(answer) == example.reference)

    return Graded(read, grade)
