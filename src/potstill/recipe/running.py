"""A recipe carried out in a run folder: the teacher, then for every seed its arms, such as alone and distilled.

A kill at any moment hurts nothing: the same command finds what is finished and goes on from the last checkpoint.
"""

from __future__ import annotations

import shutil
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.errors import DataError, PotstillError, RecipeError
from potstill.core.run import RunFolder, environment, read_json, read_lines, replacing, write_json, write_text
from potstill.recipe import text
from potstill.recipe.building import (
    BUILD,
    TEACHER_SEED,
    freeze,
    load_student,
    make_teacher,
    read_data,
    teaching,
    with_members,
)
from potstill.recipe.elicitation import FOLDER, unchanging
from potstill.recipe.eliciting import CARD, elicit_in
from potstill.recipe.materials import Material
from potstill.recipe.memory import enough_memory
from potstill.recipe.plan import plan
from potstill.recipe.playing import last_elicited, play_rounds
from potstill.recipe.sections import DataRecipe, Recipe, TeacherPlan, build, settle
from potstill.recipe.solving import Problems
from potstill.recipe.training import score_into, scores_of, solved_by, train

if TYPE_CHECKING:
    from potstill.core.types import Teacher
    from potstill.loops.parallel import Ranks


CACHE = "cache"
"""In the teacher's folder: what it said."""


def run(recipe: Recipe | DataRecipe, out: Path | None = None, *, command: str = "") -> RunFolder:
    """Carry out a recipe in its folder, or go on where it was stopped; returns the folder, with its report.

    Raises RecipeError for a folder that holds another recipe, and all that `plan` refuses, before any training.
    """
    from potstill.loops.parallel import join

    folder, ranks = RunFolder(out or recipe.out), join()
    ranks.from_main(lambda: _claim(folder, recipe, command))
    if ranks.from_main(folder.report.exists):
        return folder
    try:
        with enough_memory():
            if isinstance(recipe, Recipe):
                _carry_out(recipe, folder, ranks, command)
            else:
                ranks.from_main(lambda: _make_data(recipe, folder, command))
    except PotstillError:
        raise
    except Exception as error:
        if ranks.is_main:
            write_text(folder.path / "traceback.txt", traceback.format_exc())
            error.add_note(f"The traceback is in {folder.path / 'traceback.txt'}.")
        raise
    return folder


def is_main() -> bool:
    """This process is the one of its run that writes and speaks."""
    from potstill.loops.parallel import join

    return join().is_main


def score(path: Path) -> dict[str, object]:
    """The scores of a finished run's student, measured again from its export."""
    folder = _finished(path)
    recipe = build(text.read_file(folder.recipe))
    if isinstance(recipe, DataRecipe):
        raise RecipeError(f"{path}: this run made a data set and trained no student, so there is nothing to score.")
    if recipe.elicitation is not None:
        recipe = settle(recipe, folder.path / FOLDER if recipe.rounds is None else last_elicited(recipe, folder))
    data = read_data(recipe.data, seed=recipe.seeds[0])
    judge = None
    if recipe.teacher is not None and not recipe.teacher.follows_student:
        judge = _stored_teacher(recipe.teacher, folder, "teacher", data)
    student = load_student(folder.student)
    return scores_of(student, data, judge=judge, done=solved_by(student, recipe.task))


def export(path: Path, destination: Path) -> Path:
    """Copy a run's clean student to a folder that is not there yet."""
    folder = _finished(path)
    if destination.exists():
        raise RecipeError(f"export: {destination} is there already and is not overwritten. Give another folder.")
    with replacing(destination) as draft:
        shutil.copytree(folder.student, draft)
    return destination


def _claim(folder: RunFolder, recipe: Recipe | DataRecipe, command: str) -> None:
    """Make the folder this recipe's own. Raises RecipeError where it is another's."""
    started = folder.path.is_dir() and any(_is_begun(entry) for entry in _visible(folder.path))
    if folder.recipe.exists() and started:
        before = text.read_file(folder.recipe)
        found = text.first_difference(unchanging(before), unchanging(recipe.resolved))
        if found:
            key, here, there = found
            raise RecipeError(
                f"{folder.path} holds a run with {key} {text.shortly(here)}, this one says {text.shortly(there)}. "
                "Choose another --out, or delete the folder."
            )
        if text.first_difference(before, dict(recipe.resolved)):
            write_text(folder.recipe, text.write(recipe.resolved))  # how requests travel, or a raised budget
            if before.get("rounds") != recipe.resolved.get("rounds"):
                folder.report.unlink(missing_ok=True)  # it tells of another number of rounds
    elif folder.path.exists() and not folder.recipe.exists() and (not folder.path.is_dir() or _visible(folder.path)):
        raise RecipeError(f"{folder.path} is there already and holds no run. Choose another --out.")
    else:
        # First of all files: it is what makes the folder this run's. A recipe that was refused before anything was
        # trained has left only itself there, and makes room.
        write_text(folder.recipe, text.write(recipe.resolved))
    # What a killed command left half written. Only now is the folder known to be ours.
    for draft in [*folder.path.rglob(".*.draft-*"), *folder.path.rglob(".*.old-*")]:
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)
    if not started or not folder.environment.exists():
        write_json(folder.environment, environment(command))


