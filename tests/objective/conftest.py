"""Shared by the tests of the fused engine: chunks of any size, and which path ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from potstill.objective import chunked


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Force a chunk size and record how often the fused path ran: a parity test must know which path it tested."""
    original = chunked.fused_sum

    def force(rows: int) -> list[int]:
        ran: list[int] = []

        def counting(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            ran.append(rows)
            return original(*args, **{**kwargs, "sizes": chunked.Sizes(chunk=rows, strip=max(rows // 2, 1))})

        monkeypatch.setattr(chunked, "fused_sum", counting)
        return ran

    return force
