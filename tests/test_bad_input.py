"""What people get wrong, and what machines do to them: one sentence each, the right exit code, nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from potstill.cli import app
from potstill.core.run import read_json
from potstill.recipe.building import load_student
from tests import tiny


def potstill(*words: str) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stderr.strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path)


# (what is changed, where it is, what was found, what was expected or is nearest)
MISTAKES = [
    ("sceme={use: offline}", "sceme", "'sceme'", "'scheme'"),
    ("objective.1.temprature=2", "objective[1].temprature", "'temprature'", "'temperature'"),
    ("objective.1.use=dkdd", "objective[1].use", "'dkdd'", "'dkd'"),
    ("objective.1.temperature='2'", "objective[1].temperature", "the text '2'", "a number"),
    ("objective.1.weight=much", "objective[1].weight", "the text 'much'", "a number"),
    ("objective.1.weight={use: linar}", "objective[1].weight.use", "'linar'", "'linear'"),
    ("objective.1.weight={use: linear, start: 1}", "objective[1].weight", "linear", "'end'"),
    ("objective.1.at=[layer1]", "objective[1].at", "'at'", "Remove it"),
    ("objective.1={use: sp}", "objective[1].at", "none is named", "at: {"),
    ("objective.1={use: sp, at: layer1}", "objective[1].at", "the text 'layer1'", "a list"),
    ("objective.1={use: sp, at: [leyer1]}", "objective", "'leyer1'", "'layer1'"),
    ("objective=[]", "objective", "a list of 0", "a list of terms"),
    ("objective=kd", "objective", "the text 'kd'", "a list of terms"),
    ("objective.1=kd", "objective[1]", "the text 'kd'", "a mapping"),
    ("stages=[]", "objective", "stages", "inside each stage"),
    ("student.use=mlpp", "student.use", "'mlpp'", "'mlp'"),
    ("student.use=7", "student.use", "the number 7", "the name of a student"),
    ("student.widht=4", "student.widht", "'widht'", "'width'"),
    ("student.width=wide", "student.width", "the text 'wide'", "a whole number"),
    ("student.classes=2", "student.classes", "2", "3 classes"),
    ("teacher.classes=2", "teacher.classes", "2", "3 classes"),
    ("teacher.classes=5", "objective", "the teacher 5", "same classes"),
    ("teacher.weights=/nowhere.safetensors", "teacher", "both", "Keep"),
    ("teacher={use: mlp, weights: /nowhere.safetensors}", "teacher.weights", "/nowhere.safetensors", "Give"),
    ("teacher={use: mlp}", "teacher", "untrained", "weights"),
    ("teacher.fit.setps=3", "teacher.fit.setps", "'setps'", "'steps'"),
    ("data.path=/nowhere", "/nowhere", "no such file", "Expected"),
    ("data.btach=3", "data.btach", "'btach'", "'batch'"),
    ("data.batch=0", "batch", "0 found", "at least 1"),
    ("data.batch=1.5", "data.batch", "the number 1.5", "a whole number"),
    ("data.seed=3", "data.seed", "'seed'", "Remove"),
    ("data=digits", "data", "the text 'digits'", "a mapping"),
    ("fit.steps=0", "fit.steps", "0", "at least 1"),
    ("fit.lr=fast", "fit.lr", "the text 'fast'", "a number"),
    ("fit.lr=-1", "fit.lr", "-1", "above 0"),
    ("fit.optimizer=sgdd", "fit.optimizer", "'sgdd'", "'sgd'"),
    ("fit.schedule=cosin", "fit.schedule", "the text 'cosin'", "cosine"),
    ("fit.out=here", "fit.out", "'out'", "Remove"),
    ("scheme.use=offlin", "scheme.use", "'offlin'", "'offline'"),
    ("seeds=3", "seeds", "the number 3", "a list"),
    ("seeds=[]", "seeds", "[]", "such as [0, 1, 2]"),
    ("seeds=[0, 0]", "seeds", "[0, 0]", "each once"),
    ("baseline=no", "baseline", "the text 'no'", "a mapping"),
    ("baseline={fti: {steps: 3}}", "baseline.fti", "'fti'", "'fit'"),
    ("baseline={fit: {stesp: 3}}", "baseline.fit.stesp", "'stesp'", "'steps'"),
    ("name=a b/c", "name", "the text 'a b/c'", "one word"),
]


@pytest.mark.parametrize(("change", "where", "found", "expected"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_gives_one_sentence_with_place_found_and_expected(
    change: str, where: str, found: str, expected: str, file: Path
) -> None:
    code, said = potstill("check", str(file), change)
    assert code == 2
    assert len(said.splitlines()) == 1
    assert said.removeprefix("error: ").removeprefix("images.").startswith(where)
    assert found in said
    assert expected in said


@pytest.mark.parametrize("change", [mistake[0] for mistake in MISTAKES[::6]])
def test_a_run_refuses_what_check_refuses_and_trains_nothing(change: str, file: Path, tmp_path: Path) -> None:
    said = potstill("check", str(file), change)
    assert potstill("run", str(file), change, "--out", str(tmp_path / "run")) == said
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("kdd", "'kd'"), ("quikstart", "'quickstart'"), ("kd.yaml", "no file kd.yaml"), ("/x.yaml", "/x.yaml")],
)
def test_a_recipe_that_is_not_there_is_named_with_the_nearest(name: str, nearest: str) -> None:
    code, said = potstill("check", name)
    assert code == 2
    assert nearest in said


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    code, said = potstill("check", str(tmp_path / "x.yaml"))
    assert code == 2
    assert "x.yaml" in said


def test_a_broken_image_is_named(file: Path, tmp_path: Path) -> None:
    for index, name in enumerate(("a0", "a1", "b0", "b1")):
        (tmp_path / "pictures" / name[0]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 40 * index, np.uint8)).save(tmp_path / "pictures" / name[0] / f"{name}.png")
    torn = tmp_path / "pictures" / "b" / "b1.png"
    torn.write_bytes(torn.read_bytes()[:40])
    code, said = potstill("check", str(file), f"data.path={tmp_path / 'pictures'}")
    assert code == 2
    assert "b1.png" in said


def test_labels_that_are_no_classes_are_refused(file: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(tmp_path / "tiny.npz"))
    arrays["y_train"][5] = -7
    np.savez(tmp_path / "odd.npz", **arrays)
    code, said = potstill("check", str(file), f"data.path={tmp_path / 'odd.npz'}")
    assert code == 2
    assert "-7" in said


def test_a_batch_of_one_is_refused_by_a_loss_that_compares_examples(file: Path) -> None:
    code, said = potstill("check", str(file), "objective.1={use: rkd, at: [layer1]}", "data.batch=1")
    assert code == 2
    assert said.startswith("error: objective: rkd compares examples")
    assert "Use a larger batch" in said


def test_a_loss_that_is_no_number_stops_the_run_with_1_and_keeps_what_was_written(file: Path, tmp_path: Path) -> None:
    code, said = potstill("run", str(file), "fit.lr=1e30", "fit.steps=50", "--out", str(tmp_path / "run"))
    assert code == 1
    assert said.startswith("error: The loss became")
    assert "Lower lr" in said
    assert load_student(tmp_path / "run" / "teacher" / "student") is not None


def test_after_a_diverged_run_another_learning_rate_needs_another_folder(file: Path, tmp_path: Path) -> None:
    potstill("run", str(file), "fit.lr=1e30", "--out", str(tmp_path / "run"))
    code, said = potstill("run", str(file), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "fit.lr" in said


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    """Writes beyond `size` fail, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 700, 2500, 6000, 20000])
def test_a_write_that_fails_stops_with_1_and_the_same_command_finishes_later(
    size: int, file: Path, tmp_path: Path
) -> None:
    words = ("run", str(file), "--out", str(tmp_path / "run"))
    with _files_no_larger_than(size):
        code, said = potstill(*words)
    assert code == 1
    assert said.startswith("error: Cannot ")
    assert len(said.splitlines()) == 1
    assert not list((tmp_path / "run").rglob(".*draft*"))
    assert potstill(*words)[0] == 0
    assert potstill("run", str(file), "--out", str(tmp_path / "whole"))[0] == 0
    assert _accuracies(tmp_path / "run") == _accuracies(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 200 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    may_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    if not may_mount or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs the rights to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_called_so_and_the_run_goes_on_when_there_is_room(file: Path, small_disk: Path) -> None:
    words = ("run", str(file), "teacher.width=100", "--out", str(small_disk / "run"))
    code, said = potstill(*words)
    assert code == 1
    assert "disk is full" in said or "No space left" in said
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert potstill(*words)[0] == 0


def _accuracies(folder: Path) -> list[float]:
    arms = read_json(folder / "summary.json")["arms"]
    return [entry["scores"]["nll"] for name in sorted(arms) for entry in arms[name]]
