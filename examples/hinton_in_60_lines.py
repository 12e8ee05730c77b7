"""Hinton's distillation in bare PyTorch, without Potstill, so that you see what the library does for you.

The student may use 100 labels. Its teacher saw all 1,347, and tells it for every image how likely each digit is.
Hinton, Vinyals, Dean 2015 (arXiv:1503.02531).    python examples/hinton_in_60_lines.py
"""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

STEPS = 300 if os.environ.get("POTSTILL_QUICK") else 1000
TEMPERATURE, UNKNOWN = 4.0, -100

digits = load_digits()
split = train_test_split(digits.data / 16.0, digits.target, test_size=450, stratify=digits.target, random_state=0)
x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
y_train, y_test = (torch.tensor(part) for part in split[2:])
few, _ = train_test_split(torch.arange(len(x_train)), train_size=100, stratify=y_train, random_state=0)
y_few = torch.full_like(y_train, UNKNOWN)
y_few[few] = y_train[few]


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(model: nn.Module, rows: Tensor, labels: Tensor, seed: int, teacher: nn.Module | None = None) -> float:
    """Train on these rows of the training set; the accuracy on the test set."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (64,), generator=order)]
        logits, truth = model(x_train[batch]), labels[batch]
        num_known = (truth != UNKNOWN).sum().clamp(min=1)
        loss = F.cross_entropy(logits, truth, ignore_index=UNKNOWN, reduction="sum") / num_known
        if teacher is not None:
            with torch.no_grad():
                target = F.softmax(teacher(x_train[batch]) / TEMPERATURE, dim=1)
            soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), target, reduction="batchmean")
            loss = 0.1 * loss + 0.9 * TEMPERATURE**2 * soft  # T^2 gives the soft gradient its size back
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model(x_test).argmax(dim=1) == y_test).float().mean().item()


teacher = network(256, seed=0)
print(f"teacher    {train(teacher, torch.arange(len(x_train)), y_train, 0):.3f}  (256 hidden units, all labels)")
alone = [train(network(16, seed), few, y_few, seed) for seed in range(3)]
distilled = [train(network(16, seed), torch.arange(len(x_train)), y_few, seed, teacher) for seed in range(3)]
for name, scores in (("alone", alone), ("distilled", distilled)):
    print(f"{name:10} {sum(scores) / 3:.3f}  (16 hidden units, 100 labels; lowest of 3 seeds {min(scores):.3f})")
