"""What Potstill has, by name: found by walking the package, never by a hand-kept list.

A part announces itself with `@part(kind, ...)`; the decorator only pins a `Card` on it and returns it
unchanged. `find("loss", "forward_kl")` looks the name up; `package.module:name` reaches an installed
callable outside Potstill.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, TypeVar

from potstill.core.errors import RecipeError, unknown

Part = TypeVar("Part", bound=Callable[..., Any])

ROOMS = {
    "loss": ("potstill.losses",),
    "weight": ("potstill.losses",),
    "reward": ("potstill.losses",),
    "schedule": ("potstill.objective",),
    "model": ("potstill.students",),
    "head": ("potstill.students",),
    "student": ("potstill.students",),
    "layers": ("potstill.students",),
    "teacher": ("potstill.teachers",),
    "writer": ("potstill.teachers",),
    "data": ("potstill.data",),
    "source": ("potstill.data",),
    "seeds": ("potstill.data",),
    "task": ("potstill.tasks",),
    "elicitor": ("potstill.knowledge",),
    "scheme": ("potstill.schemes",),
}
"""Where the parts of each kind live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a part says about itself. What follows `paper` is for losses; the law tests read it."""

    kind: str
    name: str
    paper: str = ""
    zero_at_equality: bool = True
    """Value and gradient are zero when student and teacher coincide."""
    distribution: bool = False
    """Reads logits only through softmax: a constant added to a row changes nothing, and a sparse teacher
    with a tail bucket is as good as its coarsened law."""
    raw: bool = False
    """Reads logits as numbers: a constant added to a row changes it, so a law alone, known up to one, is not enough."""
    linear_in_teacher: bool = False
    """The gradient is linear in the teacher's probabilities: sampled teachers are unbiased for it."""
    of_draws: Callable[..., Any] | None = None
    """The same loss from a sampled teacher's draws: (student_logits, ids, log_weights, /, **knobs). Where it is None a
    sampled teacher is spread over all classes first."""
    labels: Literal["classes", "numbers"] = "classes"
    """What the labels must be, where they are read: class ids, or a vector of numbers per position."""
    min_examples: int = 1
    """Fewer examples than this in a micro-batch carry no lesson."""
    head: str = ""
    """The training head that must stand between the student's feature and this loss."""

    @property
    def coarsens(self) -> bool:
        """A top-k teacher serves: only laws are read, and no row meets another, which has other classes listed."""
        return self.distribution and self.min_examples == 1


def part(kind: str, **facts: Any) -> Callable[[Part], Part]:
    """Announce a function or class to the catalog: `@part("loss", paper="Hinton et al. 2015")`."""
    assert kind in ROOMS, f"no room is known for parts of kind {kind!r}"

    def pin(thing: Part) -> Part:
        thing.__card__ = Card(kind=kind, name=facts.pop("name", thing.__name__), **facts)  # type: ignore[attr-defined]
        return thing

    return pin


def card(thing: Callable[..., Any]) -> Card:
    """The card of a part; for an outside callable that carries none, a plain one made from its name."""
    pinned = getattr(thing, "__card__", None)
    if isinstance(pinned, Card):
        return pinned
    return Card(kind="outside", name=getattr(thing, "__name__", type(thing).__name__))


@cache
def parts(kind: str) -> dict[str, Callable[..., Any]]:
    """All parts of one kind by name."""
    found: dict[str, Callable[..., Any]] = {}
    for module in _modules(kind):
        for thing in vars(module).values():
            if isinstance(getattr(thing, "__card__", None), Card) and thing.__card__.kind == kind:
                assert found.setdefault(thing.__card__.name, thing) is thing, f"two {kind}s named {thing.__card__.name}"
    return dict(sorted(found.items()))


def find(kind: str, name: str, *, place: str = "use") -> Callable[..., Any]:
    """The part called `name`, or the installed callable `package.module:name`.

    Raises RecipeError naming `place`, the word found and the nearest right one.
    """
    if ":" in name:
        return _outside(name, place=place)
    known = parts(kind)
    if name not in known:
        raise unknown(place, name, known, noun=kind)
    return known[name]


def check_keywords(thing: Callable[..., Any], given: dict[str, Any], *, place: str) -> None:
    """Signature is schema: every given key is a keyword of `thing`, and every required one is given."""
    knobs = keywords(thing)
    title = card(thing).name
    for key in given:
        if key not in knobs:
            guess = unknown(f"{place}.{key}", key, knobs, noun="knob")
            raise RecipeError(str(guess).replace("no knob is called", f"{title} has no knob called"))
    missing = [name for name, knob in knobs.items() if knob.default is knob.empty and name not in given]
    if missing:
        raise RecipeError(f"{place}: {title} needs '{missing[0]}', which is not given. It takes: {', '.join(knobs)}.")


def keywords(thing: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named arguments of a callable: everything but positional-only ones."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: knob for name, knob in inspect.signature(thing).parameters.items() if knob.kind in named}


def _modules(kind: str) -> list[ModuleType]:
    modules: list[ModuleType] = []
    for room in ROOMS[kind]:
        package = importlib.import_module(room)
        modules.append(package)
        for entry in pkgutil.iter_modules(package.__path__, prefix=f"{room}."):
            modules.append(importlib.import_module(entry.name))
    return modules


def _outside(name: str, *, place: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"{place}: '{name}' names the module {module_name}, which cannot be imported ({error}). "
            "Install it, or check the spelling."
        ) from error
    thing = getattr(module, attribute, None)
    if not callable(thing):
        raise unknown(
            place, attribute, [n for n, v in vars(module).items() if callable(v)], noun=f"callable in {module_name}"
        )
    return thing  # type: ignore[no-any-return]
