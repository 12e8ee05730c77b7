"""Potstill's objective inside a Hugging Face Trainer: its data loading, optimizer, schedule and logging stay yours.

Two methods are overridden. `get_batch_samples` sees all micro-batches of an optimizer step, so it asks the objective
how many rows each of its terms counts there. The Trainer's own `num_items_in_batch` is one number, the labelled rows;
here soft targets also count rows without a label, so each term has a divisor of its own. `compute_loss` then asks both
models and divides by these counts.    python examples/objective_in_hf_trainer.py
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import potstill as ps
from potstill.core.types import Teacher
from potstill.evaluate import evaluate

STEPS = 80 if os.environ.get("POTSTILL_QUICK") else 200

Rows = dict[str, Tensor]


class Distiller(Trainer):
    """A Trainer whose model is `scheme.learners()`: the student, with the training heads that some losses need."""

    def __init__(self, scheme: ps.Offline, objective: ps.Objective, args: TrainingArguments, rows: list[Rows]) -> None:
        scheme.prepare(objective, as_batch(torch.utils.data.default_collate(rows[:8])))
        super().__init__(scheme.learners(), args, train_dataset=rows)
        self.objective = objective
        self.teacher: Teacher | None = scheme.teacher
        # The loss is divided by the counts of the whole step already: the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[Rows], Tensor | int | None]:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [as_batch(rows) for rows in samples]
        counts = self.objective.counts(batches, step=self.state.global_step, steps=self.state.max_steps)
        # Over all processes, since their gradients are averaged: see the factor below.
        self.counts = replace(counts, divisors=self.accelerator.reduce(counts.divisors.to(device), reduction="sum"))
        return samples, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Rows,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        batch = as_batch(inputs)
        need = self.objective.need("teacher")
        taught = self.teacher(batch, need) if self.teacher is not None else ps.Signal()
        lesson = ps.Lesson(student=model(batch, self.objective.need("student")), teacher=taught)
        return self.objective(lesson, batch, self.counts) * self.accelerator.num_processes


def as_batch(rows: Rows) -> ps.Batch:
    return ps.Batch.of(rows["labels"], image=rows["image"])


def rows_of(data: ps.data.ImageData) -> list[Rows]:
    """The training part in the form that the Trainer's collator takes."""
    pictures = data.train.pictures
    images = pictures.standardised(torch.arange(len(pictures.labels)))
    return [{"image": image, "labels": label} for image, label in zip(images, pictures.labels, strict=True)]


def train(model: nn.Module, objective: ps.Objective, rows: list[Rows], teacher: nn.Module | None = None) -> float:
    """Train `model` in place; its accuracy on the test set."""
    scheme = ps.Offline(model, None if teacher is None else ps.teachers.local(teacher))
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out, max_steps=STEPS, per_device_train_batch_size=16, gradient_accumulation_steps=4,
            learning_rate=0.01, lr_scheduler_type="cosine", remove_unused_columns=False, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Distiller(scheme, objective, args, rows).train()
    return evaluate(scheme.student, digits.test.batches(256)).accuracy


def student() -> nn.Module:
    torch.manual_seed(0)
    return ps.students.plain_cnn(channels=1, classes=10, width=8)


digits = ps.data.images("digits")
some_labels = rows_of(ps.data.images("digits", labelled=150))
only_labelled = [row for row in some_labels if row["labels"] >= 0]
labels_only = ps.Objective(ps.term("cross_entropy"))
distillation = ps.Objective(
    ps.term("kd", 0.9, temperature=4.0),
    ps.term("cross_entropy", 0.1),
    # The student's map has half the teacher's channels: `hint` puts a head between, which the Trainer trains along.
    ps.term("hint", 0.1, at={"stage3": "layer3"}),
)

torch.manual_seed(0)
teacher = ps.students.resnet(channels=1, classes=10, depth=8, width=16)
print(f"teacher    {train(teacher, labels_only, rows_of(digits)):.3f}  (all labels)")
print(f"alone      {train(student(), labels_only, only_labelled):.3f}  (150 labels)")
print(f"distilled  {train(student(), distillation, some_labels, teacher):.3f}  (150 labels and the teacher)")
