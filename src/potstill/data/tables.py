"""Tables in the forms of Hugging Face `datasets`: saved to disk, parquet files, a name on the hub; their pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potstill.core.errors import DataError
from potstill.data.rows import (
    TEST_NAMES,
    Array,
    Parts,
    Rows,
    as_parts,
    as_rows,
    hold_back,
    picture_values,
    reading_picture,
    stacked,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def read_disk(folder: Path) -> Parts:
    """A data set as `save_to_disk` left it."""
    return from_tables(saved_tables(folder), place=str(folder))


def read_parquet(folder: Path) -> Parts:
    """Parquet files, told apart by name or folder: train-*.parquet and test-*.parquet, or train/ and test/."""
    from datasets import concatenate_datasets

    tables: dict[str, list[Dataset]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        words = {*path.relative_to(folder).parent.parts, re.split(r"[-_.]", path.name)[0]}
        split = next((name for name in ("train", *TEST_NAMES) if name in words), "")
        tables.setdefault(split, []).append(_parquet(path))
        if "" in tables and len(tables) > 1:
            raise DataError(
                f"{folder}: {path.name} and the other files do not all say which part (train, test) they are."
            )
    if set(tables) == {""}:
        tables = {"train": tables[""]}
    return from_tables({split: concatenate_datasets(parts) for split, parts in tables.items()}, place=str(folder))


def read_hub(name: str) -> Parts:
    """The data set `name` on the hub."""
    return from_tables(hub_tables(name), place=name)


def saved_tables(folder: Path) -> Mapping[str, Dataset]:
    """The tables of a data set that `save_to_disk` wrote, by split name."""
    from datasets import load_from_disk

    try:
        return splits(load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a saved data set ({error}). Save it again.") from error


def hub_tables(name: str) -> Mapping[str, Dataset]:
    """The tables of the data set `name`, by way of `datasets.load_dataset`, from its cache or the network."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return splits(load_dataset(name))
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: there is no such file or folder here, and the hub did not give a data set of that name "
            f"({reason}). Check the spelling and the network, or give the path of a local copy."
        ) from error


def from_tables(tables: Mapping[str, Dataset], *, image: str = "", label: str = "", place: str) -> Parts:
    """Tables by split name. An empty column name stands for 'image' or 'label', or the only column of that type."""
    if "train" not in tables:
        raise DataError(f"{place}: there is no split 'train'. It has: {', '.join(tables) or 'none'}.")
    features = tables["train"].features
    image = image or _column(features, "image", kind="Image", place=place)
    label = label or _column(features, "label", kind="ClassLabel", place=place)
    test = next((name for name in TEST_NAMES if name in tables), "")
    for split in ("train", test) if test else ("train",):
        for column in (image, label):
            if column not in tables[split].features:
                columns = ", ".join(tables[split].features)
                raise DataError(f"{place} ({split}): there is no column '{column}'. It has: {columns}.")
    names = tuple(getattr(features[label], "names", None) or ())
    train = _rows(tables["train"], image, label, place=f"{place} (train)")
    if not test:
        return hold_back(train, share=0.1, class_names=names, place=place)
    held = _rows(tables[test], image, label, place=f"{place} ({test})")
    return as_parts(train, held, class_names=names, place=place)


def splits(found: Dataset | DatasetDict) -> Mapping[str, Dataset]:
    """Tables by split name; a single table is the training one."""
    return found if isinstance(found, dict) else {"train": found}


def _parquet(path: Path) -> Dataset:
    from datasets import Dataset
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        # Not Dataset.from_parquet: that one leaves a copy in a cache folder in the user's home.
        return Dataset(parquet.read_table(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}). Fetch or write it again.") from error


def _rows(table: Dataset, image: str, label: str, *, place: str) -> Rows:
    from datasets import Image

    labels = np.asarray(list(table[label]))
    column = table.select_columns([image])
    if isinstance(table.features[image], dict):  # {bytes, path}: written by something that does not know the type.
        column = column.cast_column(image, Image())
    if isinstance(column.features[image], Image):
        return as_rows(stacked(_decoded(column, image, place=place), place=place), labels, place=place)
    return as_rows(np.asarray(column.with_format("numpy")[:][image]), labels, place=place)


def _decoded(column: Dataset, image: str, *, place: str) -> Iterator[tuple[str, Array]]:
    for row in range(len(column)):
        where = f"{place} row {row}"
        with reading_picture(where):
            picture = column[row][image]
            if picture is None:
                raise DataError(f"{where} holds no picture. Fill it or leave it out.")
            values = picture_values(picture, place=where)
        yield where, values


def _column(features: Mapping[str, object], name: str, *, kind: str, place: str) -> str:
    """The column of this name, or else the only one of this type."""
    if name in features:
        return name
    typed = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) != 1:
        raise DataError(
            f"{place}: {len(typed)} columns are of type {kind} and none is called '{name}', so it is unclear which to "
            f"read. It has: {', '.join(features)}. Name it with from_dataset(..., {name}=...)."
        )
    return typed[0]
