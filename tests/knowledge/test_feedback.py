"""Preferences in both orders, rubrics, critiques and corrections; and what must hold when a judge babbles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Failure, Reply, Request, TokenLogProb
from potstill.knowledge.constitution import constitutional
from potstill.knowledge.feedback import STOP, correct, critique, preference, rubric_scores, soft_preference
from potstill.knowledge.samples import candidates
from potstill.tasks.graded import Graded
from tests.knowledge.scripted import Scripted, last, through


def with_candidates(*texts: str) -> Example:
    return Example.of("Q", fields={"candidates": list(texts)})


def longer_is_better(request: Request) -> str:
    first, second = last(request).split("Answer 1:\n")[1].split("Answer 2:\n")
    sizes = len(first.strip().split("\n")[0]), len(second.strip().split("\n")[0])
    return f"Reasons.\nBetter: {'tie' if sizes[0] == sizes[1] else 1 if sizes[0] > sizes[1] else 2}"


# Candidates and preferences


def test_candidates_stand_side_by_side_with_all_their_requests():
    writer = Scripted(lambda request: f"a{request.sample}")
    (row,) = through([Example.of("Q")], candidates(student=writer))

    assert row.fields["candidates"] == ["a0", "a1", "a2", "a3"]
    assert len(set(row.lineage.requests)) == len(row.lineage.writers) == len(row.lineage.prompts) == 4
    assert {(asked.temperature, asked.top_p) for asked in writer.asked} == {(0.7, 0.9)}


def test_a_truncated_candidate_becomes_a_rejected_row_of_its_own():
    def say(request: Request) -> str | Reply:
        return Reply(key="k", text="half", finish="length") if request.sample == 1 else f"a{request.sample}"

    dropped, row = through([Example.of("Q")], candidates(student=Scripted(say), samples=3))

    assert (dropped.rejection, dropped.raw) == ("candidates: truncated", "half")
    assert row.fields["candidates"] == ["a0", "a2"]


def test_the_preferred_answer_is_chosen_and_the_least_preferred_rejected():
    judge = Scripted(longer_is_better)
    (row,) = through([with_candidates("aa", "aaaa", "a")], preference(judge=judge))

    assert (row.answer, row.fields["chosen"], row.fields["rejected"]) == ("aaaa", "aaaa", "a")
    assert (row.fields["scores"], row.fields["preference"]) == ([0.5, 1.0, 0.0], 1.0)
    assert len(judge.asked) == len(row.lineage.requests) == 3 * 2


def test_a_judge_that_always_takes_the_first_gives_no_pair():
    (row,) = through([with_candidates("a", "b")], preference(judge=Scripted(lambda request: "Better: 1")))

    assert row.rejection == "preference: a tie"
    assert row.fields["scores"] == [0.5, 0.5]


def test_soft_labels_are_the_mean_of_both_orders():
    # By hand: the first answer has 0.9 when it stands first and 1 - 0.4 when it stands second.
    def say(request: Request) -> Reply:
        one = 0.9 if "Answer 1:\na" in last(request) else 0.4
        top = (("1", math.log(one)), ("2", math.log(1 - one)))
        token = TokenLogProb(token="1", log_prob=math.log(one), top=top)
        return Reply(key=request.key(""), text="1", finish="stop", log_probs=(token,))

    (row,) = through([with_candidates("a", "b")], soft_preference(judge=Scripted(say)))

    assert row.fields["preference"] == pytest.approx(0.75)
    assert row.fields["chosen"] == "a"


def test_a_verdict_that_cannot_be_read_rejects_the_row_with_its_text():
    (row,) = through([with_candidates("a", "b")], preference(judge=Scripted(lambda request: "Hard to say.")))

    assert row.rejection == "preference: no verdict to be read"
    assert "Hard to say." in row.raw


def test_a_single_candidate_cannot_be_compared():
    (row,) = through([with_candidates("a")], preference(judge=Scripted(longer_is_better)))

    assert row.rejection == "preference: fewer than two candidates"


# Rubrics, critique, correction


def test_each_rubric_is_asked_apart_and_the_score_is_their_mean():
    judge = Scripted(lambda request: f"Rating: {5 if 'is short' in last(request) else 2}")
    step = rubric_scores(judge=judge, rubrics={"brevity": "whether it is short", "tone": "whether it is kind"})
    (row,) = through([Example.of("Q", answer="A")], step)

    assert (row.fields["rubrics"], row.fields["score"]) == ({"brevity": 5, "tone": 2}, 3.5)
    assert len(row.lineage.requests) == 2


def test_a_rubric_without_a_readable_rating_rejects_the_row():
    step = rubric_scores(judge=Scripted(lambda request: "good"), rubrics={"tone": "kind"})
    (row,) = through([Example.of("Q", answer="A")], step)

    assert (row.rejection, row.raw) == ("rubric_scores: no rating to be read for 'tone'", "good")


@pytest.mark.parametrize(("said", "kept"), [("Too long.", "Too long."), (STOP, ""), (f"Good.\n{STOP}.", "")])
def test_a_critique_is_empty_where_nothing_is_to_change(said, kept):
    (row,) = through([Example.of("Q", answer="A")], critique(teacher=Scripted(lambda request: said)))

    assert row.fields["critique"] == kept


def improving(good: str) -> Callable[[Request], str]:
    """A teacher that adds a letter with each revision and is content with `good`."""

    def say(request: Request) -> str:
        text = last(request)
        answer = text.split("Answer:\n")[1].split("\n")[0]
        if "Remarks:" in text:
            return f"{answer}x"
        return STOP if answer == good else "One x more."

    return say


def test_a_correction_is_chosen_over_the_students_own_answer():
    writer = Scripted(improving("Ax"))
    (row,) = through([Example.of("Q", answer="A")], correct(teacher=writer))

    assert (row.answer, row.fields["chosen"], row.fields["rejected"]) == ("Ax", "Ax", "A")
    assert row.fields["critiques"] == ["One x more."]
    assert len(writer.asked) == 2


def test_corrections_end_when_there_is_nothing_to_change():
    writer = Scripted(improving("Axx"))
    (row,) = through([Example.of("Q", answer="A")], correct(teacher=writer, rounds=9))

    assert (row.answer, len(writer.asked)) == ("Axx", 2 + 2 + 1)


def test_an_answer_that_is_right_passes_without_a_pair():
    (row,) = through([Example.of("Q", answer="A")], correct(teacher=Scripted(improving("A"))))

    assert (row.answer, row.fields["critiques"]) == ("A", [])
    assert "chosen" not in row.fields


def test_reasoning_is_part_of_what_is_corrected():
    row = Example.of("Q", answer="4", reasoning="Two and two.")
    kept, mended = (
        through([row], correct(teacher=Scripted(improving(good))))[0] for good in ("Two and two.", "perfect")
    )

    assert (kept.reasoning, kept.answer, kept.fields["draft"]) == ("Two and two.", "4", "Two and two.\n#### 4")
    assert (mended.reasoning, mended.answer) == ("", "Two and two.x")


def test_what_the_task_grades_as_right_is_not_corrected():
    writer = Scripted(lambda request: "4")
    same = Graded(list, lambda example, answer: float(answer == example.reference))
    rows = [Example.of("Q", answer=answer, reference="4") for answer in ("4", "5")]
    right, wrong = through(rows, correct(teacher=writer, task=same, template="$prompt, not $answer"))

    assert (right.answer, "chosen" in right.fields, right.lineage.requests) == ("4", False, ())
    assert (wrong.answer, wrong.fields["chosen"], wrong.fields["rejected"]) == ("4", "4", "5")
    assert [last(request) for request in writer.asked] == ["Q, not 5"]


def test_a_task_that_cannot_grade_rejects_the_row_and_asks_nothing():
    writer = Scripted(lambda request: "4")
    broken = Graded(list, lambda example, answer: float("one"))
    (row,) = through([Example.of("Q", answer="5")], correct(teacher=writer, task=broken))

    assert row.rejection.startswith("correct: ValueError")
    assert not writer.asked


def test_a_teacher_that_corrects_sees_the_right_answer():
    writer = Scripted(improving("A"))
    through([Example.of("Q", answer="A", reference="secret")], correct(teacher=writer))

    assert "secret" in last(writer.asked[0])


# Constitution


def lawful(request: Request) -> str:
    text = last(request)
    if "What was found:" in text:
        return text.split("Answer:\n")[1].split("\n")[0] + "!"
    return "It fails." if "from one side only" in text else "draft"


def test_the_constitution_is_applied_four_times_with_principles_of_its_own():
    writer = Scripted(lawful)
    (row,) = through([Example.of("Q")], constitutional(student=writer))
    drawn = [entry["principle"] for entry in row.fields["revisions"]]

    assert (row.answer, row.fields["rejected"]) == ("draft!!!!", "draft")
    assert len(writer.asked) == len(row.lineage.requests) == 1 + 4 * 2
    assert len(drawn) == 4 and all(principle.startswith("whether it ") for principle in drawn)


def test_all_sixteen_principles_are_drawn_sooner_or_later():
    rows = through([Example.of(f"Q{n}") for n in range(60)], constitutional(student=Scripted(lawful)))

    assert len({entry["principle"] for row in rows for entry in row.fields["revisions"]}) == 16


def test_the_principles_of_a_row_depend_on_nothing_but_the_row():
    rows = through([Example.of("Q1"), Example.of("Q2")], constitutional(student=Scripted(lawful)))
    alone = through([Example.of("Q2")], constitutional(student=Scripted(lawful)))

    assert rows[1:] == alone


# What holds for all of them

STEPS = {
    "candidates": lambda writer: candidates(student=writer, samples=2),
    "preference": lambda writer: preference(judge=writer),
    "soft_preference": lambda writer: soft_preference(judge=writer),
    "rubric_scores": lambda writer: rubric_scores(judge=writer, rubrics={"tone": "kind"}),
    "critique": lambda writer: critique(teacher=writer),
    "correct": lambda writer: correct(teacher=writer),
    "constitutional": lambda writer: constitutional(student=writer),
}


def fails_on_bad(request: Request) -> str | Reply:
    if any("bad" in message.content for message in request.messages):
        return Reply(key=request.key(""), failure=Failure(reason="policy", message="not allowed"))
    return "Better: tie\nRating: 3"


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_one_bad_row_never_affects_another(make):
    good, bad = (Example.of(word, answer="A", fields={"candidates": ["a", "b"]}) for word in ("good", "bad"))
    alone = through([good], make(Scripted(fails_on_bad)))
    both = through([bad, good], make(Scripted(fails_on_bad)))

    assert both[-len(alone) :] == alone
    failed = both[: -len(alone)]
    assert failed and all(row.rejection for row in failed)
    assert any("not allowed" in row.raw for row in failed)


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_rejected_rows_travel_through_untouched(make):
    row = Example.of("Q").rejected("before", "no good", raw="text")
    writer = Scripted(fails_on_bad)

    assert through([row], make(writer)) == [row]
    assert not writer.asked


@pytest.mark.parametrize(
    "make",
    [
        lambda: correct(teacher=Scripted(str), rounds=0),
        lambda: correct(teacher=Scripted(str), rounds=2, template="$prompt"),
        lambda: constitutional(student=Scripted(str), rounds=0),
        lambda: rubric_scores(judge=Scripted(str), rubrics={}),
        lambda: soft_preference(judge=Scripted(str), clamp=(0.6, 0.4)),
        lambda: candidates(student=Scripted(str), samples=0),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(make):
    with pytest.raises(RecipeError, match="expected"):
        make()
