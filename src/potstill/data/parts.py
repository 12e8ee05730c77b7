"""Which rows are for training and which for testing: as rows say, as paths say, or by a hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from potstill.core.errors import RecipeError
from potstill.data.records import Record, read_records
from potstill.data.rows import TEST_NAMES
from potstill.data.text_report import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What was said about the two parts of a data set; the knobs of `chat` of the same names."""

    path: str
    test_path: str
    test_share: float
    limit: int | None
    test_limit: int | None

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_share < 1.0:
            raise RecipeError(f"chat.test_share: {self.test_share} found, a share from 0 to below 1 expected.")

    def records(self, tally: Tally) -> Iterator[tuple[Record, bool]]:
        """The rows, and whether each is for testing. Those that belong to neither part are counted as left out."""
        for record in read_records(self.path):
            tally.is_divided |= record.split == "train" or record.split in TEST_NAMES
            if record.split in TEST_NAMES and self.test_path:
                tally.leave_out("it belongs to the test part, but test_path names another", record.place)
            elif record.split in ("", "train", *TEST_NAMES):
                yield record, record.split in TEST_NAMES or (not record.split and self._is_held(record))
            else:
                names = ", ".join(TEST_NAMES)
                tally.leave_out(f"its split '{record.split}' is neither train nor one of {names}", record.place)
        for record in read_records(self.test_path) if self.test_path else ():
            if record.split == "train":
                tally.leave_out("it belongs to the training part of test_path", record.place)
            else:
                yield record, True

    def may_hold_back(self, tally: Tally) -> bool:
        """Nothing but the share says what is for testing."""
        return self.test_share > 0.0 and not self.test_path and not tally.is_divided

    def _is_held(self, record: Record) -> bool:
        if self.test_path or not self.test_share:
            return False
        content = json.dumps(dict(record.fields), sort_keys=True, default=str).encode()
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        return number < self.test_share * 2**64
