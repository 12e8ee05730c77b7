"""Numbers of any width survive packing, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.stores.bits import NARROWEST, WIDEST, pack, unpack


def unpacked(strings: list[bytes], width: int) -> list[int]:
    packed = np.frombuffer(b"".join(strings), dtype=np.uint8)
    return unpack(packed, np.array([len(string) for string in strings], dtype=np.int64), width).tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_strings_of_numbers_round_trip(data):
    width = data.draw(st.integers(NARROWEST, WIDEST))
    lists = data.draw(st.lists(st.lists(st.integers(0, 2**width - 1), max_size=9), max_size=5))
    strings = [pack(np.array(numbers, dtype=np.uint64), width) for numbers in lists]
    assert unpacked(strings, width) == [number for numbers in lists for number in numbers]


def test_nothing_lies_between_two_numbers():
    assert len(pack(np.arange(1000, dtype=np.uint64), 17)) == -(-1000 * 17 // 8)


def test_the_lowest_bit_comes_first():
    # 0x155 = 1 0101 0101, then 0x0AA = 0 1010 1010: 18 bits, the second number from bit 1 of the second byte on.
    assert pack(np.array([0x155, 0x0AA], dtype=np.uint64), 9) == bytes([0x55, 0x01 | (0x0AA << 1) & 0xFF, 0x0AA >> 7])


@pytest.mark.parametrize("width", [8, 11, 32])
def test_nothing_packs_into_nothing(width):
    assert pack(np.empty(0, dtype=np.uint64), width) == b""
    assert unpacked([], width) == []
