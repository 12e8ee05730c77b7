"""What is supervised: the shift, the ends of texts, truncation, the borders of characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError, RecipeError
from potstill.core.types import IGNORED
from potstill.core.vocabulary import fingerprint
from potstill.data.chat import aligned, check_same_text
from tests.data.chat_helpers import (
    CHATML,
    answers,
    byte_tokenizer,
    dialogue,
    losses,
    only,
    read,
    stories_tokenizer,
    table_lookup,
)

PAIR = {"prompt": "2+2=", "completion": "four"}


def test_a_label_is_the_next_token_where_that_is_supervised() -> None:
    labels = aligned(np.array([7, 8, 9, 5], np.int32), np.array([True, False, True, True]))
    assert labels.tolist() == [IGNORED, 9, 5, IGNORED]


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_a_model_that_knows_the_next_token_has_no_loss(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": "a" * n, "completion": "xyz" * n} for n in range(1, 8)]
    data = read(tmp_path, rows, byte_tokenizer(), layout=layout, batch=3)
    batch = data.train.batch(0)
    assert batch.mask.any()
    assert losses(table_lookup(batch), batch).max() < 1e-6


def test_a_model_that_is_off_by_one_has_a_loss(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [{"prompt": "a", "completion": "bcdefg"}], byte_tokenizer()))
    assert losses(table_lookup(batch).roll(1, dims=1), batch).min() > 10


def test_only_logits_at_counted_positions_move_the_loss(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [PAIR], byte_tokenizer()))
    logits = table_lookup(batch)
    for place in range(batch.labels.shape[1]):
        changed = logits.clone()
        changed[0, place] = torch.randn(600, generator=torch.Generator().manual_seed(place))
        assert (losses(changed, batch).sum() > losses(logits, batch).sum() + 1) == bool(batch.mask[0, place])


def test_the_prompt_is_not_supervised(tmp_path: Path) -> None:
    assert answers(only(read(tmp_path, [PAIR], byte_tokenizer())), byte_tokenizer()) == "four</s>"


def test_the_prompt_is_supervised_when_all_is_asked_for(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [PAIR], byte_tokenizer(), supervise="all"))
    # The first token is predicted by nothing.
    assert answers(batch, byte_tokenizer()) == "+2=four</s>"


def test_a_text_is_supervised_whole_and_ends_once(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [{"text": "a tale"}], stories_tokenizer()))
    ids = batch.inputs["input_ids"][0].tolist()
    assert (ids[0], ids[-1], ids.count(1)) == (1, 1, 2)  # <s> opens the text and ends it.
    assert batch.labels[0].tolist() == [*ids[1:], IGNORED]


@pytest.mark.parametrize("completion", ["four", "four</s>"])
def test_the_end_of_an_answer_is_supervised_exactly_once_when_padding_is_the_same_token(
    tmp_path: Path, completion: str
) -> None:
    tokenizer = byte_tokenizer(pad="</s>")
    rows = [{"prompt": "2+2=", "completion": completion}, {"prompt": "2+2=", "completion": "four hundred"}]
    batch = only(read(tmp_path, rows, tokenizer))
    end = tokenizer.eos_token_id
    assert (batch.labels == end).sum(dim=1).tolist() == [1, 1]
    assert (batch.inputs["input_ids"][0] == end).sum() > 1  # There is padding, and it looks the same.
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [9, 17]


def test_an_answer_that_is_cut_gets_no_end(tmp_path: Path) -> None:
    data = read(tmp_path, [PAIR], byte_tokenizer(), length=6)
    assert answers(only(data), byte_tokenizer()) == "fo"
    assert data.reading.tally.num_cut == 1


def test_an_answer_whose_end_alone_is_cut_keeps_all_its_words(tmp_path: Path) -> None:
    assert answers(only(read(tmp_path, [PAIR], byte_tokenizer(), length=8)), byte_tokenizer()) == "four"


def test_an_answer_that_its_writer_did_not_finish_gets_no_end(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [{**PAIR, "finish_reason": "length"}], byte_tokenizer()))
    assert answers(batch, byte_tokenizer()) == "four"


def test_an_unfinished_turn_loses_its_end_of_turn_mark(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    rows = [{"messages": dialogue("end?", "end"), "finish_reason": "length"}]
    assert answers(only(read(tmp_path, rows, tokenizer)), tokenizer) == "end"


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("\u00e9\U0001f642", "\u00fc\U0001f643!"),
        ("a ", " b"),
        ("\u65e5\u672c", "\u8a9e\n"),
        ("x\n", "\n\ny"),
        ("a", "b "),
        ("a  ", "  "),
    ],
)
def test_the_border_falls_between_the_characters(tmp_path: Path, prompt: str, completion: str) -> None:
    batch = only(read(tmp_path, [{"prompt": prompt, "completion": completion}], byte_tokenizer()))
    assert answers(batch, byte_tokenizer()) == f"{completion}</s>"


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=8), completion=st.text(min_size=1, max_size=8))
def test_every_byte_of_the_answer_and_none_of_the_prompt_is_supervised(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str
) -> None:
    folder = tmp_path_factory.mktemp("border")
    # A lone surrogate is no text; special tokens have their own tests.
    prompt, completion = (text.encode("utf-8", "ignore").decode() for text in (prompt, completion or "a"))
    if not completion or "<" in prompt + completion:
        return
    data = read(folder, [{"prompt": f".{prompt}", "completion": completion}], byte_tokenizer())
    assert int(only(data).mask.sum()) == len(completion.encode()) + 1


def test_a_token_across_the_border_belongs_to_the_answer(tmp_path: Path) -> None:
    tokenizer = stories_tokenizer()
    # "ll" is one piece of these: half of it is the prompt's.
    batch = only(
        read(tmp_path, [{"prompt": "He", "completion": "llo"}, {"prompt": "Hel", "completion": "lo"}], tokenizer)
    )
    pieces = [tokenizer.convert_ids_to_tokens(row[row != IGNORED].tolist()) for row in batch.labels]
    assert pieces == [["ll", "o", "<s>"], ["ll", "o", "<s>"]]


def test_extra_padding_changes_neither_ids_nor_labels(tmp_path: Path) -> None:
    plain, wide = (only(read(tmp_path, [PAIR], byte_tokenizer(), multiple_of=n)) for n in (1, 64))
    width = plain.labels.shape[1]
    assert wide.labels.shape == (1, 64)
    assert torch.equal(wide.labels[:, :width], plain.labels)
    assert not wide.mask[:, width:].any()
    assert int(wide.inputs["attention_mask"].sum()) == width


def test_the_mask_says_where_labels_are(tmp_path: Path) -> None:
    batch = only(read(tmp_path, [PAIR, {"prompt": "a", "completion": "b"}], byte_tokenizer()))
    assert batch.mask.dtype == torch.bool
    assert torch.equal(batch.mask, batch.labels != IGNORED)


def test_a_batch_carries_the_fingerprint_of_its_tokenizer(tmp_path: Path) -> None:
    data = read(tmp_path, [PAIR], byte_tokenizer())
    assert only(data).vocabulary == data.vocabulary == fingerprint(byte_tokenizer())


def test_keys_name_the_content(tmp_path: Path) -> None:
    first = only(read(tmp_path, [PAIR, {"prompt": "2+2=", "completion": "five"}, PAIR], byte_tokenizer())).keys
    assert first[0] == first[2] != first[1]
    assert only(read(tmp_path, [PAIR], byte_tokenizer())).keys[0] == first[0]


def test_what_is_supervised_enters_the_keys(tmp_path: Path) -> None:
    some, whole = (only(read(tmp_path, [PAIR], byte_tokenizer(), supervise=s)) for s in ("answers", "all"))
    assert torch.equal(some.inputs["input_ids"], whole.inputs["input_ids"])
    assert some.keys != whole.keys


def test_another_template_gives_other_keys_although_the_ids_are_equal(tmp_path: Path) -> None:
    rows = [{"messages": dialogue("hi", "ho")}]
    one, other = (only(read(tmp_path, rows, byte_tokenizer(template=text))) for text in (CHATML, "{# v2 #}" + CHATML))
    assert torch.equal(one.labels, other.labels)
    assert one.keys != other.keys


def test_without_a_pad_token_rows_are_filled_with_the_end_token_and_the_report_says_so(tmp_path: Path) -> None:
    data = read(tmp_path, [PAIR, {"prompt": "a", "completion": "b"}], byte_tokenizer(pad=None))
    batch = only(data)
    assert batch.inputs["input_ids"][1, -1] == byte_tokenizer().eos_token_id
    assert (batch.labels == byte_tokenizer().eos_token_id).sum() == 2
    assert "no pad token" in data.report.text()


def test_without_an_end_token_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end-of-sequence token"):
        read(tmp_path, [PAIR], byte_tokenizer(eos=None))


def test_a_tokenizer_is_loaded_by_the_path_of_its_model(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = read(tmp_path, [PAIR], str(tmp_path / "model"))
    assert answers(only(data), byte_tokenizer()) == "four</s>"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        read(tmp_path, [PAIR], str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"length": 0}, {"limit": 0}, {"multiple_of": 0}, {"test_share": 1.0}, {"system": "Be kind."}],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"chat.{next(iter(wrong))}"):
        read(tmp_path, [PAIR], byte_tokenizer(), **wrong)


def test_a_teacher_that_writes_the_same_text_is_accepted(tmp_path: Path) -> None:
    data = read(tmp_path, [PAIR], byte_tokenizer(template=CHATML))
    check_same_text(data, byte_tokenizer(template=CHATML))
    check_same_text(data, byte_tokenizer())


def test_a_teacher_that_writes_another_text_is_refused_with_the_place(tmp_path: Path) -> None:
    data = read(tmp_path, [PAIR], byte_tokenizer(template=CHATML))
    with pytest.raises(DataError, match=r"rows.jsonl:1 .*from character 12 on"):
        check_same_text(data, byte_tokenizer(template=CHATML.replace("{{ m.role }}", "{{ m.role.upper() }}")))
