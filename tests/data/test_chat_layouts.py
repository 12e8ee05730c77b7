"""Batches of rows by number: permutations, buckets, packed rows without cross-talk, pairs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.core.types import IGNORED, Batch
from potstill.data.chat import ChatData, chat
from potstill.data.packing import fit
from potstill.data.preferences import preferences
from potstill.data.sequences import Stream
from tests.data.chat_helpers import answers, byte_tokenizer, dialogue, only, read, stories_tokenizer, write
from tests.data.places import shared

# 23 rows of 2 to 24 tokens, no two alike.
ROWS = [{"prompt": chr(97 + n), "completion": "z" * n} for n in range(1, 24)]


def of(folder: Path, **settings: object) -> ChatData:
    return read(folder, ROWS, byte_tokenizer(), **{"batch": 4, "length": 30, **settings})


def stream(data: ChatData, batches: int) -> list[str]:
    return [key for index in range(batches) for key in data.train.batch(index).keys]


def row_ids(batch: Batch) -> list[list[int]]:
    """The real tokens of each row."""
    pairs = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
    return [ids[real].tolist() for ids, real in pairs]


@pytest.mark.parametrize("layout", ["padded", "bucketed"])
def test_every_epoch_holds_each_row_once(tmp_path: Path, layout: str) -> None:
    keys = stream(of(tmp_path, layout=layout), 23)  # 4 epochs of 23 rows, in batches of 4.
    for epoch in range(4):
        assert len(set(keys[epoch * 23 : (epoch + 1) * 23])) == 23


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_epochs_differ_and_another_seed_gives_another_order(tmp_path: Path, layout: str) -> None:
    data, other = (of(tmp_path, layout=layout, batch=1, seed=seed) for seed in (0, 1))
    count = data.train.num_rows
    keys = stream(data, 2 * count)
    assert keys[:count] != keys[count:]
    assert sorted(keys[:count]) == sorted(keys[count:])
    assert stream(other, count) != keys[:count]


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_a_batch_depends_on_its_number_alone(tmp_path: Path, layout: str) -> None:
    first, later = of(tmp_path, layout=layout), of(tmp_path, layout=layout)
    wanted = [first.train.batch(index) for index in range(9)]
    for index in (8, 3, 5):
        found = later.train.batch(index)
        assert found.keys == wanted[index].keys
        assert torch.equal(found.labels, wanted[index].labels)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_of_eight_is_two_batches_of_four(tmp_path: Path, layout: str) -> None:
    data = of(tmp_path, layout=layout, length=24)
    large, small = data.train.with_batch(8).batch(3), [data.train.batch(index) for index in (6, 7)]
    assert large.keys == small[0].keys + small[1].keys
    assert row_ids(large) == row_ids(small[0]) + row_ids(small[1])


def test_reading_with_another_batch_size_gives_the_same_stream(tmp_path: Path) -> None:
    assert stream(of(tmp_path, batch=8), 4) == stream(of(tmp_path, batch=2), 16)


def test_buckets_bring_rows_of_like_length_together() -> None:
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0))

    def padding(window: int) -> float:
        items = [Stream(lengths=lengths, batch_size=8, seed=0, window=window).items(index) for index in range(500)]
        return 1.0 - sum(lengths[rows].sum().item() for rows in items) / sum(
            8 * lengths[rows].max().item() for rows in items
        )

    assert padding(0) > 0.4
    assert padding(50) < 0.05


def test_buckets_do_not_come_in_the_order_of_length() -> None:
    lengths = torch.arange(400)
    items = [Stream(lengths=lengths, batch_size=8, seed=0, window=50).items(index) for index in range(50)]
    maxima = [int(lengths[rows].max()) for rows in items]
    assert maxima != sorted(maxima)


@given(count=st.integers(1, 60), size=st.integers(1, 13), window=st.integers(1, 5))
def test_buckets_of_any_size_are_permutations(count: int, size: int, window: int) -> None:
    source = Stream(lengths=torch.arange(count) % 7, batch_size=size, seed=3, window=window)
    items = torch.cat([source.items(index) for index in range(-(-3 * count // size))])
    for epoch in range(3):
        assert sorted(items[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


@given(sizes=st.lists(st.integers(1, 20), max_size=60))
def test_packing_places_each_document_once_and_never_over_the_capacity(sizes: list[int]) -> None:
    bins = fit(sizes, 20)
    assert sorted(member for bin in bins for member in bin) == list(range(len(sizes)))
    assert all(sum(sizes[member] for member in bin) <= 20 for bin in bins)
    # Two bins that are at most half full would have been one.
    assert len(bins) <= 2 * sum(sizes) / 20 + 1


def test_packing_finds_the_full_bins() -> None:
    assert sorted(sorted(bin) for bin in fit([6, 4, 7, 3, 10], 10)) == [[0, 1], [2, 3], [4]]


def test_packed_rows_hold_every_supervised_token_exactly_once(tmp_path: Path) -> None:
    plain, dense = (only(of(tmp_path, layout=layout)) for layout in ("padded", "packed"))
    assert len(dense.keys) < len(plain.keys)
    assert sorted(dense.labels[dense.mask].tolist()) == sorted(plain.labels[plain.mask].tolist())


def test_packed_documents_are_the_padded_ones(tmp_path: Path) -> None:
    plain, dense = (only(of(tmp_path, layout=layout)) for layout in ("padded", "packed"))
    wanted = {tuple(ids) for ids in row_ids(plain)}
    found = set()
    for ids, segments in zip(dense.inputs["input_ids"], dense.inputs["segments"], strict=True):
        found |= {tuple(ids[segments == number].tolist()) for number in range(1, int(segments.max()) + 1)}
    assert found == wanted


def test_no_label_reaches_into_another_document(tmp_path: Path) -> None:
    batch = only(of(tmp_path, layout="packed"))
    segments = batch.inputs["segments"]
    last = segments != torch.nn.functional.pad(segments, (0, 1))[:, 1:]
    assert last.any()
    assert not batch.mask[last].any()


def test_positions_begin_anew_with_each_document_and_padding_is_segment_zero(tmp_path: Path) -> None:
    batch = only(of(tmp_path, layout="packed"))
    segments, positions = batch.inputs["segments"], batch.inputs["position_ids"]
    assert torch.equal(segments > 0, batch.inputs["attention_mask"].bool())
    for row in range(len(segments)):
        for number in range(1, int(segments[row].max()) + 1):
            count = int((segments[row] == number).sum())
            assert positions[row][segments[row] == number].tolist() == list(range(count))


def test_padded_rows_have_no_segments(tmp_path: Path) -> None:
    assert "segments" not in of(tmp_path).train.batch(0).inputs


def test_packed_documents_do_not_hear_each_other(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()
    plain, dense = (only(of(tmp_path, layout=layout)) for layout in ("padded", "packed"))

    def loss(batch: Batch, groups: torch.Tensor) -> torch.Tensor:
        """Summed over all answers; a position attends to earlier ones of its own group."""
        seen = (groups[:, None, :, None] == groups[:, None, None, :]).tril()
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
        logits = model(**inputs, attention_mask=hidden).logits
        return torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask], reduction="sum")

    with torch.no_grad():
        alone = loss(plain, plain.inputs["attention_mask"])
        torch.testing.assert_close(loss(dense, dense.inputs["segments"]), alone, rtol=1e-5, atol=1e-5)
        # Without the segments they do hear each other: the test can fail.
        assert abs(float(loss(dense, dense.inputs["attention_mask"]) - alone)) > 1e-3


def test_the_test_part_comes_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if n % 2 else "train"} for n, row in enumerate(ROWS)]
    data = read(tmp_path, rows, byte_tokenizer(), layout="packed", length=30)
    texts = [answers(batch, byte_tokenizer(), row) for batch in data.test.batches(4) for row in range(len(batch.keys))]
    assert texts == ["z" * n + "</s>" for n in range(2, 24, 2)]


def test_a_thousand_stories_are_ready_in_about_a_second() -> None:
    path = shared("tinystories-1k") / "stories.jsonl.gz"
    tokenizer = stories_tokenizer()
    start = time.perf_counter()
    data = chat(str(path), tokenizer=tokenizer)
    # Tried at 0.6 to 1.2 s on two busy cores; the room is for busier ones.
    assert time.perf_counter() - start < 8.0
    assert (data.train.num_rows, data.test.num_rows) == (900, 100)


def test_a_batch_of_stories_takes_far_less_than_a_step() -> None:
    path = shared("tinystories-1k") / "stories.jsonl.gz"
    data = chat(str(path), tokenizer=stories_tokenizer(), layout="packed", limit=200)
    seconds = []
    for index in range(50):
        start = time.perf_counter()
        data.train.batch(index)
        seconds.append(time.perf_counter() - start)
    # 0.2 ms was measured.
    assert min(seconds) < 1e-3


PAIRS = [{"prompt": f"{n}?", "chosen": "yes" * n, "rejected": "no" * n} for n in range(1, 6)]


def pairs(folder: Path, rows: list[dict[str, object]], **settings: object) -> ChatData:
    path = write(folder / "pairs.jsonl", rows)
    return preferences(path, **{"tokenizer": byte_tokenizer(), "test_share": 0.0, "batch": 2, **settings})


def test_a_pair_is_two_rows_chosen_first(tmp_path: Path) -> None:
    batch = pairs(tmp_path, PAIRS).train.batch(1)
    assert batch.extras["chosen"].tolist() == [True, False, True, False]
    for row, (pair, chosen) in enumerate(
        zip(batch.extras["pair"].tolist(), batch.extras["chosen"].tolist(), strict=True)
    ):
        assert answers(batch, byte_tokenizer(), row) == ("yes" if chosen else "no") * (pair + 1) + "</s>"


def test_pairs_are_a_permutation_too(tmp_path: Path) -> None:
    data = pairs(tmp_path, PAIRS, batch=5, layout="bucketed")
    assert data.train.num_rows == 5
    assert sorted(data.train.batch(0).extras["pair"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_pair_of_which_one_answer_is_too_long_is_left_out(tmp_path: Path) -> None:
    data = pairs(tmp_path, PAIRS, length=15)  # "5?" + "yes" * 5 + an end are 18 tokens, the rejected one 13.
    assert data.train.num_rows == 4
    assert "1 x an answer does not fit into 15 tokens; first:" in data.report.text()


def test_what_two_conversations_begin_with_is_their_prompt(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    rows = [{"chosen": dialogue("a", "b", "c", "yes"), "rejected": dialogue("a", "b", "c", "no")}]
    tokenizer = byte_tokenizer(template=template)
    batch = pairs(tmp_path, rows, tokenizer=tokenizer, batch=1).train.batch(0)
    assert [answers(batch, tokenizer, row) for row in (0, 1)] == ["yes|", "no|"]


def test_a_preference_without_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:1: 'chosen' is a text and there is no field 'prompt'"):
        pairs(tmp_path, [{"chosen": "a", "rejected": "b"}])


def test_a_small_set_of_pairs_holds_back_a_whole_one(tmp_path: Path) -> None:
    data = pairs(tmp_path, PAIRS, test_share=1e-9)
    assert (data.train.num_rows, data.test.num_rows) == (4, 1)
    batch = next(data.test.batches(8))
    assert batch.extras["chosen"].tolist() == [True, False]
    assert (batch.labels != IGNORED).any(dim=1).all()
