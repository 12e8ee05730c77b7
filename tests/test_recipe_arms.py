"""Recipes that name their arms: what each is, what is refused, and what a run of several leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import jsonschema
import pytest

from potstill.core.errors import RecipeError
from potstill.core.run import read_json, read_lines
from potstill.recipe import build, plan, run, schema, score
from potstill.recipe.sections import Recipe
from potstill.recipe.text import Tree, merge, override, read, write
from tests import tiny

ARMS = "arms={plain: {objective: [{use: cross_entropy}]}, wide: {student: {width: 6}}, taught: {}}"
STAGES = "[{objective: [{use: cross_entropy}], fit: {steps: 2, lr: 0.1}}]"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("images") / "tiny.npz")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, two seeds."""
    return run(arms_of(images, "seeds=[0, 1]"), tmp_path_factory.mktemp("arms") / "run").path


def arms_of(images: Path, *changes: str) -> Recipe:
    recipe = build(override(tiny.content(images), [ARMS, *changes]))
    assert isinstance(recipe, Recipe)
    return recipe


def test_an_arm_is_the_recipe_with_its_changes(images: Path) -> None:
    arms = arms_of(images).arms
    assert list(arms) == ["plain", "wide", "taught"]
    assert [list(arm.stages[0].objective.labels) for arm in arms.values()] == [
        ["cross_entropy"], ["cross_entropy", "kd"], ["cross_entropy", "kd"],
    ]  # fmt: skip
    assert [arm.student.knobs["width"] for arm in arms.values()] == [4, 6, 4]


def test_the_recipe_is_about_its_last_arm(images: Path) -> None:
    recipe = arms_of(images)
    assert recipe.main == "taught"
    assert recipe.arms["taught"] is recipe
    assert recipe.alone is None


def test_a_change_does_to_an_arm_what_it_does_to_a_recipe_of_one(images: Path) -> None:
    change: dict[str, Tree] = {"student": {"width": 6}, "fit": {"steps": 3}}
    content = tiny.content(images)
    alone = build(merge(content, change) | {"baseline": None})
    arm = build(content | {"arms": {"changed": change}})
    assert isinstance(alone, Recipe) and isinstance(arm, Recipe)
    assert arm.student.written() == alone.student.written()
    assert [stage.written for stage in arm.stages] == [stage.written for stage in alone.stages]


def test_all_arms_have_one_teacher(images: Path) -> None:
    assert len({id(arm.teacher) for arm in arms_of(images).arms.values()}) == 1


def test_an_arm_may_have_stages_where_the_others_have_none(images: Path) -> None:
    recipe = arms_of(images, f"arms.plain={{stages: {STAGES}}}")
    assert [arm.stages[0].steps for arm in recipe.arms.values()] == [2, 6, 6]


def test_an_arm_may_have_one_objective_where_the_others_have_stages(images: Path) -> None:
    content = {key: value for key, value in tiny.content(images).items() if key not in ("objective", "fit")}
    content["arms"] = {"one": {"objective": [{"use": "cross_entropy"}], "fit": {"steps": 3, "lr": 0.1}}, "staged": {}}
    recipe = build(override(content, [f"stages={STAGES}"]))
    assert isinstance(recipe, Recipe)
    assert [arm.stages[0].steps for arm in recipe.arms.values()] == [3, 2]


