"""What a recipe's teacher says about its batches, put on disk before any student is trained: `potstill cache`.

Afterwards the same recipe with `teacher={use: remembered, path: FOLDER}` needs no teacher in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.errors import RecipeError, unknown
from potstill.core.run import RunFolder, write_text
from potstill.core.types import Need
from potstill.recipe import text
from potstill.recipe.building import TEACHER_SEED, freeze, make_model, make_teacher, objective_of, read_data, teaching
from potstill.recipe.materials import Material, Pictures
from potstill.recipe.memory import enough_memory
from potstill.recipe.running import teacher_in
from potstill.recipe.sections import DataRecipe, Recipe, TeacherPlan
from potstill.recipe.signature import check_knobs, typed
from potstill.recipe.stored import asked_of, needed, template_of, view_seed
from potstill.recipe.text import Tree

if TYPE_CHECKING:
    import torch

    from potstill.core.types import Teacher
    from potstill.objective import Term
    from potstill.stores import Info, Sketch
    from potstill.teachers import Built, Verified

FACTORS = frozenset({"teacher_states", "teacher_head"})
HEARD = FACTORS | {"teacher_logits"}
"""What a term reads where the teacher's logits are needed, in whole or in parts."""
TEACHER = "teacher.yaml"
"""In a cache's folder: the teacher that was trained there, as its recipe writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a build is."""

    batches: int
    of_batches: int
    asked: int
    """Those that the teacher was asked about in this call; the others were there already."""
    rows: int
    """Rows added."""
    seconds: float
    """Spent on what was asked."""

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """If all batches that are left must be asked about; not a number as long as none was."""
        return self.seconds / self.asked * (self.of_batches - self.batches) if self.asked else math.nan

    def __str__(self) -> str:
        left = "" if math.isnan(self.seconds_left) else f", {_time(self.seconds_left)} left"
        return f"{self.batches:,} of {self.of_batches:,} batches, {self.rows_per_second:,.1f} rows/s{left}"


