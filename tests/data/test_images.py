"""The door to labelled images: settings, and what they leave of a set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill.core.catalog import card, find
from potstill.core.errors import DataError, RecipeError
from potstill.core.types import IGNORED
from potstill.data import arrays, images
from potstill.data.rows import proportional


def pixels(num: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, side, side), dtype=np.uint8)


def uneven(**knobs: object):
    """60 rows of class 0, 30 of class 1, 10 of class 2."""
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    return arrays(pixels(100), labels, pixels(9), np.arange(9) % 3, **knobs)


def counts(labels: torch.Tensor) -> list[int]:
    return torch.bincount(labels[labels != IGNORED], minlength=3).tolist()


def test_images_is_in_the_catalog():
    assert find("data", "images") is images
    assert card(images).name == "images"


def test_the_digits_are_all_there():
    digits = images("digits")
    assert (len(digits.train) + len(digits.test), digits.num_classes, digits.shape) == (1797, 10, (1, 8, 8))
    assert digits.class_names == tuple("0123456789")


def test_the_digits_keep_their_sixteen_grey_values():
    assert images("digits").train.pictures.pixels.unique().tolist() == list(range(17))


def test_a_fifth_of_each_digit_is_held_back():
    digits = images("digits")
    # scikit-learn's counts of the ten classes.
    whole = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    held = torch.bincount(digits.test.pictures.labels)
    assert torch.equal(held, (whole * 0.2).round().long())


def test_the_digits_are_split_the_same_whatever_the_seed():
    assert images("digits", seed=1).test.pictures.keys == images("digits", seed=2).test.pictures.keys


def test_no_digit_is_in_both_parts():
    digits = images("digits")
    assert not set(digits.train.pictures.keys) & set(digits.test.pictures.keys)


def test_kept_labels_are_in_proportion():
    assert counts(uneven(labelled=10).train.pictures.labels) == [6, 3, 1]


def test_rows_that_lose_their_label_stay():
    train = uneven(labelled=10).train
    assert len(train) == 100
    assert int((train.pictures.labels == IGNORED).sum()) == 90


def test_kept_labels_are_the_right_ones():
    kept, whole = uneven(labelled=20).train.pictures.labels, uneven().train.pictures.labels
    assert torch.equal(kept[kept != IGNORED], whole[kept != IGNORED])


def test_the_choice_of_labels_follows_from_the_seed_alone():
    first, again, other = (uneven(labelled=20, seed=seed, batch=batch) for seed, batch in ((3, 8), (3, 5), (4, 8)))
    assert torch.equal(first.train.pictures.labels, again.train.pictures.labels)
    assert not torch.equal(first.train.pictures.labels, other.train.pictures.labels)


def test_fewer_labels_are_a_part_of_more():
    few, many = (set(uneven(labelled=n).train.pictures.labelled.tolist()) for n in (10, 30))
    assert few < many


def test_no_label_at_all_may_be_kept():
    assert (uneven(labelled=0).train.batch(0).labels == IGNORED).all()


def test_the_test_part_keeps_its_labels():
    assert (uneven(labelled=1).test.pictures.labels != IGNORED).all()


def test_a_limit_keeps_the_proportion_of_classes():
    assert counts(uneven(limit=20).train.pictures.labels) == [12, 6, 2]


def test_a_limit_above_the_number_of_rows_changes_nothing():
    assert uneven(limit=1000).train.pictures.keys == uneven().train.pictures.keys


def test_a_test_limit_leaves_the_training_part_alone():
    limited = uneven(test_limit=3)
    assert (len(limited.test), len(limited.train)) == (3, 100)


def test_one_row_per_class_comes_before_any_second():
    labels = torch.tensor([0] * 12 + [1] * 11 + [2] * 10)
    chosen = proportional(labels, 3, first=torch.randperm(33, generator=torch.Generator().manual_seed(0)))
    assert labels[chosen].tolist() == [0, 1, 2]


def test_settings_reach_the_source():
    train = uneven(batch=7, seed=5).train
    assert (train.batch_size, train.seed, len(train.batch(0).keys)) == (7, 5, 7)


@pytest.mark.parametrize("as_kind", [np.asarray, torch.as_tensor])
def test_numpy_and_torch_arrays_are_one_to_the_door(as_kind):
    x, y = pixels(6), np.arange(6) % 2
    there = arrays(as_kind(x), as_kind(y), as_kind(x), as_kind(y))
    assert there.train.pictures.keys == arrays(x, y, x, y).train.pictures.keys


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5, 7), (1, 5, 7)),
        ((6, 3, 5, 7), (3, 5, 7)),
        ((6, 5, 7, 3), (3, 5, 7)),
        ((6, 12, 5, 7), (12, 5, 7)),
        ((6, 4, 4, 3), (3, 4, 4)),
    ],
)
def test_channels_may_come_first_last_or_not_at_all(shape, expected):
    x, y = np.zeros(shape, np.uint8), np.arange(6) % 2
    assert arrays(x, y, x, y).shape == expected


def test_channels_last_are_moved_not_reshaped():
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    stored = arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1]).train.pictures.pixels.numpy()
    assert np.array_equal(stored[2, 1], x[2, :, :, 1])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.uint8, torch.uint8),
        (np.int64, torch.uint8),
        (np.uint16, torch.uint8),
        (np.float64, torch.float32),
        (">f4", torch.float32),
        (bool, torch.uint8),
    ],
)
def test_bytes_stay_bytes_and_floats_become_float32(given, kept):
    x = (pixels(4) % 2).astype(given)
    assert arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1]).train.pictures.pixels.dtype == kept


def test_negative_bytes_do_not_wrap_round():
    x = np.full((2, 2, 2), -3, np.int8)
    assert arrays(x, [0, 1], x, [0, 1]).train.pictures.pixels.unique().tolist() == [-3.0]


def test_labels_in_a_column_are_labels():
    x = pixels(4)
    assert arrays(x, np.array([[0], [1], [2], [0]]), x, [0, 1, 2, 0]).train.pictures.labels.tolist() == [0, 1, 2, 0]


def test_unknown_training_labels_are_allowed():
    x = pixels(4)
    assert arrays(x, [0, IGNORED, 1, IGNORED], x, [0, 1, 0, 1]).train.pictures.unlabelled.tolist() == [1, 3]


def test_names_say_how_many_classes_there_are():
    x = pixels(4)
    assert arrays(x, [0, 1, 0, 1], x, [0, 1, 2, 0], class_names=("a", "b", "c")).num_classes == 3


X, Y = pixels(4), np.array([0, 1, 0, 1])
NOT_A_NUMBER = np.where(np.arange(64).reshape(4, 4, 4) == 40, np.nan, 0.5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((X, Y[:3], X, Y), r"arrays \(train\): 4 pictures but 3 labels"),
        ((X, Y, X, np.array([0, 1, 2, 0])), r"test row 2 has the label 2, but there are the classes 0 to 1"),
        ((X, np.array([0, -1, 1, 0]), X, Y), r"train row 1 has the label -1"),
        ((X, Y, X, np.array([0, IGNORED, 1, 0])), r"test row 1 has the label -100"),
        ((X, np.full(4, IGNORED), X, Y), "no training picture has a label"),
        ((X, np.array([0.5, 1, 0, 1]), X, Y), "labels are float64 such as"),
        ((X, np.array([0, None, 0, 1]), X, Y), "labels are object such as"),
        ((X, np.eye(4), X, Y), r"labels of shape \[4, 4\].*argmax"),
        ((X[0], Y, X, Y), r"pictures of shape \[4, 4\]"),
        ((X[:0], Y[:0], X, Y), "no picture at all"),
        ((X, Y, X[:0], Y[:0]), r"arrays \(test\): no picture at all"),
        ((X, Y, pixels(4, side=5), Y), "training pictures are 1 x 4 x 4 but test pictures 1 x 5 x 5"),
        ((NOT_A_NUMBER, Y, X, Y), r"the picture in row 2 holds NaN or infinity"),
        ((X.astype(str), Y, X, Y), "pictures are an array of <U"),
    ],
)
def test_unfit_arrays_are_refused_in_a_sentence(given, sentence):
    with pytest.raises(DataError, match=sentence):
        arrays(*given)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"batch": 0}, "images.batch: 0 found"),
        ({"limit": 0}, "images.limit: 0 found"),
        ({"test_limit": -1}, "images.test_limit: -1 found"),
        ({"labelled": 101}, "images.labelled: 101 found, but 0 to 100"),
        ({"labelled": -1}, "images.labelled: -1 found"),
        ({"labelled": 10, "labelled_share": 1.5}, "images.labelled_share: 1.5 found"),
        ({"labelled": 10, "labelled_share": 0.0}, "images.labelled_share: 0.0 found"),
        ({"labelled": 10, "labelled_share": 0.001}, "less than one row"),
        ({"labelled_share": 0.5}, "there are no unlabelled ones"),
        ({"labelled": 0, "labelled_share": 0.5}, "there are no labelled ones"),
        ({"augment": ["crp"]}, r"images.augment\[0\]: .* Did you mean 'crop'"),
        ({"bach": 3}, "arrays.bach: images has no knob called 'bach'. Did you mean 'batch'"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(knobs, sentence):
    with pytest.raises(RecipeError, match=sentence):
        uneven(**knobs)
