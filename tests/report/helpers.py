"""Run folders made by hand: what a recipe writes, without training anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_run(
    folder: Path,
    accuracies: Mapping[str, Sequence[float]],
    *,
    name: str = "kd",
    about: str = "Hinton's distillation on spoken digits: a small student learns a teacher's softened answers.",
    recipe: str = "teacher: {use: resnet}\nobjective:\n  - {use: forward_kl, weight: 0.9, temperature: 4.0}\n",
    class_names: Sequence[str] = CLASSES,
    steps: int = 400,
) -> Path:
    """A finished run: for each arm, one accuracy per seed; everything else follows from it."""
    luck = random.Random(0)
    arms = {}
    for arm, seeds in accuracies.items():
        arms[arm] = [
            _seed(folder, arm, seed, accuracy, luck, num_classes=len(class_names), steps=steps)
            for seed, accuracy in enumerate(seeds)
        ]
    summary = {
        "name": name,
        "about": about,
        "cite": "Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. 2015.",
        "command": f"potstill run {name} fit.steps={steps} --out {folder.name}",
        "arms": arms,
        "class_names": list(class_names),
        "seconds": 312.4,
    }
    environment = {
        "command": "potstill run",
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "cores": 2,
        "packages": {"potstill": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "transformers": "absent"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def _seed(
    folder: Path, arm: str, seed: int, accuracy: float, luck: random.Random, *, num_classes: int, steps: int
) -> dict[str, object]:
    own = folder / f"{arm}-seed{seed}"
    own.mkdir(parents=True)
    scores: dict[str, object] = {
        "accuracy": accuracy,
        "per_class": [min(1.0, max(0.0, accuracy + luck.gauss(0.0, 0.03))) for _ in range(num_classes)],
        "nll": 3.1 * (1 - accuracy) + luck.gauss(0.0, 0.004),
        "ece": 0.4 * (1 - accuracy) + abs(luck.gauss(0.0, 0.004)),
        "parameters": 272_474 if arm == "teacher" else 19_722,
        "bytes": 1_106_000 if arm == "teacher" else 81_000,
        "latency_ms": luck.gauss(3.4 if arm == "teacher" else 0.82, 0.03),
        "num_items": 360,
        "agreement": None if arm == "teacher" else accuracy - 0.005,
        "kl_to_teacher": None if arm == "teacher" else 1.9 * (1 - accuracy),
    }
    lines = []
    for step in range(10, steps + 1, 10):
        fall = math.exp(-step / 90) + 0.08 + luck.gauss(0.0, 0.05)
        terms = {"cross_entropy": 2.1 * fall}
        if arm == "distilled":
            terms["forward_kl"] = 5.5 * fall + 0.2
        loss = sum(weight * value for weight, value in zip((0.1, 0.9), terms.values(), strict=False))
        lines.append({"step": step, "stage": 0, "loss": loss, "terms": terms, "lr": 0.05, "seconds": step * 0.031})
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (own / "scores.json").write_text(json.dumps(scores))
    return {"seed": seed, "folder": own.name, "scores": scores}