def build_cache(
    recipe: Recipe,
    folder: Path,
    *,
    sketch: str = "",
    dtype: str = "float16",
    batches: int | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Info:
    """Store what `recipe` needs of its teacher in `folder`, or go on where it was stopped; what is there afterwards.

    A teacher that the recipe trains is trained first, in `folder`/teacher. sketch: how logits are kept, such as
    "top k=50"; empty: the smallest way that the objective allows. dtype: precision of layers. batches: of the data of
    each seed and stage; None: all that the run will ask about. Raises RecipeError for what cannot be remembered,
    UserError for a folder that remembers something else, StorageError for a full disk or a second writer.
    """
    from potstill.loops.parallel import join
    from potstill.stores import info

    how, ranks = _teacher_plan(recipe), join()
    with enough_memory():
        rows = needed(recipe, batches=batches)
        # What cannot serve is refused before a teacher is trained.
        sketch_for(sketch, recipe, read_data(recipe.data, seed=recipe.seeds[0]))
        teacher = _teacher(how, folder, ranks.device)
        clock = _Clock(len(rows), tell)
        store_answers(recipe, teacher, folder, sketch=sketch, dtype=dtype, batches=batches, watch=[clock])
    return info(folder)


def store_answers(
    recipe: Recipe,
    teacher: Teacher,
    folder: Path,
    *,
    sketch: str = "",
    dtype: str = "float16",
    batches: int | None = None,
    watch: Sequence[Callable[[Built], None]] = (),
) -> None:
    """Store what this live `teacher` says about the rows that the recipe's students will see: see build_cache."""
    from potstill.loops.parallel import join
    from potstill.stores.sketch import FloatName
    from potstill.teachers import build

    ranks = join()
    precision: FloatName = typed(dtype, FloatName, place="--dtype")
    if ranks.world > 1:
        raise RecipeError("cache build: it writes from one process. Start it without a launcher.")
    data, rows = read_data(recipe.data, seed=recipe.seeds[0]), needed(recipe, batches=batches)
    build(
        folder,
        teacher,
        rows,
        batches=len(rows),
        sketch=sketch_for(sketch, recipe, data),
        layers=sorted(_need(recipe, data, teacher).features),
        dtype=precision,
        template=template_of(data),
        seed=view_seed(recipe, data),
        device=ranks.device,
        watch=watch,
    )


def verify_cache(folder: Path, recipe: Recipe, *, sample: int = 256) -> Verified:
    """Ask the recipe's teacher again about `sample` of the rows in `folder`, or a few more.

    Raises UserError for a store of another teacher, tokenizer, template or data seed.
    """
    from potstill.loops.parallel import join
    from potstill.stores import contents_of
    from potstill.teachers import verify

    how, ranks = _teacher_plan(recipe), join()
    with enough_memory():
        there, data = contents_of(folder), read_data(recipe.data, seed=recipe.seeds[0])
        there.check(asked_of(there, recipe, data), place=folder)
        rows, teacher = needed(recipe), _teacher(how, folder, ranks.device)
        return verify(folder, teacher, rows, batches=len(rows), sample=sample, device=ranks.device)


def fitting(terms: Sequence[Term], data: Material) -> Sketch:
    """The smallest way to keep logits that every term can learn from, exact where classes are few.

    Draws where all terms are linear in the teacher and compare at one temperature, the likeliest classes where all read
    laws only, the states before the head for whatever else.
    """
    from potstill.stores import Hidden, Sampled, Top, Whole

    if any(not FACTORS.isdisjoint(term.reads) for term in terms):
        return Hidden()
    if isinstance(data, Pictures):
        return Whole()
    if all(_is_linear(term) for term in terms) and len({term.temperature for term in terms}) == 1:
        return Sampled(temperature=terms[0].temperature)
    return Top() if all(term.card.coarsens for term in terms) else Hidden()


def sketch_for(spec: str, recipe: Recipe, data: Material) -> Sketch | None:
    """How logits are kept; None where no term reads them. RecipeError for a way that some term cannot learn from."""
    from potstill.stores import SKETCHES, Sampled

    stages = [stage for arm in recipe.taught for stage in arm.stages]
    terms = [term for stage in stages for term in stage.objective.terms if not HEARD.isdisjoint(term.asks)]
    if not terms:
        if spec:
            raise RecipeError(f"--sketch: found '{spec}', but no term of this recipe reads logits. Leave it out.")
        return None
    if not spec:
        return fitting(terms, data)
    name, *words = spec.split()
    if name not in SKETCHES:
        raise unknown("--sketch", name, SKETCHES, noun="sketch")
    kind = SKETCHES[name]
    given = check_knobs(kind, text.override({}, words), place=f"--sketch {name}")
    if kind is Sampled:
        given = {"temperature": terms[0].temperature, **given}
    sketch: Sketch = kind(**given)
    for term in terms:
        _check_serves(sketch, term)
    return sketch


def _check_serves(sketch: Sketch, term: Term) -> None:
    """Raises RecipeError for a term that cannot learn from what such a store holds."""
    from potstill.stores import Hidden, Sampled, Top

    name = term.card.name
    if not isinstance(sketch, Hidden) and not FACTORS.isdisjoint(term.reads):
        raise RecipeError(f"--sketch: {name} reads what stands before the teacher's head. Take: hidden.")
    if isinstance(sketch, Sampled) and not _is_linear(term):
        raise RecipeError(
            f"--sketch: {name} is not linear in the teacher, so draws would bias it. Take: top, or hidden."
        )
    if isinstance(sketch, Sampled) and sketch.temperature != term.temperature:
        raise RecipeError(
            f"--sketch: {name} compares at temperature {term.temperature:g}, and draws at {sketch.temperature:g} serve "
            "no other. Draw at that of the objective, or take: top, or hidden."
        )
    if isinstance(sketch, Top) and not term.card.coarsens:
        raise RecipeError(f"--sketch: {name} reads all of the teacher's logits, as they are. Take: whole, or hidden.")


def _is_linear(term: Term) -> bool:
    """Also where it counts or weighs."""
    selects = term.select is not None and "teacher_logits" in term.select.reads
    return term.card.linear_in_teacher and not selects


def _need(recipe: Recipe, data: Material, teacher: Teacher) -> Need:
    """All that the stages read of the teacher."""
    need = Need()
    for arm, stage in [(each, stage) for each in recipe.taught for stage in each.stages]:
        objective = stage.objective
        if stage.maps:
            student = make_model(arm.student, data, seed=recipe.seeds[0])
            objective = objective_of(stage, teaching(recipe, teacher)(student))
        need |= objective.need("teacher")
    return need


def _teacher_plan(recipe: Recipe | DataRecipe) -> TeacherPlan:
    if recipe.elicitation is not None:
        raise RecipeError(
            "elicit: what this recipe trains on is not there before its run. Run it with teacher.remember, or cache a "
            "recipe whose data.path names the elicited rows."
        )
    how = recipe.teacher
    if how is None:
        raise RecipeError("teacher: this recipe has none, so there is nothing to remember. Give one.")
    if how.call.use == "remembered":
        raise RecipeError("teacher.use: a remembered teacher is in a store already. Give the recipe with the live one.")
    if how.follows_student:
        raise RecipeError(
            f"teacher.use: {how.call.use} is made of the student that learns, so what it says is not known beforehand."
        )
    return how


def _teacher(how: TeacherPlan, folder: Path, device: torch.device) -> Teacher:
    """The recipe's teacher, as its run would have it. RecipeError where another one was trained in `folder`."""
    from potstill.loops.parallel import join

    if not _is_trained_here(how):
        return freeze(make_teacher(how, read_data(how.data, seed=TEACHER_SEED)), device)
    written: dict[str, Tree] = {"teacher": dict(how.written), "data": how.data.written()}
    there = folder / TEACHER
    if there.exists():
        found = text.first_difference(text.read_file(there), written)
        if found:
            key, here, asked = found
            raise RecipeError(
                f"{folder} holds what a teacher with {key} {text.shortly(here)} says, this one has "
                f"{text.shortly(asked)}. Choose another --out."
            )
    write_text(there, text.write(written))
    return teacher_in(how, RunFolder(folder), "teacher", join())


def _is_trained_here(how: TeacherPlan) -> bool:
    return how.stage is not None or any(_is_trained_here(member) for _, member in how.arms(""))


class _Clock:
    """Turns what a build says after each batch into `Progress`."""

    def __init__(self, of_batches: int, tell: Callable[[Progress], None]) -> None:
        self._of_batches, self._tell = of_batches, tell
        self._last = time.monotonic()
        self._rows = self._asked = 0
        self._seconds = 0.0

    def __call__(self, done: Built) -> None:
        now = time.monotonic()
        if done.rows > self._rows:
            self._asked += 1
            self._seconds += now - self._last
        self._last, self._rows = now, done.rows
        self._tell(
            Progress(
                batches=done.batches,
                of_batches=self._of_batches,
                asked=self._asked,
                rows=done.rows,
                seconds=self._seconds,
            )
        )


def _time(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
