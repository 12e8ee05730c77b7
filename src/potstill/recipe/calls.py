"""One section of a recipe as a checked call: which part, which knobs, and how they are written out in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from potstill.core.catalog import find, keywords, parts
from potstill.core.errors import RecipeError, unknown
from potstill.recipe.signature import check_knobs, in_full, knobs
from potstill.recipe.text import Tree, name_of

FROM_DATA = frozenset({"channels", "classes"})
"""Knobs of a model that the data fill in where the recipe does not."""
SUPPLIED = {
    "data": frozenset({"seed"}),
    "scheme": frozenset({"student", "teacher"}),
    "fit": frozenset({"scheme", "objective", "source", "out", "stage", "seed", "train", "watch"}),
}
"""Arguments that the run itself gives."""
ALSO = {"teacher": "model", "student": "model"}
"""A second kind of parts that a section may name."""
EXAMPLES = {
    "data": "{use: images, path: digits}",
    "teacher": "{use: resnet, fit: {steps: 400, lr: 0.1}}",
    "student": "{use: plain_cnn, width: 8}",
    "scheme": "{use: offline}",
    "fit": "{steps: 600, lr: 0.05}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A part of the catalog and the keywords it will be given."""

    kind: str
    use: str
    part: Callable[..., Any]
    knobs: Mapping[str, Any]

    def __call__(self, **supplied: Any) -> Any:
        return self.part(**supplied, **self.knobs)

    def written(self) -> dict[str, Tree]:
        """The section with every knob that a recipe can set."""
        return {"use": self.use, **in_full(self.part, self.knobs, supplied=SUPPLIED.get(self.kind, FROM_DATA))}


def check_call(kind: str, section: Mapping[str, Tree], *, place: str) -> Call:
    """A section with `use` as a call. Raises RecipeError: place, found, expected."""
    use = section.get("use")
    known = choices(kind)
    if not isinstance(use, str):
        found = "no 'use'" if use is None else name_of(use)
        raise RecipeError(f"{place}.use: found {found}, expected the name of a {kind}: {', '.join(known)}.")
    if ":" not in use and use not in known:
        raise unknown(f"{place}.use", use, known, noun=kind)
    part = known[use] if use in known else find(kind, use, place=f"{place}.use")
    given = {key: value for key, value in section.items() if key != "use"}
    if kind in ALSO:
        return Call(kind=kind, use=use, part=part, knobs=check_knobs(part, given, place=place, optional=FROM_DATA))
    supplied = SUPPLIED.get(kind, frozenset())
    return Call(kind=kind, use=use, part=part, knobs=check_knobs(part, given, place=place, supplied=supplied))


def choices(kind: str) -> dict[str, Callable[..., Any]]:
    """The parts that a section can name: those that a recipe can give all they need."""
    known = {**parts(kind), **(parts(ALSO[kind]) if kind in ALSO else {})}
    if kind not in ALSO:
        return known
    return {name: part for name, part in known.items() if _needed(part) <= knobs(part).keys()}


def section_of(
    content: Mapping[str, Tree], key: str, default: Mapping[str, Tree] | None = None, *, place: str = ""
) -> Mapping[str, Tree]:
    """The mapping under `key`. Raises RecipeError where there is none and no default."""
    section = content.get(key)
    if section is None and default is not None:
        return default
    if not isinstance(section, dict):
        found = f"no {key}" if section is None else name_of(section)
        raise RecipeError(f"{place}{key}: found {found}, expected a mapping, for example {EXAMPLES[key]}.")
    return section


def check_keys(content: Mapping[str, Tree], known: tuple[str, ...], *, place: str = "") -> None:
    """Every key is a known one. Raises RecipeError naming the nearest."""
    for key in content:
        if key not in known:
            raise unknown(f"{place}{key}", key, known, noun="key" if place else "section")


def check_fit(section: Mapping[str, Tree], *, place: str) -> dict[str, Any]:
    """How long and how fast to train, as keywords of loops.fit; its own checks of the values are asked at once."""
    from potstill.loops.fit import fit
    from potstill.loops.settings import Settings

    given = check_knobs(fit, section, place=place, supplied=SUPPLIED["fit"])
    whole = {**{name: knob.default for name, knob in keywords(fit).items()}, **given}
    try:
        Settings(**{field.name: whole[field.name] for field in fields(Settings)})
    except RecipeError as error:
        raise RecipeError(str(error).replace("fit.", f"{place}.", 1)) from error
    return given


def written_fit(given: Mapping[str, Any]) -> dict[str, Tree]:
    """The same in full."""
    from potstill.loops.fit import fit

    return in_full(fit, given, supplied=SUPPLIED["fit"])


def _needed(part: Callable[..., Any]) -> set[str]:
    return {name for name, knob in keywords(part).items() if knob.default is knob.empty} - FROM_DATA
