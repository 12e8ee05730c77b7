"""Recipes: the text they are written in, what is refused before anything is built, and what is carried out."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.catalog import find, parts
from potstill.core.errors import RecipeError
from potstill.core.run import read_json, read_lines
from potstill.losses.response import kd
from potstill.recipe import DataRecipe, Recipe, build, load, plan, run, schema
from potstill.recipe import text as words
from potstill.recipe.building import load_student, make_model, read_data
from potstill.recipe.signature import check_knobs, typed
from tests import tiny

SHIPPED = sorted({name.rpartition("/")[2] for name in words.shipped()})
KEYS = st.text(min_size=1, max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
RECIPES = st.dictionaries(KEYS, TREES, max_size=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("tiny") / "tiny.npz")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    return run(tiny.recipe(images), tmp_path_factory.mktemp("run") / "tiny").path


# The text.


@given(RECIPES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_back_as_the_same(tree: dict[str, words.Tree]) -> None:
    assert words.read(words.write(tree), where="test") == tree


@given(RECIPES)
@settings(max_examples=30, deadline=None)
def test_a_recipe_does_not_differ_from_itself(tree: dict[str, words.Tree]) -> None:
    assert words.first_difference(tree, words.read(words.write(tree), where="again")) is None


@pytest.mark.parametrize(
    ("new", "difference"),
    [
        ({"fit": {"steps": 2, "lr": 0.1}, "seeds": [0]}, ("fit.steps", 1, 2)),
        ({"fit": {"steps": 1, "lr": 0.1}, "seeds": [0, 1]}, ("seeds[1]", None, 1)),
        ({"fit": {"steps": 1.0, "lr": 0.1}, "seeds": [0]}, ("fit.steps", 1, 1.0)),
        ({"seeds": [0], "fit": {"lr": 0.1, "steps": 1}}, None),
        ({"fit": {"steps": 1, "lr": 0.1}, "seeds": [0], "out": "x"}, ("out", None, "x")),
        ({"fit": 3, "seeds": [0]}, ("fit", {"steps": 1, "lr": 0.1}, 3)),
    ],
)
def test_the_first_key_that_differs_is_named_with_both_values(new: dict[str, words.Tree], difference: object) -> None:
    assert words.first_difference({"fit": {"steps": 1, "lr": 0.1}, "seeds": [0]}, new) == difference


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("5e3", 5000.0),
        (".inf", math.inf),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("~", None),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(written: str, value: object) -> None:
    assert words.read(f"key: {written}", where="test") == {"key": value}


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("fit: {steps: 1\nseeds: [0]", "test.yaml, line 2, column 6"),
        ("fit: {steps: 1}\nfit: {steps: 2}", "test.yaml, line 2, column 1: the key 'fit' is given twice"),
        ("a: &x 1\nb: *x", "test.yaml, line 2, column 4: a recipe has no aliases"),
        ("a: !!python/object/apply:os.getcwd []", "test.yaml, line 1, column 4"),
        ("- a\n- b", "test.yaml: found a list of 2, expected a mapping"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(written: str, place: str) -> None:
    with pytest.raises(RecipeError) as refused:
        words.read(written, where="test.yaml")
    assert str(refused.value).startswith(place)


def test_an_override_reaches_into_lists_and_leaves_the_rest() -> None:
    old: dict[str, words.Tree] = {"objective": [{"use": "kd"}, {"use": "sp", "weight": 1}], "fit": {"steps": 1}}
    new = words.override(old, ["objective.1.weight=2.5", "fit.lr=1e-3", "data.path=/x"])
    assert new == {
        "objective": [{"use": "kd"}, {"use": "sp", "weight": 2.5}],
        "fit": {"steps": 1, "lr": 1e-3},
        "data": {"path": "/x"},
    }
    assert old["objective"] == [{"use": "kd"}, {"use": "sp", "weight": 1}]


def test_an_override_one_place_behind_a_list_adds_to_it() -> None:
    old: dict[str, words.Tree] = {"objective": [{"use": "kd"}]}
    assert words.override(old, ["objective.1={use: sp}"]) == {"objective": [{"use": "kd"}, {"use": "sp"}]}


@pytest.mark.parametrize(
    "change", ["objective.5.weight=1", "objective.kd.weight=1", "fit.steps.more=1", "fit.steps", "=1"]
)
def test_an_override_of_a_place_that_cannot_be_is_refused(change: str, images: Path) -> None:
    with pytest.raises(RecipeError, match="override"):
        tiny.recipe(images, change)


def test_another_part_in_the_baseline_does_not_inherit_the_first_ones_knobs() -> None:
    merged = words.merge({"student": {"use": "mlp", "width": 3}}, {"student": {"use": "plain_cnn"}})
    assert merged == {"student": {"use": "plain_cnn"}}


# Signatures.


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("0.1", float, "here: found the text '0.1', expected a number."),
        (True, int, "here: found true, expected a whole number."),
        (1.5, int, "here: found the number 1.5, expected a whole number."),
        (1, bool, "here: found the number 1, expected true or false."),
        (None, str, "here: found nothing (null), expected a text."),
        (["a", 1], list[str], "here[1]: found the number 1, expected a text."),
        ("a", list[str], "here: found the text 'a', expected a list, each entry a text."),
        ("x", int | None, "here: found the text 'x', expected a whole number or null."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_words(value: words.Tree, annotation: object, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        typed(value, annotation, place="here")
    assert str(refused.value) == message


def test_a_whole_number_is_a_number() -> None:
    assert check_knobs(kd, {"temperature": 4}, place="here") == {"temperature": 4.0}


def test_knobs_that_a_signature_requires_are_asked_for(images: Path) -> None:
    with pytest.raises(RecipeError, match=r"^fit: fit needs 'lr' \(a number\), which is not given"):
        tiny.recipe(images, "fit={steps: 3}")


def test_the_schema_knows_every_loss_with_exactly_its_knobs() -> None:
    told = {each["title"]: each["properties"] for each in schema()["$defs"]["term"]["oneOf"] if "title" in each}
    for name, loss in parts("loss").items():
        own = {knob.name for knob in inspect.signature(loss).parameters.values() if knob.kind is knob.KEYWORD_ONLY}
        assert set(told.pop(name)) == own | {"use", "weight", "at", "over", "only", "weigh", "select"}
    assert not told


def test_the_schema_has_the_sections_that_a_recipe_accepts(images: Path) -> None:
    for section in schema()["properties"]:
        with pytest.raises(RecipeError) as refused:
            build({**tiny.content(images), section: {"odd": [1]}})
        assert "no section" not in str(refused.value)


# Whole recipes.


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_passes_check(name: str) -> None:
    assert plan(load(name)).parts


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_short_and_says_where_it_comes_from(name: str) -> None:
    assert len(words.locate(name).read_text().splitlines()) <= 20
    recipe = load(name)
    assert recipe.name == name
    assert recipe.about
    assert recipe.cite


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_resolves_to_the_same_bytes(name: str) -> None:
    once = words.write(load(name).resolved)
    assert words.write(build(words.read(once, where="once")).resolved) == once


@pytest.mark.parametrize("name", SHIPPED)
def test_the_student_alone_takes_the_same_number_of_steps_and_batches(name: str) -> None:
    recipe = load(name)
    if isinstance(recipe, DataRecipe) or recipe.arm or recipe.rounds:  # as equal as their recipe makes them
        return
    if recipe.teacher is None:
        assert recipe.alone is None
        return
    assert recipe.alone is not None
    assert recipe.alone.teacher is None
    assert recipe.alone.student.knobs == recipe.student.knobs
    assert recipe.alone.stages[0].steps == sum(stage.steps for stage in recipe.stages)
    batches = {stage.data.knobs["batch"] for stage in (*recipe.stages, *recipe.alone.stages)}
    assert len(batches) == 1


def test_a_recipe_with_a_mistake_is_refused_before_a_model_is_made(images: Path) -> None:
    with pytest.raises(RecipeError, match="temprature"):
        tiny.recipe(images, "student={use: 'tests.tiny:never_built'}", "objective.1.temprature=2")


def test_a_recipe_without_a_baseline_has_one_arm(images: Path) -> None:
    assert tiny.recipe(images, "baseline=null").alone is None


def test_a_recipe_without_a_teacher_trains_the_student_alone(images: Path) -> None:
    recipe = tiny.recipe(images, "teacher=null", "objective=[{use: cross_entropy}]")
    assert recipe.teacher is None
    assert recipe.alone is None


def test_a_term_that_reads_a_teacher_needs_one(images: Path) -> None:
    with pytest.raises(RecipeError, match=r"^objective\[1\]: kd reads teacher_logits, but this arm has no teacher"):
        tiny.recipe(images, "teacher=null")


def test_a_mistake_in_the_baseline_is_named_as_such(images: Path) -> None:
    with pytest.raises(RecipeError, match=r"^baseline\.objective\[0\]: kd reads teacher_logits"):
        tiny.recipe(images, "baseline={objective: [{use: kd}]}")


def test_a_schedule_is_a_weight(images: Path) -> None:
    recipe = tiny.recipe(images, "objective.1.weight={use: linear, start: 1.0, end: 0.0}")
    terms = recipe.stages[0].objective.terms
    assert [terms[1].weight_at(step, 10) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_the_same_seed_gives_the_same_first_weights(images: Path) -> None:
    recipe = tiny.recipe(images)
    data = read_data(recipe.data, seed=0)
    first, again, other = (make_model(recipe.student, data, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_data_are_read_once_and_again_when_the_file_has_changed(tmp_path: Path) -> None:
    call = tiny.recipe(tiny.write_images(tmp_path / "tiny.npz")).data
    first = read_data(call, seed=0)
    assert read_data(call, seed=0) is first
    tiny.write_images(tmp_path / "tiny.npz", num_train=12)
    assert read_data(call, seed=0).train.num_rows == 12


# Carried out.


def test_a_run_leaves_all_its_files(finished: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "summary.json", "report.html", "student/student.yaml"):
        assert (finished / name).is_file(), name
    for arm in ("teacher", "alone-seed0", "distilled-seed0"):
        for name in ("metrics.jsonl", "scores.json", "student/model.safetensors", "checkpoints"):
            assert (finished / arm / name).exists(), f"{arm}/{name}"


def test_the_summary_has_every_arm_with_its_scores(finished: Path) -> None:
    arms = read_json(finished / "summary.json")["arms"]
    assert {name: [entry["folder"] for entry in entries] for name, entries in arms.items()} == {
        "alone": ["alone-seed0"],
        "distilled": ["distilled-seed0"],
        "teacher": ["teacher"],
    }
    assert all(0.0 <= entry["scores"]["accuracy"] <= 1.0 for entries in arms.values() for entry in entries)


def test_the_top_student_is_the_first_seeds_distilled_one(finished: Path) -> None:
    top, arm = (load_student(finished / place / "student").state_dict() for place in (".", "distilled-seed0"))
    assert all(torch.equal(top[name], arm[name]) for name in top)


def test_a_run_begins_with_the_recipe_it_resolved(finished: Path, images: Path) -> None:
    assert (finished / "recipe.yaml").read_text() == words.write(tiny.recipe(images).resolved)


def test_a_teacher_of_weight_zero_leaves_the_student_as_if_alone(images: Path, tmp_path: Path) -> None:
    folder = run(tiny.recipe(images, "objective.1.weight=0"), tmp_path / "zero").path
    alone, taught = (load_student(folder / f"{arm}-seed0" / "student").state_dict() for arm in ("alone", "distilled"))
    assert all(torch.equal(alone[name], taught[name]) for name in alone)


def test_stages_train_what_they_name_and_start_from_the_one_before(images: Path, tmp_path: Path) -> None:
    stages = (
        "[{objective: [{use: hint, at: [layer1]}], train: [layer1], fit: {steps: 4, lr: 0.05, log_every: 1}},"
        " {objective: [{use: cross_entropy}], fit: {steps: 3, lr: 0.01, log_every: 1}}]"
    )
    content = tiny.content(images)
    del content["objective"], content["fit"]
    recipe = build(words.override(content, [f"stages={stages}"]))
    folder = run(recipe, tmp_path / "stages").path
    lines = list(read_lines(folder / "distilled-seed0" / "metrics.jsonl"))
    assert [(line["stage"], line["step"]) for line in lines] == [
        *((0, n) for n in (1, 2, 3, 4)),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    assert len(list(read_lines(folder / "alone-seed0" / "metrics.jsonl"))) > 0
    assert recipe.alone is not None
    assert recipe.alone.stages[0].steps == 7


def test_a_teacher_can_come_from_a_weights_file(finished: Path, images: Path, tmp_path: Path) -> None:
    weights = finished / "teacher" / "student" / "model.safetensors"
    recipe = tiny.recipe(images, f"teacher={{use: mlp, pixels: 16, width: 16, depth: 1, weights: {weights}}}")
    folder = run(recipe, tmp_path / "weights").path
    told, again = (read_json(place / "teacher" / "scores.json") for place in (finished, folder))
    assert told["accuracy"] == again["accuracy"]
    taught, same = (load_student(place / "student").state_dict() for place in (finished, folder))
    assert all(torch.equal(taught[name], same[name]) for name in taught)


def test_a_callable_of_the_users_own_is_a_part(images: Path) -> None:
    recipe: Recipe = tiny.recipe(images, "objective.1.use=potstill.losses.divergence:forward_kl")
    assert recipe.stages[0].objective.terms[1].card.name == "forward_kl"
    assert find("loss", "forward_kl") is not None
