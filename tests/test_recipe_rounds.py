"""Recipes with rounds: the student is asked, taught from its own rows and scored, and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.core.errors import BudgetError, DataError, RecipeError
from potstill.core.run import read_json, read_lines
from potstill.loops import checkpoint
from potstill.recipe import load, plan, playing, quote, run, score
from potstill.recipe.sections import Recipe
from potstill.tasks.arithmetic import problems
from potstill.teachers.local_writer import LocalTransport

SHIPPED = ("star", "rest", "feedback_rounds")
FIT = "{steps: 3, lr: 0.001, optimizer: adamw, checkpoint_every: 1}"
SMALL = (
    f"fit={FIT}", "data.batch=4", "data.test_share=0.3", "task.num=2", "elicit.seeds.num=12", "rounds={num_rounds: 2}",
)  # fmt: skip

ROUNDS = ("round_0", "round_1")


class Killed(BaseException):
    """As a SIGKILL between two instructions: nobody catches it."""


def small(name: str, folder: Path, *changes: str) -> Recipe:
    recipe = load(name, [f"elicit.store={folder / 'requests.sqlite'}", *SMALL, *changes])
    assert isinstance(recipe, Recipe)
    return recipe


def rows_and_weights(folder: Path) -> dict[str, bytes]:
    """What must not depend on when a run was killed."""
    names = ("accepted.jsonl", "rejected.jsonl", "model.safetensors", "state.json")
    found = (path for name in names for path in sorted(folder.rglob(name)) if "checkpoints" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two rounds that nothing interrupted."""
    place = tmp_path_factory.mktemp("star")
    return run(small("star", place), place / "run").path


# What a run leaves.


def test_each_round_is_one_row_of_the_summary_beside_the_student_before(whole: Path) -> None:
    arms = read_json(whole / "summary.json")["arms"]
    assert tuple(arms) == ("before", *ROUNDS)
    for name in ROUNDS:
        ((_, folder, scores),) = (entry.values() for entry in arms[name])
        accepted, rejected = (
            sum(1 for _ in read_lines(whole / folder / "elicited" / f"{kind}.jsonl"))
            for kind in ("accepted", "rejected")
        )
        assert (scores["rows"], scores["accepted"]) == (accepted, accepted / (accepted + rejected))
        assert scores["dollars"] == 0.0
        assert 0.0 <= scores["solved"] <= 1.0


def test_the_report_shows_the_rounds_and_leads_to_their_rows(whole: Path) -> None:
    page, words = (whole / "report.html").read_text(), (whole / "report.md").read_text()
    assert "Round by round, the student solves" in page
    for number in range(2):
        assert f'href="rounds-seed0/round-{number}/samples.html"' in page
        assert (whole / f"rounds-seed0/round-{number}/samples.html").is_file()
        assert f"| Round {number} |" in words
    assert "| Arm | Rows | Accepted, % | Dollars |" in words


def test_what_is_exported_is_the_student_of_the_last_round(whole: Path) -> None:
    last, exported = (folder / "student" / "model.safetensors" for folder in (whole / "rounds-seed0/round-1", whole))
    assert last.read_bytes() == exported.read_bytes()


def test_the_last_round_can_be_scored_again(whole: Path) -> None:
    told = read_json(whole / "summary.json")["arms"]["round_1"][0]["scores"]
    assert score(whole)["solved"] == told["solved"]


def test_rationalised_rows_are_asked_with_the_hint_of_the_recipe(whole: Path) -> None:
    rows = [row for path in whole.rglob("*ted.jsonl") for row in read_lines(path)]
    hinted = [row for row in rows if len(row["lineage"]["prompts"]) == 1 and ".0" not in row["id"]]
    assert hinted
    assert len({hash for row in rows for hash in row["lineage"]["prompts"]}) == 2


# Killed at any point.


def test_killed_before_training(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, playing, "train_and_export", at=1)
    assert_the_same_after_a_kill(whole, tmp_path, monkeypatch)


def test_killed_while_a_round_trains(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first round writes 3 checkpoints, so this is in the second.
    dying(monkeypatch, checkpoint, "save", at=5)
    assert_the_same_after_a_kill(whole, tmp_path, monkeypatch)


def test_killed_while_the_student_writes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, LocalTransport, "send", at=20)
    assert_the_same_after_a_kill(whole, tmp_path, monkeypatch)


def test_killed_before_the_first_score(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, playing, "score_into", at=1)
    assert_the_same_after_a_kill(whole, tmp_path, monkeypatch)


def dying(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, at: int) -> None:
    """The call of this number, from 1, is the last one."""
    inside, calls = getattr(owner, name), []

    def call(*given: object, **named: object) -> object:
        calls.append(name)
        if len(calls) == at:
            raise Killed
        return inside(*given, **named)

    monkeypatch.setattr(owner, name, call)


