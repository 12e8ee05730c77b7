"""What `fit` costs over a hand-written loop, and what two other trainers cost, doing the same work in one run.

    python benchmarks/loop.py                        # a CPU, one thread, 9 rounds of 40 steps each
    python benchmarks/loop.py --without-peers --rounds 20

The work: a ResNet-20 teaches a ResNet-8 on Fashion-MNIST, batch 64, 0.9 KD (T = 4) + 0.1 cross-entropy, SGD with
momentum, cosine learning rate. All start from the same weights and see the same rows in the same order, and the
script first makes sure that they arrive at the same student. `fit` keeps its metrics file, its checks for broken
losses and its checkpoint at the end; the others save and log nothing.

Time per step runs from the start of step 6 to the start of the last step, so neither set-up nor the final checkpoint
is in it; the whole call is given beside it. Rounds are paired (everyone in turn, every second round in reverse) and
the ratio is the median over the rounds. CPU time is measured along with the clock on the wall: it feels the neighbours
less. What a loop costs by itself is measured once more with linear models of one layer, which take next to nothing:
microseconds of CPU per step over the hand-written loop's, whatever the models.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import make_torchvision_importable
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, SequentialSampler, Subset, TensorDataset

from potstill.core.run import environment, write_json
from potstill.core.types import Batch, Source
from potstill.data import ImageData, images
from potstill.data.sources import order
from potstill.loops.fit import fit
from potstill.objective import Objective, term
from potstill.schemes.offline import Offline
from potstill.students.vision import resnet
from potstill.teachers.local import local

BATCH = 64
TEMPERATURE, SOFT, HARD = 4.0, 0.9, 0.1
LR, MOMENTUM = 0.05, 0.9
SKIPPED = 5
"""Steps before the measured ones: memory is allocated and kernels are chosen there."""

BAR = 1.03
"""`fit` may take so much of the hand-written loop's time per step."""

Tick = Callable[[], None]
"""To be called at the start of each step."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What everyone is given: the data, the order of the rows, and two models to start from."""

    data: ImageData
    images: Tensor
    """float32 [n, 1, 28, 28], standardised beforehand."""
    labels: Tensor
    rows: Tensor
    student: nn.Module
    teacher: nn.Module
    steps: int

    def dataset(self) -> Subset[tuple[Tensor, ...]]:
        """The rows of all steps in their order, one by one, for those who read through a DataLoader."""
        return Subset(TensorDataset(self.images, self.labels), self.rows[: self.steps * BATCH].tolist())


def work(path: str, steps: int) -> Work:
    torch.manual_seed(0)
    data = images(path, batch=BATCH, seed=0)
    assert steps * BATCH <= data.train.num_rows, "the rows of one epoch are enough"
    pictures = data.train.pictures
    channels, num_classes = data.shape[0], data.num_classes
    return Work(
        data=data,
        images=pictures.standardised(torch.arange(data.train.num_rows)),
        labels=pictures.labels,
        rows=order(data.train.num_rows, 0, 0, "rows"),
        student=resnet(channels=channels, classes=num_classes, depth=8).train(),
        teacher=resnet(channels=channels, classes=num_classes, depth=20).requires_grad_(False).eval(),
        steps=steps,
    )


def by_fit(work: Work, student: nn.Module, tick: Tick) -> None:
    objective = Objective(term("cross_entropy", HARD), term("kd", SOFT, temperature=TEMPERATURE))
    source = Ticking(source=work.data.train, tick=tick)
    with tempfile.TemporaryDirectory() as out:
        scheme = Offline(student, local(work.teacher))
        fit(scheme, objective, source, steps=work.steps, lr=LR, momentum=MOMENTUM, out=out)


@dataclass(frozen=True, kw_only=True)
class Ticking:
    """A source that says when it is asked: `fit` asks for its batch at the start of each step."""

    source: Source
    tick: Tick

    def batch(self, index: int) -> Batch:
        self.tick()
        return self.source.batch(index)


