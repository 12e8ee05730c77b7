"""Feedback and self-knowledge through a whole flow, with a store and money: nothing twice, every dollar once."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.core.writing import Elicitor, Example, Request, Writer
from potstill.knowledge.constitution import constitutional
from potstill.knowledge.feedback import STOP, correct, critique, preference, rubric_scores
from potstill.knowledge.flow import Elicited, elicit
from potstill.knowledge.samples import candidates
from potstill.knowledge.self_improvement import self_refine, self_rewarding, spin
from potstill.knowledge.self_knowledge import raft, rejection_sampling, rest, star
from potstill.knowledge.ultrafeedback import ultrafeedback
from potstill.recipe.nested import check_nest
from potstill.recipe.text import Tree
from potstill.tasks.graded import Graded
from potstill.teachers.fake import fake
from potstill.teachers.money import Price
from potstill.teachers.recorded import Recorded

ROWS = [
    Example.of(f"question {n}", answer=f"answer {n}", reference="2", fields={"candidates": ["a", "bbb", "cc"]})
    for n in range(5)
]
BARE = [Example.of(row.prompt, reference=row.reference) for row in ROWS]
TASK = Graded(list, lambda example, answer: float(answer == example.reference))


def everyone(request: Request) -> str:
    """Writer, judge and critic in one; what it says depends on the request alone, and is now and then no good.

    No two of its answers are the same: what two rows ask is bought once, and stands in both.
    """
    text = request.messages[-1].content
    number = zlib.crc32(f"{text}{request.messages[0].content}{request.sample}".encode())
    if number % 7 == 0:
        return f"{number}: I would rather not."
    if "Types:" in text or "<its number>" in text:
        types = "Types: none\n" if "Types: <" in text else ""
        count = len(re.findall(r"^Answer \d+:$", text, re.MULTILINE))
        return "\n\n".join(f"Answer {n + 1}\n{types}Rating: {1 + n % 5}\nReason: so." for n in range(count))
    if "Better:" in text:
        return f"Better: {1 + number % 2}"
    if "Rating: " in text:
        return f"So so.\nRating: {number % 5 + 1}"
    if STOP in text:
        return STOP if number % 3 == 0 else "More."
    return f"{number}: 1+1={2 + number % 2}\n#### {2 + number % 2}"


STEPS: dict[str, tuple[list[Example], Callable[[Writer], Elicitor]]] = {
    "candidates": (BARE, lambda writer: candidates(student=writer)),
    "preference": (ROWS, lambda writer: preference(judge=writer)),
    "rubric_scores": (ROWS, lambda writer: rubric_scores(judge=writer, rubrics={"one": "1", "two": "2"})),
    "critique": (ROWS, lambda writer: critique(teacher=writer)),
    "correct": (ROWS, lambda writer: correct(teacher=writer, rounds=2)),
    "constitutional": (BARE, lambda writer: constitutional(student=writer)),
    "ultrafeedback": (BARE, lambda writer: ultrafeedback(teachers=[writer] * 4, judge=writer)),
    "star": (BARE, lambda writer: star(student=writer, task=TASK)),
    "rejection_sampling": (BARE, lambda writer: rejection_sampling(student=writer, task=TASK, samples=6)),
    "raft": (BARE, lambda writer: raft(student=writer, judge=writer, samples=3)),
    "rest": (BARE, lambda writer: rest(student=writer, judge=writer, samples=3, thresholds=(2.0,))),
    "self_rewarding": (BARE, lambda writer: self_rewarding(student=writer)),
    "spin": (BARE, lambda writer: spin(student=writer)),
    "self_refine": (BARE, lambda writer: self_refine(student=writer, judge=writer)),
}


def flow(name: str, folder: Path, store: Path) -> tuple[Elicited, Recorded]:
    rows, make = STEPS[name]
    writer = fake(everyone, store=str(store), price=Price(input=1e6, output=1e6))
    return elicit(rows, make(writer), out=folder), writer


@pytest.mark.parametrize("name", STEPS)
def test_a_flow_that_runs_again_gives_the_same_rows_and_sends_nothing(tmp_path, name):
    first, writer = flow(name, tmp_path / "first", tmp_path / "store")
    second, again = flow(name, tmp_path / "second", tmp_path / "store")

    assert writer.transport.num_sent > 0 == again.transport.num_sent
    for file in ("accepted.jsonl", "rejected.jsonl"):
        assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()


@pytest.mark.parametrize("name", STEPS)
def test_every_dollar_stands_in_exactly_one_row(tmp_path, name):
    told, writer = flow(name, tmp_path / "rows", tmp_path / "store")
    rows = [*told, *told.rejected()]

    assert writer.dollars > 0
    assert sum(row.lineage.dollars for row in rows) == pytest.approx(writer.dollars)


@pytest.mark.parametrize("name", STEPS)
def test_every_row_has_an_id_of_its_own_and_a_prompt_for_every_request(tmp_path, name):
    told, _ = flow(name, tmp_path / "rows", tmp_path / "store")
    rows = [*told, *told.rejected()]

    assert len({row.id for row in rows}) == len(rows)
    assert all(len(row.lineage.requests) == len(row.lineage.prompts) == len(row.lineage.writers) for row in rows)
    assert all(row.raw for row in told.rejected())


SECTIONS: list[Tree] = [
    {"use": "candidates", "student": "teacher", "stop": ["\n"]},
    {"use": "preference", "judge": "teacher", "combine": "average"},
    {"use": "soft_preference", "judge": "teacher", "clamp": [0.4, 0.6]},
    {"use": "rubric_scores", "judge": "teacher", "rubrics": {"tone": "kind"}},
    {"use": "critique"},
    {"use": "correct", "rounds": 2},
    {"use": "constitutional", "student": "teacher", "principles": ["whether it is rude"]},
    {"use": "ultrafeedback", "teachers": ["teacher"] * 4, "judge": "teacher", "against": "random"},
    {"use": "star", "student": "teacher", "demonstrations": [{"prompt": "a", "reasoning": "b", "answer": "c"}]},
    {"use": "rejection_sampling", "student": "teacher"},
    {"use": "raft", "student": "teacher", "score": "builtins:len"},
    {"use": "rest", "student": "teacher", "thresholds": [0.1, 0.5], "improve": 1},
    {"use": "self_rewarding", "student": "teacher"},
    {"use": "spin", "student": "teacher", "chosen": "answer"},
    {"use": "self_refine", "student": "teacher", "critic": "teacher"},
    {"use": "step_by_step", "labels": "reference"},
    {"use": "soft_labels", "options": ["yes", "no"]},
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["use"])
def test_each_can_be_written_in_a_recipe(tmp_path, section):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    if section["use"] in ("star", "rejection_sampling", "rest"):
        section = {**section, "task": {"use": "gsm8k", "path": str(tmp_path)}}
    nest = check_nest("elicitor", section, place="elicit.steps[0]", words=frozenset({"teacher"}))
    writer = fake(everyone)
    step = nest.build(lambda inner: writer if isinstance(inner, str) else inner.build(lambda _: writer))

    assert step.name == section["use"]