def assert_the_same_after_a_kill(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        run(small("star", place), place / "run")
    monkeypatch.undo()
    assert not (place / "run" / "report.html").exists()
    assert rows_and_weights(run(small("star", place), place / "run").path) == rows_and_weights(whole)


def test_more_rounds_go_on_from_those_that_are_there(whole: Path, tmp_path: Path) -> None:
    run(small("star", tmp_path, "rounds.num_rounds=1"), tmp_path / "run")
    longer = run(small("star", tmp_path), tmp_path / "run").path
    assert rows_and_weights(longer) == rows_and_weights(whole)
    assert "| Round 1 |" in (longer / "report.md").read_text()


def test_another_beginning_is_another_run(whole: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds a run with rounds\.start base, this one says last"):
        run(small("star", whole, "rounds.start=last"), whole)


# A teacher that costs money, and seeds of each round's own.


def paid(folder: Path, *changes: str) -> Recipe:
    """The student solves; a scripted teacher with a price solves what it got wrong."""
    answers = {problem.question: problem.solution for problem in problems(12, seed=100, split="train")}
    (folder / "answers.json").write_text(json.dumps(answers))
    teacher = f"teacher={{use: fake, answers: {folder / 'answers.json'}, price: {{input: 1.0, output: 1.0}}}}"
    more = (teacher, "student.layers=2", "rounds={num_rounds: 2, seeds: 6, start: last}", *changes)
    return small("feedback_rounds", folder, *more)


def test_money_is_told_by_round_and_capped_for_all_together(tmp_path: Path) -> None:
    folder = run(paid(tmp_path), tmp_path / "run").path
    arms = read_json(folder / "summary.json")["arms"]
    dollars = [arms[name][0]["scores"]["dollars"] for name in ROUNDS]
    rows = [list(read_lines(path)) for path in sorted(folder.rglob("accepted.jsonl"))]
    assert all(dollars)
    assert dollars == pytest.approx([sum(row["lineage"].get("dollars", 0.0) for row in of) for of in rows])

    (tmp_path / "again").mkdir()
    with pytest.raises(BudgetError):
        run(paid(tmp_path / "again", f"elicit.budget={0.999 * sum(dollars)}"), tmp_path / "again" / "run")
    assert (tmp_path / "again" / "run" / "rounds-seed0" / "round-0" / "scores.json").is_file()


def test_rounds_may_have_seeds_of_their_own(tmp_path: Path) -> None:
    folder = run(paid(tmp_path), tmp_path / "run").path
    first, second = (
        {row["prompt"] for name in ("accepted", "rejected") for row in read_lines(path / "elicited" / f"{name}.jsonl")}
        for path in sorted((folder / "rounds-seed0").glob("round-*"))
    )
    assert (len(first), len(second), len(first & second)) == (6, 6, 0)


def test_too_few_seeds_for_all_rounds_are_found_out_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^rounds\.seeds: 3 rounds of 6 want 18 seeds, but there are 12"):
        run(paid(tmp_path, "rounds.num_rounds=3"), tmp_path / "run")


# Checked before anything is asked.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rounds=0"], r"^rounds: found 0, expected at least 1"),
        (["rounds={num_rounds: 0}"], r"^rounds\.num_rounds: found 0, expected at least 1"),
        (["rounds=three"], r"^rounds: found the text 'three', expected a whole number"),
        (["rounds={num_rouns: 3}"], r"^rounds\.num_rouns: .* Did you mean 'num_rounds'"),
        (["rounds={num_rounds: 3, start: first}"], r"^rounds\.start: found the text 'first', expected one of base"),
        (["rounds={num_rounds: 3, seeds: -1}"], r"^rounds\.seeds: found -1"),
        (["rounds={start: last}"], r"^rounds: .* needs 'num_rounds'"),
        (["task=null"], r"^rounds: there is no task to score the student by after each one"),
        (["elicit=null"], r"^rounds: there is no elicit, so no round has anything to learn"),
        (["student=null"], r"^rounds: there is no student, so nothing is trained"),
        (["baseline={}"], r"^baseline: rounds are compared with the student before the first"),
        (["arms={one: {}}"], r"^arms: rounds are one student beside itself"),
        (["rounds=null"], r"^elicit\.steps\[0\]: star needs 'student', .* A recipe with rounds gives its own"),
        (["rounds=null", "elicit.steps.0.student=student"], r"^elicit\.steps\[0\]\.student: only a recipe with rounds"),
        (["teacher={use: hf_fresh, model: x, fit: {steps: 1, lr: 1}}"], r"^teacher\.fit: each round has rows"),
        (["teacher={use: hf, model: x, remember: top k=2}"], r"^teacher\.remember: each round has rows of its own"),
        (
            ["teacher={use: fake, answers: x}", "elicit.steps=[{use: label}]"],
            r"^rounds: no step of elicit asks the student, so every round would have the same rows",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_place(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("star", changes)


def test_a_student_of_pictures_cannot_be_asked(tmp_path: Path) -> None:
    recipe = load(
        "star", ["student={use: plain_cnn, width: 8, channels: 1, classes: 9}", "data.tokenizer=shipped:data/bytes"]
    )
    with pytest.raises(RecipeError, match=r"^student\.use: plain_cnn writes no texts"):
        plan(recipe)


def test_a_bare_number_is_short_for_the_section() -> None:
    assert load("star", ["rounds=2"]).resolved == load("star", ["rounds={num_rounds: 2}"]).resolved


def test_the_student_is_meant_where_a_step_names_none() -> None:
    recipe = load("star")
    assert recipe.elicitation is not None
    assert recipe.elicitation.steps[0].written()["student"] == "student"


@pytest.mark.parametrize("name", SHIPPED)
def test_no_computation_of_the_test_is_ever_trained_on(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, Recipe) and recipe.elicitation is not None and recipe.task is not None
    assert recipe.elicitation.seeds.written()["split"] == "train"
    assert recipe.task.call.written()["split"] == "test"


def test_a_check_tells_of_the_rounds_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, LocalTransport, "send", at=1)
    told = plan(small("rest", tmp_path))
    assert told.parts[0] == (
        "rounds", (("rounds", "2"), ("each trains from", "its first weights"), ("seeds", "all, in every round")),
    )  # fmt: skip


def test_a_quote_says_that_it_is_per_round(tmp_path: Path) -> None:
    told = quote(paid(tmp_path, "rounds.seeds=4"), sample=2)
    assert told.scale == 2.0
    assert dict(told.rows())["rounds"].startswith("2; all of this is per round")
