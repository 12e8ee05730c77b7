"""Pairs of answers of which one is preferred: prompt + chosen + rejected."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from potstill.core.catalog import part
from potstill.data.chat import ChatData, check_counts, read_rows
from potstill.data.formats import PreferenceReader
from potstill.data.parts import Parts
from potstill.data.sequences import WINDOW, PairSource
from potstill.data.tokens import Tokenizer, load_tokenizer


@part("data", name="preferences")
def preferences(
    path: str,
    *,
    tokenizer: str | Tokenizer,
    batch: int = 4,
    length: int = 512,
    seed: int = 0,
    layout: Literal["padded", "bucketed"] = "padded",
    template: str = "own",
    system: str = "",
    test_path: str = "",
    test_share: float = 0.05,
    limit: int | None = None,
    test_limit: int | None = None,
    multiple_of: int = 1,
) -> ChatData:
    """The pairs at `path`, files and settings as for `chat`: `batch` pairs are 2 * batch rows.

    Rows 2p and 2p + 1 of a batch are the chosen and the rejected answer of pair p; extras hold "chosen" (bool [2B]) and
    "pair" (int64 [2B], the number of the pair within the set). Answers are texts beside a prompt, or lists of messages;
    without a prompt, what both begin with is the prompt. A pair is left out where an answer exceeds `length`: cutting
    it would decide the comparison.
    Raises DataError for what lies at `path` and for the tokenizer, RecipeError for the settings.
    """
    check_counts("preferences", batch=batch, length=length, multiple_of=multiple_of, limit=limit, test_limit=test_limit)
    reading = read_rows(
        Parts(path=path, test_path=test_path, test_share=test_share, limit=limit, test_limit=test_limit),
        PreferenceReader,
        load_tokenizer(tokenizer),
        template=template,
        system=system,
        supervise="answers",
        length=length,
    )
    train, test = (
        PairSource.of(
            replace(rows, multiple_of=multiple_of),
            batch_size=batch,
            seed=seed,
            window=WINDOW if layout == "bucketed" else 0,
        )
        for rows in (reading.train, reading.test)
    )
    return ChatData(train=train, test=test, reading=reading)
