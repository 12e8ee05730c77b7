"""The teacher that ships for the word problems: it loads, it stops, it is right, and chats are written its way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from potstill import recipes
from potstill.core.types import IGNORED
from potstill.data.chat import chat
from potstill.students.hf import HfModel, hf
from potstill.tasks.arithmetic import grade, holds, problems

FOLDER = Path(recipes.__path__[0]) / "quickstart" / "arithmetic"


@pytest.fixture(scope="module")
def teacher() -> HfModel:
    return hf(str(FOLDER)).eval()


@pytest.fixture(scope="module")
def solutions(teacher: HfModel) -> list[str]:
    """What it writes to 40 held-out problems, all tokens shown."""
    tokenizer = teacher.tokenizer
    assert tokenizer is not None
    asked = [[{"role": "user", "content": problem.question}] for problem in problems(40, seed=3, split="test")]
    prompts = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = teacher.model.generate(**prompts, max_new_tokens=48, do_sample=False)
    return tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])


@pytest.fixture(scope="module")
def answers(solutions: list[str]) -> list[str]:
    """The same without the tokens that only end or fill them."""
    return [solution.partition("<end>")[0] for solution in solutions]


def test_it_solves_most_held_out_problems(answers: list[str]) -> None:
    held = problems(40, seed=3, split="test")
    assert sum(map(grade, held, answers)) >= 32


def test_most_of_its_solutions_hold_by_themselves(answers: list[str]) -> None:
    assert sum(map(holds, answers)) >= 32


def test_it_ends_its_answers(solutions: list[str]) -> None:
    assert all("<end>" in solution for solution in solutions)


def test_every_number_of_the_world_is_one_piece(teacher: HfModel) -> None:
    assert teacher.tokenizer is not None
    assert all(len(teacher.tokenizer.tokenize(str(number))) == 1 for number in range(1, 61))


def test_its_tokenizer_gives_any_text_back(teacher: HfModel) -> None:
    text = "Zo\u00eb paid 123,456 \u20ac.\n\tReally?"
    assert teacher.tokenizer is not None
    assert teacher.tokenizer.decode(teacher.tokenizer(text)["input_ids"]) == text


def test_data_supervise_the_solution_and_its_end_alone(teacher: HfModel, tmp_path: Path) -> None:
    [problem] = problems(1, seed=0, split="train")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": problem.question, "completion": problem.solution}) + "\n")
    batch = chat(str(rows), tokenizer=str(FOLDER), batch=1, test_share=0.0).train.batch(0)
    assert teacher.tokenizer is not None
    assert teacher.tokenizer.decode(batch.labels[batch.labels != IGNORED].tolist()) == f"{problem.solution}<end>"


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4_000_000
