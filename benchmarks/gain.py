"""What a teacher gives on real data: every shipped method beside the student alone, on Fashion-MNIST, three seeds.

    python benchmarks/gain.py           # two processes of one thread each; run it again to go on where it stopped
    python benchmarks/gain.py --quick   # every method for a few steps on the digits: does it run? Nothing is written

The recipes run as shipped, weights included. What changes is named here: the data, one teacher for all, the number of
steps. No weight was tuned here, and all scores are those of the last step. The teacher's answers are
remembered, since nothing is augmented: time per step is the student's, with the comparison.

The teacher has learnt from all 60,000 training images, students see 10,000 of them. Two settings: "same data", where
the student has all 10,000 labels with and without a teacher, and "few labels", where it has 300 and the other images
come unlabelled. Alone it then learns from the labelled rows only, in as many steps of as many rows.

Exit code 1: plain KD did not beat the student alone in every seed with few labels.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from potstill.core.catalog import part
from potstill.core.errors import NotFiniteError
from potstill.core.run import RunFolder, environment, read_json, read_lines, write_json
from potstill.core.types import Batch, Dense, Need, Signal, Teacher
from potstill.recipe import load, run
from potstill.recipe.building import load_student
from potstill.teachers import local

METHODS = ("kd", "dkd", "dist", "lskd", "fitnet", "at", "nst", "vid", "rkd", "sp", "cc", "pkt", "fsp")
OTHER_WEIGHTS = {
    # Its recipe divides the usual 1000, which is for maps of 32, 16 and 8 pixels a side, by 16 for the 8, 4 and 2 of
    # the digits. By the same rule it is 1000 (28 / 32)^2 for the maps here.
    "at, weight 766": ("at", ("objective.1.weight=765.6",)),
}
WITH_ALONE = {"kd": "alone", "fsp": "alone, for fsp"}
"""Whose runs train the student alone too. FSP compares channel by channel, so its recipe has a wider student."""

TEACHER = "{use: resnet, depth: 8, width: 16}"
TEACHER_FIT = "lr: 0.1, weight_decay: 5.0e-4"
SETTINGS = {
    "same data": (),
    # Half of each batch is labelled: taken as they fall, two rows of 64 would be, too few for cross-entropy.
    "few labels": ("data.labelled=300", "data.labelled_share=0.5"),
}
GATE = "few labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    steps: int
    teacher_steps: int
    teacher_images: int
    images: int
    test_images: int
    seeds: tuple[int, ...]


FULL = Size(steps=1000, teacher_steps=2000, teacher_images=60_000, images=10_000, test_images=10_000, seeds=(0, 1, 2))
QUICK = Size(steps=6, teacher_steps=6, teacher_images=1000, images=1000, test_images=200, seeds=(0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One recipe with its changes, in its folder. `setting` and `method` are "" for the teacher's own training."""

    setting: str
    method: str
    recipe: str
    changes: tuple[str, ...]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a value per seed, shares in 0..1."""

    method: str
    against: str
    """The arm it is compared with."""
    accuracy: tuple[float, ...] = ()
    gain: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()
    """With the teacher's choice of a class."""
    seconds_per_step: float | None = None
    failed: str = ""
    """What stopped it; there are no values then."""

    @property
    def wins(self) -> int:
        return sum(difference > 0 for difference in self.gain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="default: Fashion-MNIST in $POTSTILL_DATA or ../shared/data; digits if --quick")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default runs/gain, or runs/gain-quick")
    parser.add_argument("--out", default="benchmarks/results/gain.json", help="not written by --quick")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    data = arguments.data or ("digits" if arguments.quick else fashion_mnist())
    root = arguments.folder or Path("runs/gain-quick" if arguments.quick else "runs/gain")

    teacher = teacher_job(size, data, root)
    jobs = student_jobs(size, data, root, teacher=RunFolder(teacher.folder).student)
    carry_out([teacher], processes=1)
    failures = carry_out(jobs, processes=arguments.processes)
    # The runs' own clocks, so that a benchmark that was stopped in between says the same.
    finished = [job for job in (teacher, *jobs) if job.folder not in failures]
    seconds = sum(read_json(RunFolder(job.folder).summary)["seconds"] for job in finished)

    tables = {setting: table([job for job in jobs if job.setting == setting], failures) for setting in SETTINGS}
    taught = read_json(RunFolder(teacher.folder).arm("alone-seed0").scores)
    print_report(tables, size, data=data, teacher_accuracy=float(taught["accuracy"]), seconds=seconds)
    if arguments.quick:
        return
    plain = next(line for line in tables[GATE] if line.method == "kd")
    passed = plain.wins == len(size.seeds)
    print(f"\nBar: plain KD beats the student alone in every seed with few labels: {'met' if passed else 'MISSED'}.")
    write_json(
        Path(arguments.out),
        {
            "environment": environment(" ".join(sys.argv)),
            "size": asdict(size),
            "teacher": {"model": TEACHER, "fit": TEACHER_FIT, "scores": taught},
            "settings": SETTINGS,
            "seconds": round(seconds, 1),
            "passed": passed,
            "tables": {setting: [asdict(row) for row in rows] for setting, rows in tables.items()},
        },
    )
    if not passed:
        sys.exit(1)


