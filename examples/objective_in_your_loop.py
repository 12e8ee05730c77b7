"""Potstill's objective inside a training loop of your own: the optimizer, the batches and the steps are yours.

Three terms on digits: soft targets, labels, and where the networks look. Four micro-batches make one optimizer step,
and `counts` makes that the same step as one large batch.    python examples/objective_in_your_loop.py
"""

import os

import torch
from torch import nn

import potstill as ps
from potstill.evaluate import evaluate

STEPS = 80 if os.environ.get("POTSTILL_QUICK") else 200
ACCUMULATE = 4

# 150 digits keep their label; the others are there, but only a teacher can say something about them.
everything = ps.data.images("digits", batch=16)
data = ps.data.images("digits", batch=16, labelled=150)
only_labelled = ps.data.images("digits", batch=16, labelled=150, labelled_share=1.0)


def train(
    model: nn.Module, objective: ps.Objective, data: ps.data.ImageData, teacher: nn.Module | None = None
) -> float:
    """Train `model` in place; its accuracy on the test set."""
    scheme = ps.Offline(model, None if teacher is None else ps.teachers.local(teacher))
    # A dry run: it checks layers and shapes, and builds the training heads that some losses need.
    scheme.prepare(objective, data.train.batch(0))
    learners = scheme.learners()
    optimizer = torch.optim.SGD(learners.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    needs = objective.need("student"), objective.need("teacher")
    learners.train()
    for step in range(STEPS):
        batches = [data.train.batch(ACCUMULATE * step + number) for number in range(ACCUMULATE)]
        # How many rows each term counts in the whole step: its divisor. It is known before the first forward.
        counts = objective.counts(batches, step=step, steps=STEPS)
        for batch in batches:
            for lesson in scheme.lessons(batch, *needs):
                objective(lesson, batch, counts).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return evaluate(scheme.student, data.test.batches(256)).accuracy


def student() -> nn.Module:
    torch.manual_seed(0)
    return ps.students.plain_cnn(channels=1, classes=10, width=8)


labels_only = ps.Objective(ps.term("cross_entropy"))
distillation = ps.Objective(
    ps.term("kd", 0.9, temperature=4.0),
    ps.term("cross_entropy", 0.1),
    ps.term("attention_transfer", 10.0, at={"stage2": "layer2", "stage3": "layer3"}),
)

torch.manual_seed(0)
teacher = ps.students.resnet(channels=1, classes=10, depth=8, width=16)
print(f"teacher    {train(teacher, labels_only, everything):.3f}  (all labels)")
print(f"alone      {train(student(), labels_only, only_labelled):.3f}  (150 labels)")
print(f"distilled  {train(student(), distillation, data, teacher):.3f}  (150 labels and the teacher)")
