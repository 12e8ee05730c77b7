"""Filters on one text: what each drops, and the law that one bad row never harms another."""

from __future__ import annotations

import pytest

from potstill.core.catalog import keywords, parts
from potstill.core.errors import DataError, RecipeError, StorageError
from potstill.core.writing import Example, Message
from potstill.knowledge import filters
from potstill.knowledge.filtering import checked, gated
from tests.knowledge.scripted import questions, through

MINE = (
    *("length", "language", "copied_prompt", "refusal", "opening", "ending", "banned_words", "json_schema"),
    *("unique_id", "exact_duplicate", "rouge_l", "min_hash", "near_duplicate", "decontaminate"),
    *("decontaminate_substrings", "keep_graded", "code_passes", "keep_scored", "perplexity", "best_of", "longest"),
    *("keep_rated", "keep_additive"),
)


def reasons(step, *answers: str, on: str = "answer") -> list[str]:
    """What the filter says of each text, without its own name."""
    rows = [Example(id=str(place), **{"prompt": "p", on: text}) for place, text in enumerate(answers)]
    return [row.rejection.partition(": ")[2] for row in through(rows, step)]


@pytest.mark.parametrize("name", MINE)
def test_every_filter_is_an_elicitor_with_keywords_only_and_a_name(name):
    knobs = keywords(parts("elicitor")[name])

    assert {knob.kind for knob in knobs.values()} == {knobs["name"].KEYWORD_ONLY}
    assert knobs["name"].default == name


def divided(row: Example) -> Example:
    """Trips over the answer 1."""
    assert 1 / (int(row.answer) - 1)
    return row


def test_a_rejection_has_the_name_the_reason_and_the_raw_text():
    (row,) = through([Example(id="0", answer="one two")], filters.length(min_words=3, name="mine"))

    assert (row.rejection, row.raw, row.answer) == ("mine: too short", "one two", "one two")
    assert row.lineage.steps == ()


def test_a_row_that_passes_says_so_and_is_otherwise_the_same():
    (row,) = through([Example(id="0", answer="one")], filters.length())

    assert row == Example(id="0", answer="one").passed("length")


def test_a_rejected_row_is_left_alone():
    dead = Example(id="0", answer="x").rejected("before", "so", raw="x")

    assert through([dead], filters.length(min_words=9), filters.refusal(), filters.copied_prompt()) == [dead]


def test_a_row_that_makes_a_filter_raise_is_rejected_alone():
    rows = through([Example(id=n, answer=n) for n in "012"], gated("odd", lambda: divided))

    assert [row.rejection for row in rows] == ["", "odd: ZeroDivisionError: division by zero", ""]
    assert rows[1].raw == "1"


def test_a_row_that_makes_a_slow_filter_raise_is_rejected_alone():
    async def decide(row: Example) -> Example:
        return divided(row)

    rows = through([Example(id=n, answer=n) for n in "012"], checked("odd", lambda: decide))

    assert [bool(row.rejection) for row in rows] == [False, True, False]


@pytest.mark.parametrize("slow", [False, True])
def test_an_error_that_concerns_all_rows_is_raised(slow):
    def full(row: Example) -> Example:
        raise StorageError("the disk is full")

    async def slowly(row: Example) -> Example:
        return full(row)

    with pytest.raises(StorageError):
        through(questions("x"), checked("f", lambda: slowly) if slow else gated("f", lambda: full))


def test_a_missing_text_rejects_the_row():
    (row,) = through(questions("x"), filters.length(on="topic"))

    assert row.rejection == "length: LookupError: no text in 'topic'"


def test_any_field_can_be_looked_at():
    (row,) = through([Example(id="0", fields={"topic": "too much of it"})], filters.length(on="topic", max_words=2))

    assert row.rejection == "length: too long"


def test_length_counts_words_as_self_instruct_does():
    step = filters.length(min_words=4, max_words=150)

    assert reasons(step, "a b c", "a b c d", "w " * 150, "w " * 151) == ["too short", "", "", "too long"]


def test_length_counts_characters():
    assert reasons(filters.length(min_characters=2, max_characters=3), "a", "ab", "abcd") == [
        "too short",
        "",
        "too long",
    ]