def fashion_mnist() -> str:
    """$POTSTILL_DATA, or the folder shared/data beside the project."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    return str(Path(os.environ.get("POTSTILL_DATA", shared)) / "fashion-mnist")


def teacher_job(size: Size, data: str, root: Path) -> Job:
    """The teacher is the "student" of a recipe without a teacher."""
    changes = (
        *data_changes(size, data),
        f"data.limit={size.teacher_images}",
        "data.augment=[flip]",
        "teacher=null",
        f"student={TEACHER}",
        "objective=[{use: cross_entropy}]",
        f"fit={{steps: {size.teacher_steps}, {TEACHER_FIT}}}",
        "seeds=[0]",
    )
    return Job(setting="", method="", recipe="kd", changes=changes, folder=root / "teacher")


def student_jobs(size: Size, data: str, root: Path, *, teacher: Path) -> list[Job]:
    """Every method in every setting. The student alone is trained in the runs of WITH_ALONE."""
    named = {**{method: (method, ()) for method in METHODS}, **OTHER_WEIGHTS}
    jobs = []
    for setting, how in SETTINGS.items():
        for label, (recipe, own) in named.items():
            changes = (
                *data_changes(size, data),
                *how,
                f"teacher={{use: 'gain:remembered', export: {teacher}}}",
                f"seeds={list(size.seeds)}",
                *step_changes(recipe, size.steps),
                *baseline_changes(label, setting),
                *own,
            )
            folder = root / setting.replace(" ", "-") / label.replace(", weight ", "-")
            jobs.append(Job(setting=setting, method=label, recipe=recipe, changes=changes, folder=folder))
    return jobs


def data_changes(size: Size, data: str) -> tuple[str, ...]:
    return f"data.path={data}", f"data.limit={size.images}", f"data.test_limit={size.test_images}"


def step_changes(recipe: str, steps: int) -> tuple[str, ...]:
    """All stages of a recipe together take `steps`, in the shipped proportion."""
    shipped = [stage.steps for stage in load(recipe).stages]
    if len(shipped) == 1:
        return (f"fit.steps={steps}",)
    ends = [round(steps * sum(shipped[: index + 1]) / sum(shipped)) for index in range(len(shipped))]
    return tuple(f"stages.{index}.fit.steps={b - a}" for index, (a, b) in enumerate(pairwise([0, *ends])))


def baseline_changes(method: str, setting: str) -> tuple[str, ...]:
    """Who trains the student alone, and on which rows: what reads no teacher gets labelled rows only."""
    if method not in WITH_ALONE:
        return ("baseline=null",)
    if setting == "same data":
        return ()
    last_stage = ("stages.1.data={labelled_share: 1.0}",) if method == "fsp" else ()
    return "baseline={data: {labelled_share: 1.0}}", *last_stage


@part("teacher")
def remembered(*, export: str) -> Teacher:
    """The student that a run exported as a teacher that works each image out only once."""
    return Remembered(local(load_student(Path(export))))


class Remembered:
    """Keeps what it said about each image, in memory, by the image's key."""

    def __init__(self, teacher: Teacher) -> None:
        self.identity = teacher.identity
        self._teacher = teacher
        self._logits: dict[str, Tensor] = {}
        self._features: dict[str, dict[str, Tensor]] = {}

    def __call__(self, batch: Batch, need: Need) -> Signal:
        asked = [self._logits] * need.logits + [self._features.setdefault(name, {}) for name in need.features]
        if any(key not in known for known in asked for key in batch.keys):
            self._learn(batch, need)
        logits = Dense(logits=recall(self._logits, batch)) if need.logits else None
        return Signal(logits=logits, features={name: recall(self._features[name], batch) for name in need.features})

    def _learn(self, batch: Batch, need: Need) -> None:
        said = self._teacher(batch, need)
        if isinstance(said.logits, Dense):
            self._logits.update(zip(batch.keys, said.logits.logits, strict=True))
        for name, feature in said.features.items():
            self._features[name].update(zip(batch.keys, feature, strict=True))


