"""Several documents in one row: fewer rows, hardly any padding, the same answers.

Which documents share a row changes nothing about what is learnt from each: labels end with their document, positions
begin anew, and models attend within a segment only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import torch

from potstill.data.sequences import TokenRows
from potstill.data.sources import generator

WINDOW = 4096
"""Documents that are fitted together at a time. Neighbours in the file, often alike, do not meet: they are shuffled."""


def packed(rows: TokenRows, *, length: int, seed: int) -> TokenRows:
    """The same documents in rows of up to `length` tokens. Depends on these words alone; all epochs share the rows."""
    assert not rows.is_packed, "packed rows are packed again"
    sizes = rows.lengths.tolist()
    shuffled = torch.randperm(len(sizes), generator=generator(seed, "packing"))
    bins: list[list[int]] = []
    for some in torch.split(shuffled, WINDOW):
        members = some.tolist()
        bins += [[members[place] for place in bin] for bin in fit([sizes[member] for member in members], length)]
    taken = rows.take(torch.tensor([member for bin in bins for member in bin], dtype=torch.long))
    counts = torch.tensor([0, *(len(bin) for bin in bins)], dtype=torch.long)
    return replace(taken, firsts=counts.cumsum(0))


def fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, largest first: each size goes to the fullest bin that still has room. Returns the bins' members.

    Never more than 11/9 of the fewest bins and a few, as first fit (Johnson et al. 1974), and quicker: the rooms that
    are left are kept in order, so a bin is found by bisection.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, number of the bin), in increasing order
    for member in sorted(range(len(sizes)), key=lambda member: -sizes[member]):
        place = bisect_left(rooms, (sizes[member], 0))
        if place == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(place)
        bins[number].append(member)
        insort(rooms, (room - sizes[member], number))
    return bins
