"""Which positions matter: weights that multiply a loss, and the top fraction of each example's positions.

Both keep counts first. A weighted loss is still divided by the number of counted positions, not by the sum of weights,
which nobody knows before the first forward. A fraction is taken within each example, never within a micro-batch: how
many are kept then follows from the masks, and any split of a step equals the whole.

Dimension key: B examples, T positions, V classes, N counted positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.core.catalog import Card, card, find
from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Logits
from potstill.objective.chunked import sizes_for, slices
from potstill.objective.representations import dense, heard, rows, width

Weight = Callable[..., Tensor]
"""A part of kind "weight", or a function written like one: rows of logits, labels or extras -> [N]."""

LOGITS = frozenset({"student_logits", "teacher_logits"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The fraction of each example's counted positions where a weight is largest. Make it with `top(...)`."""

    by: Weight
    card: Card
    reads: tuple[str, ...]
    fraction: float

    def num_kept(self, counted: Tensor) -> Tensor:
        """ceil(fraction * counted positions) of each example: bool [B, T] -> [B]."""
        if counted.ndim != 2:
            raise SignalError(
                f"select by {self.card.name} chooses among the positions of an example, but these examples have one "
                "each. Remove it, or weigh instead."
            )
        # Without the little less, 0.1 * 30 would be above 3.
        return (self.fraction * counted.sum(dim=1, dtype=torch.float64) - 1e-9).ceil().clamp(min=0)

    def kept(self, counted: Tensor, scores: Tensor) -> Tensor:
        """The best of the counted positions: bool [B, T], [N] -> bool [B, T]. Of equal ones the earlier is kept."""
        # No score may tie with what is not counted. NaN sorts as the largest: it is not hidden.
        finite = torch.nan_to_num(scores.float(), nan=math.nan, neginf=torch.finfo(torch.float32).min)
        ranked = torch.full(counted.shape, -torch.inf, device=scores.device).masked_scatter(counted, finite)
        place = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return counted & (place < self.num_kept(counted)[:, None])

    def scores(
        self,
        student: Logits | None,
        teacher: Logits | None,
        named: Mapping[str, Tensor],
        *,
        num_rows: int,
        chunk_bytes: int,
    ) -> Tensor:
        """The weight at N positions, [N], without a gradient; a head not applied yet is so chunk by chunk."""
        classes = max((width(logits) for logits in (student, teacher) if logits is not None), default=1)
        # Without strips, as on an accelerator: a weight holds a few buffers of a chunk.
        chunk = sizes_for(classes, device="cuda", budget_bytes=chunk_bytes).chunk
        with torch.no_grad():
            return torch.cat([self._scored(student, teacher, named, which) for which in slices(num_rows, chunk)])

    def _scored(
        self, student: Logits | None, teacher: Logits | None, named: Mapping[str, Tensor], which: slice
    ) -> Tensor:
        said = None if student is None else dense(rows(student, which))
        there = {name: tensor[which] for name, tensor in named.items()}
        there |= heard(said, None if teacher is None else rows(teacher, which), self.reads, self.card)
        return self.by(*(there[name] for name in self.reads))


def top(by: Weight | str, /, *, fraction: float, place: str = "select") -> Top:
    """The `fraction` of each example's positions where a weight (function or catalog name) is largest.

    At least one position of an example that has any is kept, and the term's loss is divided by the number kept. A
    packed row is one example. Raises RecipeError for a fraction outside 0..1 and for what is no weight.
    """
    weight, its_card, reads = found(by, place=f"{place}.by")
    if isinstance(fraction, bool) or not 0.0 < fraction <= 1.0:
        raise RecipeError(f"{place}.fraction: found {fraction!r}, expected a number above 0, up to 1.")
    return Top(by=weight, card=its_card, reads=reads, fraction=float(fraction))


def found(by: Weight | str, *, place: str) -> tuple[Weight, Card, tuple[str, ...]]:
    """A weight with its card and what it reads. Raises RecipeError where it reads more than single positions."""
    weight: Weight = find("weight", by, place=place) if isinstance(by, str) else by
    reads = positional(weight)
    beyond = [name for name in reads if name == "mask" or name.startswith(("student_", "teacher_"))]
    if not reads or set(beyond) - LOGITS:
        raise RecipeError(
            f"{place}: {card(weight).name} is no weight of positions. One reads, as positional-only parameters, any of "
            "student_logits, teacher_logits, labels and names in the batch's extras."
        )
    return weight, card(weight), reads


def weighted(
    loss: Callable[..., Tensor], its_card: Card, reads: Collection[str], by: Weight | str, *, place: str
) -> tuple[Callable[..., Tensor], Card, tuple[str, ...]]:
    """A loss times a weight at each position, itself a loss that reads what both read; no gradient meets the weight."""
    weight, weight_card, weight_reads = found(by, place=place)
    both = tuple(dict.fromkeys((*reads, *weight_reads)))

    def values(*said: Tensor, **knobs: object) -> Tensor:
        given = dict(zip(both, said, strict=True))
        with torch.no_grad():
            scale = weight(*(given[name] for name in weight_reads))
        return loss(*(given[name] for name in reads), **knobs) * scale

    joint = replace(
        its_card,
        name=f"{its_card.name}*{weight_card.name}",
        # A top-k teacher coarsens the classes, which labels would not survive.
        distribution=its_card.distribution and weight_card.distribution and "labels" not in both,
        linear_in_teacher=its_card.linear_in_teacher and "teacher_logits" not in weight_reads,
        # A weight reads laws.
        raw=its_card.raw and "teacher_logits" in reads,
        of_draws=None,
    )
    return values, joint, both


def positional(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """What a loss or a weight reads: the names of its positional-only parameters, in order."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)
