"""A language recipe that a run is through with in a moment: shipped questions, models of a few thousand parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from potstill.cli import app
from potstill.recipe import Recipe, build
from potstill.recipe.calls import located
from potstill.recipe.text import Tree, override

BYTES = "shipped:data/bytes"
PIECES = "shipped:data/pieces"
FIT: dict[str, Tree] = {"steps": 4, "lr": 0.01, "optimizer": "adamw", "log_every": 1, "checkpoint_every": 2}


def content() -> dict[str, Tree]:
    """The sections of a small recipe over the shipped questions."""
    return {
        "name": "tiny",
        "data": {
            "use": "chat",
            "path": "shipped:data/chats.jsonl",
            "batch": 4,
            "length": 96,
            "limit": 12,
            "test_limit": 5,
        },
        "teacher": {"use": "hf_fresh", "model": BYTES, "layers": 2, "hidden": 16, "fit": dict(FIT)},
        "student": {"use": "hf_fresh", "model": BYTES, "layers": 1, "hidden": 8, "heads": 2},
        "objective": [{"use": "cross_entropy", "weight": 0.5}, {"use": "forward_kl", "weight": 0.5}],
        "fit": dict(FIT),
        "seeds": [0],
    }


def recipe(*changes: str) -> Recipe:
    return build(override(content(), changes))


def write_recipe(folder: Path) -> Path:
    """The same as a file."""
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(content()))
    return file


def potstill(*words: str) -> tuple[int, str, str]:
    """Exit code, output, and what was said on stderr, without the progress of loading."""
    done = CliRunner().invoke(app, words)
    errors = [line for line in done.stderr.strip().splitlines() if line.startswith(("error", "internal", "stopped"))]
    return done.exit_code, done.stdout, "\n".join(errors)


def tokenizer_folder(folder: Path, change: Callable[[dict[str, object]], None], *, template: str | None = None) -> Path:
    """The shipped folder of bytes with another tokenizer_config.json, and another chat template."""
    shutil.copytree(located(BYTES), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    change(settings)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def rows(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def asked(number: int, answer: str = "Yes.") -> dict[str, object]:
    return {"prompt": f"Question {number}?", "completion": answer}
