"""Labelled images for training and testing, from a path, from arrays, or from a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch

from potstill.core.catalog import check_keywords, keywords, part
from potstill.core.errors import RecipeError
from potstill.core.types import IGNORED
from potstill.data.augment import find_augmentations
from potstill.data.readers import read
from potstill.data.rows import Array, Parts, Rows, as_parts, as_rows, proportional
from potstill.data.sources import ImageSource, Pictures, generator, moments
from potstill.data.tables import from_tables, splits

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """A data set ready for use. Both parts are standardised by the training part; the test part is never augmented."""

    train: ImageSource
    test: ImageSource
    num_classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    """(channels, height, width)."""


@part("data", name="images")
def images(
    path: str,
    *,
    batch: int = 64,
    seed: int = 0,
    augment: tuple[str, ...] | list[str] = (),
    limit: int | None = None,
    test_limit: int | None = None,
    labelled: int | None = None,
    labelled_share: float | None = None,
) -> ImageData:
    """The labelled images at `path`: 'digits', a folder, a .npz file or a name on the hub, told by what it is.

    batch: images per micro-batch.
    seed: order, augmentation and the choice of labelled rows follow from it, and from nothing else.
    augment: names from crop, flip, shift, cutout, applied in this order to the training part.
    limit, test_limit: keep at most so many rows, each class in proportion.
    labelled: keep so many training labels, each class in proportion; the other rows stay, their label unknown.
    labelled_share: this share of each batch is labelled rows (1.0: only those); otherwise they come as they fall.
    Raises DataError for what lies at `path`, RecipeError for the settings.
    """
    return _assemble(
        read(path),
        batch=batch,
        seed=seed,
        augment=augment,
        limit=limit,
        test_limit=test_limit,
        labelled=labelled,
        labelled_share=labelled_share,
    )


class Settings(TypedDict, total=False):
    """The keywords of `images`, whose signature is the only home of their defaults."""

    batch: int
    seed: int
    augment: tuple[str, ...] | list[str]
    limit: int | None
    test_limit: int | None
    labelled: int | None
    labelled_share: float | None


def arrays(
    x_train: Array | torch.Tensor,
    y_train: Array | torch.Tensor,
    x_test: Array | torch.Tensor,
    y_test: Array | torch.Tensor,
    *,
    class_names: Sequence[str] = (),
    **settings: Unpack[Settings],
) -> ImageData:
    """Images in memory, [n, H, W], [n, C, H, W] or [n, H, W, C], with class numbers [n]; settings as in `images`.

    uint8 is kept as it is, floats as float32. A training label of -100 is an unknown one.
    """
    train = as_rows(x_train, y_train, place="arrays (train)")
    test = as_rows(x_test, y_test, place="arrays (test)")
    parts = as_parts(train, test, class_names=class_names, place="arrays")
    return _assemble(parts, **_complete(settings, place="arrays"))


def from_dataset(
    dataset: Dataset | DatasetDict, *, image: str = "image", label: str = "label", **settings: Unpack[Settings]
) -> ImageData:
    """A Hugging Face data set in hand, by the names of its columns; settings as in `images`.

    A single `Dataset`, or a `DatasetDict` without a test split, has a tenth of each class held back.
    """
    parts = from_tables(splits(dataset), image=image, label=label, place="from_dataset")
    return _assemble(parts, **_complete(settings, place="from_dataset"))


def _complete(given: Settings, *, place: str) -> Settings:
    """The given settings over the defaults of `images`."""
    check_keywords(images, {"path": "", **given}, place=place)
    defaults = {name: knob.default for name, knob in keywords(images).items() if name != "path"}
    return Settings(**{**defaults, **given})  # type: ignore[typeddict-item]


def _assemble(
    parts: Parts,
    *,
    batch: int,
    seed: int,
    augment: Sequence[str],
    limit: int | None,
    test_limit: int | None,
    labelled: int | None,
    labelled_share: float | None,
) -> ImageData:
    for name, number in (("batch", batch), ("limit", limit), ("test_limit", test_limit)):
        if number is not None and number < 1:
            raise RecipeError(f"images.{name}: {number} found, a whole number of at least 1 expected.")
    rows = _limited(parts.train, limit)
    if labelled is not None:
        rows = _keep_labels(rows, labelled, seed=seed)
    mean, std = moments(rows.pixels)
    train = Pictures(pixels=rows.pixels, labels=rows.labels, mean=mean, std=std)
    held = _limited(parts.test, test_limit)
    test = Pictures(pixels=held.pixels, labels=held.labels, mean=mean, std=std)
    channels, height, width = rows.pixels.shape[1:]
    return ImageData(
        train=ImageSource(
            pictures=train,
            batch_size=batch,
            seed=seed,
            augment=find_augmentations(augment, place="images.augment"),
            labelled_of=None if labelled_share is None else _labelled_of(train, labelled_share, batch),
        ),
        test=ImageSource(pictures=test, batch_size=batch, seed=seed),
        num_classes=len(parts.class_names),
        class_names=parts.class_names,
        shape=(channels, height, width),
    )


def _limited(rows: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return rows.take(proportional(rows.labels, limit, first=torch.arange(len(rows))))


def _keep_labels(rows: Rows, count: int, *, seed: int) -> Rows:
    """Forget all labels but `count`, drawn from each class in proportion. The rows themselves stay."""
    known = (rows.labels != IGNORED).nonzero().flatten()
    if not 0 <= count <= len(known):
        raise RecipeError(f"images.labelled: {count} found, but 0 to {len(known)} training labels can be kept.")
    shuffled = torch.randperm(len(known), generator=generator(seed, "labelled"))
    kept = known[proportional(rows.labels[known], count, first=shuffled)]
    labels = torch.full_like(rows.labels, IGNORED)
    labels[kept] = rows.labels[kept]
    return Rows(pixels=rows.pixels, labels=labels)


def _labelled_of(train: Pictures, share: float, batch: int) -> tuple[int, int]:
    """So many of each `batch` rows are labelled ones."""
    if not 0.0 < share <= 1.0:
        raise RecipeError(f"images.labelled_share: {share} found, a share above 0 and up to 1 expected.")
    count = round(share * batch)
    if count == 0:
        raise RecipeError(f"images.labelled_share: {share} of a batch of {batch} is less than one row. Raise either.")
    for some, rows in (("labelled", train.labelled), ("unlabelled", train.unlabelled)):
        if len(rows) == 0 and (some == "labelled" or count < batch):
            raise RecipeError(
                f"images.labelled_share: {share} asks for labelled and unlabelled rows, but there are no {some} ones. "
                "Set images.labelled, or leave the share out."
            )
    return count, batch