def by_hand(work: Work, student: nn.Module, tick: Tick) -> None:
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, T_max=work.steps)
    for step in range(work.steps):
        tick()
        chosen = work.rows[step * BATCH : (step + 1) * BATCH]
        inputs, labels = work.images[chosen], work.labels[chosen]
        optimizer.zero_grad()
        with torch.no_grad():
            teacher_logits = work.teacher(inputs)
        distillation_loss(student(inputs), teacher_logits, labels).backward()
        optimizer.step()
        schedule.step()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """0.9 T^2 KL(teacher || student) + 0.1 cross-entropy, as most training scripts write it."""
    log_q = F.log_softmax(student_logits / TEMPERATURE, dim=1)
    p = F.softmax(teacher_logits / TEMPERATURE, dim=1)
    soft = TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")
    return SOFT * soft + HARD * F.cross_entropy(student_logits, labels)


def by_torchdistill(work: Work, student: nn.Module, tick: Tick) -> None:
    from torchdistill.core.distillation import get_distillation_box

    box = get_distillation_box(
        work.teacher, student, {"train": work.dataset()}, torchdistill_config(work.steps),
        device=torch.device("cpu"), device_ids=None, distributed=False, lr_factor=1,
    )  # fmt: skip
    box.pre_epoch_process(epoch=0)
    tick()
    for inputs, labels, supplement in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(inputs, labels, supplement)
        box.post_forward_process(loss=loss)
        tick()
    box.clean_modules()


def torchdistill_config(steps: int) -> dict[str, Any]:
    """Its `alpha` weighs the hard loss; T squared is inside (D-03)."""
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    kd = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": HARD, "beta": SOFT}}
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": MOMENTUM}},
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": steps}, "scheduling_step": 1},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }


