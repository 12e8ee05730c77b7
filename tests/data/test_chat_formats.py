"""What lies on disk: formats by their fields, files by their endings, parts, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.data.chat import ChatData, chat
from tests.data.chat_helpers import BARE, CHATML, answers, byte_tokenizer, dialogue, only, read, write

PAIR = {"prompt": "hi ", "completion": "yo"}


def learnt(folder: Path, row: dict[str, object], template: str = "") -> str:
    tokenizer = byte_tokenizer(template=template)
    return answers(only(read(folder, [row], tokenizer)), tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": "hi ", "response": "yo"},
        {"question": "hi ", "answer": "yo"},
        {"instruction": "greet", "output": "yo"},
        {"instruction": "greet", "input": "him", "output": "yo"},
        {"instruction": "greet", "response": "yo", "other": 3},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("template, end", [("", "</s>"), (CHATML, "<|im_end|>")], ids=["plain", "template"])
def test_an_answer_is_told_by_the_name_of_its_field(
    tmp_path: Path, row: dict[str, object], template: str, end: str
) -> None:
    assert learnt(tmp_path, row, template) == f"yo{end}"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": dialogue("hi", "yo")},
        {"messages": [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yo"}]},
        {"conversations": dialogue("hi", "yo")},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"messages": dialogue("hi", "yo"), "prompt": "hi", "text": "user: hi"},
        {"messages": dialogue("hi", "yo"), "tools": '[{"name": "f"}]'},
    ],
    ids=["messages", "null", "conversations", "from-value", "others beside", "tools as text"],
)
def test_a_conversation_is_told_by_the_name_of_its_field(tmp_path: Path, row: dict[str, object]) -> None:
    assert learnt(tmp_path, row, CHATML) == "yo<|im_end|>"


def test_an_instruction_without_a_template_stands_under_headings(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = read(tmp_path, [{"instruction": "greet", "input": "him", "output": "yo"}], tokenizer)
    text = tokenizer.decode(only(data).inputs["input_ids"][0].tolist())
    assert text == "### Instruction:\ngreet\n\n### Input:\nhim\n\n### Response:\nyo</s>"


def test_a_text_row_is_supervised_without_its_first_token(tmp_path: Path) -> None:
    assert learnt(tmp_path, {"text": "tale"}) == "ale</s>"


def write_as(folder: Path, kind: str) -> str:
    rows = [{"prompt": f"{n} ", "completion": "yo, \n you"} for n in range(3)]
    path = folder / f"rows.{kind}"
    text = {
        "jsonl": "\n\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows),
    }
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "saved":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(path)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(text[kind.removesuffix(".gz")].encode()))
    else:
        path.write_text("\ufeff" + text[kind], encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "saved"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_tokenizer()
    batch = only(chat(write_as(tmp_path, kind), tokenizer=tokenizer, test_share=0.0))
    assert [answers(batch, tokenizer, row) for row in range(3)] == ["yo, \n you</s>"] * 3


def sizes(data: ChatData) -> tuple[int, int]:
    return data.train.num_rows, data.test.num_rows


def test_files_of_a_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", [PAIR] * 2)
    write(tmp_path / "train-1.jsonl.gz", [PAIR] * 3)
    (tmp_path / "validation").mkdir()
    write(tmp_path / "validation" / "0.jsonl", [PAIR])
    (tmp_path / "README.md").write_text("About these rows.")
    assert sizes(chat(str(tmp_path), tokenizer=byte_tokenizer())) == (5, 1)


def test_a_folder_of_which_one_file_is_silent_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "more.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"more.jsonl does not say which part"):
        chat(str(tmp_path), tokenizer=byte_tokenizer())


def test_rows_may_say_which_part_they_belong_to(tmp_path: Path) -> None:
    rows = [{**PAIR, "split": part} for part in ("train", "test", "train", "later")]
    data = read(tmp_path, rows, byte_tokenizer())
    assert sizes(data) == (2, 1)
    assert "1 x its split 'later' is neither train nor" in data.report.text()


def test_nothing_is_held_back_of_rows_that_say_they_are_for_training(tmp_path: Path) -> None:
    rows = [{**PAIR, "split": "train"}] * 2
    assert sizes(read(tmp_path, rows, byte_tokenizer(), test_share=0.5)) == (2, 0)


def test_a_question_without_a_template_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = read(tmp_path, [{"question": "Why?", "answer": "So."}], tokenizer)
    assert tokenizer.decode(only(data).inputs["input_ids"][0].tolist()) == "Why?\nSo.</s>"


@pytest.mark.parametrize("parts, found", [({"train": 5}, (4, 1)), ({"train": 5, "test": 2}, (5, 2))])
def test_the_tables_of_a_saved_set_are_its_parts_unless_there_is_one(
    tmp_path: Path, parts: dict[str, int], found: tuple[int, int]
) -> None:
    from datasets import Dataset, DatasetDict

    tables = {
        name: Dataset.from_list([{**PAIR, "prompt": str(n)} for n in range(size)]) for name, size in parts.items()
    }
    DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert sizes(chat(str(tmp_path / "saved"), tokenizer=byte_tokenizer(), test_share=1e-9)) == found


def test_another_path_holds_the_test_part(tmp_path: Path) -> None:
    path = write(tmp_path / "more.jsonl", [PAIR] * 2)
    data = read(tmp_path, [PAIR] * 5, byte_tokenizer(), test_path=path, test_share=0.5)
    assert sizes(data) == (5, 2)


def test_a_share_is_held_back_by_content(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ", "completion": "yo"} for n in range(400)]
    few = read(tmp_path, rows[:200], byte_tokenizer(), test_share=0.25, seed=1)
    many = read(tmp_path, rows[::-1], byte_tokenizer(), test_share=0.25, seed=2)
    assert 60 < many.test.num_rows < 140
    # No row changes sides when others are added, the order is another or the seed is.
    assert set(few.test.rows.keys) <= set(many.test.rows.keys)
    assert not set(many.test.rows.keys) & set(many.train.rows.keys)


def test_a_small_set_still_holds_one_row_back(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ", "completion": "yo"} for n in range(4)]
    assert sizes(read(tmp_path, rows, byte_tokenizer(), test_share=1e-9)) == (3, 1)


def test_limits_keep_the_first_rows_that_teach_something(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "" if n == 1 else str(n), "split": "train"} for n in range(9)]
    rows += [{**row, "split": "test"} for row in rows]
    data = read(tmp_path, rows, byte_tokenizer(), limit=3, test_limit=2)
    assert [answers(only(data), byte_tokenizer(), row) for row in range(3)] == ["0</s>", "2</s>", "3</s>"]
    assert data.test.num_rows == 2


def test_a_batch_of_an_empty_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row here"):
        read(tmp_path, [PAIR], byte_tokenizer()).test.batch(0)


def test_a_row_without_an_answer_is_left_out_with_its_reason(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "a", "completion": ""}, {"prompt": "b" * 40, "completion": "yo"}]
    data = read(tmp_path, rows, byte_tokenizer(), length=20)
    assert data.train.num_rows == 1
    assert data.report.left_out == (
        f"1 x the answer is empty; first: {tmp_path}/rows.jsonl:2",
        f"1 x no supervised token within the first 20; first: {tmp_path}/rows.jsonl:3",
    )


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": dialogue("hi", " ")}, "the answer is empty"),
        ({"messages": dialogue("hi")}, "no message is the assistant's"),
        ({"text": ""}, "the text is empty"),
    ],
)
def test_nothing_to_learn_at_all_is_an_error_with_the_reasons(
    tmp_path: Path, row: dict[str, object], reason: str
) -> None:
    with pytest.raises(DataError, match=f"no row for training is left. Left out: 2 because {reason} .first: .*:1"):
        read(tmp_path, [row, row], byte_tokenizer(template=BARE))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"body": "a"}, r"rows.jsonl:2 lacks the field 'prompt' that the rows before it have \(it has: body\)"),
        ({"prompt": "a", "completion": 3}, r"rows.jsonl:2: 'completion' is a int"),
        ({"prompt": "a", "completion": None}, r"rows.jsonl:2: 'completion' is null"),
    ],
)
def test_a_row_unlike_the_others_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [PAIR, row], byte_tokenizer())


@pytest.mark.parametrize(
    "row, message",
    [
        ({"body": "a", "title": "b"}, r"has the fields body, title. Expected one of: messages .*; text; chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "holds a preference .* Use data.preferences"),
        ({"messages": []}, "'messages' is an empty list. Expected a list of messages"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str. Expected a message"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\] has no role \(it has: content\)"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: 'content' is a int"),
        (
            {"conversations": [{"from": "martian", "value": "hi"}]},
            r"'from' is 'martian'. Expected one of system, human",
        ),
        ({"messages": dialogue("a", "b"), "tools": "{"}, "'tools' is a text that is not JSON"),
        ({"messages": dialogue("a", "b"), "tools": [3]}, "'tools' is not a list of objects"),
    ],
)
def test_fields_that_cannot_be_read_are_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1.*{message}"):
        read(tmp_path, [row], byte_tokenizer(template=CHATML))


def test_a_missing_file_is_named_with_what_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere.jsonl: there is no such file or folder. Expected a file ending in .jsonl"
    ):
        chat(str(tmp_path / "nowhere.jsonl"), tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b', r"rows.jsonl:2 is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', r"rows.jsonl:2 holds a list. Expected an object"),
        ("rows.jsonl", b'{"text": "\xff"}\n', r"rows.jsonl is torn or no UTF-8 text"),
        ("rows.jsonl", b"", "no row for training is left. There is no row at all"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "rows.jsonl.gz is torn"),
        ("rows.jsonl.gz", b"no gzip", "rows.jsonl.gz is torn"),
        ("rows.json", b'{"text": "a"}', "rows.json holds a dict. Expected a list"),
        ("rows.csv", b"text\na,b\n", "rows.csv:2 has another number of values"),
        ("rows.csv", b'text\n"a', "rows.csv: after line 1 this is no comma-separated text"),
        ("rows.parquet", b"PAR1", "rows.parquet cannot be read as parquet"),
        ("rows.txt", b"a", "this is a file ending in '.txt'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        chat(str(tmp_path / name), tokenizer=byte_tokenizer())


def test_a_folder_without_any_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match=r"the folder holds notes\.md"):
        chat(str(tmp_path), tokenizer=byte_tokenizer())
