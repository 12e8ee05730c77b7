"""Seeds from files: what is asked is found, what is torn is kept and told."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError, RecipeError
from potstill.core.writing import Example, Message, ToolCall
from potstill.data.examples import accepted, examples, numbers


def lines(path: Path, *rows: object) -> str:
    """A .jsonl file; a text is written as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_columns_are_mapped_as_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "1 + 1?", "answer": 2, "topic": "sums"})
    (row,) = examples(path, prompt="question", reference="answer")
    assert (row.prompt, row.reference, row.answer) == ("1 + 1?", "2", "")
    assert row.fields == {"topic": "sums"}


def test_well_known_columns_need_no_map(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 and 1", "output": "2"})
    (row,) = examples(path)
    assert (row.prompt, row.answer) == ("Add.\n\n1 and 1", "2")


def test_all_forms_of_file_give_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    content = [{"prompt": "a", "level": "x"}, {"prompt": "b", "level": "y"}]
    plain = lines(tmp_path / "a.jsonl", *content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(Path(plain).read_text())
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "level"])
        writer.writeheader()
        writer.writerows(content)
    Dataset.from_list(content).to_parquet(str(tmp_path / "d.parquet"))
    Dataset.from_list(content).save_to_disk(str(tmp_path / "saved"))
    wanted = list(examples(plain))
    for name in ("b.jsonl.gz", "c.csv", "d.parquet", "saved"):
        assert list(examples(str(tmp_path / name))) == wanted


def test_half_of_an_emoji_is_a_rejected_row_and_a_whole_one_is_none(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", '{"prompt": "cut \\ud83d"}', '{"prompt": "\\ud83d\\ude00"}')
    half, emoji = examples(path)
    assert half.rejection.startswith("examples: a text holds half of a character")
    assert (emoji.prompt, emoji.rejection) == ("\U0001f600", "")


def test_a_row_made_in_python_with_half_of_an_emoji_is_refused_in_a_sentence() -> None:
    with pytest.raises(DataError, match="half of a character"):
        Example.of("cut \ud83d")


def test_a_torn_line_is_a_rejected_row_that_names_its_place(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a"}, '{"prompt": "b', "[1]", {"prompt": "c"})
    good, torn, listed, last = examples(path)
    assert [good.prompt, last.prompt] == ["a", "c"]
    assert torn.rejection == "examples: not JSON"
    assert torn.fields["place"] == f"{path}:2"
    assert torn.raw.startswith('{"prompt": "b')
    assert listed.rejection == "examples: no object with named fields"


def test_a_later_row_without_its_prompt_is_rejected(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": None}, {"prompt": ["x"]})
    assert [row.rejection for row in examples(path)] == [
        "",
        "examples: no text in 'prompt'",
        "examples: 'prompt' is a list, expected a text",
    ]


def test_a_missing_column_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "a"})
    with pytest.raises(DataError, match=r"no column 'questoin', which was given as prompt\. Did you mean 'question'"):
        list(examples(path, prompt="questoin"))


def test_columns_that_nobody_knows_are_listed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"frage": "a"})
    with pytest.raises(DataError, match=r"has the columns frage, and none is called prompt.*such as prompt: frage"):
        list(examples(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl: there is no row in it"):
        list(examples(str(tmp_path / "a.jsonl")))


def test_a_limit_counts_rows_and_is_at_least_one(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"prompt": str(number)} for number in range(5)))
    assert [row.prompt for row in examples(path, limit=2)] == ["0", "1"]
    with pytest.raises(RecipeError, match=r"examples\.limit: found 0"):
        examples(path, limit=0)


def test_only_the_part_that_is_wanted_is_read(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "split": "train"}, {"prompt": "b", "split": "test"})
    assert [row.prompt for row in examples(lines(tmp_path / "a.jsonl", *rows), split="test")] == ["b"]


def test_ids_are_unique_and_the_same_on_every_reading(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "a"}, "torn", "torn")
    seeds = examples(path)
    ids = [row.id for row in seeds]
    assert len(set(ids)) == 4
    assert [row.id for row in seeds] == ids


def test_messages_become_turns_a_question_and_an_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "3"},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "So."},
    ]
    (row,) = examples(lines(tmp_path / "a.jsonl", {"messages": turns}))
    assert (row.system, row.prompt, row.answer) == ("Be brief.", "And?", "So.")
    call = ToolCall(name="f", arguments='{"x": 1}')
    assert row.turns == (
        Message(role="user", content="Hi"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="3"),
    )


def test_accepted_rows_come_back_with_their_lineage(tmp_path: Path) -> None:
    row = Example.of("a", answer="b").passed("label")
    lines(tmp_path / "accepted.jsonl", row.plain())
    assert list(accepted(str(tmp_path))) == [row]


def test_a_folder_that_no_flow_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no accepted\.jsonl"):
        accepted(str(tmp_path))


def test_numbered_rows_have_no_prompt() -> None:
    assert [(row.prompt, row.fields["number"]) for row in numbers(2)] == [("", 0), ("", 1)]
