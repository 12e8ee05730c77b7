"""Rows of tokens, and micro-batches of them by number. Labels come aligned: nothing here shifts.

Dimension key: B examples, T positions, N tokens of the whole set, D documents, R rows (of one document or, packed, of
several).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import IGNORED, Batch
from potstill.data.sources import generator, order
from potstill.data.tokens import Ids

WINDOW = 50
"""Batches among which rows of like length are brought together: much less padding, and still far from sorted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """All tokens of a set, end to end, and where documents and rows begin among them."""

    ids: Tensor
    """int32 [N]."""
    labels: Tensor
    """int32 [N]: the token that the model is to say at this place, IGNORED where it is not supervised."""
    borders: Tensor
    """int64 [D + 1]: document d is ids[borders[d] : borders[d + 1]]."""
    firsts: Tensor
    """int64 [R + 1]: row r is made of the documents firsts[r] to firsts[r + 1] - 1."""
    keys: tuple[str, ...]
    """One per document: a hash of its ids, its labels and of what they were made with."""
    pad_id: int
    vocabulary: str
    multiple_of: int = 1
    """Rows are filled up to a width that this divides."""

    @property
    def num_rows(self) -> int:
        return len(self.firsts) - 1

    @property
    def is_packed(self) -> bool:
        """Some row holds several documents."""
        return len(self.firsts) != len(self.borders)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens per row: int64 [R]."""
        return self.borders[self.firsts].diff()

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        if not self.is_packed:
            return self.keys
        members = pairwise(self.firsts.tolist())
        return tuple(digest("/".join(self.keys[first:stop]).encode()) for first, stop in members)

    def take(self, documents: Tensor) -> TokenRows:
        """These documents [d] in this order, one to a row."""
        starts, sizes = self.borders[documents], self.borders.diff()[documents]
        borders = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        index = torch.arange(int(borders[-1])) + (starts - borders[:-1]).repeat_interleave(sizes)
        return replace(
            self,
            ids=self.ids[index],
            labels=self.labels[index],
            borders=borders,
            firsts=torch.arange(len(borders)),
            keys=tuple(map(self.keys.__getitem__, documents.tolist())),
        )

    def batch(self, rows: Tensor) -> Batch:
        """These rows [B], filled up on the right to the longest: ids, masks and labels [B, T]."""
        start = self.borders[self.firsts[rows]]
        length = self.lengths[rows]
        width = -(-int(length.max()) // self.multiple_of) * self.multiple_of
        offset = torch.arange(width)
        padding = offset >= length[:, None]
        index = (start[:, None] + offset).masked_fill_(padding, 0)
        labels = self.labels[index].long().masked_fill_(padding, IGNORED)
        inputs = {
            "input_ids": self.ids[index].long().masked_fill_(padding, self.pad_id),
            "attention_mask": (~padding).long(),
            "position_ids": offset.expand(len(rows), -1).masked_fill(padding, 0),
        }
        if self.is_packed:
            document = torch.searchsorted(self.borders, index, right=True) - 1
            inputs["position_ids"] = (index - self.borders[document]).masked_fill_(padding, 0)
            inputs["segments"] = (document - self.firsts[rows][:, None] + 1).masked_fill_(padding, 0)
        return Batch(
            keys=tuple(map(self.row_keys.__getitem__, rows.tolist())),
            inputs=inputs,
            labels=labels,
            mask=labels != IGNORED,
            vocabulary=self.vocabulary,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Endless epochs over `lengths`, each a permutation of its own, cut into batches: `items(i)` is a pure function.

    With a `window`, so many batches of an epoch are sorted by length and then shuffled as wholes: rows of like length
    meet. What meets depends on the batch size then; without a window, two batches of 4 are one batch of 8.
    """

    lengths: Tensor
    batch_size: int
    seed: int
    window: int = 0

    def items(self, index: int) -> Tensor:
        """The items of micro-batch `index`: [batch_size]."""
        assert index >= 0, "batches are counted from 0"
        if len(self.lengths) == 0:
            raise DataError("These data have no row here to make a batch of. Give test_path or a larger test_share.")
        start, stop = index * self.batch_size, (index + 1) * self.batch_size
        parts = []
        while start < stop:
            epoch, begin = divmod(start, len(self.lengths))
            end = min(begin + stop - start, len(self.lengths))
            parts.append(_bucketed(self, epoch)[begin:end] if self.window else self._shuffled(epoch)[begin:end])
            start += end - begin
        return torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        return order(len(self.lengths), self.seed, epoch, "rows")


