"""The world of word problems: deterministic, apart, solvable, checkable."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.tasks import arithmetic
from potstill.tasks.arithmetic import EQUATION, LARGEST, Problem, final_answer, grade, holds, problems

TRAIN = problems(400, seed=0, split="train")
TEST = problems(200, seed=0, split="test")


def equations(problem: Problem) -> str:
    return "|".join(found.group() for found in EQUATION.finditer(problem.solution))


def test_the_same_arguments_give_the_same_problems() -> None:
    assert problems(50, seed=7, split="train") == problems(50, seed=7, split="train")


def test_more_problems_begin_with_the_same_ones() -> None:
    assert problems(60, seed=7, split="test")[:20] == problems(20, seed=7, split="test")


def test_another_seed_gives_other_problems() -> None:
    assert not set(problems(50, seed=1, split="train")) & set(problems(50, seed=2, split="train"))


def test_no_question_comes_twice() -> None:
    assert len({problem.question for problem in TRAIN}) == len(TRAIN)


def test_no_held_out_computation_is_in_training_whatever_the_seed() -> None:
    seen = {equations(problem) for seed in range(5) for problem in problems(300, seed=seed, split="train")}
    held = {equations(problem) for seed in range(5) for problem in problems(100, seed=seed, split="test")}
    assert not seen & held


def test_every_solution_holds_and_ends_in_the_answer() -> None:
    assert all(holds(problem.solution) and grade(problem, problem.solution) for problem in TRAIN + TEST)


def test_every_number_given_in_a_question_is_used_in_its_solution() -> None:
    for problem in TRAIN:
        used = re.findall(r"\d+", problem.solution)
        assert set(re.findall(r"\d+", problem.question)) <= set(used)


def test_solutions_take_two_or_three_steps_and_both_are_common() -> None:
    counts = [len(EQUATION.findall(problem.solution)) for problem in TRAIN]
    assert set(counts) == {2, 3}
    assert 0.25 < counts.count(3) / len(counts) < 0.75


def test_all_three_operations_are_common() -> None:
    signs = [step[1] for problem in TRAIN for step in EQUATION.findall(problem.solution)]
    assert all(signs.count(sign) > 0.15 * len(signs) for sign in "+-*")


def test_no_number_is_out_of_range() -> None:
    numbers = [int(number) for p in TRAIN + TEST for number in re.findall(r"\d+", p.question + p.solution)]
    assert min(numbers) > 0
    assert max(numbers) <= LARGEST


def test_problems_are_short() -> None:
    assert max(len(problem.question) for problem in TRAIN) <= 120
    assert max(len(problem.solution) for problem in TRAIN) <= 80


@given(st.integers(-99, 999))
def test_the_final_answer_is_what_stands_behind_the_marks(number: int) -> None:
    assert final_answer(f"so it is 3+4=7. #### {number}") == str(number)


@pytest.mark.parametrize("text", ["", "#### seven", "7 ####", "### 7", "3+4=7", "#### 7.5"])
def test_without_marks_and_a_number_there_is_no_answer(text: str) -> None:
    assert final_answer(text) is None


def test_the_last_of_several_answers_counts() -> None:
    assert final_answer("#### 3 no, #### 5") == "5"


def test_zeros_in_front_do_not_change_an_answer() -> None:
    assert final_answer("#### 007") == "7"


def test_grade_refuses_an_answer_that_only_begins_like_the_right_one() -> None:
    problem = Problem(question="?", solution="", answer="3")
    assert not grade(problem, "#### 35")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("6+7=14. 14-4=10. #### 10", id="a wrong sum"),
        pytest.param("6*7=41. #### 41", id="a wrong product"),
        pytest.param("6+7=13. 13-4=9. #### 8", id="another answer than the last result"),
        pytest.param("6+7=13.", id="no answer"),
        pytest.param("#### 13", id="no equation"),
        pytest.param("16+7=13. #### 13", id="a number that is only part of one"),
    ],
)
def test_a_solution_does_not_hold_with(text: str) -> None:
    assert not holds(text)


def test_a_right_solution_holds_in_any_words() -> None:
    assert holds("First 6+7=13, and then 13-4=9! #### 9")


def test_the_module_knows_no_model() -> None:
    assert not {"torch", "transformers"} & set(vars(arithmetic))
