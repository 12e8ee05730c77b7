"""The bytes that a tokenizer's ids stand for, and the special tokens that stand for none.

Byte-level BPE (its pieces are written in GPT-2's alphabet), SentencePiece-like vocabularies (a meta space, byte
fallback) and plain pieces are known. Knows nothing of models or batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from potstill.core.errors import DataError
from potstill.core.vocabulary import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META_SPACE = "\u2581"
BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PROBES = ("a", "A", "a  b", "a\nb", "caf\u00e9", "\ufb01", "\uff11")
"""Text that a tokenizer must leave as it is. All of it is NFC already: only NFKC, lower case and the like alter it."""


class Spelling:
    """What each id of a tokenizer is written as. Raises DataError for a tokenizer whose bytes cannot be told."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, title: str) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{title}: the bytes of its tokens cannot be told. Use the fast version (tokenizer.json).")
        self.title = title
        self.fingerprint = fingerprint(tokenizer)
        self._tokenizer = tokenizer
        self._scheme = _Scheme.of(json.loads(tokenizer.backend_tokenizer.to_str()), title=title)
        added = tokenizer.added_tokens_decoder
        self.specials: dict[int, str] = {i: str(token) for i, token in added.items() if token.special}
        self.pieces: tuple[bytes | None, ...] = self._read(tokenizer, {i: str(t) for i, t in added.items()})
        """By id: the bytes, or None where it stands for none (special tokens, gaps)."""
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def leads(self) -> bool:
        """Whether it puts a space in front of a text, as SentencePiece does."""
        return self._bytes(self.encode("a")) == b" a"

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The special tokens that it puts in front of a text by itself."""
        bare = self.encode("a")
        whole = list(self._tokenizer("a", add_special_tokens=True).input_ids)
        return tuple(whole[: next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)])

    @property
    def limit(self) -> int:
        """The longest row that its model reads, in tokens."""
        return int(self._tokenizer.model_max_length)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts at once."""
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []

    def is_fallback(self, token: int) -> bool:
        """A single byte that stands in for what has no piece."""
        return self._scheme.falls_back and bool(BYTE_FALLBACK.fullmatch(self._tokenizer.convert_ids_to_tokens(token)))

    def check_faithful(self) -> None:
        """Raises DataError where the tokenizer rewrites text (NFKC, lower case, fewer spaces): its bytes then are no
        longer the text's. NFC is let through: a text that it changes is left out when it is met."""
        for text in PROBES:
            ids = self.encode(text)
            if any(token in self.specials for token in ids):
                continue  # unknown to it, so nothing is known of how it would write it
            found = self._bytes(ids)
            if found.removeprefix(b" ") != text.encode():
                raise DataError(
                    f"{self.title}: its tokenizer rewrites text: {text!a} becomes {found.decode(errors='replace')!a}, "
                    "so the bytes of both sides cannot be aligned. Take a teacher whose tokenizer keeps text as it is, "
                    "or learn from the texts it writes."
                )

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.pieces[token] or b"" for token in ids)

    def _read(self, tokenizer: PreTrainedTokenizerBase, added: Mapping[int, str]) -> tuple[bytes | None, ...]:
        pieces: list[bytes | None] = [None] * len(tokenizer)
        for piece, token in tokenizer.get_vocab().items():
            if token < len(pieces) and token not in self.specials:
                # Added tokens are written as they are, whatever the scheme of the others.
                pieces[token] = added[token].encode() if token in added else self._scheme.spell(piece)
        return tuple(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How a vocabulary writes bytes as text."""

    byte_level: bool
    meta_space: bool
    falls_back: bool

    @classmethod
    def of(cls, backend: Mapping[str, Any], *, title: str) -> _Scheme:
        kinds = set(_kinds({name: part for name, part in backend.items() if name != "model"}))
        kind = backend["model"].get("type", "")
        if kind == "WordPiece" or "WordPiece" in kinds:
            raise DataError(f"{title}: a WordPiece vocabulary drops the spaces of a text, so bytes cannot be aligned.")
        fallback = bool(backend["model"].get("byte_fallback")) or "ByteFallback" in kinds
        meta = META_SPACE in json.dumps(backend.get("decoder"), ensure_ascii=False) or "Metaspace" in kinds
        return cls(byte_level="ByteLevel" in kinds, meta_space=meta, falls_back=fallback)

    def spell(self, piece: str) -> bytes | None:
        if self.byte_level:
            return bytes(BYTE_OF[letter] for letter in piece) if all(letter in BYTE_OF for letter in piece) else None
        found = BYTE_FALLBACK.fullmatch(piece) if self.falls_back else None
        if found:
            return bytes([int(found[1], 16)])
        return (piece.replace(META_SPACE, " ") if self.meta_space else piece).encode()


def _kinds(part: object) -> list[str]:
    """Every "type" in a nested description."""
    if isinstance(part, Mapping):
        own = [part["type"]] if isinstance(part.get("type"), str) else []
        return own + [kind for value in part.values() for kind in _kinds(value)]
    return [kind for value in part for kind in _kinds(value)] if isinstance(part, list) else []


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _gpt2_alphabet()
