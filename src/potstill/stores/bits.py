"""Whole numbers of any width, one after the other without a gap.

Dimension key: E numbers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

Bytes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"
Integers: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
Numbers: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"

NARROWEST, WIDEST = 8, 57
"""From 8 bits on, the number of whole entries in a string of bytes is certain; 57 bits at any of the 8 places
in a byte still fit into one 64-bit word."""

_WHOLE = {8: "<u1", 16: "<u2", 32: "<u4"}


def pack(numbers: Numbers, width: int) -> bytes:
    """E numbers below 2^width -> ceil(E * width / 8) bytes, lowest bit first; the last byte is filled with zeros."""
    assert NARROWEST <= width <= WIDEST, f"{width} bits"
    assert not len(numbers) or int(numbers.max()) >> width == 0, f"{numbers.max()} does not fit into {width} bits"
    if width in _WHOLE:
        return numbers.astype(_WHOLE[width]).tobytes()
    each = numbers.astype("<u8")[:, None].view(np.uint8)
    bits = np.unpackbits(each, axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack(packed: Bytes, sizes: Integers, width: int) -> Numbers:
    """The numbers of several strings from `pack`, laid end to end in `packed`; `sizes` are their lengths in bytes."""
    if width in _WHOLE:
        return packed.view(_WHOLE[width]).astype(np.uint64)
    counts = sizes * 8 // width
    starts = np.cumsum(sizes) - sizes
    # Of entry e of a string that starts at byte s, the first bit is 8 s + e * width.
    firsts = np.repeat(8 * starts - width * (np.cumsum(counts) - counts), counts) + width * np.arange(counts.sum())
    padded = np.zeros(len(packed) + 8, dtype=np.uint8)
    padded[: len(packed)] = packed
    # A word at every byte: unaligned reads, which numpy makes for us.
    words: Numbers = np.ndarray(shape=(len(packed) + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    shifted: Numbers = words[firsts >> 3] >> (firsts & 7).astype(np.uint64)
    return shifted & np.uint64(2**width - 1)
