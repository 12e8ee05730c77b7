"""What a text gives as its final answer, and whether that is the right one."""

from __future__ import annotations

import re
import string
from collections import Counter
from fractions import Fraction

from potstill.tasks.symbolic import equal_expressions

HASHES = re.compile(r"####[ \t]*((?:(?!####)[^\n])+)")
"""GSM8K (Cobbe et al. 2021)."""
SAID = re.compile(r"\banswer is:?\s*(.+?)(?:[.!](?!\d)|\n|$)", re.IGNORECASE)
LABELLED = re.compile(r"^(?:A|Answer|Final answer):[ \t]*([^\n]+)", re.MULTILINE | re.IGNORECASE)
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
RATIO = re.compile(r"(-?\d+)\s*/\s*(\d+)")
UNIT = re.compile(r"(?<=\d)\s+(?!(?:dozen|hundred|thousand|million|billion|trillion)\b)[^\W\d_]+(?: [^\W\d_]+)*$")
"""Words behind a number that do not change it: "72 clips", "9 dollars per day"."""
MATHS = re.compile(r"[\d\\^=+*/()\[\]{}<>|]")
LONGEST_NUMBER = 100
"""Characters: a longer number is not a number that anybody means."""


def final_answer(text: str) -> str | None:
    r"""The answer behind the last mark: "#### 9", "\boxed{9}", "The answer is 9", "A: 9", looked for in this order.

    A text that is nothing but a number, perhaps with its unit, is an answer without a mark. Thinking before </think>
    does not count. None where there is neither.
    """
    told = without_thinking(text)
    marked = HASHES.findall(told) or _boxed(told) or SAID.findall(told) or LABELLED.findall(told)
    if marked:
        return _bare(marked[-1])
    return _bare(told) if _number(_without_unit(told)) is not None else None


def last_number(text: str) -> str | None:
    """The last number anywhere: the lenient reading of GSM8K answers."""
    found = NUMBER.findall(without_thinking(text))
    return found[-1] if found else None


def without_thinking(text: str) -> str:
    """What stands behind the last </think>."""
    return text.rpartition("</think>")[2]


def equal(answer: str, reference: str) -> bool:
    r"""The same number or expression: 1,000 and 1000.0, 1/2 and 0.5 and \frac{1}{2}. A sign $ or % is not compared."""
    given, wanted = _number(answer), _number(reference)
    if wanted is not None and given is None:
        given = _number(_without_unit(answer))
    if wanted is not None and given is not None:
        return given == wanted
    if normalised(answer) == normalised(reference):
        return bool(reference.strip())
    # To mathematics a word is a product of letters, and anagrams are equal.
    is_maths = MATHS.search(answer) and MATHS.search(reference)
    return bool(is_maths) and equal_expressions(_bare(answer), _bare(reference))


def exact(answer: str, reference: str) -> bool:
    """The same characters, but for space around them."""
    return answer.strip() == reference.strip()


def same_words(answer: str, reference: str) -> bool:
    """The same words in the same order: exact match of SQuAD (Rajpurkar et al. 2016)."""
    return normalised(answer) == normalised(reference)


def word_f1(answer: str, reference: str) -> float:
    """F1 of the bags of words, in [0, 1] (Rajpurkar et al. 2016). Two empty answers are equal."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    shared = (Counter(given) & Counter(wanted)).total()
    if not given or not wanted:
        return float(given == wanted)
    return 2 * shared / (len(given) + len(wanted))


def normalised(text: str) -> str:
    """In lower case, without punctuation, articles and extra space."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def _boxed(text: str) -> list[str]:
    r"""What is inside each \boxed{...}, braces balanced; an unfinished one does not count."""
    found = []
    for start in (match.end() for match in re.finditer(r"\\boxed\s*\{", text)):
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                found.append(text[start:end])
                break
    return found


def _bare(text: str) -> str:
    """Without what is around an answer: space, a full stop, dollars, stars."""
    return text.strip().rstrip(".").strip("$* \t")


def _without_unit(text: str) -> str:
    """Without words behind the number: the 72 of "72 clips"."""
    return UNIT.sub("", _bare(text)) if len(text) <= LONGEST_NUMBER else text


def _number(text: str) -> Fraction | None:
    bare = _bare(text).rstrip("%\\ ").replace("$", "").strip()
    if len(bare) > LONGEST_NUMBER:
        return None
    if ratio := RATIO.fullmatch(bare):
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    return Fraction(bare.replace(",", "")) if NUMBER.fullmatch(bare) else None
