"""Filters that look at one text of a row and need nothing else. `on` names the text: prompt, answer, or a field."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from potstill.core.catalog import find, part
from potstill.core.errors import RecipeError
from potstill.core.writing import Example
from potstill.knowledge.faults import (
    NOT_FOR_TEXT_MODELS,
    SORRY_WORDS,
    is_short_and_sorry,
    length_fault,
    opening_fault,
    word_fault,
)
from potstill.knowledge.filtering import gated, text_filter
from potstill.knowledge.steps import Step
from potstill.tasks import json_schema as schemas
from potstill.tasks.answers import normalised

SELF_INSTRUCT_WORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    "go to",
)
"""What a text-only model cannot do (Wang et al. 2022, repository)."""

REFUSALS = (
    *("i'm sorry", "i am sorry", "sorry", "i'm really sorry", "i am really sorry", "my apologies", "i apologize"),
    *("i cannot", "i can't", "i'm not able to", "i am not able to", "i'm unable to", "i am unable to"),
    *("as an ai", "as a language model", "as an assistant", "i'm an ai", "i'm just an ai"),
)
"""How refusals begin (the list of Zou et al. 2023, without the words that good answers begin with, too)."""

WRITTEN_IN = {
    ("CYRILLIC",): ("ru", "uk", "bg", "sr", "mk", "be", "kk", "mn"),
    ("ARABIC",): ("ar", "fa", "ur", "ps"),
    ("DEVANAGARI",): ("hi", "mr", "ne", "sa"),
    ("CJK",): ("zh",),
    ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"): ("ja",),
    ("HANGUL", "CJK"): ("ko",),
    ("GREEK",): ("el",),
    ("HEBREW",): ("he", "yi"),
    ("THAI",): ("th",),
    ("BENGALI",): ("bn", "as"),
    ("TAMIL",): ("ta",),
    ("TELUGU",): ("te",),
    ("GEORGIAN",): ("ka",),
    ("ARMENIAN",): ("hy",),
    ("ETHIOPIC",): ("am", "ti"),
    ("KHMER",): ("km",),
    ("MYANMAR",): ("my",),
}
"""First words of the Unicode names of letters, and languages written in them. All others are written in Latin."""
SCRIPTS = {language: scripts for scripts, languages in WRITTEN_IN.items() for language in languages}
DEFAULT_SCRIPT = ("LATIN",)


@part("elicitor")
def length(
    *,
    on: str = "answer",
    min_words: float = 0,
    max_words: float = math.inf,
    min_characters: float = 0,
    max_characters: float = math.inf,
    name: str = "length",
) -> Step:
    """Bounds on words (between white space) and characters; Self-Instruct keeps instructions of 4 to 150 words."""

    def fault(text: str) -> str:
        if len(text) < min_characters:
            return "too short"
        within = length_fault(text, min_words=min_words, max_words=max_words)
        return within or ("too long" if len(text) > max_characters else "")

    return text_filter(name, on, fault)


@part("elicitor")
def language(
    *, language: str = "en", on: str = "answer", share: float = 0.8, detect: str = "", name: str = "language"
) -> Step:
    """At least this share of the letters belongs to the language's script; a text without letters passes.

    The script does not tell English from German: for that, `detect` names an installed function,
    "package.module:function", that takes a text and returns a code such as "en".
    """
    scripts = SCRIPTS.get(language, DEFAULT_SCRIPT)
    told: Callable[[str], str] | None = find("elicitor", detect, place="language.detect") if detect else None

    def fault(text: str) -> str:
        letters = [character for character in text if character.isalpha()]
        if letters and sum(_script(letter) in scripts for letter in letters) < share * len(letters):
            return f"not in the script of '{language}'"
        return f"detected as '{found}'" if told and (found := told(text)) != language else ""

    return text_filter(name, on, fault)


@part("elicitor")
def copied_prompt(*, name: str = "copied_prompt") -> Step:
    """Drops an answer that is the prompt, or begins with all of it; case, punctuation and articles aside."""

    def decide(row: Example) -> Example:
        prompt, answer = normalised(row.prompt), normalised(row.answer)
        is_copy = bool(prompt) and (answer == prompt or answer.startswith(f"{prompt} "))
        return row.rejected(name, "repeats the prompt", raw=row.answer) if is_copy else row

    return gated(name, lambda: decide)


@part("elicitor")
def refusal(
    *, on: str = "answer", openings: Sequence[str] = REFUSALS, sorry_words: int = SORRY_WORDS, name: str = "refusal"
) -> Step:
    """Drops answers that begin like a refusal, or are shorter than `sorry_words` and say "sorry".

    The second rule is Evol-Instruct's (Xu et al. 2023, section 3.2); 0 turns it off.
    """
    begins = tuple(opening.lower() for opening in openings)

    def fault(text: str) -> str:
        if text.replace("\u2019", "'").strip().lower().startswith(begins):
            return "begins like a refusal"
        return "short and sorry" if is_short_and_sorry(text, words=sorry_words) else ""

    return text_filter(name, on, fault)


@part("elicitor")
def opening(
    *,
    on: str = "prompt",
    forbidden: Sequence[str] = NOT_FOR_TEXT_MODELS,
    punctuation: bool = False,
    non_ascii: bool = False,
    name: str = "opening",
) -> Step:
    """How a text may begin; the last two knobs allow what Self-Instruct drops (Wang et al. 2022, repository)."""

    def fault(text: str) -> str:
        return opening_fault(text, forbidden=forbidden, punctuation=punctuation, non_ascii=non_ascii)

    return text_filter(name, on, fault)


@part("elicitor")
def ending(*, on: str = "prompt", forbidden: Sequence[str] = (":",), name: str = "ending") -> Step:
    """How a text must not end: with a colon, the rest is missing."""

    def fault(text: str) -> str:
        return next((f"ends with '{words}'" for words in forbidden if text.rstrip().endswith(words)), "")

    return text_filter(name, on, fault)


@part("elicitor")
def banned_words(*, on: str = "prompt", words: Sequence[str] = SELF_INSTRUCT_WORDS, name: str = "banned_words") -> Step:
    """Drops texts with one of these words or phrases, whole words, in any case."""
    if not words:
        raise RecipeError("banned_words.words: the list is empty. Give words, or leave the filter out.")

    def fault(text: str) -> str:
        return word_fault(text, tuple(words))

    return text_filter(name, on, fault)


@part("elicitor")
def json_schema(*, schema: str | Path | Mapping[str, object], on: str = "answer", name: str = "json_schema") -> Step:
    """Keeps texts that are JSON, alone or in one fenced block, and follow the schema; given itself or as a file."""
    return text_filter(name, on, schemas.check(_schema(schema), place=f"{name}.schema"))


def _schema(given: str | Path | Mapping[str, object]) -> Mapping[str, object]:
    return given if isinstance(given, Mapping) else schemas.read_schema(Path(given).expanduser())


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
