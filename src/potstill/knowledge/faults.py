"""What may be wrong with a text, as a reason, "" where nothing is: for filters, and for ways that judge as they go."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from functools import cache

NOT_FOR_TEXT_MODELS = ("Write a program",)
"""How no task may begin (Wang et al. 2022, repository)."""
SORRY_WORDS = 80
"""An answer that says "sorry" in fewer words is none (Xu et al. 2023, section 3.2)."""


def length_fault(text: str, *, min_words: float = 0, max_words: float = math.inf) -> str:
    num_words = len(text.split())
    return "too short" if num_words < min_words else "too long" if num_words > max_words else ""


def opening_fault(
    text: str,
    *,
    forbidden: Sequence[str] = NOT_FOR_TEXT_MODELS,
    punctuation: bool = False,
    non_ascii: bool = False,
) -> str:
    """punctuation, non_ascii: whether a text may begin so."""
    first = text.strip()[:1]
    if not first:
        return "empty"
    if not punctuation and first in string.punctuation:
        return "begins with punctuation"
    if not non_ascii and not first.isascii():
        return "begins with a letter outside ASCII"
    return next((f"begins with '{words}'" for words in forbidden if text.strip().startswith(words)), "")


def word_fault(text: str, words: tuple[str, ...]) -> str:
    """One of these words or phrases, whole words, in any case."""
    found = _any_of(words).search(text)
    return f"has the word '{found[0].lower()}'" if found else ""


def is_short_and_sorry(text: str, *, words: int = SORRY_WORDS) -> bool:
    return len(text.split()) < words and re.search(r"\bsorry\b", text, re.IGNORECASE) is not None


@cache
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
