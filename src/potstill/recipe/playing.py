"""The section `rounds` carried out: for each seed the student before, then `loops.rounds`, one row in the report each.

runs/star/before-seed0/              what the student solves before the first round
runs/star/rounds-seed0/state.json    which stages are through
runs/star/rounds-seed0/round-0/      elicited/, checkpoints/, student/, scores.json, samples.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.core.run import RunFolder, read_json, write_json
from potstill.recipe.building import load_student, make_student, read_data, teaching, writing_part
from potstill.recipe.elicitation import FOLDER
from potstill.recipe.eliciting import CARD, elicit_in
from potstill.recipe.sections import Recipe, TeacherPlan, settle
from potstill.recipe.solving import Problems
from potstill.recipe.training import score_into, solved_by, train_and_export, write_examples

if TYPE_CHECKING:
    from torch import nn

    from potstill.core.types import Teacher
    from potstill.loops.parallel import Ranks
    from potstill.loops.rounds import Round, Told
    from potstill.students import HfModel

BEFORE = "before"

TeacherIn = Callable[..., "Teacher"]
"""`running.teacher_in`: the teacher of a run, scored once."""


def play_rounds(
    recipe: Recipe, folder: RunFolder, ranks: Ranks, *, teacher_in: TeacherIn
) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all seeds; entries of the summary by arm: before, round_0, round_1, ..."""
    from potstill.loops.rounds import rounds

    assert recipe.rounds is not None, "whoever calls has looked"
    places: dict[str, list[tuple[int, str]]] = {}
    for seed in recipe.seeds:
        play = _Play(recipe, folder, ranks, seed=seed, teacher_in=teacher_in)
        ranks.from_main(play.score_before)
        places.setdefault(BEFORE, []).append((seed, f"{BEFORE}-seed{seed}"))
        played = rounds(play, num_rounds=recipe.rounds.num_rounds, out=folder.path / _place(seed))
        for turn in played:
            places.setdefault(f"round_{turn.number}", []).append((seed, f"{_place(seed)}/{turn.folder.name}"))
    return {
        name: [{"seed": seed, "folder": place, "scores": _scores(folder, place)} for seed, place in of]
        for name, of in places.items()
    }


def last_elicited(recipe: Recipe, folder: RunFolder) -> Path:
    """Where the rows of the last round of the first seed lie."""
    assert recipe.rounds is not None, "whoever calls has looked"
    return folder.path / _place(recipe.seeds[0]) / f"round-{recipe.rounds.num_rounds - 1}" / FOLDER


class _Play:
    """The three stages of a round, for one seed; see loops.rounds."""

    def __init__(self, recipe: Recipe, folder: RunFolder, ranks: Ranks, *, seed: int, teacher_in: TeacherIn) -> None:
        assert recipe.rounds is not None and recipe.elicitation is not None, "the recipe was checked"
        self._recipe = recipe
        self._rounds = recipe.rounds
        self._how = recipe.elicitation
        self._folder = folder
        self._ranks = ranks
        self._seed = seed
        self._teacher_in = teacher_in

    def score_before(self) -> None:
        """What the student solves as it is."""
        arm = self._folder.arm(f"{BEFORE}-seed{self._seed}")
        if arm.scores.exists():
            return
        model = make_student(self._recipe.student, seed=self._seed).eval()
        done = solved_by(model.to(self._ranks.device), self._task)
        assert done is not None, "the student was found to write"
        write_examples(arm, done.lines)
        write_json(arm.scores, {**done.scores, "parameters": sum(each.numel() for each in model.parameters())})

    def elicit(self, turn: Round) -> Told:
        """The rows of this round, asked of the student of the round before."""
        return self._ranks.from_main(lambda: self._elicited(turn))

    def fit(self, turn: Round) -> Told:
        """The student of this round."""
        recipe = settle(self._recipe, turn.folder / FOLDER)
        teacher = self._teacher(recipe)
        last = None if self._rounds.start == "base" else _student_before(turn)
        model = make_student(recipe.student, seed=self._seed, last=last)
        train_and_export(
            recipe.student, model, recipe.stages, teaching(recipe, teacher), RunFolder(turn.folder),
            seed=self._seed, ranks=self._ranks,
        )  # fmt: skip
        return {"steps": sum(stage.steps for stage in recipe.stages)}

    def evaluate(self, turn: Round) -> Told:
        """What it solves, beside what its rows were."""
        recipe = settle(self._recipe, turn.folder / FOLDER)
        teacher = self._teacher(recipe)
        return self._ranks.from_main(lambda: self._scored(turn, recipe, teacher))

    @property
    def _task(self) -> Problems | None:
        return self._recipe.task

    def _elicited(self, turn: Round) -> Told:
        from potstill.report import samples

        elicit_in(
            self._how,
            turn.folder / FOLDER,
            name=self._recipe.name,
            about=self._recipe.about,
            run=f"{self._folder.path.resolve()}",
            student=lambda: self._asked(turn),
            part=lambda seeds: self._rounds.part(seeds, turn.number),
            paid=sum(float(str(each.told["elicit"]["dollars"])) for each in turn.earlier),
        )
        samples(turn.folder)
        card = read_json(turn.folder / FOLDER / CARD)
        return {name: card[name] for name in ("num_accepted", "num_rejected", "dollars")}

    def _asked(self, turn: Round) -> HfModel:
        """Who writes in this round."""
        last = _student_before(turn)
        model = make_student(self._recipe.student, seed=self._seed) if last is None else load_student(last)
        return writing_part(model.to(self._ranks.device), self._recipe.student)

    def _scored(self, turn: Round, recipe: Recipe, teacher: Teacher | None) -> Told:
        arm, rows = RunFolder(turn.folder), turn.told["elicit"]
        model: nn.Module = load_student(arm.student).to(self._ranks.device)
        accepted, rejected = (int(str(rows[name])) for name in ("num_accepted", "num_rejected"))
        more = {"rows": accepted, "accepted": accepted / (accepted + rejected), "dollars": rows["dollars"]}
        data = read_data(recipe.stages[-1].data, seed=self._seed)
        score_into(arm, model, data, judge=teacher, task=self._task, more=more)
        return {"solved": read_json(arm.scores)["solved"]}

    def _teacher(self, recipe: Recipe) -> Teacher | None:
        how: TeacherPlan | None = recipe.teacher
        if how is None or how.follows_student:
            return None
        return self._teacher_in(how, self._folder, "teacher", self._ranks, task=self._task)


def _place(seed: int) -> str:
    return f"rounds-seed{seed}"


def _student_before(turn: Round) -> Path | None:
    return None if turn.previous is None else RunFolder(turn.previous.folder).student


def _scores(folder: RunFolder, place: str) -> dict[str, Any]:
    return read_json(folder.arm(place).scores)
