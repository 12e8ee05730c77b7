"""What people get wrong with texts and language models: one sentence each, exit code 2, nothing trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from potstill.recipe.calls import located
from potstill.students import hf_fresh
from tests import tiny_text
from tests.tiny_text import asked, potstill, rows, tokenizer_folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_text.write_recipe(tmp_path)


# (what is changed, where the sentence begins, what it says besides)
MISTAKES = [
    ("data.path=/nowhere.jsonl", "/nowhere.jsonl", "no such"),
    ("data.path=shipped:data/chat.jsonl", "path", "Did you mean 'shipped:data/chats.jsonl'"),
    ("student.model=/nowhere", "/nowhere", "no tokenizer can be loaded"),
    ("student.model=shipped:data/byte", "path", "Did you mean 'shipped:data/bytes'"),
    ("student.modle=x", "student.modle", "Did you mean 'model'"),
    ("student.hidden=9", "hidden", "is not a multiple"),
    ("data.length=0", "chat.length", "at least 1"),
    ("data.supervise=answer", "data.supervise", "one of answers, all, last"),
    ("data.template=/nowhere.jinja", "chat.template", "no file /nowhere.jinja"),
    ("source={use: rolout}", "source.use", "Did you mean 'rollout'"),
    ("source={use: rollout, share: 2.0}", "rollout.share", "a share from 0 to 1"),
    ("source={use: rollout, tokns: 2}", "source.tokns", "Did you mean 'tokens'"),
    ("source={use: rollout, teacher: x}", "source.teacher", "the run itself gives"),
    ("source={use: rollout, share: {use: linar, start: 0, end: 1}}", "source.share.use", "Did you mean 'linear'"),
    ("teacher.remember=smapled", "--sketch", "Did you mean 'sampled'"),
    ("objective.1={use: hidden_mse, at: {use: uniforn}}", "objective[1].at.use", "Did you mean 'uniform'"),
    ("objective.1={use: hidden_mse, at: {use: uniform, orign: 0}}", "objective[1].at.orign", "'origin'"),
    ("objective.1={use: hidden_mse, at: [hidden/9]}", "objective", "hidden/0 to hidden/2"),
    ("objective.1={use: hidden_mse, at: {use: uniform, template: 'layer{}'}}", "objective", "no layer 'layer"),
]


@pytest.mark.parametrize(("change", "where", "said"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_gives_one_sentence_with_its_place(change: str, where: str, said: str, file: Path) -> None:
    code, _, errors = potstill("check", str(file), change)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert errors.removeprefix("error: ").startswith(where)
    assert said in errors


def test_a_teacher_of_another_tokenizer_is_pointed_to_what_crosses_over(file: Path, tmp_path: Path) -> None:
    hf_fresh(located(tiny_text.PIECES), layers=1, hidden=8, heads=2).export(tmp_path / "other")
    code, _, errors = potstill("check", str(file), f"teacher={{use: hf, model: {tmp_path / 'other'}}}")
    assert code == 2
    assert "has another tokenizer than the one that made the batch" in errors
    assert "aligned" in errors


def test_data_read_by_another_tokenizer_than_the_students_are_refused(file: Path) -> None:
    code, _, errors = potstill("check", str(file), f"data.tokenizer={tiny_text.PIECES}")
    assert code == 2
    assert "another tokenizer" in errors


def test_a_teacher_whose_template_writes_another_text_is_refused(file: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|end|>{% endfor %}"
    folder = tokenizer_folder(tmp_path / "teacher", lambda settings: None, template=template)
    hf_fresh(str(folder), layers=1, hidden=8, heads=2).export(tmp_path / "trained")
    code, _, errors = potstill("check", str(file), f"teacher={{use: hf, model: {tmp_path / 'trained'}}}")
    assert code == 2
    assert "by the teacher's chat template" in errors


def test_a_missing_pad_token_is_told_and_changes_nothing_else(file: Path, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "bare", lambda settings: settings.pop("pad_token"))
    code, output, _ = potstill("check", str(file), f"student.model={folder}", f"teacher.model={folder}")
    assert code == 0
    assert "The tokenizer has no pad token" in output


def test_a_missing_end_token_is_refused(file: Path, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "bare", lambda settings: settings.pop("eos_token"))
    code, _, errors = potstill("check", str(file), f"data.tokenizer={folder}")
    assert code == 2
    assert "no end-of-sequence token" in errors


def test_a_row_longer_than_the_model_is_found_before_training_although_it_comes_late(
    file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(located(tiny_text.BYTES), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    long = rows(tmp_path / "long.jsonl", *(asked(number) for number in range(30)), asked(30, "Yes. " * 20))
    words = (f"data.path={long}", f"student.model={folder}", f"teacher.model={folder}", "data.length=200",
             "data.limit=null", "data.test_limit=null")  # fmt: skip
    code, _, errors = potstill("check", str(file), *words)
    assert code == 2
    assert "the model reads at most 60" in errors


def test_a_row_without_an_answer_is_left_out_and_counted(file: Path, tmp_path: Path) -> None:
    some = rows(tmp_path / "some.jsonl", *(asked(number) for number in range(9)), asked(9, ""))
    code, output, _ = potstill("check", str(file), f"data.path={some}")
    assert code == 0
    assert "left out\t1 x the answer is empty" in output


def test_rows_without_any_answer_are_refused_with_the_reason(file: Path, tmp_path: Path) -> None:
    none = rows(tmp_path / "none.jsonl", *(asked(number, "") for number in range(9)))
    code, _, errors = potstill("check", str(file), f"data.path={none}")
    assert code == 2
    assert "no row for training is left" in errors
    assert "the answer is empty" in errors


def test_rows_whose_answer_is_cut_away_are_refused_with_the_reason(file: Path) -> None:
    code, _, errors = potstill("check", str(file), "data.length=8")
    assert code == 2
    assert "no supervised token within the first 8" in errors


def test_a_template_that_drops_the_answer_is_refused(file: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    folder = tokenizer_folder(tmp_path / "deaf", lambda settings: None, template=template)
    code, _, errors = potstill("check", str(file), f"student.model={folder}", f"teacher.model={folder}")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert "template" in errors
    assert "answer" in errors


def test_data_without_a_test_row_are_refused(file: Path) -> None:
    code, _, errors = potstill("check", str(file), "data.test_share=0.0", "data.limit=null", "data.test_limit=null")
    assert code == 2
    assert errors.startswith("error: data: there is no test row")


def test_a_cache_that_is_not_there_is_named(file: Path, tmp_path: Path) -> None:
    code, _, errors = potstill("check", str(file), f"teacher={{use: remembered, path: {tmp_path / 'none'}}}")
    assert code == 2
    assert str(tmp_path / "none") in errors


def test_text_models_on_pictures_are_told_what_they_read(file: Path) -> None:
    code, _, errors = potstill("check", str(file), "data={use: images, path: digits}", "teacher=null",
                               "objective=[{use: cross_entropy}]")  # fmt: skip
    assert code == 2
    assert "reads the input 'input_ids'; the batch has: image" in errors


@pytest.mark.parametrize("change", [mistake[0] for mistake in MISTAKES[::5]])
def test_a_run_refuses_what_check_refuses_and_trains_nothing(change: str, file: Path, tmp_path: Path) -> None:
    code, _, errors = potstill("check", str(file), change)
    assert potstill("run", str(file), change, "--out", str(tmp_path / "run"))[::2] == (code, errors)
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))