@pytest.mark.parametrize("more", ["seeds=[0]", f"arms.plain={{stages: {STAGES}}}", "arms.plain.data={augment: []}"])
def test_a_resolved_recipe_of_arms_resolves_to_the_same_bytes(images: Path, more: str) -> None:
    once = write(arms_of(images, more).resolved)
    assert write(build(read(once, where="once")).resolved) == once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arms={}", r"^arms: found a mapping \(empty\), expected names with what each changes"),
        ("arms=[plain]", r"^arms: found a list of 1, expected names"),
        ("arms.plain=cross_entropy", r"^arms\.plain: found the text 'cross_entropy', expected a mapping of overrides"),
        ("arms.plain.objektive=[]", r"^arms\.plain\.objektive: no key is called 'objektive'\. Did you mean"),
        ("arms.plain.fit={stesp: 3}", r"^arms\.plain\.fit\.stesp: fit has no knob called 'stesp'"),
        ("arms.wide.student.widht=3", r"^arms\.wide\.student\.widht: mlp has no knob called 'widht'"),
        ("arms.plain.objective.0.use=kdd", r"^arms\.plain\.objective\[0\]\.use: no loss is called 'kdd'"),
        ("arms.plain.teacher={use: resnet}", r"^arms\.plain\.teacher: no key is called 'teacher'"),
        ("arms.teacher={}", r"^arms\.teacher: found the name 'teacher', expected one word other than teacher"),
        ("arms={'two words': {}}", r"^arms\.two words: found the name 'two words', expected one word"),
        ("baseline={fit: {steps: 2}}", r"^baseline: a recipe with arms names all that it compares\. Make it the first"),
        ("fit.stesp=3", r"^fit\.stesp: no key is called 'stesp'\. Did you mean 'steps'"),
        ("student.widht=3", r"^student\.widht: mlp has no knob"),
        ("data.btach=3", r"^data\.btach: images has no knob"),
        ("objective.1.temprature=3", r"^objective\[1\]\.temprature: kd has no knob"),
        ("teacher=null", r"^objective\[1\]: kd reads teacher_logits, but this arm has no teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_arm_is_refused_with_its_place(images: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        arms_of(images, change)


def test_checking_rehearses_every_arm(images: Path) -> None:
    titles = [title for title, _ in plan(arms_of(images)).parts]
    assert titles == ["data", "teacher", "plain", "wide", "taught"]


def test_checking_finds_what_only_one_arm_cannot_do(images: Path) -> None:
    with pytest.raises(RecipeError, match=r"^arms\.wide\.stages\[0\]\.train\[0\]: no part"):
        stages = "[{objective: [{use: cross_entropy}], train: [nothing], fit: {steps: 2, lr: 0.1}}]"
        plan(arms_of(images, f"arms.wide={{stages: {stages}}}"))


def test_every_seed_trains_every_arm(finished: Path) -> None:
    told = read_json(finished / "summary.json")["arms"]
    assert list(told) == ["plain", "wide", "taught", "teacher"]
    assert [entry["seed"] for entry in told["wide"]] == [0, 1]
    assert all(
        (finished / f"{arm}-seed{seed}" / "scores.json").is_file()
        for arm in told
        if arm != "teacher"
        for seed in (0, 1)
    )


def test_arms_of_equal_sections_are_equal_students(images: Path, tmp_path: Path) -> None:
    folder = run(arms_of(images, "arms={one: {}, two: {}}"), tmp_path / "run").path
    one, two = ((folder / f"{arm}-seed0" / "student" / "model.safetensors").read_bytes() for arm in ("one", "two"))
    assert one == two


def test_arms_called_alone_and_distilled_are_the_pair(images: Path, tmp_path: Path) -> None:
    named = "arms={alone: {objective: [{use: cross_entropy}]}, distilled: {}}"
    pair, arms = (
        run(build(override(tiny.content(images), changes)), tmp_path / str(len(changes))).path
        for changes in ([], [named])
    )
    for arm in ("alone", "distilled"):
        file = Path(f"{arm}-seed0") / "student" / "model.safetensors"
        assert (pair / file).read_bytes() == (arms / file).read_bytes()


def test_the_last_arm_is_exported_and_scored_again(finished: Path) -> None:
    exported = (finished / "student" / "model.safetensors").read_bytes()
    assert exported == (finished / "taught-seed0" / "student" / "model.safetensors").read_bytes()
    assert score(finished)["accuracy"] == read_json(finished / "taught-seed0" / "scores.json")["accuracy"]


def test_a_stopped_run_goes_on_with_the_arm_it_was_at(finished: Path, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "wide-seed1")
    kept = (folder / "plain-seed0" / "scores.json").stat().st_mtime_ns
    run(arms_of(images, "seeds=[0, 1]"), folder)
    assert (folder / "plain-seed0" / "scores.json").stat().st_mtime_ns == kept
    one, two = ((each / "wide-seed1" / "student" / "model.safetensors").read_bytes() for each in (folder, finished))
    assert one == two


def test_a_teacher_can_be_remembered_for_all_arms(images: Path, tmp_path: Path) -> None:
    folder = run(arms_of(images, "teacher.remember=whole", "data.augment=[]"), tmp_path / "run")
    assert [line["step"] for line in read_lines(folder.path / "wide-seed0" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_schema_knows_arms(images: Path) -> None:
    known = jsonschema.Draft202012Validator(schema())
    assert known.is_valid(override(tiny.content(images), [ARMS]))
    assert not known.is_valid(override(tiny.content(images), [ARMS, "arms.plain.objektive=[]"]))
    assert not known.is_valid(override(tiny.content(images), [ARMS, "baseline={}"]))
