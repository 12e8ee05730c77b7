"""Draw docs/pictures/modes.svg: which divergence covers both modes of a teacher and which picks one.

    python scripts/mode_picture.py

The teacher is a mixture of two discretised Gaussians on 21 classes, the student one Gaussian whose mean and width are
fitted by gradient descent on each divergence, from several starts; the best fit is drawn (METHODS_LLM, Appendix 4, T1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.core.catalog import find

CLASSES = torch.arange(21, dtype=torch.float64)
KINDS = {
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
    """The best student over starts at both modes and between them, with narrow and wide beginnings."""
    loss_of = find("loss", kind)
    fits = []
    for mean_0 in (5.0, 8.0, 10.0, 15.0):
        for width_0 in (1.5, 6.0):
            mean = torch.tensor(mean_0, dtype=torch.float64, requires_grad=True)
            log_width = torch.tensor(width_0, dtype=torch.float64).log().requires_grad_()
            optimizer = torch.optim.LBFGS([mean, log_width], max_iter=300, line_search_fn="strong_wolfe")

            def closure(mean: Tensor = mean, log_width: Tensor = log_width) -> Tensor:
                optimizer.zero_grad()
                value = loss_of(bump(mean, log_width.exp())[None], teacher[None], **knobs).sum()
                value.backward()
                return value

            optimizer.step(closure)
            with torch.no_grad():
                student = bump(mean, log_width.exp())
                value = float(loss_of(student[None], teacher[None], **knobs).sum())
            fits.append(Fit(value, float(mean), float(log_width.exp()), student.softmax(0)))
    return min(fits, key=lambda fit: fit.loss)


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
