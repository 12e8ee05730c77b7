"""What a student learns from its own answers: which are asked for, which are kept, what becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from potstill.core.errors import RecipeError
from potstill.core.writing import Example, Failure, Message, Reply, Request
from potstill.knowledge.calculations import equations, holds
from potstill.knowledge.flow import elicit
from potstill.knowledge.self_knowledge import raft, rejection_sampling, rest, star
from potstill.tasks.graded import Graded
from potstill.teachers.fake import fake
from tests.knowledge.scripted import Scripted, last, through

SUMS = Graded(list, lambda example, answer: float(answer == example.reference))


def sums(*pairs: tuple[int, int]) -> list[Example]:
    return [Example.of(f"{one} + {other}?", reference=str(one + other)) for one, other in pairs]


def alive(rows: list[Example]) -> list[Example]:
    return [row for row in rows if not row.rejection]


# STaR


def needs_help(request: Request) -> str:
    """Right about 1 + 1 alone; with a hint right about all but 3 + 3."""
    asked = last(request)
    if "right answer is" in asked:
        answer = asked.split("right answer is ")[1].split(".")[0]
        return f"So it must be.\n#### {'7' if asked.startswith('3') else answer}"
    return "One and one.\n#### 2" if asked.startswith("1 + 1") else "No idea.\n#### 0"


def test_star_keeps_what_is_right_and_rationalises_the_rest():
    rows = through(sums((1, 1), (2, 2), (3, 3)), star(student=Scripted(needs_help), task=SUMS))

    assert [(row.answer, row.fields["rationalised"]) for row in alive(rows)] == [("2", False), ("4", True)]
    assert [row.rejection for row in rows if row.rejection] == ["star: wrong answer"] * 3


def test_star_asks_once_where_the_answer_is_right_and_twice_where_not():
    writer = Scripted(needs_help)
    through(sums((1, 1), (2, 2)), star(student=writer, task=SUMS))

    assert len(writer.asked) == 3
    assert {(asked.temperature, asked.top_p, asked.max_tokens) for asked in writer.asked} == {(0.01, 0.9, 96)}


def test_star_keeps_a_rationalised_row_without_its_hint():
    (question,) = sums((2, 2))
    row = alive(through([question], star(student=Scripted(needs_help), task=SUMS)))[0]

    assert (row.id, row.prompt, row.reasoning) == (question.id, "2 + 2?", "So it must be.")
    assert not any("right answer" in str(value) for value in row.plain().values())


def test_star_refuses_a_rationale_that_speaks_of_the_hint():
    def say(request: Request) -> str:
        return "The hint says so.\n#### 4" if "right answer is" in last(request) else "#### 0"

    rows = through(sums((2, 2)), star(student=Scripted(say), task=SUMS))

    assert rows[-1].rejection == "star: speaks of the hint"


def test_star_counts_what_cannot_be_read_as_a_failure_and_gives_the_hint():
    def say(request: Request) -> str:
        return "Two and two.\n#### 4" if "right answer is" in last(request) else "hm"

    rows = through(sums((2, 2)), star(student=Scripted(say), task=SUMS))

    assert [row.rejection for row in rows] == ["star: no answer after ####", ""]
    assert rows[0].raw == "hm"


def test_star_rationalises_only_the_share_that_is_asked_for():
    questions = sums(*((n, 1) for n in range(2, 202)))
    writer = Scripted(lambda request: "#### -1")
    through(questions, star(student=writer, task=SUMS, rationalise=0.25))

    assert 200 + 30 <= len(writer.asked) <= 200 + 70


def test_star_shows_the_demonstrations_with_their_hints_where_a_hint_is_given():
    writer = Scripted(lambda request: "#### 0")
    shown = [{"prompt": "1 + 2?", "reasoning": "Count.", "answer": "3"}]
    through(sums((2, 2)), star(student=writer, task=SUMS, demonstrations=shown))
    plain, hinted = ([message.content for message in asked.messages] for asked in writer.asked)

    assert plain[1] == hinted[1] == "Count.\n#### 3"
    assert "right answer is 3" not in plain[0] and "right answer is 3" in hinted[0]


def test_star_leaves_a_failure_without_reference_rejected():
    rows = through([Example.of("?")], star(student=Scripted(lambda request: "#### 0"), task=SUMS))

    assert rows[-1].rejection == "star: no reference to give as a hint"


def test_star_asks_with_the_templates_of_its_knobs():
    writer = Scripted(lambda request: "right #### 4" if "It is 4." in last(request) else "wrong #### 1")
    step = star(student=writer, task=SUMS, template="Solve: $prompt", hint="$prompt It is $answer.")
    (kept,) = alive(through([Example.of("Q", reference="4")], step))

    assert [last(request) for request in writer.asked] == ["Solve: Q", "Q It is 4."]
    assert (kept.answer, kept.fields["rationalised"]) == ("4", True)


# Rejection sampling


def solutions(*texts: str) -> Callable[[Request], str]:
    return lambda request: texts[request.sample]


def test_rejection_sampling_asks_for_a_hundred_answers_at_temperature_point_seven():
    writer = Scripted(lambda request: "1+1=2\n#### 2")
    through(sums((1, 1)), rejection_sampling(student=writer, task=SUMS))

    assert [asked.sample for asked in writer.asked] == list(range(100))
    assert {asked.temperature for asked in writer.asked} == {0.7}


def test_rejection_sampling_keeps_right_answers_that_reason_differently():
    texts = ("2+3=5\n#### 5", "3+2=5\n#### 5", "2+2=4\n#### 4", "2+2=5\n#### 5", "just so", "2+3=5 as we see\n#### 5")
    rows = through(sums((2, 3)), rejection_sampling(student=Scripted(solutions(*texts)), task=SUMS, samples=len(texts)))

    assert [row.rejection.removeprefix("rejection_sampling: ") for row in rows] == [
        "same equations as another", "", "wrong answer", "a calculation is wrong", "no answer after ####", "",
    ]  # fmt: skip


def test_of_the_same_equations_the_text_farthest_from_the_others_is_kept():
    # By hand: distances to the other two are 1 + 9, 1 + 8, 9 + 8.
    texts = ("1+1=2 ab\n#### 2", "1+1=2 abc\n#### 2", "1+1=2 zzzzzzzzz\n#### 2")
    rows = through(sums((1, 1)), rejection_sampling(student=Scripted(solutions(*texts)), task=SUMS, samples=3))

    assert [row.reasoning for row in alive(rows)] == ["1+1=2 zzzzzzzzz"]


def test_of_equally_far_texts_the_first_is_kept():
    texts = ("1+1=2 a\n#### 2", "1+1=2 b\n#### 2")
    rows = through(sums((1, 1)), rejection_sampling(student=Scripted(solutions(*texts)), task=SUMS, samples=2))

    assert [row.reasoning for row in alive(rows)] == ["1+1=2 a"]


def test_rejection_sampling_refuses_several_samples_that_would_be_the_same():
    with pytest.raises(RecipeError, match="temperature 0"):
        rejection_sampling(student=Scripted(str), task=SUMS, temperature=0.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<<48/2=24>> and 1+1=2", (("48/2", "24"),)),
        ("48 / 2 = 24 clips, then 1,000 + 24 = $1,024.", (("48/2", "24"), ("1000+24", "1024"))),
        ("(2 + 3) * 4 = 20", (("(2+3)*4", "20"),)),
        ("x = 5, and no sum", ()),
        ("4 x 3 = 12 but 4 * x + 600 = 10000", (("4*3", "12"),)),
        ("6 * $3 = $18 and 6/3=.5", (("6*3", "18"), ("6/3", ".5"))),
        ("20% * 50 = 10", (("(20/100)*50", "10"),)),
        ("60 students x 2/3 = 40; 1/2 * 1/2 = 1/4; 8 x 1 1/2 = 12; 3 / 4 * 2 = 1 1/2", ()),
        ("<<+30+46=76>> <<(1/2)(20)=10>> <<2*.2=.4>>", (("+30+46", "76"), ("(1/2)*(20)", "10"), ("2*.2", ".4"))),
    ],
)
def test_equations_are_found_as_they_are_written(text, found):
    assert equations(text) == found


@pytest.mark.parametrize(
    ("left", "right", "right_or_not"),
    [
        ("48/2", "24", True), ("7/2", "3", False), ("7/2", "3.5", True), ("10/3", "3.33", True), ("10/3", "3.3", True),
        ("10/3", "3.34", False), ("0.1+0.2", "0.3", True), ("(2+3)*4", "20", True), ("-2+3", "1", True),
        ("2*.2", ".4", True), ("+1+1", "2", True), ("5/20", "25%", True), ("100-75", "25%", True),
        ("5/20", "20%", False), ("1/0", "1", False), ("2**9", "512", False), ("a+1", "2", False), ("1+", "1", False),
    ],
)  # fmt: skip
def test_a_calculation_holds_to_the_last_digit_that_is_written(left, right, right_or_not):
    assert holds(left, right) is right_or_not


@pytest.mark.parametrize("piece", ["1 + ", "1", "(", "1 = ", "<<", "<<1+", "1x", "$1,"])
def test_equations_of_a_model_that_does_not_stop_are_found_at_once(piece):
    began = time.process_time()
    for pair in equations(piece * 5000):
        holds(*pair)

    assert time.process_time() - began < 2.0


# RAFT and ReST


def by_length(row: Example) -> float:
    return len(row.answer)


def test_raft_keeps_the_one_answer_of_the_highest_reward():
    writer = Scripted(solutions("a", "ccc", "bb", "ddd"))
    rows = through([Example.of("?")], raft(student=writer, score=by_length, samples=4))

    assert [(row.answer, row.fields["score"]) for row in alive(rows)] == [("ccc", 3.0)]
    assert [row.rejection for row in rows].count("raft: not among the best") == 3


def test_raft_takes_a_judge_as_its_reward():
    def points(request: Request) -> str:
        return "Rating: 5" if "Answer:\nbb" in last(request) else "Rating: 1"

    judge = Scripted(points)
    rows = through([Example.of("?")], raft(student=Scripted(solutions("a", "bb")), judge=judge, samples=2))

    assert [row.answer for row in alive(rows)] == ["bb"]
    assert len(judge.asked) == 6


@pytest.mark.parametrize("given", [{}, {"task": SUMS, "score": by_length}])
def test_exactly_one_reward_is_expected(given):
    with pytest.raises(RecipeError, match="exactly one"):
        raft(student=Scripted(str), **given)


def test_rest_em_keeps_at_most_ten_right_answers_of_thirty_two():
    writer = Scripted(lambda request: "2" if request.sample % 2 else "0")
    rows = through(sums((1, 1)), rest(student=writer, task=SUMS))

    assert len(writer.asked) == 32
    assert [row.id.rpartition(".")[2] for row in alive(rows)] == [str(n) for n in range(1, 21, 2)]
    reasons = [row.rejection for row in rows if row.rejection]
    assert reasons.count("rest: reward at or below the threshold") == 16
    assert reasons.count("rest: not among the best") == 6


def test_rest_raises_the_bar_with_each_improve_step():
    kept = []
    for improve in range(4):
        step = rest(
            student=Scripted(solutions("a", "bb", "ccc")), score=by_length, samples=3, thresholds=(0, 1, 2),
            improve=improve,
        )  # fmt: skip
        kept.append(len(alive(through([Example.of("?")], step))))

    assert kept == [3, 2, 1, 1]


def test_an_improve_step_buys_nothing_again(tmp_path):
    store = str(tmp_path / "store.sqlite")
    sent = []
    for improve in range(2):
        writer = fake(lambda request: "a" * (request.sample + 1), store=store)
        step = rest(student=writer, score=by_length, samples=3, thresholds=(0, 2), improve=improve)
        elicit([Example.of("?")], step, out=tmp_path / str(improve))
        sent.append(writer.transport.num_sent)

    assert sent == [3, 0]


def test_thresholds_that_do_not_rise_are_refused():
    with pytest.raises(RecipeError, match="rise"):
        rest(student=Scripted(str), task=SUMS, thresholds=(0.5, 0.2))


# What holds for all of them

STEPS = {
    "star": lambda writer: star(student=writer, task=SUMS),
    "rejection_sampling": lambda writer: rejection_sampling(student=writer, task=SUMS, samples=2),
    "raft": lambda writer: raft(student=writer, task=SUMS, samples=2),
    "rest": lambda writer: rest(student=writer, task=SUMS, samples=2),
}


def fails_on_two(request: Request) -> str | Reply:
    if last(request).startswith("2"):
        key = request.key("scripted")
        return Reply(key=key, failure=Failure(reason="policy", message="not allowed"))
    return "1+1=2\n#### 2" if "step by step" in last(request) else "2"


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_one_bad_row_never_affects_another(make):
    good = through(sums((1, 1)), make(Scripted(fails_on_two)))
    mixed = through(sums((1, 1), (2, 2)), make(Scripted(fails_on_two)))
    bad = [row for row in mixed if row.prompt.startswith("2")]

    assert [row for row in mixed if row.prompt.startswith("1")] == good
    assert alive(good) and not alive(bad)
    assert {row.raw for row in bad} == {"not allowed"}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_rows_do_not_depend_on_how_long_answers_take(make):
    questions = sums((1, 1), (2, 2), (1, 1), (3, 3))
    slow = Scripted(
        fails_on_two,
        pause=lambda request: 0.002 * (len(request.key("")) + request.sample + ord(last(request)[0])) % 0.005,
    )

    assert through(questions, make(Scripted(fails_on_two))) == through(questions, make(slow))


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_rejected_rows_travel_through_untouched(make):
    row = Example.of("?").rejected("before", "no good", raw="text")
    writer = Scripted(fails_on_two)

    assert through([row], make(writer)) == [row]
    assert not writer.asked


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_earlier_turns_and_the_system_message_reach_the_student(make):
    writer = Scripted(fails_on_two)
    row = replace(sums((1, 1))[0], system="be short", turns=(Message(role="user", content="earlier"),))
    through([row], make(writer))

    assert [message.content for message in writer.asked[0].messages[:2]] == ["be short", "earlier"]


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_ids_are_unique(make):
    rows = through(sums((1, 1), (2, 2)), make(Scripted(fails_on_two)))

    assert len({row.id for row in rows}) == len(rows)
