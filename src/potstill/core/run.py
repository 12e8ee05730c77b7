"""A run is a folder. This file knows its layout and how to write so that a kill at any moment hurts nothing."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from potstill.core.errors import StorageError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run, or of one arm of it (the teacher, one seed of one student)."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def examples(self) -> Path:
        return self.path / "examples.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The clean export: no heads, no teacher."""
        return self.path / "student"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def arm(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: the old content stays until the new one is durable."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; StorageError names the file when it is torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} is torn ({error}). Delete it and run the same command again.") from error
    if not isinstance(content, dict):
        raise StorageError(
            f"{path} holds {type(content).__name__} where an object was expected. Delete it and run again."
        )
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft path (file or folder, for the caller to create) that takes the place of `path` at the end.

    The draft is made durable before it is renamed. Where it fails, the draft goes and `path` keeps its old
    content; a full disk becomes a StorageError that says so.
    """
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(draft)
        yield draft
        _make_durable(draft)
        if path.is_dir():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            draft.rename(path)
            _remove(old)
        else:
            draft.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk is full while saving {path}; what was saved before is intact. "
                "Free some space and run the same command again."
            ) from error
        raise StorageError(
            f"Cannot save {path}: {error.strerror or error}. What was saved before is intact."
        ) from error
    finally:
        _remove(draft)


def environment(command: str) -> dict[str, Any]:
    """Versions and machine: enough to repeat a run elsewhere."""
    packages = ("potstill", "torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "command": command,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": versions,
    }


def _make_durable(draft: Path) -> None:
    for path in sorted(draft.rglob("*")) if draft.is_dir() else [draft]:
        if path.is_file():
            _sync(path)
    if draft.is_dir():
        _sync(draft)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)
