"""From what lies on disk to labelled pictures: each layout is recognised by what it is, and read whole.

Nothing is skipped silently: a torn file, a broken picture, a missing part is a DataError that names it.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from potstill.core.errors import DataError, nearest
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
from potstill.data.tables import read_disk, read_hub, read_parquet

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read(path: str) -> Parts:
    """The pictures at `path`, whatever their layout. DataError says which layouts there are and what was found."""
    if path == "digits":
        return read_digits()
    place = Path(path).expanduser()
    if not place.exists() and HUB_NAME.fullmatch(path):
        return read_hub(path)
    for layout in LAYOUTS:
        if place.exists() and layout.matches(place):
            return layout.read(place)
    known = ["'digits'", *(layout.about for layout in LAYOUTS), "the name of a data set on the hub, as owner/name"]
    raise DataError(f"{path}: {_found(path, place)}. Expected one of: {'; '.join(known)}.")


def read_digits() -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey values 0 to 16; a fifth is held back. Nothing is fetched."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = as_rows(digits.images.astype(np.uint8), digits.target, place="digits")
    return hold_back(rows, share=0.2, class_names=(), place="digits")


def read_idx(folder: Path) -> Parts:
    """The four files of MNIST and its kin, gzipped or not."""
    train_x, train_y, test_x, test_y = (_idx_array(folder, name) for name in IDX_FILES)
    train = as_rows(train_x, train_y, place=f"{folder} (train)")
    return as_parts(train, as_rows(test_x, test_y, place=f"{folder} (t10k)"), place=str(folder))


def read_npz(path: Path) -> Parts:
    """The arrays x_train, y_train, x_test, y_test of one .npz file. Nothing pickled is ever loaded."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: file[name] for name in NPZ_ARRAYS if name in file}
            names = ", ".join(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a .npz file of plain arrays ({error}). Save it again.") from error
    for name in NPZ_ARRAYS:
        if name not in arrays:
            raise DataError(f"{path}: there is no array '{name}'. It holds: {names or 'nothing'}.")
    train_x, train_y, test_x, test_y = (arrays[name] for name in NPZ_ARRAYS)
    train = as_rows(train_x, train_y, place=f"{path} (train)")
    return as_parts(train, as_rows(test_x, test_y, place=f"{path} (test)"), place=str(path))


def read_tree(folder: Path) -> Parts:
    """Pictures in one folder per class: train/<class>/ and test/<class>/, or <class>/ with a tenth held back."""
    has_train = (folder / "train").is_dir()
    tests = [folder / name for name in TEST_NAMES if (folder / name).is_dir()]
    if tests and not has_train:
        raise DataError(f"{folder}: there is '{tests[0].name}' but no 'train' beside it. Expected train/<class>/ too.")
    top = folder / "train" if has_train else folder
    names = _subfolders(top)
    if not names:
        raise DataError(f"{top}: no folder in it. Expected one folder of pictures per class.")
    empty = [name for name in names if not _files(top / name)]
    if empty:
        raise DataError(f"{top / empty[0]}: no picture in it. Fill the class, or take its folder away.")
    if not tests:
        return hold_back(_read_classes(top, names), share=0.1, class_names=names, place=str(folder))
    return as_parts(_read_classes(top, names), _read_classes(tests[0], names), class_names=names, place=str(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way pictures lie on disk: what it looks like, in words and as a test, and its reader."""

    about: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Parts]


LAYOUTS = (
    Layout(
        about="a .npz file with x_train, y_train, x_test, y_test",
        matches=lambda place: place.is_file() and place.suffix == ".npz",
        read=read_npz,
    ),
    Layout(
        about="a folder with the idx files of MNIST (train-images-idx3-ubyte[.gz], ...)",
        matches=lambda place: any(place.glob("*-idx[13]-ubyte*")),
        read=read_idx,
    ),
    Layout(
        about="a folder written by save_to_disk of Hugging Face datasets",
        matches=lambda place: (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file(),
        read=read_disk,
    ),
    Layout(
        about="a folder of parquet files (train-*.parquet, test-*.parquet)",
        matches=lambda place: any(place.rglob("*.parquet")),
        read=read_parquet,
    ),
    Layout(
        about="a folder of pictures (train/<class>/*.png and test/<class>/*.png, or <class>/*.png)",
        matches=lambda place: any(path.suffix.lower() in PICTURES for path in place.rglob("*")),
        read=read_tree,
    ),
)


def _found(path: str, place: Path) -> str:
    if not place.exists():
        guess = nearest(path, ["digits"])
        return "there is no such file or folder" + (f" (did you mean '{guess}'?)" if guess else "")
    if place.is_file():
        return f"this is a file ending in '{place.suffix}'"
    names = [entry.name for entry in islice(sorted(place.iterdir()), 5)]
    return f"the folder holds {', '.join(names)}" if names else "the folder is empty"


def _idx_array(folder: Path, name: str) -> Array:
    """One idx file: two zero bytes, 8 for uint8, the number of sides, the sides (big-endian), the values."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else zipped
    if not path.is_file():
        raise DataError(f"{folder}: {name}[.gz] is missing. Expected: {', '.join(IDX_FILES)}.")
    try:
        content = gzip.decompress(path.read_bytes()) if path == zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is torn ({error}). Fetch it again.") from error
    num_sides = 3 if "idx3" in name else 1
    header = 4 + 4 * num_sides
    if content[:4] != bytes((0, 0, 8, num_sides)) or len(content) < header:
        raise DataError(f"{path} does not begin as an idx{num_sides} file of bytes does. Fetch it again.")
    sides = struct.unpack_from(f">{num_sides}I", content, 4)
    if len(content) - header != math.prod(sides):
        raise DataError(
            f"{path} is torn: its header says {' x '.join(map(str, sides))} values, "
            f"but {len(content) - header:,} follow. Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sides).copy()


def _read_classes(top: Path, names: Sequence[str]) -> Rows:
    """All pictures of one part, class by class."""
    stray = [name for name in _subfolders(top) if name not in names]
    if stray:
        raise DataError(f"{top}: the class '{stray[0]}' has no folder for training. There is: {', '.join(names)}.")
    loose = [path for path in sorted(top.iterdir()) if path.is_file() and path.suffix.lower() in PICTURES]
    if loose:
        raise DataError(f"{loose[0]} lies outside the folders of the classes. Move it into one of: {', '.join(names)}.")
    files = [(path, number) for number, name in enumerate(names) for path in _files(top / name)]
    pictures = stacked(((str(path), _read_picture(path)) for path, _ in files), place=str(top))
    return as_rows(pictures, np.array([number for _, number in files], dtype=np.int64), place=str(top))


def _read_picture(path: Path) -> Array:
    from PIL import Image

    if path.suffix.lower() not in PICTURES:
        raise DataError(f"{path} is no picture by its name. Expected {', '.join(sorted(PICTURES))}; move it away.")
    with reading_picture(str(path)), Image.open(path) as picture:
        return picture_values(picture, place=str(path))


def _subfolders(top: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _files(folder: Path) -> list[Path]:
    """All files below a class folder; names that begin with a dot are the file browser's own."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
