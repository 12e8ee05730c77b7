"""Build a small store and be killed at the nth touch of the disk, for n = 1, 3, 5, ...; then build again.

Prints how many kills there were and how many stores came out different. An audit hook sees every file that Python
opens, renames or removes, so the kills fall between any two of them. Children are forked: one start of torch for all.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from potstill.core.types import Batch, Dense, Need, Signal
from potstill.stores import Sampled
from potstill.teachers.remembered import build


class Rows:
    """Batches of two rows out of five."""

    def batch(self, index: int) -> Batch:
        which = [(2 * index + row) % 5 for row in range(2)]
        ids = torch.tensor(which)[:, None].expand(2, 4)
        mask = torch.ones(2, 4, dtype=torch.bool)
        return Batch(keys=tuple(f"r{row}" for row in which), inputs={"input_ids": ids}, labels=ids, mask=mask)


class Table:
    """A law for each token."""

    identity = "table"

    def __call__(self, batch: Batch, need: Need) -> Signal:
        laws = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
        return Signal(logits=Dense(logits=laws[batch.inputs["input_ids"]]))


def make(folder: Path) -> None:
    build(folder, Table(), Rows(), batches=4, sketch=Sampled(draws=8), shard_bytes=60)


def killed_at(folder: Path, touches: int) -> bool:
    """Build in a child that dies at the given touch of `folder`; whether it came that far."""
    child = os.fork()
    if not child:
        left = touches

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        make(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(out: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    make(out / "whole")
    whole = files(out / "whole")
    kills = differing = 0
    while killed_at(out / str(kills), 2 * kills + 1):
        make(out / str(kills))
        differing += files(out / str(kills)) != whole
        kills += 1
    print(len(whole), kills, differing)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
