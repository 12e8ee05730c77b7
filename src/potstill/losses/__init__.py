"""Floor 1: losses, pure functions that never reduce. Every loss of the catalog is an attribute: `losses.forward_kl`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from potstill.core.catalog import parts
from potstill.core.errors import unknown


def __getattr__(name: str) -> Callable[..., Tensor]:
    if name.startswith("_"):
        raise AttributeError(name)
    known = parts("loss")
    if name not in known:
        raise AttributeError(str(unknown("losses", name, known, noun="loss")))
    return known[name]


def __dir__() -> list[str]:
    return list(parts("loss"))
