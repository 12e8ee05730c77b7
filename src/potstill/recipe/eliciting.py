"""The section `elicit` carried out: writers and steps made, rows asked for, training data and data card written."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.catalog import keywords
from potstill.core.errors import DataError, RecipeError
from potstill.core.run import write_json, write_text
from potstill.core.writing import JSON, Elicitor, Example, Message, Writer, content_id
from potstill.recipe import text
from potstill.recipe.elicitation import Elicitation, Export
from potstill.recipe.nested import STUDENT, Nest
from potstill.recipe.text import Tree

if TYPE_CHECKING:
    from potstill.data.data_card import DataCard
    from potstill.knowledge import Elicited
    from potstill.stores.requests import Requests
    from potstill.students import HfModel

CARD, READ_ME = "card.json", "README.md"
STAND_INS = 64
"""Seeds that a rehearsal dresses up as elicited rows."""
TEST_EVERY = 8
"""Of the stand-ins, so that there is something to score."""

NOT_SAID: Mapping[str, tuple[object, ...]] = {"budget": (math.inf,), "step_budgets": (None,), "store": ("",)}
"""Values of a writer's knobs that leave the matter to the whole elicitation: a resolved recipe writes them out."""

Rows = tuple[tuple[str, str], ...]
Watch = Callable[[Writer], Writer]


class Writers:
    """The writers of one elicitation: each made once, bound to the run's ledger, store and budget.

    student: who is meant where a step says so, as it is at the beginning of a round.
    """

    def __init__(
        self, how: Elicitation, *, run: str, student: HfModel | None = None, watch: Watch = lambda writer: writer
    ) -> None:
        self._how = how
        self._run = run
        self._student = student
        self._watch = watch
        self._made: dict[str, Writer] = {}
        self._shared = self._common()

    def of(self, nest: Nest | str) -> object:
        """The writer or the task of a section; the word `teacher` is the one that steps share."""
        if nest == STUDENT:
            if STUDENT not in self._made:
                self._made[STUDENT] = self._watch(self._student_writer())
            return self._made[STUDENT]
        if isinstance(nest, str):
            assert self._how.teacher is not None, "the recipe was checked"
            return self.of(self._how.teacher)
        if nest.call.kind != "writer":
            return nest.build(self.of)
        name = text.write(nest.written())
        if name not in self._made:
            self._made[name] = self._watch(self._writer(nest))
        return self._made[name]

    def _writer(self, nest: Nest) -> Writer:
        """A writer's own store goes before the shared one; of budgets the recipe was found to have one kind only."""
        own = {name: value for name, value in nest.call.knobs.items() if value not in NOT_SAID.get(name, ())}
        bare = replace(nest, call=replace(nest.call, knobs=own))
        supplied: dict[str, object] = {"run": self._run} if bare.call.takes("run") else {}
        supplied |= {name: value for name, value in self._shared.items() if bare.call.takes(name)}
        if "budget" in self._shared and "budget" not in supplied and "price" in keywords(nest.call.part):
            raise RecipeError(f"elicit.budget: {nest.call.use} costs money but keeps no budget. Leave one of them out.")
        writer: Writer = bare.build(self.of, **supplied)  # type: ignore[assignment]
        return writer

    def _student_writer(self) -> Writer:
        from potstill.stores.requests import Requests
        from potstill.teachers.local_writer import LocalTransport
        from potstill.teachers.writers import writer_over

        assert self._student is not None, "whoever asks a student knows it"
        shared = self._shared.get("store")
        store = shared if isinstance(shared, Requests) else ""
        transport = LocalTransport(self._student)
        return writer_over(transport, model=self._student.title, price=0.0, store=store, run=self._run)

    def _common(self) -> dict[str, object]:
        """The store and the purse that all share, where the recipe asks for them."""
        from potstill.stores.requests import Requests
        from potstill.teachers.money import Purse

        if not self._how.store and self._how.budget == math.inf:
            return {}
        store: Requests = Requests(self._how.store or None)
        if self._how.budget == math.inf:
            return {"store": store}
        return {"store": store, "budget": Purse(self._how.budget, past=store.ledger(self._run) if self._run else ())}


def steps_of(how: Elicitation, writers: Writers) -> tuple[Elicitor, ...]:
    """The steps, ready to be asked."""
    return tuple(step.build(writers.of) for step in how.steps)  # type: ignore[misc]


def seeds_of(how: Elicitation) -> Iterator[Example]:
    """The examples to begin with: of a task, or of a file."""
    from potstill.data.examples import Seeds

    made = how.seeds()
    return iter(made if isinstance(made, Seeds) else made.examples())


def elicit_in(
    how: Elicitation,
    folder: Path,
    *,
    name: str,
    about: str,
    run: str,
    student: Callable[[], HfModel] | None = None,
    part: Callable[[Iterator[Example]], Iterator[Example]] = iter,
    paid: float = 0.0,
) -> None:
    """Carry it out in `folder`, or go on where it was stopped. What is finished is left as it is.

    student: gives the one that steps ask by this word. part: which of the seeds are meant. paid: dollars of the run's
    earlier rounds, which are no cost of these rows.
    """
    from potstill.data.exports import export_rows
    from potstill.knowledge import elicit

    if (folder / CARD).is_file():
        return
    writers = Writers(how, run=run, student=None if student is None else student())
    told = elicit(part(seeds_of(how)), *steps_of(how, writers), out=folder, until=how.until, limit=how.limit)
    told = replace(told, dollars=told.dollars - paid)
    if not told.num_accepted:
        reasons = ", ".join(f"{count:,} {why}" for why, count in itertools.islice(told.reasons.items(), 5))
        raise DataError(
            f"{folder}: no row was accepted ({reasons or 'no row came'}). The rejected ones, with their texts, are in "
            f"{folder / 'rejected.jsonl'}."
        )
    written = [export_rows(told, folder / export.file, **export.knobs) for export in how.exports]
    made = [(one.path.name, str(one.format), one.num_rows) for one in written]
    card = card_of(how, told, tuple(made), name=name, about=about)
    write_text(folder / READ_ME, card.as_markdown())
    write_json(folder / CARD, card.as_json())


