"""Laws of an image source: a batch is a pure function of its number, however the stream is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.types import IGNORED, Batch
from potstill.data import ImageData, arrays
from potstill.data.sources import READY_BYTES, Pictures, content_keys, moments, order

EVERYTHING = ("crop", "flip", "shift", "cutout")


def data(num_rows: int = 23, **knobs: object) -> ImageData:
    """Rows 0, 1, 2, ... as pictures of 3 x 8 x 8 that say their own number in the first pixel."""
    pixels = torch.randint(0, 256, (num_rows, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(num_rows)
    labels = torch.arange(num_rows) % 3
    return arrays(pixels, labels, pixels[:9], labels[:9], **knobs)


def same(left: Batch, right: Batch) -> bool:
    return (
        left.keys == right.keys
        and torch.equal(left.inputs["image"], right.inputs["image"])
        and torch.equal(left.labels, right.labels)
    )


def together(*batches: Batch) -> Batch:
    return Batch(
        keys=tuple(key for batch in batches for key in batch.keys),
        inputs={"image": torch.cat([batch.inputs["image"] for batch in batches])},
        labels=torch.cat([batch.labels for batch in batches]),
        mask=torch.cat([batch.mask for batch in batches]),
    )


KNOBS = [
    {},
    {"augment": EVERYTHING},
    {"augment": EVERYTHING, "labelled": 7, "labelled_share": 0.25},
    {"augment": ("crop",), "labelled": 5, "labelled_share": 1.0},
]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("index", [0, 1, 2, 7, 40])
def test_a_batch_of_eight_is_two_batches_of_four(knobs, index):
    large = data(batch=8, **knobs).train
    small = large.with_batch(4)
    assert same(large.batch(index), together(small.batch(2 * index), small.batch(2 * index + 1)))


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_batch_does_not_depend_on_what_was_asked_before(knobs):
    asked_often, asked_once = data(batch=6, **knobs).train, data(batch=6, **knobs).train
    for index in (5, 0, 9, 5, 31):
        asked_often.batch(index)
    assert same(asked_often.batch(7), asked_once.batch(7))


def test_the_same_number_twice_is_the_same_batch():
    source = data(augment=EVERYTHING).train
    assert same(source.batch(3), source.batch(3))


def test_a_source_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data(augment=EVERYTHING, labelled=6, labelled_share=0.5).train.batch(11)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_does_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = data(augment=EVERYTHING, seed=4).train.batch(2)
    torch.manual_seed(2)
    order.cache_clear()
    assert same(data(augment=EVERYTHING, seed=4).train.batch(2), first)


def test_another_seed_is_another_order():
    assert data(seed=0).train.batch(0).keys != data(seed=1).train.batch(0).keys


@given(num_rows=st.integers(1, 40), batch=st.integers(1, 50), epoch=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_one_epoch_covers_each_row_once(num_rows, batch, epoch):
    source = data(num_rows=max(num_rows, 9), batch=batch).train
    first, last = epoch * len(source), (epoch + 1) * len(source)
    keys = [key for index in range(first // batch, -(-last // batch)) for key in source.batch(index).keys]
    skip = first - first // batch * batch
    assert sorted(keys[skip : skip + len(source)]) == sorted(source.pictures.keys)


def test_two_epochs_come_in_different_orders():
    source = data(batch=23).train
    assert source.batch(0).keys != source.batch(1).keys


def test_a_batch_may_be_larger_than_the_set():
    assert len(data(num_rows=9, batch=30).train.batch(0).keys) == 30


def test_every_row_keeps_its_own_label_and_key():
    source = data(batch=10).train
    batch = source.batch(4)
    for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
        assert source.pictures.labels[source.pictures.keys.index(key)] == label


def test_a_pass_for_evaluation_is_in_order_with_a_short_end():
    test = data().test
    batches = list(test.batches(4))
    assert [len(batch.labels) for batch in batches] == [4, 4, 1]
    assert tuple(key for batch in batches for key in batch.keys) == test.pictures.keys


def test_a_pass_for_evaluation_is_not_augmented():
    augmented, plain = data(augment=EVERYTHING).train, data().train
    assert same(next(augmented.batches(5)), next(plain.batches(5)))


def test_the_test_part_is_not_augmented():
    assert data(augment=EVERYTHING).test.augment == ()


def test_training_pictures_have_zero_mean_and_unit_variance_per_channel():
    images = next(data().train.batches(23)).inputs["image"].double()
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_test_pictures_are_standardised_by_the_training_part():
    train = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    ready = arrays(train, [0, 0, 1, 1], torch.full((1, 1, 2, 2), 10.0), [0])
    mean, std = 1.5, (5 / 4) ** 0.5
    torch.testing.assert_close(next(ready.test.batches(1)).inputs["image"], torch.full((1, 1, 2, 2), (10 - mean) / std))


def test_moments_agree_with_a_direct_computation():
    pixels = torch.randint(0, 256, (5000, 2, 3, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mean, std = moments(pixels)
    values = pixels.double()
    torch.testing.assert_close(mean.flatten().double(), values.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.flatten().double(), values.std(dim=(0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_a_channel_that_never_varies_becomes_zero():
    flat = torch.full((4, 1, 2, 2), 0.1)
    images = next(arrays(flat, [0, 1, 0, 1], flat, [0, 1, 0, 1]).train.batches(4)).inputs["image"]
    assert images.abs().max() < 1e-5


def test_a_set_too_large_to_keep_as_floats_gives_the_same_bits():
    picture = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    mean, std = moments(picture)
    rows = torch.tensor([0, 0])
    small, large = (
        # Stride 0: as many rows as wanted, and no memory.
        Pictures(pixels=picture.expand(n, -1, -1, -1), labels=torch.zeros(n), mean=mean, std=std)
        for n in (1, READY_BYTES // (4 * 64))
    )
    assert torch.equal(small.standardised(rows), large.standardised(rows))
    assert large._ready is None


def test_everything_counts_in_the_mask():
    batch = data(labelled=0).train.batch(0)
    assert batch.mask.all()
    assert batch.mask.dtype == torch.bool


def test_images_are_float32_and_labels_int64():
    batch = data().train.batch(0)
    assert (batch.inputs["image"].dtype, batch.labels.dtype) == (torch.float32, torch.int64)


def test_a_labelled_share_fills_every_batch_with_as_many_labelled_rows():
    source = data(num_rows=60, batch=10, labelled=12, labelled_share=0.33).train
    assert [int((source.batch(i).labels != IGNORED).sum()) for i in range(20)] == [3] * 20


def test_a_labelled_share_of_one_gives_labelled_rows_only():
    source = data(labelled=6, labelled_share=1.0, batch=4).train
    assert all((source.batch(i).labels != IGNORED).all() for i in range(9))


def test_each_of_the_two_interleaved_streams_covers_its_rows_once_an_epoch():
    source = data(num_rows=24, batch=6, labelled=6, labelled_share=1 / 3).train
    batches = [source.batch(i) for i in range(9)]
    seen = [key for batch in batches for key, label in zip(batch.keys, batch.labels, strict=True) if label != IGNORED]
    assert all(len(set(seen[i : i + 6])) == 6 for i in range(0, 18, 6))
    rest = [key for batch in batches for key, label in zip(batch.keys, batch.labels, strict=True) if label == IGNORED]
    assert len(set(rest[:18])) == 18


def test_equal_pixels_have_equal_keys_and_others_have_not():
    pixels = torch.tensor([[1, 2], [1, 2], [2, 1]], dtype=torch.uint8).view(3, 1, 1, 2)
    first, second, third = content_keys(pixels)
    assert first == second != third


def test_keys_are_the_same_in_every_process():
    # What b2sum --length=64 says of the four bytes 00 01 02 03.
    assert content_keys(torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)) == ("fa898ba1ee4ec998",)


def test_keys_name_the_row_before_augmentation():
    assert data(augment=EVERYTHING).train.batch(2).keys == data().train.batch(2).keys
