"""A whole recipe, checked: every section a call, nothing built yet, no data read, no model made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from potstill.core.catalog import card, keywords
from potstill.core.errors import RecipeError
from potstill.recipe import arms, text
from potstill.recipe.calls import SUPPLIED, Call, check_call, check_keys, section_of
from potstill.recipe.elicitation import Elicitation, check_elicitation, is_writer, settled, training
from potstill.recipe.rounds import Rounds, check_rounds
from potstill.recipe.signature import teachers_in, typed
from potstill.recipe.solving import Problems, check_problems
from potstill.recipe.stages import Stage, check_stages
from potstill.recipe.text import Tree, name_of

KEYS = (
    "name",
    "about",
    "cite",
    "data",
    "teacher",
    "student",
    "source",
    "scheme",
    "objective",
    "fit",
    "stages",
    "seeds",
)
TOP_KEYS = (*KEYS, "arms", "elicit", "rounds", "task", "baseline", "out")
TEACHER_KEYS = ("fit", "weights", "data", "remember")
"""What a teacher's section may say beside the knobs of its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPlan:
    """Who teaches, and where its knowledge comes from."""

    call: Call
    weights: Path | None
    stage: Stage | None
    """How to train it here, on plain cross-entropy; None where it comes trained."""
    members: Mapping[str, TeacherPlan | tuple[TeacherPlan, ...]]
    """The teachers that it is made of, by the keyword they are given as."""
    data: Call
    """What it is scored on: the run's data, read by its own tokenizer."""
    remember: str
    """How its answers are stored before a student is trained from them, such as "top k=50"; empty: it answers live."""
    written: Mapping[str, Tree]

    @property
    def follows_student(self) -> bool:
        """It is made of the student that learns, so there is one for each."""
        return self.call.takes("student")

    def arms(self, name: str) -> Iterator[tuple[str, TeacherPlan]]:
        """The teachers that it is made of, each with a name for its folder; a single one has the whole's name."""
        for members in self.members.values():
            if isinstance(members, TeacherPlan):
                yield name, members
            else:
                yield from ((f"{name}{index}", member) for index, member in enumerate(members))


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
    others: Mapping[str, Recipe]
    """The arms that are trained before this one, by name. All are compared with the first."""
    out: Path
    resolved: Mapping[str, Tree]
    task: Problems | None = None
    """What students are scored by beside their data: problems that they solve by writing."""
    elicitation: Elicitation | None = None
    """How the data are drawn out of a teacher first; None where they are there."""
    rounds: Rounds | None = None
    """How often the student is asked and taught anew; None: the data are elicited once."""
    arm: str = ""
    """What the recipe calls this arm; empty where it names none."""

    @property
    def main(self) -> str:
        """The arm that the recipe is about. A student of a teacher's text is distilled, whoever grades its tokens."""
        return self.arm or ("alone" if self.teacher is None and self.elicitation is None else "distilled")

    @property
    def arms(self) -> dict[str, Recipe]:
        """Every arm by its name, in the order they are trained; the last is the recipe's own."""
        return {**self.others, self.main: self}

    @property
    def alone(self) -> Recipe | None:
        """The same student for the same number of steps, without a teacher."""
        return self.others.get("alone")

    @property
    def taught(self) -> tuple[Recipe, ...]:
        """The arms that have the teacher."""
        return tuple(arm for arm in self.arms.values() if arm.teacher is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """A checked recipe of a data set: nothing is trained."""

    name: str
    about: str
    cite: str
    elicitation: Elicitation
    out: Path
    resolved: Mapping[str, Tree]


def load(name: str, changes: Iterable[str] = ()) -> Recipe | DataRecipe:
    """The recipe in a file, or the shipped one of this name, with `key=value` changes laid over it."""
    path = text.locate(name)
    return build({"name": path.stem, **text.override(text.read_file(path), changes)})


def build(content: Mapping[str, Tree]) -> Recipe | DataRecipe:
    """Check every section of a recipe's mapping. Raises RecipeError for the first thing that cannot work."""
    check_keys(content, TOP_KEYS)
    elicitation = check_elicitation(content)
    rounds = check_rounds(content, elicitation)
    if elicitation is None:
        return _with_arms(content)
    trained = training(content, elicitation)
    added: dict[str, Tree] = {"elicit": dict(elicitation.written)}
    if is_writer(content.get("teacher")) and elicitation.teacher is not None:
        added["teacher"] = elicitation.teacher.written()
    if trained is None:
        return _data_recipe(content, elicitation, added)
    if rounds is not None:
        trained["baseline"] = None  # each round is compared with the student before the first
        added["rounds"] = rounds.written()
    recipe = _with_arms(trained, elicited=True)
    return replace(recipe, elicitation=elicitation, rounds=rounds, resolved={**recipe.resolved, **added})


def settle(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what was elicited in `folder` as its data."""
    assert recipe.elicitation is not None, "nothing is elicited"
    content = settled(dict(recipe.resolved), folder, recipe.elicitation)
    assert isinstance(content, dict)
    again = build(content)
    assert isinstance(again, Recipe)
    return again


def _with_arms(content: Mapping[str, Tree], *, elicited: bool = False) -> Recipe:
    """The arm that the recipe is about, with those that it is compared with."""
    task = check_problems(content)
    recipe = _several(content) if content.get("arms") is not None else _pair(content, elicited=elicited)
    written: dict[str, Tree] = {} if task is None else {"task": task.written()}
    return replace(recipe, task=task, resolved={**recipe.resolved, **written})


def _pair(content: Mapping[str, Tree], *, elicited: bool) -> Recipe:
    """The student alone and distilled."""
    recipe = _build(content)
    # What a student of a teacher's text is compared with is for the recipe to say.
    compared = recipe.teacher is not None or (elicited and content.get("baseline") is not None)
    baseline = content.get("baseline", {}) if compared else None
    fit = recipe.stages[-1].written["fit"]
    assert isinstance(fit, dict)
    plain = arms.alone(content, baseline, steps=sum(stage.steps for stage in recipe.stages), fit=fit)
    others = {} if plain is None else {"alone": _build(plain, place="baseline.")}
    return replace(recipe, others=others, resolved={**recipe.resolved, "baseline": baseline})


def _several(content: Mapping[str, Tree]) -> Recipe:
    """The last of the arms that the recipe names, with the others."""
    named = arms.several(content)
    shared = _written_shared(content)
    made = {name: _build(arm, place=f"arms.{name}.") for name, arm in named.items()}
    *before, last = made
    # One teacher for all; it is scored on the data of the arm that the recipe is about.
    teacher = made[last].teacher
    written: dict[str, Tree] = {
        name: {key: arm.resolved[key] for key in arms.KEYS if key in arm.resolved} for name, arm in made.items()
    }
    told = {key: value for key, value in made[last].resolved.items() if key not in arms.KEYS}
    return replace(
        made[last],
        arm=last,
        others={name: replace(made[name], teacher=teacher) for name in before},
        resolved={**told, **shared, "arms": written},
    )


def _written_shared(content: Mapping[str, Tree]) -> dict[str, Tree]:
    """What all arms begin with, in full. It is checked here, where a mistake in it has a place of its own."""
    from potstill.loops.fit import fit

    written: dict[str, Tree] = {}
    offered: dict[str, str] = {}
    if content.get("student") is not None:
        student = check_call("student", section_of(content, "student"), place="student")
        offered, written["student"] = _offered(student), student.written()
    if content.get("data") is not None:
        written["data"] = check_call("data", section_of(content, "data"), place="data", given=offered).written()
    check_keys(section_of(content, "fit", {}), tuple(keywords(fit).keys() - SUPPLIED["fit"]), place="fit.")
    if "stages" in content or {"data", "objective", "fit"} <= content.keys():
        check_stages(content, taught=content.get("teacher") is not None, offered=offered)
    return written


def _data_recipe(content: Mapping[str, Tree], elicitation: Elicitation, added: Mapping[str, Tree]) -> DataRecipe:
    name, about, cite = _titles(content)
    return DataRecipe(
        name=name,
        about=about,
        cite=cite,
        elicitation=elicitation,
        out=Path(typed(content.get("out", f"runs/{name}"), str, place="out")),
        resolved={"name": name, "about": about, "cite": cite, **added},
    )


def _titles(content: Mapping[str, Tree], *, place: str = "") -> tuple[str, str, str]:
    """name, about, cite."""
    name = typed(content.get("name", "recipe"), str, place=f"{place}name")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise RecipeError(f"{place}name: found {name_of(name)}, expected one word, because it names the run's folder.")
    about = typed(content.get("about", ""), str, place=f"{place}about")
    return name, about, typed(content.get("cite", ""), str, place=f"{place}cite")


def _build(content: Mapping[str, Tree], *, place: str = "") -> Recipe:
    name, about, cite = _titles(content, place=place)
    student = check_call("student", section_of(content, "student", place=place), place=f"{place}student")
    offered = _offered(student)
    data = check_call("data", section_of(content, "data", place=place), place=f"{place}data", given=offered)
    teacher = None
    if content.get("teacher") is not None:
        section = section_of(content, "teacher", place=place)
        teacher = _teacher(section, content, offered={**offered, **_written_tokenizer(data)}, place="teacher")
    scheme = check_call("scheme", {"use": "offline", **section_of(content, "scheme", {})}, place=f"{place}scheme")
    stages = check_stages(content, taught=teacher is not None, place=place, offered=offered)
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
        others={},
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


def _offered(call: Call) -> dict[str, str]:
    """What a model gives to the data where they do not say: the tokenizer that lies beside it."""
    model = call.knobs.get("model")
    return {"tokenizer": model} if isinstance(model, str) else {}


def _written_tokenizer(data: Call) -> dict[str, str]:
    tokenizer = data.knobs.get("tokenizer")
    return {"tokenizer": tokenizer} if isinstance(tokenizer, str) else {}


def _teacher(
    section: Mapping[str, Tree], content: Mapping[str, Tree], *, offered: Mapping[str, str], place: str
) -> TeacherPlan:
    """`offered`: the tokenizer of the data that this teacher reads."""
    # A model's weights are a file; those of an ensemble's members are a list, and a knob like any other.
    own = {key: value for key, value in section.items() if key not in TEACHER_KEYS or isinstance(value, list)}
    section = {key: value for key, value in section.items() if key not in own or key not in TEACHER_KEYS}
    call = check_call("teacher", own, place=place, trained="fit" in section)
    members, tokenizers = _members(call, own, content, offered=offered, place=place)
    call = replace(call, filled={name: value for name, value in tokenizers.items() if call.takes(name)})
    if call.takes("student_tokenizer"):
        raise RecipeError(f"{place}.student_tokenizer: {call.use} needs it, and the student names no model's folder.")
    weights = typed(section["weights"], Path, place=f"{place}.weights") if "weights" in section else None
    changes = section_of(section, "data", {}, place=f"{place}.")
    remember = typed(section.get("remember", ""), str, place=f"{place}.remember")
    if remember and call.takes("student"):
        raise RecipeError(f"{place}.remember: {call.use} is made of the student that learns. Remove this key.")
    _check_origin(call, weights=weights, section=section, place=place)
    data = text.merge(section_of(content, "data"), changes)
    stage = None
    if "fit" in section:
        plain: dict[str, Tree] = {"data": data, "objective": [{"use": "cross_entropy"}], "fit": section["fit"]}
        (stage,) = check_stages(plain, taught=False, place=f"{place}.", offered=offered)
    return TeacherPlan(
        call=call,
        weights=weights,
        stage=stage,
        members=members,
        data=check_call("data", data, place=f"{place}.data", given=offered),
        remember=remember,
        written={
            **call.written(),
            **{name: _written_members(member) for name, member in members.items()},
            **({} if weights is None else {"weights": str(weights)}),
            **({} if stage is None else {"fit": stage.written["fit"]}),
            **({"data": dict(changes)} if changes else {}),
            **({"remember": remember} if remember else {}),
        },
    )


def _members(
    call: Call, section: Mapping[str, Tree], content: Mapping[str, Tree], *, offered: Mapping[str, str], place: str
) -> tuple[dict[str, TeacherPlan | tuple[TeacherPlan, ...]], dict[str, str]]:
    """The teachers that a teacher is made of, and the tokenizers between which it stands."""
    members: dict[str, TeacherPlan | tuple[TeacherPlan, ...]] = {}
    tokenizers = {"student_tokenizer": offered["tokenizer"]} if "tokenizer" in offered else {}
    for name, several in teachers_in(call.part).items():
        here, found = f"{place}.{name}", section.get(name)
        entries = found if several and isinstance(found, list) else [found]
        made = []
        for index, entry in enumerate(entries):
            at = f"{here}[{index}]" if several else here
            if not isinstance(entry, dict):
                said = "nothing" if entry is None else name_of(entry)
                raise RecipeError(f"{at}: found {said}, expected a teacher such as {{use: hf, model: FOLDER}}.")
            inside, theirs = content, offered
            own = call.knobs.get("teacher_tokenizer", entry.get("model"))
            if call.takes("teacher_tokenizer") or "teacher_tokenizer" in call.knobs:
                # It reads the same texts in tokens of its own.
                if not isinstance(own, str):
                    raise RecipeError(
                        f"{place}.teacher_tokenizer: {call.use} needs it, and the teacher names no model's folder."
                    )
                theirs = {"tokenizer": own}
                inside = {**content, "data": {**section_of(content, "data"), **theirs}}
                tokenizers["teacher_tokenizer"] = own
            made.append(_teacher(entry, inside, offered=theirs, place=at))
            if made[-1].follows_student:
                raise RecipeError(
                    f"{at}: {made[-1].call.use} is made of the student that learns, so in a recipe it is the whole "
                    "teacher. Put it among others from Python."
                )
        members[name] = tuple(made) if several else made[0]
    return members, tokenizers


def _written_members(members: TeacherPlan | tuple[TeacherPlan, ...]) -> Tree:
    return dict(members.written) if isinstance(members, TeacherPlan) else [dict(member.written) for member in members]


def _check_origin(call: Call, *, weights: Path | None, section: Mapping[str, Tree], place: str) -> None:
    """A teacher knows something, and from one place."""
    kind = card(call.part).kind
    if weights is not None and "fit" in section:
        raise RecipeError(f"{place}: both weights and fit are given. Keep weights to load it, or fit to train it here.")
    if section.get("data") and "fit" not in section:
        raise RecipeError(f"{place}.data: only a teacher that is trained here has data. Give fit too, or remove it.")
    if kind == "teacher" and ("weights" in section or "fit" in section):
        raise RecipeError(f"{place}: {call.use} comes trained, so weights or fit would be ignored. Remove them.")
    if kind == "student" and weights is not None:
        raise RecipeError(
            f"{place}.weights: {call.use} reads no such file. Name its folder: {{use: hf, model: FOLDER}}."
        )
    if kind in ("model", "student") and not ("weights" in section or "fit" in section):
        origin = "weights: FILE, or fit" if kind == "model" else "fit"
        raise RecipeError(f"{place}: an untrained {call.use} has nothing to teach. Give {origin} to train it.")
    if weights is not None and not weights.is_file():
        raise RecipeError(
            f"{place}.weights: there is no file {weights}. Give the .safetensors weights of a {call.use}."
        )
