"""Augmentation as functions of images and of numbers already drawn: nothing here is random by itself.

Each function takes the standardised images [B, C, H, W], two numbers per image in [0, 1) [B, 2], and `blank`
[C, 1, 1], the standardised value of a black pixel; it returns images of the same shape. Who draws the numbers
(`sources.draws`) decides what replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import unknown

Augmentation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def crop(images: Tensor, numbers: Tensor, blank: Tensor) -> Tensor:
    """A window of the same size out of the image widened by its mirror on all sides (He et al. 2016, 4 pixels for 32).

    Mirrored, not blank: a bar of another grey along the border would tell the window's place away.
    """
    rows, columns = _margin(images.shape[2]), _margin(images.shape[3])
    return _window(F.pad(images, (columns, columns, rows, rows), mode="reflect"), images, numbers)


def shift(images: Tensor, numbers: Tensor, blank: Tensor) -> Tensor:
    """Move the image by up to an eighth of its side; black comes in from outside. For figures on plain ground."""
    rows, columns = _margin(images.shape[2]), _margin(images.shape[3])
    height, width = images.shape[2] + 2 * rows, images.shape[3] + 2 * columns
    wide = blank.expand(*images.shape[:2], height, width).clone()
    wide[:, :, rows : height - rows, columns : width - columns] = images
    return _window(wide, images, numbers)


def flip(images: Tensor, numbers: Tensor, blank: Tensor) -> Tensor:
    """Left becomes right in every second image. Not for digits and letters."""
    return torch.where(numbers[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)


def cutout(images: Tensor, numbers: Tensor, blank: Tensor) -> Tensor:
    """Blot out a square of half the side with the mean colour, its centre anywhere (DeVries and Taylor 2017)."""
    rows = _covered(images.shape[2], numbers[:, 0])
    columns = _covered(images.shape[3], numbers[:, 1])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


AUGMENTATIONS: dict[str, Augmentation] = {"crop": crop, "cutout": cutout, "flip": flip, "shift": shift}


def find_augmentations(names: Sequence[str], *, place: str) -> tuple[Augmentation, ...]:
    """The functions called `names`, in that order. RecipeError names `place` and the nearest right word."""
    for index, name in enumerate(names):
        if name not in AUGMENTATIONS:
            raise unknown(f"{place}[{index}]", name, AUGMENTATIONS, noun="augmentation")
    return tuple(AUGMENTATIONS[name] for name in names)


def _margin(side: int) -> int:
    """An eighth of the side, as 4 of 32; at least one pixel, but a side of one cannot move."""
    return max(1, side // 8) if side > 1 else 0


def _pick(numbers: Tensor, choices: int) -> Tensor:
    # The largest float32 below 1 times `choices` may round up to `choices` itself.
    return (numbers * choices).long().clamp_(max=choices - 1)


def _window(wide: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    height, width = images.shape[2:]
    windows = wide.unfold(2, height, 1).unfold(3, width, 1)
    top = _pick(numbers[:, 0], windows.shape[2])
    left = _pick(numbers[:, 1], windows.shape[3])
    return windows[torch.arange(len(images)), :, top, left]


def _covered(side: int, numbers: Tensor) -> Tensor:
    """Which of `side` lines the square covers: [B] -> [B, side]."""
    first = _pick(numbers, side)[:, None] - side // 4
    lines = torch.arange(side)
    return (lines >= first) & (lines < first + side // 2)
