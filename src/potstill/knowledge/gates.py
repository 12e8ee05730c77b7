"""Filters that compare a row with those that passed before it. A flow begins with an empty memory (but for `pool`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import numpy as np

from potstill.core.catalog import find, part
from potstill.core.writing import JSON, Example, Rows, content_id
from potstill.knowledge.filtering import Decide, gated, spelled, text_of
from potstill.knowledge.flow import each
from potstill.knowledge.rouge import RougePool
from potstill.knowledge.steps import Step

WORD = re.compile(r"\w+")
BLOCK = 4096
"""Vectors that are compared in one product."""


@part("elicitor")
def unique_id(*, name: str = "unique_id") -> Step:
    """Drops a row whose id was there before."""
    return _first_of(name, lambda row: row.id, "the id was there before")


@part("elicitor")
def exact_duplicate(*, on: str = "prompt", name: str = "exact_duplicate") -> Step:
    """Drops a row whose text was there before; case and white space aside."""

    def key(row: Example) -> str:
        return content_id(spelled(text_of(row, on)))

    return _first_of(name, key, "the text was there before", on=on)


@part("elicitor", paper="Wang et al. 2022")
def rouge_l(*, on: str = "prompt", above: float = 0.7, pool: Sequence[str] = (), name: str = "rouge_l") -> Step:
    """Drops a row whose ROUGE-L F with a text of the pool, or with a row that passed, is above 0.7 (Self-Instruct).

    Rows that pass carry a field called like this step: the mean over all, and id and F of the 10 nearest. A text of
    `pool` has the id that `core.writing.content_id` gives it.
    """

    def begin() -> Decide:
        known = RougePool((content_id(text), text) for text in pool)

        def decide(row: Example) -> Example:
            text = text_of(row, on)
            likeness = known.likeness(text)
            if likeness.most > above:
                return row.rejected(name, f"too near to an earlier row (above {above:g})", raw=text)
            known.add(row.id, text)
            told: dict[str, JSON] = {"mean": likeness.mean, "nearest": [list(pair) for pair in likeness.nearest]}
            return replace(row, fields={**row.fields, name: told})

        return decide

    return gated(name, begin)


@part("elicitor", paper="Broder 1997")
def min_hash(*, on: str = "answer", words: int = 5, bands: int = 14, rows: int = 8, name: str = "min_hash") -> Step:
    """Drops a row that shares a band of MinHash values with one before: runs of 5 words, 14 bands of 8 (Cosmopedia).

    Two texts with Jaccard similarity s share a band with probability 1 - (1 - s^8)^14: half at s = 0.68. A text shorter
    than one run counts as one.
    """

    def begin() -> Decide:
        from datasketch import MinHash, MinHashLSH

        known = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
        none_yet = MinHash(num_perm=bands * rows)

        def decide(row: Example) -> Example:
            text = text_of(row, on)
            hashed = none_yet.copy()
            hashed.update_batch(sorted(_runs(text, words)))
            if known.query(hashed):
                return row.rejected(name, "nearly the text of an earlier row", raw=text)
            known.insert(len(known.keys), hashed)
            return row

        return decide

    return gated(name, begin)


@part("elicitor")
def near_duplicate(
    *,
    embed: str | Callable[[str], Sequence[float]],
    on: str = "prompt",
    at_least: float = 0.95,
    name: str = "near_duplicate",
) -> Step:
    """Drops a row whose embedding has at least this cosine with one that passed (Magpie: distance at most 0.05).

    embed: a function from a text to numbers, or where it is installed, as "package.module:function". It works in
    threads, several texts at once.
    """
    function: Callable[[str], Sequence[float]] = (
        find("elicitor", embed, place="near_duplicate.embed") if isinstance(embed, str) else embed
    )

    def run(rows: AsyncIterator[Example]) -> Rows:
        """First the vectors, many at once; then the decisions, in order."""
        vectors: dict[str, np.ndarray | Exception] = {}
        known = _Vectors()

        async def look(row: Example) -> tuple[Example]:
            try:
                vectors[row.id] = _unit(await asyncio.to_thread(function, text_of(row, on)))
            except Exception as error:  # noqa: BLE001 - raised below, where it rejects this row
                vectors[row.id] = error
            return (row,)

        def decide(row: Example) -> Example:
            vector = vectors.pop(row.id)
            if isinstance(vector, Exception):
                raise vector
            if known.most(vector) >= at_least:
                return row.rejected(name, "nearly the meaning of an earlier row", raw=text_of(row, on))
            known.add(vector)
            return row

        return gated(name, lambda: decide)(each(rows, look))

    return Step(name=name, run=run)


class _Vectors:
    """Unit vectors in blocks."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._num = 0

    def add(self, vector: np.ndarray) -> None:
        place = self._num % BLOCK
        if place == 0:
            self._blocks.append(np.zeros((BLOCK, len(vector)), dtype=np.float32))
        self._blocks[-1][place] = vector
        self._num += 1

    def most(self, vector: np.ndarray) -> float:
        """The largest cosine; empty places of the last block count as 0."""
        return max((float((block @ vector).max()) for block in self._blocks), default=-1.0)


def _first_of(name: str, key: Callable[[Example], str], reason: str, *, on: str = "prompt") -> Step:
    """Keeps the first row of each key."""

    def begin() -> Decide:
        seen: set[str] = set()

        def decide(row: Example) -> Example:
            if key(row) in seen:
                return row.rejected(name, reason, raw=text_of(row, on))
            seen.add(key(row))
            return row

        return decide

    return gated(name, begin)


def _runs(text: str, words: int) -> set[bytes]:
    found = WORD.findall(text.lower())
    return {" ".join(found[at : at + words]).encode() for at in range(max(1, len(found) - words + 1))}


def _unit(numbers: Sequence[float]) -> np.ndarray:
    vector = np.asarray(numbers, dtype=np.float32)
    norm = float(np.linalg.norm(vector))
    if vector.ndim != 1 or not 0 < norm < np.inf:
        raise ValueError(f"an embedding must be a vector of finite numbers, not all 0; found shape {vector.shape}")
    return vector / norm
