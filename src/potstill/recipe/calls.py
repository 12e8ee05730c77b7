"""One section of a recipe as a checked call: which part, which knobs, and how they are written out in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from potstill.core.catalog import find, keywords, parts
from potstill.core.errors import RecipeError, unknown
from potstill.recipe.signature import check_knobs, in_full, knobs, teachers_in
from potstill.recipe.text import RECIPES, Tree, name_of

FROM_DATA = frozenset({"channels", "classes"})
"""Knobs of a model that the data fill in where the recipe does not."""
SUPPLIED = {
    "data": frozenset({"seed"}),
    "source": frozenset({"teacher", "seed"}),
    "scheme": frozenset({"student", "teacher"}),
    "layers": frozenset({"num_student_layers", "num_teacher_layers"}),
    "writer": frozenset({"run"}),
    "fit": frozenset({"scheme", "objective", "source", "out", "stage", "seed", "train", "watch"}),
}
"""Arguments that the run itself gives."""
OPTIONAL = {
    "student": FROM_DATA,
    "teacher": FROM_DATA | {"student", "student_tokenizer", "teacher_tokenizer", "reading"},
    "data": frozenset({"tokenizer"}),
    "seeds": frozenset(),
}
"""Knobs that another section gives where nobody wrote them."""
ALSO = {"teacher": ("model", "student"), "student": ("model",), "seeds": ("task",)}
"""Further kinds of parts that a section may name; of two parts with one name the section's own kind is meant."""
EXAMPLES = {
    "data": "{use: images, path: digits}",
    "teacher": "{use: resnet, fit: {steps: 400, lr: 0.1}}",
    "student": "{use: plain_cnn, width: 8}",
    "source": "{use: rollout}",
    "scheme": "{use: offline}",
    "fit": "{steps: 600, lr: 0.05}",
    "elicit": "{seeds: {use: examples, path: FILE}, steps: [{use: label}]}",
    "seeds": "{use: examples, path: FILE}",
    "task": "{use: questions, path: FILE}",
}
SHIPPED = "shipped:"
"""Begins the name of a file or folder that comes with Potstill, wherever it is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A part of the catalog and the keywords it will be given."""

    kind: str
    use: str
    part: Callable[..., Any]
    knobs: Mapping[str, Any]
    """As the section has them."""
    filled: Mapping[str, Any] = field(default_factory=dict)
    """What another section gives: the tokenizer of the student's model."""
    scheduled: Mapping[str, Call] = field(default_factory=dict)
    """Knobs that change over the run."""

    def __call__(self, *first: Any, **supplied: Any) -> Any:
        given = {name: located(knob) for name, knob in {**self.filled, **self.knobs}.items()}
        given |= {name: schedule() for name, schedule in self.scheduled.items()}
        return self.part(*first, **supplied, **given)

    def takes(self, name: str) -> bool:
        """Whether the part has this keyword, and nobody has given it yet."""
        return name in keywords(self.part) and name not in self.knobs and name not in self.filled

    def written(self) -> dict[str, Tree]:
        """The section with every knob that a recipe can set. What was filled in stays out: it follows."""
        left_out = SUPPLIED.get(self.kind, frozenset()) | OPTIONAL.get(self.kind, frozenset())
        changing = {name: schedule.written() for name, schedule in self.scheduled.items()}
        return {"use": self.use, **in_full(self.part, self.knobs, supplied=left_out), **changing}


def check_call(
    kind: str,
    section: Mapping[str, Tree],
    *,
    place: str,
    given: Mapping[str, Any] | None = None,
    trained: bool = False,
) -> Call:
    """A section with `use` as a call. `given`: what other sections offer to parts that take it.

    `trained`: it is to be trained here, so a model is meant where a part of its own kind has the same name.
    Raises RecipeError: place, found, expected.
    """
    use = section.get("use")
    known = choices(kind, trained=trained)
    if not isinstance(use, str):
        found = "no 'use'" if use is None else name_of(use)
        raise RecipeError(f"{place}.use: found {found}, expected the name of a {kind}: {', '.join(known)}.")
    if ":" not in use and use not in known:
        raise unknown(f"{place}.use", use, known, noun=kind)
    part = known[use] if use in known else find(kind, use, place=f"{place}.use")
    own = {key: value for key, value in section.items() if key != "use"}
    filled = {name: value for name, value in (given or {}).items() if name in keywords(part) and name not in own}
    if kind in ALSO:
        inner = teachers_in(part).keys() if kind == "teacher" else frozenset()
        own = {key: value for key, value in own.items() if key not in inner}
        optional = OPTIONAL[kind] | inner
        return Call(
            kind=kind, use=use, part=part, filled=filled, knobs=check_knobs(part, own, place=place, optional=optional)
        )
    supplied = SUPPLIED.get(kind, frozenset())
    written = check_knobs(part, own, place=place, supplied=supplied, optional=frozenset(filled))
    return Call(kind=kind, use=use, part=part, filled=filled, knobs=written)


def choices(kind: str, *, trained: bool = False) -> dict[str, Callable[..., Any]]:
    """The parts that a section can name: those that a recipe can give all they need."""
    if kind not in ALSO:
        return parts(kind)
    known: dict[str, Callable[..., Any]] = {}
    for each in (kind, *ALSO[kind]) if trained else (*ALSO[kind], kind):
        known |= parts(each)
    optional = OPTIONAL[kind]
    return {
        name: part
        for name, part in sorted(known.items())
        if _needed(part) <= knobs(part).keys() | teachers_in(part).keys() | optional
    }


def located(knob: Any) -> Any:
    """A knob as it is, but `shipped:data/chats.jsonl` as the path of what comes with Potstill.

    Raises RecipeError where nothing of that name is shipped.
    """
    if not isinstance(knob, str) or not knob.startswith(SHIPPED):
        return knob
    path = RECIPES / knob.removeprefix(SHIPPED)
    if not path.exists():
        there = [f"{SHIPPED}{each.relative_to(RECIPES).as_posix()}" for each in sorted(RECIPES.glob("*/*"))]
        raise unknown(
            "path", knob, [name for name in there if not name.endswith((".yaml", ".py"))], noun="shipped file"
        )
    return str(path)


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
    return {name for name, knob in keywords(part).items() if knob.default is knob.empty}
