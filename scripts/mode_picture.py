"""Draw docs/pictures/modes.svg: which divergence covers both modes of a teacher and which picks one.

    python scripts/mode_picture.py

The teacher is a mixture of two discretised Gaussians on 21 classes. The student is one such Gaussian, with the mean and
the width that make each divergence smallest. tests/test_examples.py holds the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.core.catalog import find

CLASSES = torch.arange(21, dtype=torch.float64)
KINDS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "skew_kl": {"alpha": 0.1},
    "jsd": {},
    "total_variation": {},
    "skew_reverse_kl": {"alpha": 0.1},
    "reverse_kl": {},
}


@dataclass(frozen=True)
class Fit:
    loss: float
    mean: float
    width: float
    probabilities: Tensor


def bump(mean: Tensor, width: Tensor) -> Tensor:
    """Logits of a discretised Gaussian."""
    return -((CLASSES - mean) ** 2) / (2 * width**2)


def teacher_logits() -> Tensor:
    width = torch.tensor(1.5, dtype=torch.float64)
    large, small = (bump(torch.tensor(mean, dtype=torch.float64), width).softmax(0) for mean in (5.0, 15.0))
    return (0.6 * large + 0.4 * small).log()


def fitted(kind: str, knobs: dict[str, float], teacher: Tensor) -> Fit:
    """The best student of all, by looking at a whole grid of means and widths and then closer around the best."""
    loss_of = find("loss", kind)
    mean, log_width = 10.0, 1.0
    reach_mean, reach_width = 10.0, 2.0
    for _ in range(8):
        means = torch.linspace(mean - reach_mean, mean + reach_mean, 101, dtype=torch.float64)
        widths = torch.linspace(log_width - reach_width, log_width + reach_width, 101, dtype=torch.float64).exp()
        grid = torch.cartesian_prod(means, widths)
        students = bump(grid[:, :1], grid[:, 1:])
        losses = loss_of(students, teacher.expand_as(students), **knobs)
        best = losses.argmin()
        mean, log_width = float(grid[best, 0]), float(grid[best, 1].log())
        # A tenth of the reach is five cells to each side of the best.
        reach_mean, reach_width = reach_mean / 10, reach_width / 10
    return Fit(float(losses[best]), mean, math.exp(log_width), students[best].softmax(0))


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "modes", "font.size": 9, "font.family": "sans-serif"})
    import matplotlib.pyplot as plt

    teacher = teacher_logits()
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 4.2), sharex=True, sharey=True, constrained_layout=True)
    for panel, (kind, knobs) in zip(panels.flat, KINDS.items(), strict=True):
        fit = fitted(kind, knobs, teacher)
        behaviour = "covers" if fit.width > 4 else "picks"
        print(f"{kind:16} loss {fit.loss:.6f}  mean {fit.mean:.4f}  width {fit.width:.4f}  {behaviour}")
        panel.bar(CLASSES, teacher.exp(), color="#c9d3df", width=0.9, label="teacher")
        panel.plot(CLASSES, fit.probabilities, color="#b4532a", linewidth=2, label="student")
        panel.set_title(f"{kind}: {behaviour}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    target = Path(__file__).parent.parent / "docs" / "pictures" / "modes.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    print(f"drew {target}")


if __name__ == "__main__":
    main()
