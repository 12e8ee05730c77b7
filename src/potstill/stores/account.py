"""What is in a store, and whether it is whole. Asks no teacher."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from potstill.stores.signals import Contents, SignalReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What is in a store."""

    contents: Contents
    rows: int
    positions: int
    bytes: int
    """On disk: rows, indexes and manifest."""
    shards: int
    torn: tuple[str, ...]

    @property
    def bytes_per_position(self) -> float:
        return self.bytes / max(1, self.positions)

    def lines(self) -> tuple[tuple[str, str], ...]:
        """(what, value) lines for `potstill cache info`."""
        told = ((name, "; ".join(map(str, value)) if isinstance(value, list) else str(value))
                for name, value in self.contents.fields().items() if value not in ("", None, []))  # fmt: skip
        return (
            *told,
            ("rows", f"{self.rows:,}"),
            ("counted positions", f"{self.positions:,}"),
            ("bytes", f"{self.bytes:,}"),
            ("bytes per position", f"{self.bytes_per_position:.2f}"),
            ("shards", f"{self.shards:,}"),
            ("torn shards", ", ".join(self.torn) or "none"),
        )


def info(path: str | Path) -> Info:
    """What is in the store at `path`; every shard is checked."""
    store = checked(path)
    shards = [one for one in store.shards.manifest.shards if one.name not in store.shards.torn]
    return Info(
        contents=store.contents,
        rows=sum(one.rows for one in shards),
        positions=sum(one.positions for one in shards),
        bytes=sum(file.stat().st_size for file in store.folder.iterdir()),
        shards=len(shards),
        torn=tuple(store.shards.torn),
    )


def checked(path: str | Path) -> SignalReader:
    """The store at `path` with every shard checked; what is torn is in `.shards.torn`, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SignalReader(path, thorough=True)
