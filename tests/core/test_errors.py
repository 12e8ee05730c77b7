"""What goes wrong: whose move it is, and the sentence that says so."""

from __future__ import annotations

import pytest

from potstill.core import errors
from potstill.core.errors import PotstillError, RecipeError, UserError, nearest, unknown

KNOWN = ["temperature", "weight", "beta"]


def kin(root: type[PotstillError]) -> list[type[PotstillError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, root)]


@pytest.mark.parametrize("error", kin(errors.UserError))
def test_what_the_user_gave_exits_with_two(error: type[PotstillError]) -> None:
    assert error.exit_code == 2


@pytest.mark.parametrize("error", kin(errors.RunError))
def test_what_failed_while_running_exits_with_one(error: type[PotstillError]) -> None:
    assert error.exit_code == 1


def test_every_error_belongs_to_one_side() -> None:
    either = {*kin(errors.UserError), *kin(errors.RunError)}
    assert set(kin(PotstillError)) == either | {PotstillError}


def test_what_the_user_gave_is_a_value_error_for_callers_who_know_no_potstill() -> None:
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("temprature", "temperature"),
        ("TEMPERATURE", "temperature"),
        ("wieght", "weight"),
        ("emper", "temperature"),  # part of a longer word
        ("zzz", ""),
        ("e", ""),  # one letter stands in every word, and says nothing
    ],
)
def test_the_nearest_word_is_found(word: str, found: str) -> None:
    assert nearest(word, KNOWN) == found


def test_nothing_is_near_where_nothing_is_known() -> None:
    assert nearest("anything", []) == ""


def test_a_misspelling_is_told_with_its_place_the_nearest_and_all_others() -> None:
    said = unknown("objective[0].use", "temprature", KNOWN, noun="knob")
    assert isinstance(said, RecipeError)
    assert str(said) == (
        "objective[0].use: no knob is called 'temprature'. Did you mean 'temperature'? "
        "There is: beta, temperature, weight."
    )


def test_nothing_is_guessed_where_nothing_is_near() -> None:
    assert str(unknown("use", "zzz", KNOWN, noun="loss")) == (
        "use: no loss is called 'zzz'. There is: beta, temperature, weight."
    )


def test_an_empty_choice_is_said_to_be_empty() -> None:
    assert str(unknown("use", "x", [], noun="loss")).endswith("There is: none.")
