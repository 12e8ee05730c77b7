"""A recipe and its data that a run is through with in a moment, and parts that stand outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from potstill.core.types import PerItem
from potstill.recipe import Recipe, build
from potstill.recipe.text import Tree, override

SIDE = 4
CLASSES = 3


def write_images(path: Path, *, num_train: int = 48, num_test: int = 24) -> Path:
    """An .npz file of 4 x 4 images: each class has a bright row of its own, under noise."""
    random = np.random.default_rng(0)
    labels = np.arange(num_train + num_test) % CLASSES
    images = random.integers(0, 160, (len(labels), SIDE, SIDE))
    images[np.arange(len(labels)), labels] += 60
    x_train, x_test = np.split(images.astype(np.uint8), [num_train])
    y_train, y_test = np.split(labels, [num_train])
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def content(data: Path) -> dict[str, Tree]:
    """The sections of a small recipe over the images in `data`."""
    return {
        "name": "tiny",
        "data": {"use": "images", "path": str(data), "batch": 8},
        "teacher": {"use": "mlp", "pixels": SIDE**2, "width": 16, "depth": 1, "fit": {"steps": 6, "lr": 0.05}},
        "student": {"use": "mlp", "pixels": SIDE**2, "width": 4, "depth": 1},
        "objective": [{"use": "cross_entropy"}, {"use": "kd", "temperature": 2.0}],
        "fit": {"steps": 6, "lr": 0.05, "log_every": 1, "checkpoint_every": 2},
        "seeds": [0],
    }


def recipe(data: Path, *changes: str) -> Recipe:
    return build(override(content(data), changes))


def write_recipe(folder: Path) -> Path:
    """The same as a file, beside its data."""
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(content(write_images(folder / "tiny.npz"))))
    return file


def broken_loss(student_logits: nn.Module, /) -> PerItem:
    """Fails in a way that nobody foresaw."""
    raise KeyError("unforeseen")


def never_built(*, channels: int, classes: int) -> nn.Module:
    """A model that must not be made."""
    raise AssertionError("a model was made although the recipe has a mistake")
