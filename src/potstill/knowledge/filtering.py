"""What all filters share: how a row is judged, rejected and passed, and that one bad row never harms another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from potstill.core.errors import PotstillError
from potstill.core.writing import Example, Rows, Writer
from potstill.knowledge.flow import each, gate
from potstill.knowledge.steps import Step

Decide: TypeAlias = Callable[[Example], Example]
"""The row as it goes on, or rejected."""

TEXTS = ("prompt", "answer", "reasoning", "reference", "system")


def gated(name: str, begin: Callable[[], Decide]) -> Step:
    """Decides at once, one row after the other. `begin` gives a decision with an empty memory for each flow."""

    def run(rows: AsyncIterator[Example]) -> Rows:
        decide = begin()

        def one(row: Example) -> Example:
            try:
                return _passed(decide(row), name)
            except Exception as error:  # noqa: BLE001 - tripped raises what concerns every row
                return tripped(row, name, error)

        return gate(rows, one)

    return Step(name=name, run=run)


def checked(
    name: str, begin: Callable[[], Callable[[Example], Awaitable[Example]]], *, writers: tuple[Writer, ...] = ()
) -> Step:
    """Decides on each row by itself, many under way at once: for what takes time."""

    def run(rows: AsyncIterator[Example]) -> Rows:
        decide = begin()

        async def one(row: Example) -> tuple[Example]:
            try:
                return (_passed(await decide(row), name),)
            except Exception as error:  # noqa: BLE001 - tripped raises what concerns every row
                return (tripped(row, name, error),)

        return each(rows, one)

    return Step(name=name, run=run, writers=writers)


def text_filter(name: str, on: str, fault: Callable[[str], str]) -> Step:
    """A filter on one text of the row: `fault` says what is wrong with it, "" where nothing is."""

    def decide(row: Example) -> Example:
        text = text_of(row, on)
        reason = fault(text)
        return row.rejected(name, reason, raw=text) if reason else row

    return gated(name, lambda: decide)


def spelled(text: str) -> str:
    """Case and white space aside: texts that are the same so are one. Signs stay: 1.5 is not 15."""
    return " ".join(text.casefold().split())


def text_of(row: Example, on: str) -> str:
    """The text called `on`: the prompt, the answer, ..., or a field of the row."""
    text = getattr(row, on) if on in TEXTS else row.fields.get(on)
    if not isinstance(text, str):
        raise LookupError(f"no text in '{on}'")
    return text


def tripped(row: Example, name: str, error: Exception) -> Example:
    """The row that made a filter raise is rejected with the error's words. Our own errors concern every row: raised."""
    if isinstance(error, PotstillError):
        raise error
    return row.rejected(name, f"{type(error).__name__}: {error}", raw=row.answer or row.prompt)


def _passed(row: Example, name: str) -> Example:
    return row if row.rejection else row.passed(name)
