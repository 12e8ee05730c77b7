"""Bad input and bad luck in the middle of a run of texts: the exit code, the sentence, and nothing that was there lost.

One run is stopped between two checkpoints by a memory that is full. Then something it reads goes bad, and is mended.
What is refused before anything is written stands in test_bad_text.py and test_bad_input.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.core.run import read_lines
from potstill.core.types import Batch, Need, PerItem, Signal
from potstill.recipe.calls import located
from potstill.students import hf_fresh
from potstill.teachers import hf
from tests import tiny_text
from tests.tiny_text import asked, potstill, rows, tokenizer_folder

FULL = "POTSTILL_TEST_FULL"
"""While it is set the memory is full."""
OUT_OF_MEMORY = "error: Out of memory. What was written stays: make data.batch smaller"
LONGEST = 80


def take_too_much() -> None:
    """What a machine says of a petabyte, it says itself."""
    if FULL in os.environ:
        torch.empty(2**50, dtype=torch.uint8)


def hungry(student_logits: Tensor, labels: Tensor, /, *, step: float = 0.0) -> PerItem:
    """Cross-entropy that needs more memory from step 2 on, counted from 0."""
    if step >= 2.0:
        take_too_much()
    return torch.nn.functional.cross_entropy(student_logits.float(), labels, reduction="none")


class Ravenous:
    """A language model that needs more memory for its third answer."""

    def __init__(self, model: str) -> None:
        self.teacher = hf(model)
        self.identity = self.teacher.identity
        self.asked = 0

    def __call__(self, batch: Batch, need: Need) -> Signal:
        self.asked += 1
        if self.asked == 3:
            take_too_much()
        return self.teacher(batch, need)


@dataclass(frozen=True)
class Place:
    """Everything that a run reads lies here, to be spoiled."""

    path: Path

    @property
    def data(self) -> Path:
        return self.path / "rows.jsonl"

    def recipe(self, kind: str) -> str:
        return str(self.path / f"{kind}.yaml")

    def run(self, kind: str, out: Path) -> tuple[int, str]:
        code, _, errors = potstill("run", self.recipe(kind), "--out", str(out))
        return code, errors


def written(place: Place, kind: str) -> None:
    """A recipe that learns from the teacher itself, or from what was remembered of it."""
    live = {"use": "hf", "model": str(place.path / "teacher")}
    content = {
        **tiny_text.content(),
        "data": {"use": "chat", "path": str(place.data), "batch": 4, "length": 120, "test_share": 0.2},
        "teacher": live if kind == "live" else {"use": "remembered", "path": str(place.path / "store")},
        "student": {"use": "hf_fresh", "model": str(place.path / "student"), "layers": 1, "hidden": 8, "heads": 2},
        "objective": [
            {"use": f"{__name__}:hungry", "step": {"use": "linear", "start": 0.0, "end": 4.0}},
            {"use": "forward_kl"},
        ],
        "baseline": None,
    }
    (place.path / f"{kind}.yaml").write_text(json.dumps(content))


@contextmanager
def full_memory() -> Iterator[None]:
    os.environ[FULL] = "1"
    try:
        yield
    finally:
        del os.environ[FULL]


def answered(place: Path) -> Path:
    return rows(place, *(asked(number, f"Number {number}.") for number in range(20)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Models, data and a store; a run of each kind that came to its end, and one that was stopped after step 2."""
    made = Place(tmp_path_factory.mktemp("place"))
    folder = tokenizer_folder(made.path / "student", lambda settings: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONGEST}))
    for seed, name in enumerate(("teacher", "another")):
        torch.manual_seed(seed)
        hf_fresh(str(folder), layers=1, hidden=8, heads=2).export(made.path / name)
    answered(made.data)
    for kind in ("live", "cached"):
        written(made, kind)
    assert potstill("cache", "build", made.recipe("live"), "--out", str(made.path / "store"))[0] == 0
    for kind in ("live", "cached"):
        assert made.run(kind, made.path / f"{kind}-whole") == (0, "")
        with full_memory():
            code, errors = made.run(kind, made.path / f"{kind}-stopped")
        assert code == 1 and errors.startswith(OUT_OF_MEMORY) and len(errors.splitlines()) == 1
    return made