def card_of(
    how: Elicitation, told: Elicited, made: tuple[tuple[str, str, int], ...], *, name: str, about: str
) -> DataCard:
    """The data card of a finished flow."""
    from potstill.data.data_card import DataCard, Prompt, funnel, writings

    writers, prompts, dollars = writings(told, licences=how.licences)
    texts = _prompt_texts(how)
    seeds, steps = how.written["seeds"], how.written["steps"]
    assert isinstance(seeds, dict)
    assert isinstance(steps, list)
    others = {key: value for key, value in how.licences.items() if key not in {one.writer for one in writers}}
    return DataCard(
        name=name,
        about=about,
        made_on=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        num_accepted=told.num_accepted,
        num_rejected=told.num_rejected,
        dollars=told.dollars,
        dollars_of_rows=dollars,
        seeds=seeds,
        steps=[step for step in steps if isinstance(step, dict)],
        funnel=funnel(told.steps, told.reasons, told.num_accepted),
        writers=writers,
        prompts=tuple(Prompt(hash=key, text=texts.get(key, ""), answers=count) for key, count in prompts.items()),
        files=made,
        licences=others,
    )


def rows_of(how: Elicitation, *, student: HfModel | None = None) -> Rows:
    """(what, value) lines for `potstill check`: everything is made, nothing is asked."""
    writers = Writers(how, run="", student=student)
    steps = steps_of(how, writers)
    first = next(seeds_of(how), None)
    if first is None:
        raise DataError("elicit.seeds: there is no example. Give a file or a task with at least one.")
    shown = " ".join((first.prompt or first.rejection or "(no prompt)").split())[:240]
    asked = {writer.identity: writer for step in steps for writer in step.writers}
    much = [f"until {how.until:,} accepted"] if how.until is not None else []
    much += [f"at most {how.limit:,} in all"] if how.limit is not None else []
    return (
        ("seeds", text.shortly({key: value for key, value in how.seeds.written().items() if value not in (None, "")})),
        ("first seed", shown),
        *((f"step {number}", step.name) for number, step in enumerate(steps, start=1)),
        *(("writer", identity) for identity in asked),
        ("rows", ", ".join(much) or "as many as the seeds give"),
        ("budget", "none" if how.budget == math.inf else f"{how.budget:g} dollars"),
        *(("writes", f"{export.file} ({export.format})") for export in how.exports),
    )


def stand_in(how: Elicitation, folder: Path) -> None:
    """Files as they will be written, made of seeds: a training that cannot work is found out before money goes."""
    seeds = list(itertools.islice(seeds_of(how), STAND_INS))
    for export in how.exports:
        rows = (_dressed(seeds[number % len(seeds)], number, export.format) for number in range(STAND_INS))
        _write_stand_in(export, rows, folder / export.file)


def _write_stand_in(export: Export, rows: Iterator[Example], path: Path) -> None:
    import json

    from potstill.data.exports import SHAPES, Speech

    say = Speech.of(export.knobs)
    lines = [line for row in rows for line in SHAPES[export.format](row, say)]
    marked = [line | {"split": "test" if number % TEST_EVERY == 0 else "train"} for number, line in enumerate(lines)]
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(line)}\n" for line in marked), encoding="utf-8")
        return
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([line | _as_text(line) for line in marked]), path)


def _as_text(line: Mapping[str, Tree]) -> dict[str, Tree]:
    import json

    return {"tools": json.dumps(line["tools"])} if "tools" in line else {}


def _dressed(row: Example, number: int, form: str) -> Example:
    """A seed with everything that some format wants of an accepted row."""
    answer = f"{row.answer or row.reference or 'An answer'} {number}"  # each row another: few seeds come by again
    fields: dict[str, JSON] = {
        "chosen": f"{answer} ", "rejected": f"{answer} No.", "label": True, "candidates": [answer, f"{answer} No."],
        "scores": [1.0, 0.0], "score": 1.0, "document": "A document.", "negatives": ["Another."],
    }  # fmt: skip
    if form == "tools":
        fields |= {
            "tools": [{"type": "function", "function": {"name": "tool"}}],
            "tool_calls": [{"type": "function", "function": {"name": "tool", "arguments": "{}"}}],
        }
    prompt = row.prompt or f"Question {number}"
    turns = tuple(turn for turn in row.turns if not turn.tool_calls and turn.role != "tool")
    return replace(row, prompt=prompt, answer=answer, turns=_alternating(turns), rejection="", fields=fields)


def _alternating(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return turns if [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) else ()


def _prompt_texts(how: Elicitation) -> dict[str, str]:
    """Texts by their hash in lineages: the shipped prompts, and every text that the recipe itself gives."""
    shipped = (entry for entry in (files("potstill.knowledge") / "prompts").iterdir() if entry.name.endswith(".txt"))
    texts = ["$prompt", *(entry.read_text(encoding="utf-8").strip() for entry in shipped)]
    texts += [knob for step in how.steps for section in step.sections() for knob in section.values() if _is_text(knob)]
    return {content_id(one): one for one in texts}


def _is_text(knob: Tree) -> bool:
    return isinstance(knob, str) and bool(knob)
