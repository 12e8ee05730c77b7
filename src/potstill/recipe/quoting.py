"""What an elicitation will ask, cost and take, judged by its first rows: `potstill quote`.

The sample is really asked: its answers stay in the request store, so that a run does not pay for them again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.core.catalog import keywords
from potstill.core.errors import DataError, RecipeError
from potstill.core.writing import Reply, Request, Usage, Writer
from potstill.recipe.building import make_student, writing_part
from potstill.recipe.elicitation import Elicitation, writers_of
from potstill.recipe.eliciting import Writers, seeds_of, steps_of
from potstill.recipe.memory import enough_memory
from potstill.recipe.sections import DataRecipe, Recipe

if TYPE_CHECKING:
    from potstill.knowledge import Elicited
    from potstill.teachers.money import Price

NORMAL_95 = 1.96
"""Standard errors on both sides of a mean that hold 95 % of a normal law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of the sample."""

    step: str
    writer: str
    usage: Usage
    dollars: float | None
    """None where the price is unknown."""
    seconds: float | None
    """None for an answer that was in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one step will ask of one writer."""

    step: str
    writer: str
    requests: float
    input_tokens: float
    output_tokens: float
    dollars: float | None
    margin: float
    """Half of the 95 % interval of the dollars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quoted:
    """A whole run, from a sample of it."""

    num_seeds: int
    """Of the sample."""
    num_requests: int
    accepted_share: float
    scale: float
    """The run is so many times the sample."""
    lines: tuple[Line, ...]
    paid: float
    """For the sample, in dollars; a run does not pay it again."""
    seconds: float | None
    """None where every answer of the sample was in the store."""
    num_rounds: int | None = None
    """All figures are of one round and one seed, the student as it is before the first; None: there are no rounds."""

    @property
    def dollars(self) -> float | None:
        known = [line.dollars for line in self.lines]
        return None if None in known else sum(each for each in known if each is not None)

    @property
    def margin(self) -> float:
        return math.hypot(*(line.margin for line in self.lines))

    def rows(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines."""
        tokens = sum(line.input_tokens for line in self.lines), sum(line.output_tokens for line in self.lines)
        return (
            ("judged by", f"{self.num_requests:,} requests for {self.num_seeds:,} seeds"),
            ("accepted", f"{self.accepted_share:.0%} of the rows"),
            ("requests", f"{sum(line.requests for line in self.lines):,.0f}"),
            ("tokens", f"{tokens[0]:,.0f} in, {tokens[1]:,.0f} out"),
            ("dollars", _money(self.dollars, self.margin)),
            ("time", "unknown: every answer was in the store" if self.seconds is None else _time(self.seconds)),
            ("paid for the sample", f"{self.paid:,.4f} dollars; the run has these answers from the store"),
            *([] if self.num_rounds is None else [("rounds", self._rounds())]),
        )

    def _rounds(self) -> str:
        return f"{self.num_rounds}; all of this is per round, judged by the student as it is before the first"

    def by_step(self) -> tuple[tuple[str, ...], ...]:
        """(step, writer, requests, tokens in, tokens out, dollars) lines."""
        return tuple(
            (
                line.step or "-", line.writer, f"{line.requests:,.0f}", f"{line.input_tokens:,.0f}",
                f"{line.output_tokens:,.0f}", _money(line.dollars, line.margin),
            )
            for line in self.lines
        )  # fmt: skip


def quote(recipe: Recipe | DataRecipe, *, sample: int = 20) -> Quoted:
    """Ask about the first `sample` seeds, and say what all of them will cost.

    Raises RecipeError where nothing is elicited or a price is not said, DataError where the sample says too little.
    """
    how = recipe.elicitation
    if how is None:
        raise RecipeError("quote: this recipe has no section 'elicit', so it asks nothing that costs money.")
    if sample < 2:
        raise RecipeError(f"--sample: found {sample}, expected at least 2 seeds to judge by.")
    from potstill.knowledge import elicit

    asked: list[Asked] = []
    rounds = recipe.rounds if isinstance(recipe, Recipe) else None
    with enough_memory(), tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        student = None
        if isinstance(recipe, Recipe) and rounds is not None:
            student = writing_part(make_student(recipe.student, seed=recipe.seeds[0]), recipe.student)
        writers = Writers(how, run="", student=student, watch=lambda writer: _Metered(writer, asked))
        steps = steps_of(how, writers)
        num_seeds = sum(1 for _ in (seeds_of(how) if rounds is None else rounds.part(seeds_of(how), 0)))
        enough = None if how.until is None and how.limit is None else min(sample, how.until or sample)
        told = elicit(
            itertools.islice(seeds_of(how), sample),
            *steps,
            out=Path(folder),
            until=enough,
            limit=None if how.limit is None else min(how.limit, 20 * sample),
        )
    if not asked:
        raise DataError("quote: these steps asked nothing of any writer, so there is nothing to pay.")
    shown = min(sample, num_seeds)
    scale = _scale(told, how, enough=enough, seeds=num_seeds / shown)
    lines = tuple(_line(group, scale) for group in _grouped(asked))
    waits = [each.seconds for each in asked if each.seconds is not None]
    return Quoted(
        num_seeds=shown,
        num_requests=len(asked),
        accepted_share=told.num_accepted / max(1, told.num_accepted + told.num_rejected),
        scale=scale,
        lines=lines,
        paid=sum(each.dollars or 0.0 for each in asked if each.seconds is not None),
        seconds=statistics.fmean(waits) * len(asked) * scale / _at_once(how) if waits else None,
        num_rounds=None if rounds is None else rounds.num_rounds,
    )


class _Metered:
    """A writer that notes what it is asked."""

    def __init__(self, writer: Writer, asked: list[Asked]) -> None:
        self.writer = writer
        self._asked = asked

    @property
    def identity(self) -> str:
        return self.writer.identity

    @property
    def dollars(self) -> float:
        return self.writer.dollars

    async def ask(self, request: Request) -> Reply:
        began = time.perf_counter()
        reply = await self.writer.ask(request)
        price: Price | None = getattr(self.writer, "price", None)
        self._asked.append(
            Asked(
                step=request.step,
                writer=self.identity,
                usage=reply.usage,
                dollars=None if price is None else reply.dollars or price.of(reply.usage),
                seconds=None if reply.remembered else time.perf_counter() - began,
            )
        )
        return reply

    async def close(self) -> None:
        await self.writer.close()


def _scale(told: Elicited, how: Elicitation, *, enough: int | None, seeds: float) -> float:
    """How many times the sample the whole run is: until enough rows are accepted, or rows or seeds run out."""
    bounds = []
    if enough is None or told.num_accepted < enough:
        bounds.append(seeds)  # the sample went through all its seeds, so these decide too
    if how.until is not None:
        if not told.num_accepted:
            raise DataError(
                f"quote: none of the sample's {told.num_rejected:,} rows was accepted, so nobody can say how many it "
                "takes. Look at the steps, or give a larger --sample."
            )
        bounds.append(how.until / told.num_accepted)
    if how.limit is not None:
        bounds.append(how.limit / max(1, told.num_accepted + told.num_rejected))
    return min(bounds)


def _grouped(asked: Sequence[Asked]) -> list[list[Asked]]:
    groups: dict[tuple[str, str], list[Asked]] = {}
    for each in asked:
        groups.setdefault((each.step, each.writer), []).append(each)
    return list(groups.values())


def _line(group: Sequence[Asked], scale: float) -> Line:
    costs = [each.dollars for each in group if each.dollars is not None]
    known = len(costs) == len(group)
    spread = statistics.stdev(costs) / math.sqrt(len(costs)) if known and len(costs) > 1 else 0.0
    usage = sum((each.usage for each in group), Usage())
    return Line(
        step=group[0].step,
        writer=group[0].writer,
        requests=len(group) * scale,
        input_tokens=usage.input * scale,
        output_tokens=usage.output * scale,
        dollars=sum(costs) * scale if known else None,
        margin=NORMAL_95 * spread * len(group) * scale,
    )


def _at_once(how: Elicitation) -> int:
    """How many requests are under way at a time: as the slowest writer of the recipe says, and as the flow has rows."""
    from potstill.knowledge.flow import AHEAD

    said = [AHEAD]
    for writer in writers_of(how):
        for name in ("concurrency", "together"):
            if name in keywords(writer.call.part):
                said.append(writer.call.knobs.get(name, keywords(writer.call.part)[name].default))
    return min(said)


def _money(dollars: float | None, margin: float) -> str:
    if dollars is None:
        return "unknown: the price is"
    digits = 2 if dollars >= 10 else 6
    low, high = max(0.0, dollars - margin), dollars + margin
    interval = f" (95 %: {low:,.{digits}f} to {high:,.{digits}f})" if margin else ""
    return f"{dollars:,.{digits}f}{interval}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}, if the server keeps up"
    return f"{seconds:,.1f} seconds, if the server keeps up"
