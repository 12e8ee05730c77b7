"""A recipe whose teacher is what a server told with its answers: elicited, remembered, trained on, verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.core.errors import RecipeError
from potstill.core.run import read_json
from potstill.recipe import load, plan, run
from potstill.recipe.caching import build_cache, verify_cache
from potstill.recipe.sections import Recipe
from potstill.stores import info
from potstill.stores.requests import Requests
from tests import tiny, tiny_text


def small(store: Path, *more: str) -> Recipe:
    """The shipped recipe with few problems and hardly any training."""
    changes = ("elicit.seeds.num=12", f"elicit.store={store}", f"teacher.store={store}", "fit.steps=2", "data.batch=4")
    recipe = load("told_top_k", [*changes, *more])
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run and of its request store."""
    folder = tmp_path_factory.mktemp("told")
    run(small(folder / "requests.sqlite"), folder / "run")
    return folder


def test_the_student_is_taught_from_what_was_told(place: Path) -> None:
    scores = read_json(place / "run" / "distilled-seed0" / "scores.json")
    assert scores["kl_to_teacher"] is not None
    account = info(place / "run" / "teacher" / "cache")
    assert account.contents.sketch.kind == "top"  # type: ignore[union-attr]
    assert account.contents.teacher.startswith("told:")


def test_how_many_rows_were_told_is_written_down(place: Path) -> None:
    told = read_json(place / "run" / "teacher" / "told.json")
    assert told["listed tokens without an id"].startswith("0 of ")
    assert "rows drawn at temperature 1" in told


def test_a_rehearsal_asks_nothing(tmp_path: Path) -> None:
    store = tmp_path / "requests.sqlite"
    parts = dict(plan(small(store)).parts)
    assert ("loss forward_kl", "0") in parts["distilled"]
    assert list(Requests(store).rows("SELECT count(*) FROM attempts")) == [(0,)]


def later(place: Path, *more: str) -> Recipe:
    """A recipe on the rows of that run, which elicits nothing."""
    rows = place / "run" / "elicited" / "data.jsonl"
    return tiny_text.recipe(
        f"data={{use: chat, path: {rows}, batch: 4, length: 128}}",
        f"teacher={{use: told, path: {rows}, store: {place / 'requests.sqlite'}}}",
        "student={use: hf_inherited, model: 'shipped:quickstart/arithmetic', layers: 1}",
        *more,
    )


def test_a_later_recipe_finds_the_rows_and_says_how_many(place: Path) -> None:
    parts = dict(plan(later(place)).parts)
    told = dict(parts["teacher"])
    found, _, of = told["rows with log-probabilities"].partition(" of ")
    assert found == of and int(found) > 5


def test_a_cache_of_them_is_built_and_verified(place: Path, tmp_path: Path) -> None:
    recipe = later(place)
    built = build_cache(recipe, tmp_path / "cache", sketch="top k=20")
    again = build_cache(recipe, tmp_path / "cache", sketch="top k=20")
    assert built.rows == again.rows > 0
    verified = verify_cache(tmp_path / "cache", recipe)
    assert (verified.missing, verified.divergence) == (0, 0.0)


def test_an_export_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no export of elicit is called 'dta'"):
        small(tmp_path / "requests.sqlite", "teacher.path='elicited:dta'")


def test_pictures_are_not_told_of(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_images(tmp_path / "images.npz"), "teacher={use: told, path: x}")
    with pytest.raises(RecipeError, match="told speaks of texts, and these data are pictures"):
        plan(recipe)
