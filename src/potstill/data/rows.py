"""Pictures and their classes as tensors, checked once where they come in; the ways to choose among them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import IGNORED
from potstill.data.sources import content_keys

if TYPE_CHECKING:
    from PIL.Image import Image

Array: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"
TEST_NAMES = ("test", "val", "valid", "validation")
"""What a part for testing may be called; the first of these that exists is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Pictures, uint8 or float32 [n, C, H, W], and their classes, int64 [n] (IGNORED where unknown)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Rows:
        return Rows(pixels=self.pixels[rows], labels=self.labels[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What every layout comes down to."""

    train: Rows
    test: Rows
    class_names: tuple[str, ...]


def as_rows(pixels: Array | Tensor, labels: Array | Tensor, *, place: str) -> Rows:
    """Pictures [n, H, W], [n, C, H, W] or [n, H, W, C] and class numbers [n], checked. DataError names `place`."""
    rows = Rows(pixels=_as_pixels(_as_numbers(pixels, place), place), labels=_as_labels(labels, place))
    if len(rows.pixels) != len(rows.labels):
        raise DataError(f"{place}: {len(rows.pixels)} pictures but {len(rows.labels)} labels; each needs the other.")
    if len(rows) == 0 or rows.pixels.numel() == 0:
        raise DataError(f"{place}: no picture at all (shape {tuple(rows.pixels.shape)}). Expected at least one.")
    return rows


def as_parts(train: Rows, test: Rows, *, class_names: Sequence[str] = (), place: str) -> Parts:
    """Both parts together, of one picture size and one set of classes. Without names, classes are called by number."""
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(
            f"{place}: training pictures are {_size(train)} but test pictures {_size(test)} "
            "(channels x height x width). Bring them to one size."
        )
    known = len(class_names) or int(train.labels.max()) + 1
    if known < 1:
        raise DataError(f"{place}: no training picture has a label, so the number of classes is unknown. Name them.")
    for part, labels, unknown_too in (("train", train.labels, True), ("test", test.labels, False)):
        wrong = (labels < 0) | (labels >= known)
        if unknown_too:
            wrong &= labels != IGNORED
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"{place}: {part} row {row} has the label {int(labels[row])}, but there are the classes 0 to "
                f"{known - 1}. Correct the label, or leave the row out."
            )
    names = tuple(class_names) or tuple(str(number) for number in range(known))
    return Parts(train=train, test=test, class_names=names)


def hold_back(rows: Rows, *, share: float, class_names: Sequence[str], place: str) -> Parts:
    """Split a set that has no test part: `share` of each class, at least one where there are two.

    The choice is by content: it does not change with file names, their order or the machine.
    """
    keys = content_keys(rows.pixels)
    rank, size = _ranks(rows.labels, torch.tensor(sorted(range(len(rows)), key=keys.__getitem__)))
    held = (rank < (size * share).round().clamp(min=1)) & (size > 1) & (rows.labels != IGNORED)
    if not held.any():
        raise DataError(f"{place}: one picture per class is too few to hold any back for testing. Add pictures.")
    train, test = rows.take((~held).nonzero().flatten()), rows.take(held.nonzero().flatten())
    return as_parts(train, test, class_names=class_names, place=place)


def proportional(labels: Tensor, count: int, *, first: Tensor) -> Tensor:
    """`count` rows, each class in proportion, in increasing order: labels [n] -> [count].

    Within a class those that stand `first` (a permutation of the rows) are taken. Seats are dealt by
    Sainte-Lague's divisors, so a smaller choice is part of a larger one.
    """
    rank, size = _ranks(labels, first)
    return ((rank + 0.5) / size).argsort(stable=True)[:count].sort().values


def picture_values(picture: Image, *, place: str) -> Array:
    """One picture as uint8 [C, H, W]: one channel when it is grey, else red, green and blue."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"{place} holds more than 8 bits per value (mode {picture.mode}). Convert it to 8 bits, or use .npz."
        )
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    values = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return values[None] if mode == "L" else values.transpose(2, 0, 1)


def stacked(pictures: Iterable[tuple[str, Array]], *, place: str) -> Array:
    """Named pictures [C, H, W] -> [n, C, H, W]; grey ones among coloured ones become coloured."""
    arrays: list[Array] = []
    first = ""
    for name, array in pictures:
        first = first or name
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise DataError(
                f"{name} is {array.shape[1]} x {array.shape[2]} (height x width), but {first} is "
                f"{arrays[0].shape[1]} x {arrays[0].shape[2]}. Bring all pictures to one size."
            )
        arrays.append(array)
    if not arrays:
        raise DataError(f"{place}: no picture at all. Expected at least one.")
    channels = max(len(array) for array in arrays)
    return np.stack([np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays])


@contextmanager
def reading_picture(place: str) -> Iterator[None]:
    """Turn what Pillow raises on a file that is no picture, or only a part of one, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        raise DataError(f"{place} cannot be read as a picture ({error}). Replace it or take it away.") from error


def _ranks(labels: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: its place within its class, in the order `first`, and the size of that class."""
    classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
    by_class = first[classes[first].argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - starts[classes[by_class]]
    return rank, counts[classes]


def _as_numbers(pixels: Array | Tensor, place: str) -> Tensor:
    if isinstance(pixels, Tensor):
        return pixels.detach().cpu()
    given = np.asarray(pixels)
    if given.dtype.kind not in "fiub":
        raise DataError(f"{place}: pictures are an array of {given.dtype}. Expected uint8 or floats.")
    if given.dtype == np.uint8:
        return torch.from_numpy(given if given.flags.writeable else given.copy())
    # torch knows little of the wide unsigned types, and nothing of foreign byte orders.
    return torch.from_numpy(given.astype(np.float32 if given.dtype.kind == "f" else np.int64))


def _as_pixels(pixels: Tensor, place: str) -> Tensor:
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4:
        raise DataError(
            f"{place}: pictures of shape {list(pixels.shape)}. Expected [n, height, width], "
            "[n, channels, height, width] or [n, height, width, channels]."
        )
    # Channels are few; where two sides are, the equal ones are height and width.
    first, middle, last = pixels.shape[1:]
    if last in (1, 3, 4) and (first not in (1, 3, 4) or first == middle != last):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.is_complex():
        raise DataError(f"{place}: pictures are complex numbers. Expected uint8 or floats.")
    if pixels.is_floating_point():
        pixels = pixels.float()
        broken = ~pixels.isfinite().flatten(1).all(dim=1)
        if broken.any():
            raise DataError(f"{place}: the picture in row {int(broken.nonzero()[0])} holds NaN or infinity.")
    elif pixels.dtype != torch.uint8:
        fits = pixels.numel() == 0 or (int(pixels.min()) >= 0 and int(pixels.max()) <= 255)
        pixels = pixels.to(torch.uint8 if fits else torch.float32)
    return pixels.contiguous()


def _as_labels(labels: Array | Tensor, place: str) -> Tensor:
    given = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim != 1:
        raise DataError(
            f"{place}: labels of shape {list(given.shape)}. Expected one class number per picture "
            "(one-hot rows: take their argmax)."
        )
    whole = given.dtype.kind in "iub" or (given.dtype.kind == "f" and bool((given == np.floor(given)).all()))
    if not whole:
        raise DataError(
            f"{place}: labels are {given.dtype} such as {given[:3].tolist()}. Expected class numbers from 0."
        )
    return torch.from_numpy(given.astype(np.int64))


def _size(rows: Rows) -> str:
    return " x ".join(str(side) for side in rows.pixels.shape[1:])