def recall(known: dict[str, Tensor], batch: Batch) -> Tensor:
    return torch.stack([known[key] for key in batch.keys])


def carry_out(jobs: Sequence[Job], *, processes: int) -> dict[Path, str]:
    """Run all; returns what stopped those that failed. A finished one is found in its folder and costs nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    failures = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker) as pool:
        running = {pool.submit(attempt, job): job for job in jobs}
        for done in as_completed(running):
            job, failure = running[done], done.result()
            said = f"failed: {failure}" if failure else "done"
            print(f"{job.folder}: {said}", file=sys.stderr, flush=True)
            if failure:
                failures[job.folder] = failure
    return failures


def start_worker() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def attempt(job: Job) -> str:
    """Run one recipe; returns what stopped it. A training that diverges is a result, all else stops the script."""
    try:
        run(load(job.recipe, job.changes), job.folder)
    except NotFiniteError as error:
        return str(error)
    return ""


def table(jobs: Sequence[Job], failures: dict[Path, str]) -> list[Row]:
    """The students alone, then the methods, the largest gain first and those that failed last."""
    alone = {
        job.method: row(WITH_ALONE[job.method], job.folder, "alone", against=None)
        for job in jobs
        if job.method in WITH_ALONE
    }
    taught, failed = [], []
    for job in jobs:
        against = alone.get(job.method, alone["kd"])
        if job.folder in failures:
            failed.append(Row(method=job.method, against=against.method, failed=failures[job.folder]))
        else:
            taught.append(row(job.method, job.folder, "distilled", against=against))
    return [*alone.values(), *sorted(taught, key=lambda line: -sum(line.gain)), *failed]


def row(method: str, folder: Path, arm: str, *, against: Row | None) -> Row:
    entries = read_json(RunFolder(folder).summary)["arms"][arm]
    accuracy = tuple(entry["scores"]["accuracy"] for entry in entries)
    return Row(
        method=method,
        against="" if against is None else against.method,
        accuracy=accuracy,
        gain=() if against is None else tuple(a - b for a, b in zip(accuracy, against.accuracy, strict=True)),
        agreement=tuple(entry["scores"]["agreement"] for entry in entries),
        seconds_per_step=statistics.median(seconds_per_step(folder / entry["folder"]) for entry in entries),
    )


def seconds_per_step(arm: Path) -> float:
    """Training time over all stages, evaluation not included."""
    last = {line["stage"]: line for line in read_lines(RunFolder(arm).metrics)}
    return float(sum(line["seconds"] for line in last.values()) / sum(line["step"] for line in last.values()))


def print_report(
    tables: dict[str, list[Row]], size: Size, *, data: str, teacher_accuracy: float, seconds: float
) -> None:
    print(
        f"{Path(data).name}, {size.images:,} training and {size.test_images:,} test images, {size.steps} steps, "
        f"seeds {', '.join(map(str, size.seeds))}, last step; mean +- sample standard deviation. "
        f"Teacher: {100 * teacher_accuracy:.2f} %. The clocks of all runs add up to {seconds / 60:.1f} minutes."
    )
    for setting, rows in tables.items():
        print(f"\n### {setting.capitalize()}\n")
        print("| method | accuracy, % | over alone, points | wins | agrees with the teacher, % | ms per step |")
        print("|---|---|---|---|---|---|")
        for line in rows:
            print(f"| {' | '.join(cells(line))} |")
        losers = [line.method for line in rows if line.against and line.wins < len(size.seeds)]
        print(f"\nWithout a gain in at least one seed: {', '.join(losers) or 'none'}.")


def cells(line: Row) -> tuple[str, ...]:
    if line.seconds_per_step is None:
        return line.method, f"failed: {line.failed}", "-", "-", "-", "-"
    return (
        line.method,
        spread(line.accuracy),
        spread(line.gain, sign="+") if line.against else "-",
        f"{line.wins}/{len(line.gain)}" if line.against else "-",
        spread(line.agreement),
        f"{1000 * line.seconds_per_step:.1f}",
    )


def spread(shares: Sequence[float], *, sign: str = "") -> str:
    return f"{100 * statistics.mean(shares):{sign}.2f} +- {100 * statistics.stdev(shares):.2f}"


if __name__ == "__main__":
    main()
