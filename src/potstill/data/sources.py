"""Pictures in memory, and micro-batches of them by number.

A source is arithmetic over an endless stream of epochs: batch i holds the stream's positions i * b to (i + 1) * b,
whatever was asked before. So a resumed run needs no state, and two batches of 32 are one batch of 64.

Dimension key: n rows, B examples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from potstill.core.types import IGNORED, Batch
from potstill.data.augment import Augmentation

READY_BYTES = 512 * 2**20
"""Sets below this size as float32 are standardised once and kept; larger ones per batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """Batches {"image": float32 [B, C, H, W]} with labels [B]; the keys name the rows before augmentation."""

    pictures: Pictures
    batch_size: int
    seed: int
    augment: tuple[Augmentation, ...] = ()
    labelled_of: tuple[int, int] | None = None
    """(count, period): so many of each `period` rows are labelled ones. None: rows come as they are."""

    @property
    def num_rows(self) -> int:
        return len(self.pictures.labels)

    def __len__(self) -> int:
        return self.num_rows

    def with_batch(self, size: int) -> ImageSource:
        """The same stream cut into other batches; what is cached is shared."""
        return replace(self, batch_size=size)

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the endless stream: a pure function of `index`."""
        assert index >= 0, "batches are counted from 0"
        rows, numbers = self._positions(index * self.batch_size, (index + 1) * self.batch_size)
        images = self.pictures.standardised(rows)
        for place, function in enumerate(self.augment):
            images = function(images, numbers[place], self.pictures.blank)
        return self.pictures.batch(rows, images)

    def batches(self, size: int) -> Iterator[Batch]:
        """Each row once, in the order of the set and as it is, without augmentation; the last batch may be short."""
        for rows in torch.split(torch.arange(self.num_rows), size):
            yield self.pictures.batch(rows, self.pictures.standardised(rows))

    def _positions(self, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """Positions of the stream -> rows [B] and, for each augmentation, its numbers [B, 2]."""
        if self.labelled_of is None:
            return self._part("rows", None, start, stop)
        # Position p is a labelled one when the line p * count / period crosses a whole number there: every period
        # holds exactly `count`, and where the stream is cut into batches does not matter.
        count, period = self.labelled_of
        before = torch.arange(start, stop + 1) * count // period
        is_labelled = before[1:] > before[:-1]
        first, last = start * count // period, stop * count // period
        parts = (
            (is_labelled, self._part("labelled", self.pictures.labelled, first, last)),
            (~is_labelled, self._part("unlabelled", self.pictures.unlabelled, start - first, stop - last)),
        )
        rows = torch.empty(stop - start, dtype=torch.long)
        numbers = [torch.empty(stop - start, 2) for _ in self.augment]
        for where, (some_rows, some_numbers) in parts:
            if len(some_rows):
                rows[where] = some_rows
                for whole, some in zip(numbers, some_numbers, strict=True):
                    whole[where] = some
        return rows, numbers

    def _part(self, stream: str, members: Tensor | None, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """Positions `start` to `stop` of one stream of epochs over `members` (None: over all rows)."""
        length = self.num_rows if members is None else len(members)
        rows: list[Tensor] = []
        numbers: list[list[Tensor]] = [[] for _ in self.augment]
        while start < stop:
            epoch, begin = divmod(start, length)
            end = min(begin + stop - start, length)
            rows.append(order(length, self.seed, epoch, stream)[begin:end])
            for place, some in enumerate(numbers):
                some.append(draws(length, self.seed, epoch, f"{stream}/{place}")[begin:end])
            start += end - begin
        joined = _joined(rows)
        return (joined if members is None else members[joined]), [_joined(some) for some in numbers]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """A set of labelled pictures as stored, and how to standardise them. Costly views are made once, on first use."""

    pixels: Tensor
    """uint8 or float32 [n, C, H, W]."""
    labels: Tensor
    """int64 [n]; IGNORED where there is none."""
    mean: Tensor
    """float32 [C, 1, 1], in the units of `pixels`, as is `std`."""
    std: Tensor

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return content_keys(self.pixels)

    @cached_property
    def labelled(self) -> Tensor:
        """The rows that have a label."""
        return (self.labels != IGNORED).nonzero().flatten()

    @cached_property
    def unlabelled(self) -> Tensor:
        return (self.labels == IGNORED).nonzero().flatten()

    @cached_property
    def blank(self) -> Tensor:
        """What a black pixel becomes: [C, 1, 1]."""
        return self._standardise(torch.zeros_like(self.mean))

    @cached_property
    def _ready(self) -> Tensor | None:
        return self._standardise(self.pixels) if 4 * self.pixels.numel() < READY_BYTES else None

    def standardised(self, rows: Tensor) -> Tensor:
        """Zero mean and unit variance per channel over the training set: rows [B] -> float32 [B, C, H, W]."""
        if self._ready is not None:
            return self._ready.index_select(0, rows)
        return self._standardise(self.pixels.index_select(0, rows))

    def batch(self, rows: Tensor, images: Tensor) -> Batch:
        return Batch(
            keys=tuple(map(self.keys.__getitem__, rows.tolist())),
            inputs={"image": images},
            labels=self.labels.index_select(0, rows),
            mask=torch.ones(len(rows), dtype=torch.bool),
        )

    def _standardise(self, pixels: Tensor) -> Tensor:
        # Two operations, each rounded: a fused one may round differently at the end of a vector register, and
        # then a row's value would depend on its place in the batch.
        return torch.sub(pixels, self.mean).div_(self.std)


def content_keys(pixels: Tensor) -> tuple[str, ...]:
    """One key per row, 16 hex digits of BLAKE2b over its bytes: equal pixels, equal keys, on any machine."""
    return tuple(hashlib.blake2b(row, digest_size=8).hexdigest() for row in pixels.contiguous().numpy())


def moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, in the units of the pixels: [n, C, H, W] -> [C, 1, 1], [C, 1, 1].

    A channel that never varies gets 1, so that it becomes 0 and not a division by zero.
    """
    total = torch.zeros(pixels.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for some in torch.split(pixels, 4096):
        values = some.double()
        total += values.sum(dim=(0, 2, 3))
        squares += values.square_().sum(dim=(0, 2, 3))
    count = pixels.numel() // pixels.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_(min=0.0).sqrt_()
    # Below this a difference is rounding of the sums, not a picture.
    std[std <= 1e-6 * mean.abs()] = 1.0
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


@lru_cache(maxsize=8)
def order(length: int, seed: int, epoch: int, stream: str) -> Tensor:
    """One epoch's order, a permutation of 0..length-1 that depends on these words alone. Do not write to it."""
    return torch.randperm(length, generator=generator(seed, epoch, stream, "order"))


@lru_cache(maxsize=16)
def draws(length: int, seed: int, epoch: int, stream: str) -> Tensor:
    """Two numbers in [0, 1) for each position of one epoch: [length, 2]. Do not write to it."""
    return torch.rand(length, 2, generator=generator(seed, epoch, stream, "draws"))


def generator(*words: str | int) -> torch.Generator:
    """A random stream of its own for these words; the global one is never touched."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _joined(parts: list[Tensor]) -> Tensor:
    # There is no part at all when a stream gives no row to this batch.
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
