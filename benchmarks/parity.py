"""Our losses against their counterparts in torchdistill and TRL: value and gradient on the same random input.

    python benchmarks/parity.py

Every row ends either in "equal" or in a deviation with its number in the register of known disagreements (D-.. of the
classic methods, section O; Appendix 1 and the numbered sections of the language-model methods) and, behind it, how
far apart both are once that one deviation is undone. The exit code is 1 where a difference has no such explanation,
where undoing it does not close the gap, or where a deviation is listed that is not there. Ours are computed through
`Objective`, reduction included. Inputs are float64, except where TRL's fused kernel works in float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from parity_pairs import Pair, Problem, Scalar, pairs
from peers import make_torchvision_importable
from torch import Tensor

from potstill.core.catalog import parts
from potstill.core.run import environment, write_json

TOLERANCE = 1e-5
"""Relative, of value and gradient alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Relative differences of value and gradient."""

    value: float
    gradient: float

    @property
    def is_none(self) -> bool:
        # Not by max(): that can lose a NaN.
        return self.value < TOLERANCE and self.gradient < TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    loss: str
    peer: str
    ours: float
    theirs: float
    value_difference: float
    gradient_difference: float
    verdict: str
    explained: bool


def compared(problem: Problem, pair: Pair) -> Row:
    ours, theirs, found = difference(pair.ours, pair.theirs, problem)
    verdict, explained = judged(pair, found, problem)
    return Row(
        loss=pair.loss, peer=pair.peer, ours=ours, theirs=theirs, value_difference=found.value,
        gradient_difference=found.gradient, verdict=verdict, explained=explained,
    )  # fmt: skip


def difference(ours: Scalar, theirs: Scalar, problem: Problem) -> tuple[float, float, Difference]:
    """Both values, and how far they and their gradients are apart."""
    (one, one_gradient), (other, other_gradient) = (valued(each, problem) for each in (ours, theirs))
    gradient = float((one_gradient - other_gradient).norm() / other_gradient.norm())
    return one, other, Difference(value=abs(one - other) / abs(other), gradient=gradient)


def valued(scalar: Scalar, problem: Problem) -> tuple[float, Tensor]:
    value = scalar(problem)
    gradients = torch.autograd.grad(value, problem.leaves, allow_unused=True)
    whole = (torch.zeros_like(x) if g is None else g for x, g in zip(problem.leaves, gradients, strict=True))
    return float(value), torch.cat([each.flatten() for each in whole])


def judged(pair: Pair, found: Difference, problem: Problem) -> tuple[str, bool]:
    if pair.deviation is None:
        return ("equal", True) if found.is_none else ("DIFFERS, and nothing explains it", False)
    known = pair.deviation
    if found.is_none:
        return f"equal, although {known.reason} is listed: REMOVE IT", False
    _, _, left = difference(known.ours, known.theirs or pair.theirs, problem)
    told = f"deviates: {known.reason}; {known.how}: value {left.value:.0e}, gradient {left.gradient:.0e} apart"
    return told if left.is_none else f"{told}, which does NOT close the gap", left.is_none


def print_table(rows: list[Row]) -> None:
    print("| loss | peer | ours | peer's | value apart | gradient apart | verdict |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.loss} | {row.peer} | {row.ours:.6g} | {row.theirs:.6g} | {row.value_difference:.0e} | "
            f"{row.gradient_difference:.0e} | {row.verdict} |"
        )


def without_counterpart(rows: list[Row]) -> dict[str, list[str]]:
    """What either side has and no row names."""
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

    said = {word.strip("(,") for row in rows for word in f"{row.loss} {row.peer}".split()}
    return {
        "potstill": sorted(set(parts("loss")) - said),
        "torchdistill": sorted(set(MIDDLE_LEVEL_LOSS_DICT) - said),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/parity.json")
    arguments = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore")
    make_torchvision_importable()
    import torchdistill.losses.mid_level  # noqa: F401  (importing it registers the losses)

    rows = [compared(problem, pair) for problem, pair in pairs()]
    print_table(rows)
    alone = without_counterpart(rows)
    for side, names in alone.items():
        print(f"\nOnly in {side}, or compared nowhere here: {', '.join(names)}.")
    unexplained = [row.loss for row in rows if not row.explained]
    print(f"\n{len(rows)} pairs, {len(unexplained)} unexplained{': ' if unexplained else ''}{', '.join(unexplained)}.")
    if arguments.out:
        write_json(
            Path(arguments.out),
            {
                "environment": environment(" ".join(sys.argv)),
                "peers": {name: metadata.version(name) for name in ("torchdistill", "trl")},
                "tolerance": TOLERANCE,
                "table": [asdict(row) for row in rows],
                "without_counterpart": alone,
            },
        )
    if unexplained:
        sys.exit(1)


if __name__ == "__main__":
    main()