@pytest.mark.parametrize(
    ("language", "text", "passes"),
    [
        ("en", "A plain sentence.", True),
        ("en", "42 + 1 = 43", True),
        ("en", "\u042d\u0442\u043e \u043d\u0435 \u043b\u0430\u0442\u0438\u043d\u0438\u0446\u0430", False),
        ("ru", "\u042d\u0442\u043e \u043d\u0435 \u043b\u0430\u0442\u0438\u043d\u0438\u0446\u0430", True),
        ("ja", "\u3053\u308c\u306f\u6f22\u5b57\u3067\u3059\u30fc", True),
        ("zh", "\u3053\u308c\u306f\u304b\u306a", False),
        ("de", "\u00dcber Gr\u00f6\u00dfe", True),
    ],
)
def test_language_is_told_by_its_script(language, text, passes):
    assert (reasons(filters.language(language=language), text) == [""]) == passes


def test_a_detector_decides_between_languages_of_one_script():
    step = filters.language(language="en", detect="tests.knowledge.test_filters:guess")

    assert reasons(step, "the cat", "die Katze") == ["", "detected as 'de'"]


def guess(text: str) -> str:
    return "de" if "die" in text else "en"


@pytest.mark.parametrize(
    ("answer", "passes"),
    [("say hello", False), ("Say hello!", False), ("say hello. Hello!", False), ("hello, say I", True), ("", True)],
)
def test_an_answer_that_repeats_the_prompt_is_dropped(answer, passes):
    (row,) = through([Example(id="0", prompt="Say hello", answer=answer)], filters.copied_prompt())

    assert (not row.rejection) == passes


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I\u2019m sorry, but I can't.", "begins like a refusal"),
        ("As an AI, I have no taste.", "begins like a refusal"),
        ("Well, sorry about that.", "short and sorry"),
        ("word " * 80 + "sorry", ""),
        ("As an example, take 3.", ""),
        ("Be sorryful? No.", ""),
    ],
)
def test_refusals_are_told_by_their_beginning_or_by_being_short_and_sorry(answer, reason):
    assert reasons(filters.refusal(), answer) == [reason]


def test_openings_are_those_of_self_instruct():
    texts = ("Write a program that", "- a list", "\u00c9crire", "", "List three things")

    assert reasons(filters.opening(), *texts, on="prompt") == [
        "begins with 'Write a program'", "begins with punctuation", "begins with a letter outside ASCII", "empty", "",
    ]  # fmt: skip


def test_a_colon_at_the_end_means_that_something_is_missing():
    assert reasons(filters.ending(), "Do this:", "Do: this", on="prompt") == ["ends with ':'", ""]


def test_banned_words_are_whole_words_in_any_case():
    texts = ("Draw a cat", "a drawing", "Go to the shop", "a mapping")

    assert reasons(filters.banned_words(), *texts, on="prompt") == [
        "has the word 'draw'",
        "",
        "has the word 'go to'",
        "",
    ]


def test_no_banned_words_at_all_is_refused():
    with pytest.raises(RecipeError, match=r"banned_words.words: the list is empty"):
        filters.banned_words(words=())


def test_json_must_follow_its_schema():
    step = filters.json_schema(schema={"type": "object", "required": ["a"]})

    assert reasons(step, '{"a": 1}', "{}", "no") == ["", "required at $", "not JSON"]


def test_a_schema_that_is_none_is_refused_before_any_row():
    with pytest.raises(DataError, match=r"json_schema.schema is no JSON Schema"):
        filters.json_schema(schema={"type": 3})


def test_a_schema_can_be_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "integer"}', encoding="utf-8")

    assert reasons(filters.json_schema(schema=str(path)), "1", "x") == ["", "not JSON"]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_schema_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")

    with pytest.raises(DataError, match="schema"):
        filters.json_schema(schema=str(path))


def test_turns_and_other_parts_of_a_row_survive_a_filter():
    row = Example(id="0", prompt="p", answer="a", turns=(Message(role="user", content="u"),), fields={"k": 1})

    assert through([row], filters.length())[0].turns == row.turns
