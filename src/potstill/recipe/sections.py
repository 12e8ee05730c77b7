"""A whole recipe, checked: every section a call, nothing built yet, no data read, no model made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from potstill.core.catalog import card
from potstill.core.errors import RecipeError
from potstill.recipe import text
from potstill.recipe.calls import Call, check_call, check_keys, section_of
from potstill.recipe.signature import typed
from potstill.recipe.stages import Stage, check_stages
from potstill.recipe.text import Tree, name_of

KEYS = ("name", "about", "cite", "data", "teacher", "student", "scheme", "objective", "fit", "stages", "seeds")
TOP_KEYS = (*KEYS, "baseline", "out")
BASELINE_KEYS = ("data", "student", "objective", "fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPlan:
    """Who teaches, and where its knowledge comes from."""

    call: Call
    weights: Path | None
    stage: Stage | None
    """How to train it here, on plain cross-entropy; None where it comes trained."""
    written: Mapping[str, Tree]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe. `resolved` is all of it, every knob written out: the same recipe gives the same bytes."""

    name: str
    about: str
    cite: str
    data: Call
    teacher: TeacherPlan | None
    student: Call
    scheme: Call
    stages: tuple[Stage, ...]
    seeds: tuple[int, ...]
    alone: Recipe | None
    """The comparison arm: the same student for the same number of steps, without a teacher."""
    out: Path
    resolved: Mapping[str, Tree]


def load(name: str, changes: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of this name, with `key=value` changes laid over it."""
    path = text.locate(name)
    return build({"name": path.stem, **text.override(text.read_file(path), changes)})


def build(content: Mapping[str, Tree]) -> Recipe:
    """Check every section of a recipe's mapping. Raises RecipeError for the first thing that cannot work."""
    check_keys(content, TOP_KEYS)
    recipe = _build(content)
    baseline = content.get("baseline", {}) if recipe.teacher is not None else None
    alone = _alone(content, recipe, baseline)
    return replace(recipe, alone=alone, resolved={**recipe.resolved, "baseline": baseline})


def _build(content: Mapping[str, Tree], *, place: str = "") -> Recipe:
    name = typed(content.get("name", "recipe"), str, place=f"{place}name")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise RecipeError(f"{place}name: found {name_of(name)}, expected one word, because it names the run's folder.")
    about = typed(content.get("about", ""), str, place=f"{place}about")
    cite = typed(content.get("cite", ""), str, place=f"{place}cite")
    data = check_call("data", section_of(content, "data", place=place), place=f"{place}data")
    teacher = _teacher(content, place=place) if content.get("teacher") is not None else None
    student = check_call("student", section_of(content, "student", place=place), place=f"{place}student")
    scheme = check_call("scheme", {"use": "offline", **section_of(content, "scheme", {})}, place=f"{place}scheme")
    stages = check_stages(content, taught=teacher is not None, place=place)
    seeds = typed(content.get("seeds", [0]), list[int], place=f"{place}seeds")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RecipeError(
            f"{place}seeds: found {seeds}, expected whole numbers from 0 on, each once, such as [0, 1, 2]."
        )
    return Recipe(
        name=name,
        about=about,
        cite=cite,
        data=data,
        teacher=teacher,
        student=student,
        scheme=scheme,
        stages=stages,
        seeds=tuple(seeds),
        alone=None,
        out=Path(typed(content.get("out", f"runs/{name}"), str, place=f"{place}out")),
        resolved={
            "name": name,
            "about": about,
            "cite": cite,
            "data": data.written(),
            "teacher": None if teacher is None else dict(teacher.written),
            "student": student.written(),
            "scheme": scheme.written(),
            **({"stages": [dict(stage.written) for stage in stages]} if "stages" in content else stages[0].written),
            "seeds": list(seeds),
        },
    )


def _alone(content: Mapping[str, Tree], recipe: Recipe, changes: Tree) -> Recipe | None:
    """The arm without a teacher: cross-entropy for the same number of steps, and what `baseline` changes."""
    if changes is None:
        return None
    if not isinstance(changes, dict):
        raise RecipeError(f"baseline: found {name_of(changes)}, expected a mapping of overrides, or null for none.")
    check_keys(changes, BASELINE_KEYS, place="baseline.")
    kept = {key: content[key] for key in ("name", "data", "student", "scheme", "seeds") if key in content}
    steps = sum(stage.steps for stage in recipe.stages)
    last = recipe.stages[-1].written["fit"]
    assert isinstance(last, dict)
    plain: dict[str, Tree] = {**kept, "objective": [{"use": "cross_entropy"}], "fit": {**last, "steps": steps}}
    return _build(text.merge(plain, changes), place="baseline.")


def _teacher(content: Mapping[str, Tree], *, place: str) -> TeacherPlan:
    section = section_of(content, "teacher", place=place)
    part = {key: value for key, value in section.items() if key not in ("fit", "weights", "data")}
    call = check_call("teacher", part, place="teacher")
    weights = typed(section["weights"], Path, place="teacher.weights") if "weights" in section else None
    changes = section_of(section, "data", {}, place="teacher.")
    _check_origin(call, weights=weights, section=section)
    stage = None
    if "fit" in section:
        data = text.merge(section_of(content, "data"), changes)
        plain: dict[str, Tree] = {"data": data, "objective": [{"use": "cross_entropy"}], "fit": section["fit"]}
        (stage,) = check_stages(plain, taught=False, place="teacher.")
    return TeacherPlan(
        call=call,
        weights=weights,
        stage=stage,
        written={
            **call.written(),
            **({} if weights is None else {"weights": str(weights)}),
            **({} if stage is None else {"fit": stage.written["fit"]}),
            **({"data": dict(changes)} if changes else {}),
        },
    )


def _check_origin(call: Call, *, weights: Path | None, section: Mapping[str, Tree]) -> None:
    """A teacher knows something, and from one place."""
    kind = card(call.part).kind
    if weights is not None and "fit" in section:
        raise RecipeError("teacher: both weights and fit are given. Keep weights to load it, or fit to train it here.")
    if section.get("data") and "fit" not in section:
        raise RecipeError("teacher.data: only a teacher that is trained here has data. Give fit too, or remove it.")
    if kind == "teacher" and ("weights" in section or "fit" in section):
        raise RecipeError(f"teacher: {call.use} comes trained, so weights or fit would be ignored. Remove them.")
    if kind == "model" and not ("weights" in section or "fit" in section):
        raise RecipeError(
            f"teacher: an untrained {call.use} has nothing to teach. Give weights: FILE, or fit to train it."
        )
    if weights is not None and not weights.is_file():
        raise RecipeError(
            f"teacher.weights: there is no file {weights}. Give the .safetensors weights of a {call.use}."
        )
