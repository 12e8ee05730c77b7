"""Potstill's objective inside a LightningModule. Lightning is no dependency of Potstill: pip install lightning

Here one batch on one device is a whole optimizer step, so its own counts are the right divisors. With several
devices or `accumulate_grad_batches` Lightning takes a mean of means, which is only right where all batches count
equally many rows. Where they differ (padding, unknown labels), set `automatic_optimization = False`, and write the
step as in objective_in_your_loop.py.    python examples/objective_in_lightning.py
"""

import logging
import os
import sys
import warnings

import torch
from torch import Tensor, nn

import potstill as ps
from potstill.evaluate import evaluate

try:
    import lightning
except ModuleNotFoundError:
    print("This example needs Lightning, which is not installed. Install it with: pip install lightning")
    sys.exit(0)

STEPS = 80 if os.environ.get("POTSTILL_QUICK") else 200

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


class Distilling(lightning.LightningModule):
    """Its parameters are `scheme.learners()`: the student, with the training heads that some losses need."""

    def __init__(self, scheme: ps.Offline, objective: ps.Objective, batch: ps.Batch) -> None:
        super().__init__()
        # A dry run: it checks layers and shapes, and builds the heads.
        scheme.prepare(objective, batch)
        # The scheme is no module and neither is its teacher: Lightning does not train or save what they hold.
        self.scheme, self.objective = scheme, objective
        self.learners = scheme.learners()

    def training_step(self, batch: ps.Batch, index: int) -> Tensor:
        counts = self.objective.counts([batch], step=self.global_step, steps=STEPS)
        needs = self.objective.need("student"), self.objective.need("teacher")
        losses = [self.objective(lesson, batch, counts) for lesson in self.scheme.lessons(batch, *needs)]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.learners.parameters(), lr=0.005)


def train(
    model: nn.Module, objective: ps.Objective, data: ps.data.ImageData, teacher: nn.Module | None = None
) -> float:
    """Train `model` in place; its accuracy on the test set."""
    scheme = ps.Offline(model, None if teacher is None else ps.teachers.local(teacher))
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    # Each entry is a whole batch already, hence no batch_size. Lightning calls its `to(device)`.
    batches = torch.utils.data.DataLoader([data.train.batch(index) for index in range(STEPS)], batch_size=None)
    trainer.fit(Distilling(scheme, objective, data.train.batch(0)), batches)
    return evaluate(scheme.student, data.test.batches(256)).accuracy


def student() -> nn.Module:
    torch.manual_seed(0)
    return ps.students.plain_cnn(channels=1, classes=10, width=8)


# 150 digits keep their label; the others are there, but only a teacher can say something about them.
everything = ps.data.images("digits")
some_labels = ps.data.images("digits", labelled=150)
only_labelled = ps.data.images("digits", labelled=150, labelled_share=1.0)
labels_only = ps.Objective(ps.term("cross_entropy"))
distillation = ps.Objective(
    ps.term("kd", 0.9, temperature=4.0),
    ps.term("cross_entropy", 0.1),
    # The student's map has half the teacher's channels: `hint` puts a head between, which is trained along.
    ps.term("hint", 0.1, at={"stage3": "layer3"}),
)

torch.manual_seed(0)
teacher = ps.students.resnet(channels=1, classes=10, depth=8, width=16)
print(f"teacher    {train(teacher, labels_only, everything):.3f}  (all labels)")
print(f"alone      {train(student(), labels_only, only_labelled):.3f}  (150 labels)")
print(f"distilled  {train(student(), distillation, some_labels, teacher):.3f}  (150 labels and the teacher)")
