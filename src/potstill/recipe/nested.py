"""Parts that are given other parts: a step its teacher and its judge, a filter the task that grades. Checked calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from potstill.core.catalog import find, keywords
from potstill.core.errors import RecipeError
from potstill.recipe.calls import Call, check_call, choices
from potstill.recipe.signature import parts_in
from potstill.recipe.text import Tree, name_of

SHARED = "teacher"
"""In place of a writer's section: the one that the whole elicitation asks."""
STUDENT = "student"
"""In place of a writer's section: the student that the recipe trains, as the round before left it."""
NAMELESS = {
    SHARED: "no teacher is named. Give teacher: {use: endpoint, model: NAME, url: ADDRESS} here, in elicit, or for the "
    "whole recipe.",
    STUDENT: "only a recipe with rounds trains the student that it asks. Give rounds: 3, or here a writer such as "
    "{use: local_writer, model: FOLDER}.",
}

Inner: TypeAlias = "Nest | str | tuple[Inner, ...] | Mapping[str, Inner]"
"""A part, the word for a writer that has no section here, or several of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nest:
    """A part of the catalog, and the parts that it will be given by keyword."""

    call: Call
    inner: Mapping[str, Inner]

    def build(self, make: Callable[[Nest | str], object], **supplied: object) -> object:
        """Call the part; `make` makes each of those it is given."""
        return self.call(**supplied, **{name: _made(inner, make) for name, inner in self.inner.items()})

    def written(self) -> dict[str, Tree]:
        return {**self.call.written(), **{name: _written(inner) for name, inner in self.inner.items()}}

    def sections(self) -> tuple[Mapping[str, Tree], ...]:
        """The own knobs of this part and of those inside, for whoever looks for a word."""
        return (self.call.written(), *(found for inner in self.inner.values() for found in _sections(inner)))


def check_nest(kind: str, section: Tree, *, place: str, words: frozenset[str] = frozenset()) -> Nest:
    """A section with `use` and the sections inside it. `words`: the writers that a step may call by a word.

    Raises RecipeError: place, found, expected.
    """
    if not isinstance(section, dict):
        raise RecipeError(f"{place}: found {name_of(section)}, expected a mapping such as {{use: {_first(kind)}}}.")
    use = section.get("use")
    known = isinstance(use, str) and (":" in use or use in choices(kind))
    nested = parts_in(find(kind, str(use), place=f"{place}.use")) if known else {}
    own = {key: value for key, value in section.items() if key not in nested}
    call = replace(check_call(kind, own, place=place, given=dict.fromkeys(nested)), filled={})
    inner = {}
    for name, (their_kind, shape) in nested.items():
        here = f"{place}.{name}"
        if name in section and section[name] is not None:
            inner[name] = _inner(their_kind, shape, section[name], place=here, words=words)
        elif (name == SHARED or name in words) and their_kind == "writer" and shape == "one":
            inner[name] = _inner(their_kind, shape, name, place=here, words=words)
        elif keywords(call.part)[name].default is keywords(call.part)[name].empty:
            hint = ", or the word teacher" if their_kind == "writer" else ""
            rounds = " A recipe with rounds gives its own student." if name == STUDENT else ""
            wanted = f"a {their_kind} such as {{use: {_first(their_kind)}, ...}}{hint}.{rounds}"
            raise RecipeError(f"{place}: {call.use} needs '{name}', {wanted}")
    return Nest(call=call, inner=inner)


def _inner(kind: str, shape: str, given: Tree, *, place: str, words: frozenset[str]) -> Inner:
    if shape == "list" and isinstance(given, list):
        return tuple(
            _inner(kind, "one", entry, place=f"{place}[{index}]", words=words) for index, entry in enumerate(given)
        )
    if shape == "mapping" and isinstance(given, dict):
        return {name: _inner(kind, "one", entry, place=f"{place}.{name}", words=words) for name, entry in given.items()}
    if shape != "one":
        raise RecipeError(f"{place}: found {name_of(given)}, expected a {shape} of {kind}s.")
    if kind == "writer" and isinstance(given, str) and given in NAMELESS:
        if given not in words:
            raise RecipeError(f"{place}: {NAMELESS[given]}")
        return given
    return check_nest(kind, given, place=place, words=words)


def _made(inner: Inner, make: Callable[[Nest | str], object]) -> object:
    if isinstance(inner, tuple):
        return [_made(one, make) for one in inner]
    if isinstance(inner, Nest | str):
        return make(inner)
    return {name: _made(one, make) for name, one in inner.items()}


def _written(inner: Inner) -> Tree:
    if isinstance(inner, tuple):
        return [_written(one) for one in inner]
    if isinstance(inner, Nest):
        return inner.written()
    return inner if isinstance(inner, str) else {name: _written(one) for name, one in inner.items()}


def _sections(inner: Inner) -> tuple[Mapping[str, Tree], ...]:
    if isinstance(inner, Nest):
        return inner.sections()
    if isinstance(inner, str):
        return ()
    several = inner if isinstance(inner, tuple) else tuple(inner.values())
    return tuple(found for one in several for found in _sections(one))


def _first(kind: str) -> str:
    return {"writer": "endpoint", "task": "gsm8k", "elicitor": "label", "seeds": "examples, path: FILE"}[kind]