def _is_begun(entry: Path) -> bool:
    """Something that another recipe must not touch. Rows that were asked for but not finished come from the store."""
    return entry.is_dir() and (entry.name != FOLDER or (entry / CARD).is_file())


def _visible(path: Path) -> list[Path]:
    """What a folder holds; a command killed at its very start may have left a hidden draft."""
    return [entry for entry in path.iterdir() if not entry.name.startswith(".recipe.yaml.draft-")]


def _carry_out(recipe: Recipe, folder: RunFolder, ranks: Ranks, command: str) -> None:
    """Teacher, then for every seed all arms, then what is told of them."""
    start = time.monotonic() - _trained_seconds(folder)
    if recipe.rounds is not None:
        _carry_out_rounds(recipe, folder, ranks, command, start=start)
        return
    # Whatever can be refused is refused before a teacher has been trained for an hour.
    if recipe.elicitation is None:
        ranks.from_main(lambda: plan(recipe).parts)
    else:
        ranks.from_main(lambda: _elicit(recipe, folder))
        recipe = settle(recipe, folder.path / FOLDER)
    ranks.from_main(lambda: _show_data(recipe, folder))
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in (*recipe.arms, "teacher")}
    teacher = None
    if recipe.teacher is not None and not recipe.teacher.follows_student:
        teacher = teacher_in(recipe.teacher, folder, "teacher", ranks, task=recipe.task)
    if folder.arm("teacher").scores.exists():
        arms["teacher"].append(_entry(folder, "teacher", TEACHER_SEED))
    source = teacher if teacher is None else _remembered(recipe, teacher, folder, ranks)
    for seed in recipe.seeds:
        for name, arm in recipe.arms.items():
            place = f"{name}-seed{seed}"
            scheme = teaching(arm, None if arm.teacher is None else source)
            train(
                arm.student, arm.stages, scheme, folder.arm(place),
                seed=seed, judge=teacher, ranks=ranks, task=recipe.task,
            )  # fmt: skip
            arms[name] += [_entry(folder, place, seed)] if ranks.is_main else []
    told = _titles(recipe, command) | {"arms": {name: entries for name, entries in arms.items() if entries}}
    ranks.from_main(lambda: _tell(folder, {**told, "seconds": round(time.monotonic() - start, 3)}, first=recipe.main))


def _carry_out_rounds(recipe: Recipe, folder: RunFolder, ranks: Ranks, command: str, *, start: float) -> None:
    """The same where the student is asked and taught anew: each round is an arm of the report."""
    if not ranks.from_main(lambda: any(folder.path.glob("rounds-*"))):
        ranks.from_main(lambda: plan(recipe).parts)
    arms = play_rounds(recipe, folder, ranks, teacher_in=teacher_in)
    last = list(arms)[-1]
    if folder.arm("teacher").scores.exists():
        arms["teacher"] = [_entry(folder, "teacher", TEACHER_SEED)]
    ranks.from_main(lambda: _show_data(settle(recipe, last_elicited(recipe, folder)), folder))
    told = _titles(recipe, command) | {"arms": arms, "seconds": round(time.monotonic() - start, 3)}
    ranks.from_main(lambda: _tell(folder, told, first=last))


def _titles(recipe: Recipe | DataRecipe, command: str) -> dict[str, Any]:
    """What a summary begins with."""
    return {"name": recipe.name, "about": recipe.about, "cite": recipe.cite, "command": command}


def _elicit(recipe: Recipe | DataRecipe, folder: RunFolder) -> None:
    """What is to be trained on, asked for unless it is there: nothing before the whole recipe was rehearsed."""
    from potstill.report import samples

    how = recipe.elicitation
    assert how is not None, "nothing is elicited"
    place = folder.path / FOLDER
    if not (place / CARD).is_file():
        plan(recipe)
        elicit_in(how, place, name=recipe.name, about=recipe.about, run=str(folder.path.resolve()))
    if isinstance(recipe, Recipe):
        samples(folder.path)  # at once, so that the rows can be read while a student learns from them


