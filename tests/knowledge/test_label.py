"""Labeling: what is asked, what becomes of the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Failure, Message, Reply
from potstill.knowledge import label, self_consistency, system_messages
from potstill.knowledge.filtering import spelled
from potstill.knowledge.label import reasoned
from tests.knowledge.scripted import Scripted, last, questions, through


def test_the_answer_stands_beside_its_question() -> None:
    (row,) = through(questions("two and two"), label(teacher=Scripted(lambda request: " four\n")))
    assert (row.prompt, row.answer, row.lineage.steps) == ("two and two", "four", ("label",))


def test_sampling_knobs_reach_the_request() -> None:
    writer = Scripted(str)
    through(questions("q"), label(teacher=writer, temperature=0.7, top_p=0.9, max_tokens=5, stop=["\n"], seed=3))
    (request,) = writer.asked
    assert (request.temperature, request.top_p, request.max_tokens, request.stop, request.seed) == (
        0.7,
        0.9,
        5,
        ("\n",),
        3,
    )


def test_each_sample_is_a_row_with_its_own_request() -> None:
    rows = through(questions("q"), label(teacher=Scripted(lambda request: f"a{request.sample}"), samples=3))
    assert [row.answer for row in rows] == ["a0", "a1", "a2"]
    assert len({key for row in rows for key in row.lineage.requests}) == 3
    assert {row.lineage.parents for row in rows} == {(Example.of("q").id,)}


def test_a_chain_of_thought_is_split_at_the_last_mark() -> None:
    writer = Scripted(lambda request: "2 + 2 #### is 4.\n#### 4")
    (row,) = through(questions("q"), label(teacher=writer, chain_of_thought=True))
    assert (row.reasoning, row.answer) == ("2 + 2 #### is 4.", "4")
    assert last(writer.asked[0]).startswith("q\n")


def test_what_was_thought_before_speaking_is_part_of_the_reasoning() -> None:
    thinking = Reply(key="k", text="So it is 4.\n#### 4", reasoning="2 and 2 make 4.")
    row = reasoned(Example.of("q"), thinking, "step")
    assert (row.reasoning, row.answer) == ("2 and 2 make 4.\nSo it is 4.", "4")


def test_votes_differ_by_signs_and_not_by_case_or_space() -> None:
    """As words, which drop punctuation, 1.5 would be 15 (tasks.answers)."""
    assert spelled(" The  Cat\n") == spelled("the cat")
    assert spelled("1.5") != spelled("15")


def test_reasoning_without_a_final_answer_is_rejected_with_its_text() -> None:
    (row,) = through(questions("q"), label(teacher=Scripted(lambda request: "hm"), chain_of_thought=True))
    assert (row.rejection, row.raw) == ("label: no answer after ####", "hm")


def test_demonstrations_come_as_turns_before_the_question() -> None:
    writer = Scripted(lambda request: "a")
    step = label(teacher=writer, system="s", demonstrations=[{"prompt": "q0", "answer": "a0"}])
    through([replace(Example.of("q1"), turns=(Message(role="user", content="earlier"),))], step)
    assert [turn.content for turn in writer.asked[0].messages] == ["s", "q0", "a0", "earlier", "q1"]


def test_a_truncated_and_a_failed_answer_are_rejected_alone() -> None:
    said = {
        "cut": Reply(key="1", text="half", finish="length"),
        "bad": Reply(key="2", failure=Failure(reason="policy", message="not allowed")),
        "ok": Reply(key="3", text="fine", finish="stop"),
    }
    rows = through(questions(*said), label(teacher=Scripted(lambda request: said[last(request)])))
    assert [row.rejection for row in rows] == ["label: truncated", "label: policy", ""]
    assert [row.raw for row in rows[:2]] == ["half", "not allowed"]


def test_a_template_may_use_the_fields_of_a_row() -> None:
    writer = Scripted(lambda request: "a")
    row = Example.of("why?", fields={"document": "cost: $5"})
    through([row], label(teacher=writer, template="$document\n$prompt"))
    assert last(writer.asked[0]) == "cost: $5\nwhy?"


def test_a_gap_that_nothing_fills_is_named() -> None:
    with pytest.raises(RecipeError, match=r"\$documnt.*document"):
        through([Example.of("q", fields={"document": "d"})], label(teacher=Scripted(str), template="$documnt"))


def test_many_samples_at_temperature_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match="same answer 4 times"):
        label(teacher=Scripted(str), samples=4, temperature=0)


def test_the_majority_wins_and_its_first_row_stays() -> None:
    answers = ["5", "4", " 4", "4"]
    step = label(teacher=Scripted(lambda request: answers[request.sample]), samples=4)
    rows = through(questions("q"), step, self_consistency())
    assert [row.rejection for row in rows] == [
        "self_consistency: outvoted", "", "self_consistency: said already", "self_consistency: said already",
    ]  # fmt: skip
    assert rows[1].fields["agreement"] == 0.75


def test_a_majority_that_is_too_small_rejects_the_question() -> None:
    step = label(teacher=Scripted(lambda request: str(request.sample)), samples=4)
    rows = through(questions("q"), step, self_consistency(at_least=0.5))
    assert [row.rejection for row in rows] == ["self_consistency: fewer than 50% agree"] * 4


def test_system_messages_follow_the_shares_of_each_source() -> None:
    step = system_messages(bank={"a": "A", "b": "B"}, shares={"cot": {"a": 1}, "": {"a": 1, "b": 3}})
    rows = [Example(id=str(number), fields={"source": "cot"} if number < 50 else {}) for number in range(1050)]
    given = through(rows, step)
    assert {row.system for row in given[:50]} == {"A"}
    # 1,000 draws at 3/4: five standard deviations are 68.
    assert abs(sum(row.system == "B" for row in given[50:]) - 750) < 68
    assert given == through(rows, step)
