"""Each augmentation by what it may and may not do to a picture."""

from __future__ import annotations

import pytest
import torch

from potstill.core.errors import RecipeError
from potstill.data.augment import AUGMENTATIONS, crop, cutout, find_augmentations, flip, shift

BLANK = torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)


def pictures(num: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def numbers(first: float, second: float, num: int = 6) -> torch.Tensor:
    return torch.tensor([first, second]).expand(num, 2)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 3, 28, 32), (5, 2, 1, 9), (5, 1, 2, 2), (5, 1, 1, 1)])
def test_the_shape_stays(name, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    draws = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    assert AUGMENTATIONS[name](images, draws, torch.zeros(shape[1], 1, 1)).shape == shape


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_picture_is_treated_by_its_own_numbers_alone(name):
    images, draws = pictures(), torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    whole = AUGMENTATIONS[name](images, draws, BLANK)
    for row in range(6):
        assert torch.equal(AUGMENTATIONS[name](images[row : row + 1], draws[row : row + 1], BLANK)[0], whole[row])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_pictures_given_are_not_written_to(name):
    images = pictures()
    AUGMENTATIONS[name](images, torch.rand(6, 2, generator=torch.Generator().manual_seed(2)), BLANK)
    assert torch.equal(images, pictures())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_some_numbers_change_the_picture(name):
    assert not torch.equal(AUGMENTATIONS[name](pictures(), numbers(0.0, 0.0), BLANK), pictures())


@pytest.mark.parametrize("function", [crop, shift])
def test_the_number_in_the_middle_moves_nothing(function):
    assert torch.equal(function(pictures(), numbers(0.5, 0.5), BLANK), pictures())


@pytest.mark.parametrize("function", [crop, shift])
def test_numbers_just_below_one_stay_inside(function):
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    moved = function(pictures(), numbers(largest, largest), BLANK)
    assert torch.equal(moved[:, :, :-2, :-2], pictures()[:, :, 2:, 2:])


def test_crop_fills_the_border_with_the_mirror():
    images = pictures()
    # Two pixels up and left of 16: rows and columns 2, 1, 0, 1, 2, ...
    mirror = torch.tensor([2, 1, *range(14)])
    assert torch.equal(crop(images, numbers(0.0, 0.0), BLANK), images[:, :, mirror][:, :, :, mirror])


def test_crop_moves_four_pixels_of_thirty_two():
    images = pictures(side=32)
    assert torch.equal(crop(images, numbers(0.0, 0.5), BLANK)[:, :, 4:], images[:, :, :28])


def test_shift_brings_in_black():
    moved = shift(pictures(), numbers(0.0, 0.5), BLANK)
    assert torch.equal(moved[:, :, :2], BLANK.expand(6, 3, 2, 16))
    assert torch.equal(moved[:, :, 2:], pictures()[:, :, :14])


def test_flip_mirrors_about_half_of_the_pictures():
    images = pictures(num=1000, side=4)
    flipped = flip(images, torch.rand(1000, 2, generator=torch.Generator().manual_seed(5)), BLANK)
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert ((flipped == images).flatten(1).all(dim=1) ^ mirrored).all()
    # Five standard deviations of a fair coin.
    assert abs(int(mirrored.sum()) - 500) < 80


def test_cutout_blots_out_a_square_of_half_the_side():
    cut = cutout(pictures(), numbers(0.5, 0.5), BLANK)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True
    assert (cut[:, :, inside] == 0).all()
    assert torch.equal(cut[:, :, ~inside], pictures()[:, :, ~inside])


def test_cutout_at_a_corner_is_a_quarter_of_the_square():
    assert int((cutout(pictures(), numbers(0.0, 0.0), BLANK)[0, 0] == 0).sum()) == 4 * 4


def test_the_order_of_names_is_the_order_of_functions():
    assert find_augmentations(["flip", "crop"], place="augment") == (flip, crop)


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(RecipeError, match=r"images.augment\[1\]: .*'flipp'. Did you mean 'flip'\?"):
        find_augmentations(["crop", "flipp"], place="images.augment")