@lru_cache(maxsize=4)
def _bucketed(stream: Stream, epoch: int) -> Tensor:
    """One epoch's order with rows of like length side by side in a batch. Do not write to it.

    The stream is cut into batches without regard to epochs: the two batches that reach into other epochs stay as
    they fall, so every epoch holds each row exactly once.
    """
    size, count = stream.batch_size, len(stream.lengths)
    shuffled = stream._shuffled(epoch)
    head = -epoch * count % size
    stop = head + max(count - head, 0) // size * size
    parts = [shuffled[:head]]
    for number, rows in enumerate(torch.split(shuffled[head:stop], stream.window * size)):
        batches = rows[stream.lengths[rows].argsort(stable=True)].view(-1, size)
        draw = generator(stream.seed, epoch, number, "buckets")
        parts.append(batches[torch.randperm(len(batches), generator=draw)].flatten())
    return torch.cat([*parts, shuffled[stop:]])


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSource:
    """Batches {"input_ids", "attention_mask", "position_ids"} [B, T] (packed: "segments" too) with labels [B, T]."""

    rows: TokenRows
    stream: Stream

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def __len__(self) -> int:
        return self.num_rows

    def with_batch(self, size: int) -> TokenSource:
        """The same stream cut into other batches; the tokens are shared."""
        return replace(self, stream=replace(self.stream, batch_size=size))

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the endless stream: a pure function of `index`."""
        return self.rows.batch(self.stream.items(index))

    def batches(self, size: int) -> Iterator[Batch]:
        """Each row once, in the order of the set; the last batch may be short."""
        for rows in torch.split(torch.arange(self.num_rows), size):
            if len(rows):
                yield self.rows.batch(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSource:
    """Batches of pairs: rows 2p and 2p + 1 of a batch are the chosen and the rejected answer of its pair p."""

    rows: TokenRows
    """Chosen and rejected in turn."""
    stream: Stream

    @classmethod
    def of(cls, rows: TokenRows, *, batch_size: int, seed: int, window: int) -> PairSource:
        longer = rows.lengths.view(-1, 2).amax(dim=1)
        return cls(rows=rows, stream=Stream(lengths=longer, batch_size=batch_size, seed=seed, window=window))

    @property
    def num_rows(self) -> int:
        """Pairs, not answers."""
        return self.rows.num_rows // 2

    def __len__(self) -> int:
        return self.num_rows

    def with_batch(self, size: int) -> PairSource:
        """The same stream cut into other batches; the tokens are shared."""
        return replace(self, stream=replace(self.stream, batch_size=size))

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the endless stream: a pure function of `index`."""
        return self._batch(self.stream.items(index))

    def batches(self, size: int) -> Iterator[Batch]:
        """Each pair once, in the order of the set; the last batch may be short."""
        for pairs in torch.split(torch.arange(self.num_rows), size):
            if len(pairs):
                yield self._batch(pairs)

    def _batch(self, pairs: Tensor) -> Batch:
        batch = self.rows.batch(torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten())
        chosen = torch.tensor([True, False]).repeat(len(pairs))
        return replace(batch, extras={"pair": pairs.repeat_interleave(2), "chosen": chosen})


def rows_of(documents: Sequence[tuple[Ids, Ids]], *, salt: str, pad_id: int, vocabulary: str) -> TokenRows:
    """Documents as (ids [T], aligned labels [T]), one to a row. `salt` enters the keys: what the ids were made with."""
    sizes = torch.tensor([len(ids) for ids, _ in documents], dtype=torch.long)
    return TokenRows(
        ids=_joined([ids for ids, _ in documents]),
        labels=_joined([labels for _, labels in documents]),
        borders=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
        firsts=torch.arange(len(documents) + 1),
        keys=tuple(digest(salt.encode(), ids.tobytes(), labels.tobytes()) for ids, labels in documents),
        pad_id=pad_id,
        vocabulary=vocabulary,
    )


def digest(*contents: bytes) -> str:
    """16 hexadecimal digits of BLAKE2b, as for the keys of images; where one content ends matters."""
    total = hashlib.blake2b(digest_size=8)
    for content in contents:
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()


def _joined(arrays: Sequence[Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays]))