def _make_data(recipe: DataRecipe, folder: RunFolder, command: str) -> None:
    """A run that ends with its data set."""
    from potstill.report import card

    _elicit(recipe, folder)
    write_json(folder.summary, _titles(recipe, command) | {"arms": {}})
    card(folder.path)


def teacher_in(
    how: TeacherPlan, folder: RunFolder, name: str, ranks: Ranks, *, task: Problems | None = None
) -> Teacher:
    """The frozen teacher; what of it is trained or scored has an arm of its own in `folder`."""
    from torch import nn

    from potstill.schemes import Offline
    from potstill.teachers import HfTeacher, Told

    arm = folder.arm(name)
    if how.stage is not None:
        model = train(how.call, (how.stage,), Offline, arm, seed=TEACHER_SEED, judge=None, ranks=ranks, task=task)
        return freeze(model, ranks.device)
    if how.members:
        names = {id(member): inner for inner, member in how.arms(name)}
        return with_members(how, lambda member: teacher_in(member, folder, names[id(member)], ranks, task=task))
    data = read_data(how.data, seed=TEACHER_SEED)
    teacher = make_teacher(how, data)
    if isinstance(teacher, Told):
        account = dict(teacher.account.lines())
        ranks.from_main(lambda: write_json(arm.path / "told.json", account))
    model = teacher.student if isinstance(teacher, HfTeacher) else teacher
    if isinstance(model, nn.Module) and not ranks.from_main(arm.scores.exists):
        ranks.from_main(lambda: score_into(arm, model, data, judge=None, task=task))
    return freeze(teacher, ranks.device)


def _remembered(recipe: Recipe, teacher: Teacher, folder: RunFolder, ranks: Ranks) -> Teacher:
    """The teacher itself, or what it says once its answers are on disk, as the recipe wants it."""
    # Here, because caching trains its teachers by way of this file.
    from potstill.recipe.caching import store_answers
    from potstill.teachers import remembered

    if recipe.teacher is None or not recipe.teacher.remember:
        return teacher
    cache = folder.arm("teacher").path / CACHE
    how = recipe.teacher.remember
    ranks.from_main(lambda: store_answers(recipe, teacher, cache, sketch=how))
    return remembered(cache, temperature=_temperature(recipe))


def _temperature(recipe: Recipe) -> float:
    """That at which the terms compare; a store of draws serves one, and has refused several."""
    terms = (term for arm in recipe.taught for stage in arm.stages for term in stage.objective.terms)
    return next((term.temperature for term in terms if "teacher_logits" in term.asks), 1.0)


def _stored_teacher(how: TeacherPlan, folder: RunFolder, name: str, data: Material) -> Teacher:
    """The teacher of a finished run, nothing trained again."""
    if how.members:
        names = {id(member): inner for inner, member in how.arms(name)}
        return with_members(how, lambda member: _stored_teacher(member, folder, names[id(member)], data))
    stored = folder.arm(name).student
    return freeze(load_student(stored) if stored.is_dir() else make_teacher(how, data))


def _show_data(recipe: Recipe, folder: RunFolder) -> None:
    """What the student will read, for the report: written first, so that it can be looked at while training goes on."""
    from potstill.report.figures import DATA_PAGE

    page = read_data(recipe.data, seed=recipe.seeds[0]).page()
    if page:
        write_text(folder.path / DATA_PAGE, page)


def _entry(folder: RunFolder, place: str, seed: int) -> dict[str, Any]:
    return {"seed": seed, "folder": place, "scores": read_json(folder.arm(place).scores)}


def _tell(folder: RunFolder, told: dict[str, Any], *, first: str) -> None:
    """The student's export, the summary, the report."""
    from potstill.report import card

    exported = folder.arm(told["arms"][first][0]["folder"]).student
    with replacing(folder.student) as draft:
        shutil.copytree(exported, draft)
    class_names = text.read_file(exported / BUILD).get("class_names", [])
    write_json(folder.summary, {**told, "class_names": class_names})
    card(folder.path)


def _finished(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.summary.is_file() or not folder.student.is_dir():
        raise DataError(f"{path} holds no finished run. Give the folder of one, or run its command again to finish it.")
    return folder


def _trained_seconds(folder: RunFolder) -> float:
    """What earlier, interrupted commands spent on training in this folder."""
    seconds = 0.0
    for journal in folder.path.glob(f"**/{folder.metrics.name}"):
        last = {line["stage"]: line["seconds"] for line in read_lines(journal)}
        seconds += sum(last.values())
    return seconds
