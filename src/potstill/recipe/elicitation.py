"""The section `elicit` as checked calls: seeds, a teacher that writes, steps, how much, and what is written of it.

The rest of a recipe reads what was elicited at a path that begins with `elicited:`, which a run's folder makes real.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.catalog import keywords, parts
from potstill.core.errors import RecipeError, unknown
from potstill.recipe.calls import Call, check_call, check_keys, choices, section_of
from potstill.recipe.nested import SHARED, STUDENT, Nest, check_nest
from potstill.recipe.signature import check_knobs, in_full, typed
from potstill.recipe.text import Tree, name_of

if TYPE_CHECKING:
    from potstill.data.exports import Format

ELICITED = "elicited:"
FOLDER = "elicited"
"""In the run's folder: the rows, what is trained on, and the data card."""
KEYS = ("seeds", "teacher", "steps", "until", "limit", "budget", "store", "export", "licences")
EXPORT_KEYS = ("name", "file")
FILES = (".jsonl", ".parquet")
TRAVELS = frozenset(
    (
        "budget", "step_budgets", "store", "price", "key_env", "key_file", "rpm", "tpm", "concurrency", "endpoints",
        "timeout_seconds", "together", "device", "gather_seconds", "poll_seconds",
    )
)  # fmt: skip
"""How requests travel and who pays: these may change while a run is under way, for they change no row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A file of training data made of the accepted rows."""

    name: str
    ending: str
    knobs: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"{self.name}{self.ending}"

    @property
    def format(self) -> Format:
        return self.knobs.get("format", "chat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Elicitation:
    """How a data set is drawn out of a teacher. `written` is all of it, as a recipe writes it."""

    seeds: Call
    teacher: Nest | None
    """The writer of the steps that name none."""
    steps: tuple[Nest, ...]
    until: int | None
    limit: int | None
    budget: float
    """Dollars, for all writers together."""
    store: str
    """The request store of writers that name none; empty: the user's."""
    exports: tuple[Export, ...]
    licences: Mapping[str, str]
    """For the data card: what the seeds and models are licensed under, as the user says."""
    written: Mapping[str, Tree]


def check_elicitation(content: Mapping[str, Tree]) -> Elicitation | None:
    """The section `elicit` of a recipe; None where there is none. Raises RecipeError: place, found, expected."""
    if content.get("elicit") is None:
        return None
    section = section_of(content, "elicit")
    check_keys(section, KEYS, place="elicit.")
    teacher, from_recipe = _teacher(section, content)
    seeds = check_call("seeds", section_of(section, "seeds", place="elicit."), place="elicit.seeds")
    given = section.get("steps")
    if not isinstance(given, list) or not given:
        found = "no steps" if given is None else name_of(given)
        raise RecipeError(f"elicit.steps: found {found}, expected a list of steps such as [{{use: label}}].")
    words = {SHARED: teacher is not None, STUDENT: content.get("rounds") is not None}
    known = frozenset(word for word, is_there in words.items() if is_there)
    steps = tuple(
        check_nest("elicitor", step, place=f"elicit.steps[{index}]", words=known) for index, step in enumerate(given)
    )
    until = _count(section, "until")
    limit = _count(section, "limit")
    budget = typed(section.get("budget", math.inf), float, place="elicit.budget")
    if not budget >= 0:
        raise RecipeError(f"elicit.budget: found {budget:g}, expected dollars, 0 or more.")
    if budget < math.inf:
        _check_one_budget((*([] if teacher is None else [teacher]), *(one for step in steps for one in _writers(step))))
    store = typed(section.get("store", ""), str, place="elicit.store")
    exports = _exports(section.get("export", {}))
    licences = typed(section.get("licences", {}), dict[str, str], place="elicit.licences")
    written: dict[str, Tree] = {
        "seeds": seeds.written(),
        **({} if teacher is None or from_recipe else {"teacher": teacher.written()}),
        "steps": [step.written() for step in steps],
        "until": until,
        "limit": limit,
        **({} if budget == math.inf else {"budget": budget}),
        **({"store": store} if store else {}),
        "export": [_written_export(export) for export in exports],
        **({"licences": dict(licences)} if licences else {}),
    }
    return Elicitation(
        seeds=seeds, teacher=teacher, steps=steps, until=until, limit=limit, budget=budget, store=store,
        exports=exports, licences=licences, written=written,
    )  # fmt: skip


def is_writer(section: Tree) -> bool:
    """A teacher that writes text, and nothing that a student could be compared with batch by batch."""
    if not isinstance(section, dict) or not isinstance(section.get("use"), str):
        return False
    use = str(section["use"])
    return use in parts("writer") and use not in choices("teacher", trained="fit" in section)


def training(content: Mapping[str, Tree], elicitation: Elicitation) -> dict[str, Tree] | None:
    """The rest of the recipe: what is trained on the rows. None where a data set is all that is wanted."""
    rest = {key: value for key, value in content.items() if key != "elicit"}
    if is_writer(rest.get("teacher")):
        rest.pop("teacher")
    if rest.get("student") is None:
        trains = ("rounds", "data", "objective", "fit", "stages", "source", "arms", "task", "baseline")
        named = [key for key in trains if rest.get(key)]
        if named:
            raise RecipeError(f"{named[0]}: there is no student, so nothing is trained. Give student, or remove this.")
        return None
    data = dict(section_of(rest, "data", {"use": "chat"}))
    part = choices("data").get(str(data.get("use", "chat")))
    data.setdefault("use", "chat")
    if part is not None and "path" in keywords(part):
        data.setdefault("path", f"{ELICITED}{elicitation.exports[0].name}")
    for path in _paths(rest | {"data": data}):
        name = path.removeprefix(ELICITED)
        if name not in [export.name for export in elicitation.exports]:
            raise unknown(path, name, [export.name for export in elicitation.exports], noun="export of elicit")
    return rest | {"data": data}


def settled(content: Tree, folder: Path, elicitation: Elicitation) -> Tree:
    """The same recipe with real paths instead of `elicited:` ones. `folder` is where the files lie."""
    files = {f"{ELICITED}{export.name}": str(folder / export.file) for export in elicitation.exports}
    if isinstance(content, dict):
        return {key: settled(value, folder, elicitation) for key, value in content.items()}
    if isinstance(content, list):
        return [settled(value, folder, elicitation) for value in content]
    return files.get(content, content) if isinstance(content, str) else content


def unchanging(resolved: Mapping[str, Tree]) -> dict[str, Tree]:
    """What of a recipe decides its rows and its training: a raised budget, another key, more rounds continue a run."""
    if resolved.get("elicit") is None:
        return dict(resolved)
    kept = dict(resolved)
    kept["elicit"] = _without(resolved["elicit"])
    rounds = resolved.get("rounds")
    if isinstance(rounds, dict):
        kept["rounds"] = {key: value for key, value in rounds.items() if key != "num_rounds"}
    if is_writer(resolved.get("teacher")):
        kept["teacher"] = _without(resolved["teacher"])
    return kept


def asks_student(how: Elicitation) -> bool:
    """Whether some step asks the student that the recipe trains."""
    return any(one == STUDENT for step in how.steps for one in _inside(step))


def writers_of(how: Elicitation) -> Iterator[Nest]:
    """All writers that are named, the shared one first."""
    yield from () if how.teacher is None else (how.teacher,)
    for step in how.steps:
        yield from _writers(step)


def _teacher(section: Mapping[str, Tree], content: Mapping[str, Tree]) -> tuple[Nest | None, bool]:
    """Who writes, and whether it is the recipe's teacher: one that writes, or a model whose folder can be asked."""
    if section.get("teacher") is not None:
        return check_nest("writer", section["teacher"], place="elicit.teacher"), False
    own = content.get("teacher")
    if is_writer(own):
        return check_nest("writer", own, place="teacher"), True
    if isinstance(own, dict) and own.get("use") == "hf" and "fit" not in own and isinstance(own.get("model"), str):
        return check_nest("writer", {"use": "local_writer", "model": own["model"]}, place="elicit.teacher"), True
    return None, False


def _count(section: Mapping[str, Tree], key: str) -> int | None:
    number: int | None = typed(section.get(key), int | None, place=f"elicit.{key}")
    if number is not None and number < 1:
        raise RecipeError(f"elicit.{key}: found {number}, expected at least 1 row.")
    return number


def _check_one_budget(writers: Iterable[Nest]) -> None:
    for writer in writers:
        if writer.call.knobs.get("budget", math.inf) < math.inf or writer.call.knobs.get("step_budgets"):
            raise RecipeError(
                f"elicit.budget: {writer.call.use} has a budget of its own. Keep one: elicit.budget for all writers "
                "together, or a budget in each writer's section."
            )


def _exports(given: Tree) -> tuple[Export, ...]:
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise RecipeError("elicit.export: found an empty list, expected {format: chat} or a list of such.")
    exports = []
    for index, entry in enumerate(entries):
        place = f"elicit.export[{index}]" if isinstance(given, list) else "elicit.export"
        if not isinstance(entry, dict):
            raise RecipeError(f"{place}: found {name_of(entry)}, expected a mapping such as {{format: chat}}.")
        exports.append(_export(entry, place))
    names = [export.name for export in exports]
    if len(set(names)) < len(names):
        raise RecipeError(f"elicit.export: found the names {', '.join(names)}, expected another for each: give name.")
    return tuple(exports)


def _export(entry: Mapping[str, Tree], place: str) -> Export:
    from potstill.data.exports import export_rows

    own = {key: value for key, value in entry.items() if key not in EXPORT_KEYS}
    knobs = check_knobs(export_rows, own, place=place, supplied=frozenset({"rows", "path"}))
    name = typed(entry.get("name", "data"), str, place=f"{place}.name")
    ending = typed(entry.get("file", FILES[0]), str, place=f"{place}.file")
    if not name.isidentifier() or name in ("accepted", "rejected", "card"):
        raise RecipeError(f"{place}.name: found '{name}', expected one word, and none of accepted, rejected, card.")
    if ending not in FILES:
        raise RecipeError(f"{place}.file: found '{ending}', expected one of {', '.join(FILES)}.")
    return Export(name=name, ending=ending, knobs=knobs)


def _written_export(export: Export) -> Tree:
    from potstill.data.exports import export_rows

    knobs = in_full(export_rows, export.knobs, supplied=frozenset({"rows", "path"}))
    return {"name": export.name, "file": export.ending, **knobs}


def _writers(nest: Nest) -> Iterator[Nest]:
    """The writers inside a step, however deep."""
    return (one for one in _inside(nest) if isinstance(one, Nest) and one.call.kind == "writer")


def _inside(nest: Nest) -> Iterator[Nest | str]:
    """The parts that a part is given, or the words for them, and those that they are given."""
    for inner in nest.inner.values():
        several = inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, tuple) else (inner,)
        for one in several:
            if isinstance(one, Nest | str):
                yield one
            if isinstance(one, Nest):
                yield from _inside(one)


def _paths(content: Tree) -> Iterator[str]:
    if isinstance(content, str) and content.startswith(ELICITED):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _paths(value)


def _without(content: Tree) -> Tree:
    if isinstance(content, dict):
        return {key: _without(value) for key, value in content.items() if key not in TRAVELS}
    return [_without(value) for value in content] if isinstance(content, list) else content
