"""Optimizers by name, and the learning rate as a function of the step: resuming it is arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from potstill.core.catalog import find, keywords
from potstill.core.errors import RecipeError, unknown

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "step")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """An optimizer over one group: every parameter decays, norms and biases included, as in the CIFAR protocols.

    `momentum` is SGD's momentum and Adam's first beta (the second is 0.999). `package.module:Class` is given lr,
    momentum and weight_decay as far as its signature names them.
    Raises RecipeError for a weight decay that an outside class cannot take.
    """
    parameters = list(parameters)
    betas = (momentum, 0.999)
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return _outside(name, parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def check_optimizer(name: str) -> None:
    """Raises RecipeError for a name that is none of ours and no installed `package.module:Class` of an optimizer."""
    if ":" in name:
        found = find("optimizer", name, place="fit.optimizer")
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise RecipeError(f"fit.optimizer: {name} is no torch.optim.Optimizer class. Name one that is.")
    elif name not in OPTIMIZERS:
        raise unknown("fit.optimizer", name, OPTIMIZERS, noun="optimizer")


def learning_rate(
    step: int, *, schedule: str, lr: float, steps: int, warmup: int = 0, milestones: Sequence[float] = ()
) -> float:
    """The learning rate of `step` (from 0): rises linearly to `lr` over `warmup` steps, then follows the schedule.

    "cosine" and "linear" fall to 0 at the end of the run; "step" is a tenth after each milestone, a fraction of steps.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    match schedule:
        case "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return lr * (1.0 - done)
        case "step":
            return lr * 0.1 ** sum(step >= milestone * steps for milestone in milestones)
        case _:
            return lr


def _outside(name: str, parameters: list[nn.Parameter], **given: float) -> Optimizer:
    make = find("optimizer", name, place="fit.optimizer")
    known = keywords(make)
    if given["weight_decay"] and "weight_decay" not in known:
        raise RecipeError(f"fit.weight_decay: {name} has no weight_decay, so it would be ignored. Set it to 0.")
    made = make(parameters, **{key: value for key, value in given.items() if key in known})
    assert isinstance(made, Optimizer), f"check_optimizer let {name} pass"
    return made