def by_transformers(work: Work, student: nn.Module, tick: Tick) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Distilling(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            loader = DataLoader(self.train_dataset, batch_size=BATCH, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], **_: object) -> Tensor:
            with torch.no_grad():
                teacher_logits = work.teacher(inputs["image"])
            return distillation_loss(model(inputs["image"]), teacher_logits, inputs["labels"])

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            tick()

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        inputs, labels = zip(*rows, strict=True)
        return {"image": torch.stack(inputs), "labels": torch.stack(labels)}

    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, T_max=work.steps)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=work.steps, per_device_train_batch_size=BATCH, max_grad_norm=0.0, use_cpu=True,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Distilling(
            student, arguments, train_dataset=work.dataset(), data_collator=collate,
            optimizers=(optimizer, schedule), callbacks=[Watch()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


CONTESTANTS: dict[str, Callable[[Work, nn.Module, Tick], None]] = {
    "hand-written": by_hand,
    "potstill.fit": by_fit,
    "torchdistill": by_torchdistill,
    "transformers.Trainer": by_transformers,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call: per measured step on the wall and of the CPU, and the whole call on the wall."""

    wall: float
    cpu: float
    whole: float


def rounds(names: Sequence[str], work: Work, count: int) -> dict[str, list[Timing]]:
    """Everyone in turn, `count` times; in reverse every second time, so that a drift of the machine cancels."""
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(count):
        for name in names if number % 2 == 0 else reversed(names):
            timings[name].append(measure(name, work))
    return timings


def measure(name: str, work: Work) -> Timing:
    student = copy.deepcopy(work.student)
    ticks: list[tuple[float, float]] = []
    began = time.perf_counter()
    CONTESTANTS[name](work, student, lambda: ticks.append((time.perf_counter(), time.process_time())))
    whole = time.perf_counter() - began
    # Counted from the last step's start: some ask once more before the first step, or after the last.
    first, last = ticks[-work.steps :][SKIPPED], ticks[-1]
    num_steps = work.steps - SKIPPED - 1
    return Timing(wall=(last[0] - first[0]) / num_steps, cpu=(last[1] - first[1]) / num_steps, whole=whole)


def distance(name: str, work: Work) -> float:
    """How far the student ends from the hand-written loop's, over how far that one went."""
    ends = []
    for each in ("hand-written", name):
        student = copy.deepcopy(work.student)
        CONTESTANTS[each](work, student, lambda: None)
        ends.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    start = nn.utils.parameters_to_vector(work.student.parameters()).detach()
    return float((ends[1] - ends[0]).norm() / (ends[0] - start).norm())


def with_linear_models(work: Work) -> Work:
    """The same work, but for models that cost next to nothing: what is left is the loop."""
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(work.images[0].numel(), 10)) for _ in range(2))
    return replace(work, student=student, teacher=teacher.requires_grad_(False).eval(), steps=200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians over the rounds; ratios and differences are those of each round to its hand-written loop."""

    milliseconds_per_step: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    cpu_milliseconds_per_step: float
    cpu_ratio: float
    own_microseconds_per_step: float
    """CPU time over the hand-written loop's, with linear models."""
    whole_call_seconds: float


def summary(name: str, full: Mapping[str, list[Timing]], linear: Mapping[str, list[Timing]]) -> Row:
    pairs = list(zip(full[name], full["hand-written"], strict=True))
    linear_pairs = zip(linear[name], linear["hand-written"], strict=True)
    low, middle, high = statistics.quantiles((a.wall / b.wall for a, b in pairs), n=4, method="inclusive")
    return Row(
        milliseconds_per_step=1e3 * statistics.median(t.wall for t in full[name]),
        ratio=middle,
        ratio_quartiles=(low, high),
        cpu_milliseconds_per_step=1e3 * statistics.median(t.cpu for t in full[name]),
        cpu_ratio=statistics.median(a.cpu / b.cpu for a, b in pairs),
        own_microseconds_per_step=1e6 * statistics.median(a.cpu - b.cpu for a, b in linear_pairs),
        whole_call_seconds=statistics.median(t.whole for t in full[name]),
    )


def print_table(table: Mapping[str, Row]) -> None:
    print(
        "| loop | ms per step | over hand-written (quartiles) | CPU ms | over hand-written | own us | whole call, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        low, high = row.ratio_quartiles
        print(
            f"| {name} | {row.milliseconds_per_step:.2f} | {row.ratio:.3f} ({low:.3f} to {high:.3f}) | "
            f"{row.cpu_milliseconds_per_step:.2f} | {row.cpu_ratio:.3f} | {row.own_microseconds_per_step:.0f} | "
            f"{row.whole_call_seconds:.2f} |"
        )


def fashion_mnist() -> str:
    """$POTSTILL_DATA, or the folder shared/data beside the project."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    return str(Path(os.environ.get("POTSTILL_DATA", shared)) / "fashion-mnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=fashion_mnist())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/loop.json")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.steps < SKIPPED + 5:
        parser.error(f"--rounds 2 and --steps {SKIPPED + 5} are the least that says anything")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    names = [name for name in CONTESTANTS if name in ("hand-written", "potstill.fit") or not arguments.without_peers]
    if not arguments.without_peers:
        make_torchvision_importable()
    job = work(arguments.data, arguments.steps)
    # The same rounding errors grow with the steps, so a few steps tell most clearly.
    distances = {name: distance(name, replace(job, steps=4)) for name in names[1:]}
    for name, found in distances.items():
        assert found < 1e-3, f"{name} does not do the same work: its student is {found:.1e} away"
    full = rounds(names, job, arguments.rounds)
    linear = rounds(names, with_linear_models(job), arguments.rounds)
    table = {name: summary(name, full, linear) for name in names}
    print(f"{arguments.rounds} rounds of {job.steps} steps, {arguments.threads} thread(s), torch {torch.__version__}\n")
    print_table(table)
    passed = table["potstill.fit"].ratio <= BAR
    print(f"\nBar: fit at most {BAR} of the hand-written loop's time per step: {'met' if passed else 'MISSED'}.")
    if arguments.out:
        write_json(
            Path(arguments.out),
            {
                "environment": environment(" ".join(sys.argv)),
                "peers": {} if arguments.without_peers else {"torchdistill": metadata.version("torchdistill")},
                "rounds": arguments.rounds, "steps": job.steps, "batch": BATCH, "threads": arguments.threads,
                "bar": BAR, "passed": passed, "distance_of_students": distances,
                "table": {name: asdict(row) for name, row in table.items()},
            },
        )  # fmt: skip
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
