"""From what lies on disk or on the hub to records: one mapping of fields per row, and where it stands.

Rows are read one after another; what is kept of them is decided elsewhere. Nothing is skipped silently: a torn line or
file is a DataError that names it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from potstill.core.errors import DataError
from potstill.data.readers import HUB_NAME
from potstill.data.rows import TEST_NAMES
from potstill.data.tables import hub_tables, saved_tables

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_NAMES = ("train", *TEST_NAMES)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
HALF = "a text holds half of a character (a lone surrogate, as where an emoji was cut)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row as it was written."""

    place: str
    """Where to look for it: stories.jsonl:17."""
    split: str
    """The part it says it belongs to, in its field "split" or by the name of its file or table; empty: it is silent."""
    fields: Mapping[str, object]


def read_records(path: str) -> Iterator[Record]:
    """The rows at `path`, whatever their layout. DataError says which layouts there are and what was found."""
    place = Path(path).expanduser()
    if place.is_file() and _kind(place) in READERS:
        return _with_split(READERS[_kind(place)](place))
    if place.is_dir() and _is_saved(place):
        return _from_tables(saved_tables(place), place=str(place))
    if place.is_dir() and _files(place):
        return _from_folder(place)
    if not place.exists() and HUB_NAME.fullmatch(path):
        return _from_tables(hub_tables(path), place=path)
    raise DataError(
        f"{path}: {_found(place)}. Expected a file ending in {', '.join(READERS)} (.gz too, but for parquet), a folder "
        "of such files, a folder written by save_to_disk, or the name of a data set on the hub as owner/name."
    )


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object per line; empty lines are allowed."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield _record(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a .jsonl file: its record, or what is wrong with it."""

    place: str
    text: str
    record: Record | None
    fault: str = ""


def is_json_lines(path: Path) -> bool:
    return READERS.get(_kind(path)) is read_jsonl


def read_json_lines(path: Path) -> Iterator[Line]:
    """The lines of a .jsonl file for those who keep a torn one apart. DataError where the file itself is torn."""
    with _opened(path) as file:
        for number, text in enumerate(_lines(file, path), start=1):
            place = f"{path}:{number}"
            if not text.strip():
                continue
            try:
                yield Line(place=place, text=text, record=_told(_record(_loaded(text), place)))
            except (ValueError, RecursionError) as error:
                yield Line(place=place, text=text, record=None, fault=_why(error))


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return HALF
    return "no object with named fields" if isinstance(error, DataError) else "not JSON"


def read_json(path: Path) -> Iterator[Record]:
    """One JSON list of objects."""
    with _opened(path) as file:
        content = _parsed("".join(_lines(file, path)), str(path))
    if not isinstance(content, list):
        raise DataError(f"{path} holds {_word(content)}. Expected a list of objects, or one object per line in .jsonl.")
    for number, entry in enumerate(content):
        yield _record(entry, f"{path} row {number}")


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated values under a line of names."""
    with _opened(path) as file:
        reader = csv.DictReader(_lines(file, path), strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{place} has another number of values than the first line has names. Correct it.")
                yield Record(place=place, split="", fields=dict(row))
        except csv.Error as error:
            line = reader.line_num
            raise DataError(
                f"{path}: after line {line} this is no comma-separated text ({error}). Correct it."
            ) from error


def read_parquet(path: Path) -> Iterator[Record]:
    """A parquet file, one group of rows in memory at a time."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for some in file.iter_batches(batch_size=1024):
                for row in some.to_pylist():
                    yield Record(place=f"{path} row {number}", split="", fields=row)
                    number += 1
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}). Fetch or write it again.") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _from_folder(folder: Path) -> Iterator[Record]:
    """All files of a folder. Those that name a part (train-0.jsonl, test/0.parquet) tell it to their rows."""
    files = [(path, _part_of(path.relative_to(folder))) for path in _files(folder)]
    silent = next((path for path, part in files if not part), None)
    if silent is not None and any(part for _, part in files):
        raise DataError(
            f"{folder}: {silent.name} does not say which part (train, test) it is, and other files do. Rename it, take "
            "it away, or give the path of one file and the test_path of another."
        )
    for path, part in files:
        for record in READERS[_kind(path)](path):
            yield replace(record, split=part) if part else _told(record)


def _from_tables(tables: Mapping[str, Dataset], *, place: str) -> Iterator[Record]:
    for name, table in tables.items():
        part = _part_of(Path(name)) or name
        for number, row in enumerate(table):
            # A data set that is one table has not been divided yet, whatever the table is called.
            split = part if len(tables) > 1 else ""
            record = Record(place=f"{place} ({name}) row {number}", split=split, fields=row)
            yield record if split else _told(record)


def _with_split(records: Iterator[Record]) -> Iterator[Record]:
    return (_told(record) for record in records)


def _told(record: Record) -> Record:
    """What the row itself says in its field "split"."""
    split = record.fields.get("split")
    return replace(record, split=split) if isinstance(split, str) else record


def _part_of(path: Path) -> str:
    """train or a name of the test part, from a file's folder or the first word of its name; else empty."""
    words = {*path.parent.parts, re.split(r"[-_.]", path.name)[0]}
    return next((name for name in SPLIT_NAMES if name in words), "")


def _opened(path: Path) -> IO[str]:
    # utf-8-sig: some programs put a byte order mark in front.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    """The lines of a text file; what a torn or foreign one raises becomes a DataError."""
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} is torn or no UTF-8 text after line {number} ({error}). Fetch it again.") from error


def _loaded(text: str) -> object:
    """Raises UnicodeEncodeError for half of a surrogate pair, which JSON can say and no text can hold."""
    content: object = json.loads(text)
    if SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _parsed(text: str, place: str) -> object:
    try:
        return _loaded(text)
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {HALF}. Write the character whole, or take it out.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}). The file may be torn: fetch or write it again.") from error


def _record(content: object, place: str) -> Record:
    if not isinstance(content, dict):
        raise DataError(f"{place} holds {_word(content)}. Expected an object with named fields.")
    return Record(place=place, split="", fields=content)


def _word(content: object) -> str:
    return f"a {type(content).__name__}" if content is not None else "null"


def _kind(path: Path) -> str:
    """The ending that tells the format, lower case, without .gz."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return plain.suffix.lower()


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _kind(path) in READERS)


def _found(place: Path) -> str:
    if not place.exists():
        return "there is no such file or folder"
    if place.is_file():
        return f"this is a file ending in '{place.suffix}'"
    names = [entry.name for entry in islice(sorted(place.iterdir()), 5)]
    return f"the folder holds {', '.join(names)}" if names else "the folder is empty"
