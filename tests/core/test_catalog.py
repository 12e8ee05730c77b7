"""The catalog: what is found, what is said about what is not, and which keywords a call may have."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import pytest

from potstill.core import catalog
from potstill.core.catalog import Card, card, check_keywords, find, part, parts
from potstill.core.errors import RecipeError


def outside(first: int, /, *, wide: bool, deep: int = 2) -> int:
    """A callable that announces nothing."""
    return first + wide + deep


not_callable = 3


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An empty package that is the only home of losses, for the time of a test."""
    package = types.ModuleType("a_room")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "a_room", package)
    monkeypatch.setitem(catalog.ROOMS, "loss", ("a_room",))
    parts.cache_clear()
    yield package
    parts.cache_clear()


def test_every_room_of_the_catalog_can_be_walked_and_holds_something() -> None:
    assert all(parts(kind) for kind in catalog.ROOMS)


@pytest.mark.parametrize("kind", catalog.ROOMS)
def test_a_part_carries_the_name_and_the_kind_it_is_found_by(kind: str) -> None:
    assert all((card(thing).kind, card(thing).name) == (kind, name) for name, thing in parts(kind).items())


def test_parts_of_submodules_are_found_without_a_list() -> None:
    from potstill.losses.divergence import forward_kl

    assert find("loss", "forward_kl") is forward_kl


def test_announcing_a_part_leaves_it_as_it_is(room: types.ModuleType) -> None:
    def mine(*, knob: int = 1) -> int:
        return knob

    assert part("loss", paper="You 2026")(mine) is mine
    assert card(mine) == Card(kind="loss", name="mine", paper="You 2026")


def test_a_new_part_is_found_by_its_own_name_for_it(room: types.ModuleType) -> None:
    room.thing = part("loss", name="better")(lambda: None)  # type: ignore[attr-defined]
    assert list(parts("loss")) == ["better"]


def test_a_part_that_two_modules_show_is_one_part(room: types.ModuleType) -> None:
    room.here = room.there = part("loss", name="once")(lambda: None)  # type: ignore[attr-defined]
    assert list(parts("loss")) == ["once"]


def test_two_parts_of_one_name_are_our_own_slip(room: types.ModuleType) -> None:
    room.one = part("loss", name="same")(lambda: None)  # type: ignore[attr-defined]
    room.two = part("loss", name="same")(lambda: None)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="same"):
        parts("loss")


def test_a_kind_without_a_room_cannot_be_announced() -> None:
    with pytest.raises(AssertionError, match="poem"):
        part("poem")


def test_a_misspelt_part_is_answered_with_its_place_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"^objective\[1\]\.use: no loss is called 'foward_kl'\. Did you mean 'forwa"):
        find("loss", "foward_kl", place="objective[1].use")


def test_a_callable_outside_the_package_is_reached_by_module_and_name() -> None:
    assert find("loss", f"{__name__}:outside") is outside


def test_a_callable_outside_the_package_has_a_plain_card() -> None:
    assert card(outside) == Card(kind="outside", name="outside")


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(RecipeError, match="names the module no_such_module, which cannot be imported"):
        find("loss", "no_such_module:loss", place="use")


@pytest.mark.parametrize("attribute", ["outsid", "not_callable"])
def test_what_an_outside_module_does_not_offer_is_answered_with_what_it_does(attribute: str) -> None:
    with pytest.raises(RecipeError, match=f"no callable in {__name__} is called '{attribute}'.*outside"):
        find("loss", f"{__name__}:{attribute}")


def test_known_and_complete_keywords_pass() -> None:
    check_keywords(outside, {"wide": True}, place="here")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wide": True, "dep": 1}, r"^here\.dep: outside has no knob called 'dep'\. Did you mean 'deep'\?"),
        ({"deep": 1}, r"^here: outside needs 'wide', which is not given\. It takes: wide, deep\.$"),
        ({"wide": True, "first": 1}, r"^here\.first: outside has no knob called 'first'\."),
    ],
    ids=["unknown", "missing", "positional-only"],
)
def test_keywords_that_cannot_work_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_keywords(outside, given, place="here")


@pytest.mark.parametrize("thing", [*parts("loss").values()], ids=lambda loss: card(loss).name)
def test_every_shipped_loss_works_with_no_knob_given(thing: Callable[..., object]) -> None:
    check_keywords(thing, {}, place="here")