def files(folder: Path) -> dict[str, bytes]:
    """All that a run or a store has written, but for the traceback."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != "traceback.txt"}


def student_of(folder: Path) -> bytes:
    return (folder / "distilled-seed0" / "student" / "model.safetensors").read_bytes()


@contextmanager
def spoiled(path: Path, spoil: Callable[[Path], object]) -> Iterator[None]:
    """A file or folder that goes bad, and is mended afterwards."""
    kept = path.with_name(f"{path.name}.kept")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
    try:
        spoil(path)
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept.rename(path)


def deaf(template: Path) -> None:
    """The template writes what is asked, and no answer."""
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )


def other_tokenizer(folder: Path) -> None:
    """The model learns to read in pieces."""
    shutil.rmtree(folder)
    hf_fresh(located(tiny_text.PIECES), layers=1, hidden=8, heads=2).export(folder)


def of_another_teacher(store: Path) -> None:
    """Another teacher has answered, about the same rows."""
    shutil.rmtree(store)
    assert build(Place(store.parent), store, f"teacher.model={store.parent / 'another'}") == (0, "")


def torn(store: Path) -> None:
    (store / "shard-00000.rows").write_bytes(b"")


# (kind of run, what goes bad, how, what is said)
BAD = {
    "mismatched tokenizers": ("live", "teacher", other_tokenizer, "another tokenizer than the one that made the batch"),
    "a row longer than the model": (
        "live", "rows.jsonl", lambda path: rows(path, *(asked(n, "Yes. " * 20) for n in range(20))),
        f"the model reads at most {LONGEST}",
    ),
    "empty answers": (
        "live", "rows.jsonl", lambda path: rows(path, *(asked(n, "") for n in range(20))), "the answer is empty",
    ),
    "no supervised token": (
        "live", "rows.jsonl", lambda path: rows(path, *({"prompt": "Why? " * 40, "completion": "So."},) * 20),
        "no supervised token within the first 120",
    ),
    "a template that strips the answer": (
        "live", "student/chat_template.jinja", deaf, "the chat template loses the answer",
    ),
    "torn data": ("live", "rows.jsonl", lambda path: path.write_text('{"prompt": "What'), "rows.jsonl:1 is not JSON"),
    "a cache of another teacher": ("cached", "store", of_another_teacher, "holds a run with stores"),
    "a torn shard": ("cached", "store", torn, "Torn: shard-00000"),
    "no cache": ("cached", "store", shutil.rmtree, "there is no store of signals here"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is torn")
@pytest.mark.parametrize("name", BAD)
def test_what_goes_bad_under_a_run_stops_it_with_2_and_mended_it_goes_on_to_the_same_student(
    name: str, place: Place, tmp_path: Path
) -> None:
    kind, what, spoil, said = BAD[name]
    run = shutil.copytree(place.path / f"{kind}-stopped", tmp_path / "run")
    before = files(run)
    assert any("step-00000002" in each for each in before)
    with spoiled(place.path / what, spoil):
        code, errors = place.run(kind, run)
    assert (code, len(errors.splitlines())) == (2, 1), errors
    assert said in errors
    assert files(run) == before
    assert place.run(kind, run) == (0, "")
    assert student_of(run) == student_of(place.path / f"{kind}-whole")


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_a_full_memory_stops_with_1_and_the_same_command_goes_on_to_the_same_student(
    kind: str, place: Place, tmp_path: Path
) -> None:
    run = shutil.copytree(place.path / f"{kind}-stopped", tmp_path / "run")
    with full_memory():
        code, errors = place.run(kind, run)
    assert code == 1 and errors.startswith(OUT_OF_MEMORY)
    assert place.run(kind, run) == (0, "")
    assert student_of(run) == student_of(place.path / f"{kind}-whole")
    assert [line["step"] for line in read_lines(run / "distilled-seed0" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_missing_pad_token_under_a_run_changes_nothing(place: Place, tmp_path: Path) -> None:
    def bare(path: Path) -> None:
        settings = json.loads(path.read_text())
        del settings["pad_token"]
        path.write_text(json.dumps(settings))

    run = shutil.copytree(place.path / "live-stopped", tmp_path / "run")
    with spoiled(place.path / "student" / "tokenizer_config.json", bare):
        assert place.run("live", run) == (0, "")
    assert student_of(run) == student_of(place.path / "live-whole")


# The cache itself.


def build(place: Place, out: Path, *changes: str) -> tuple[int, str]:
    code, _, errors = potstill("cache", "build", place.recipe("live"), *changes, "--out", str(out))
    return code, errors


def verified(place: Place, store: Path, *changes: str) -> str:
    code, said, errors = potstill("cache", "verify", str(store), place.recipe("live"), *changes)
    assert code == 0, errors
    return said


def test_a_full_memory_keeps_what_was_remembered_and_the_same_command_goes_on(place: Place, tmp_path: Path) -> None:
    teacher = f"teacher={{use: '{__name__}:Ravenous', model: {place.path / 'teacher'}}}"
    with full_memory():
        code, errors = build(place, tmp_path / "store", teacher)
    assert code == 1 and errors.startswith(OUT_OF_MEMORY)
    # Its first answer told the shapes, the second was stored.
    assert "rows not in the store\t12" in verified(place, tmp_path / "store")
    assert build(place, tmp_path / "store", teacher) == (0, "")
    said = verified(place, tmp_path / "store")
    assert "rows not in the store\t0" in said and "total variation, worst\t0" in said


def test_a_store_is_not_continued_by_another_teacher_and_stays_what_it_is(place: Place, tmp_path: Path) -> None:
    store = shutil.copytree(place.path / "store", tmp_path / "store")
    before = files(store)
    code, errors = build(place, store, f"teacher.model={place.path / 'another'}")
    assert code == 2 and "the store was made with teacher 'hf:" in errors and len(errors.splitlines()) == 1
    assert files(store) == before
    assert "total variation, worst\t0" in verified(place, store)


@pytest.mark.filterwarnings("ignore:.*is torn")
def test_a_torn_shard_is_filled_in_and_verifies(place: Place, tmp_path: Path) -> None:
    store = shutil.copytree(place.path / "store", tmp_path / "store")
    torn(store)
    assert "torn\tshard-00000" in verified(place, store)
    assert build(place, store) == (0, "")
    assert "total variation, worst\t0" in verified(place, store)
