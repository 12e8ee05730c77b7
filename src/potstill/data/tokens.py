"""From rendered text to token ids, each marked as supervised or not. Masks come from spans of characters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from potstill.core import vocabulary
from potstill.core.errors import DataError

if TYPE_CHECKING:
    from potstill.data.rendering import Rendered

Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int32]]"
Marks: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.bool_]]"


class Tokenizer(vocabulary.Tokenizer, Protocol):
    """The part of a transformers tokenizer that data reads."""

    name_or_path: str

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    def __call__(self, text: list[str], **settings: Any) -> Mapping[str, Any]: ...
    def apply_chat_template(self, conversation: list[dict[str, object]], **settings: Any) -> Any: ...
    def decode(self, token_ids: list[int], **settings: Any) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One text as tokens."""

    ids: Ids
    supervised: Marks
    """Whether a token is an answer: something that the model is to say."""


def load_tokenizer(tokenizer: str | Tokenizer) -> Tokenizer:
    """The tokenizer itself, or that of the model folder or hub model of this name. DataError where it will not do."""
    if isinstance(tokenizer, str):
        tokenizer = _from_pretrained(tokenizer)
    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.is_fast:
        raise DataError(f"{name}: this tokenizer cannot say where a token stands in the text. Give a fast one.")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token. Set its eos_token.")
    return tokenizer


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills up rows. Without a pad token the one that ends a text: no mask ever looks at ids."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token_id for token_id in ids if token_id is not None), 0)


def encode(texts: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Each text as tokens. A token that holds any supervised character is supervised, and so is the end of a text."""
    encoded: list[Encoded] = []
    for (plain, whole), some in groupby(texts, key=lambda text: (text.plain, text.is_whole)):
        encoded += _encode(list(some), tokenizer, plain=plain, whole=whole)
    return encoded


def _encode(texts: Sequence[Rendered], tokenizer: Tokenizer, *, plain: bool, whole: bool) -> list[Encoded]:
    found = tokenizer(
        [text.text for text in texts],
        # A chat template has written all special tokens itself; a second <s> in front would be one too many.
        add_special_tokens=plain,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=not whole,
        verbose=False,
    )
    encoded = []
    for row, text in enumerate(texts):
        ids = np.asarray(found["input_ids"][row], dtype=np.int32)
        places = None if whole else np.asarray(found["offset_mapping"][row], dtype=np.int64).reshape(-1, 2)
        supervised = np.ones(len(ids), np.bool_) if places is None else _inside(places, text)
        encoded.append(_ended(ids, supervised, text, tokenizer) if plain else Encoded(ids=ids, supervised=supervised))
    return encoded


def _inside(places: np.ndarray[Any, Any], text: Rendered) -> Marks:
    """Tokens that reach into a span: places [T, 2] as characters -> [T].

    Some tokenizers give a token of white space no width, at its end: it belongs to what ends there.
    """
    start, stop = places[:, 0], places[:, 1]
    inside = np.zeros(len(places), np.bool_)
    for first, last in text.spans:
        inside |= (stop > first) & ((start < last) | ((start == stop) & (stop <= last)))
    return inside


def _ended(ids: Ids, supervised: Marks, text: Rendered, tokenizer: Tokenizer) -> Encoded:
    """With the end-of-sequence token where the text is finished: once, also when the tokenizer or the text has it."""
    # The first token may be the same one (a <s> that opens and closes); it ends nothing.
    has_end = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    if has_end and text.ends:
        return Encoded(ids=ids, supervised=np.append(supervised[:-1], np.True_))
    if has_end:
        return Encoded(ids=ids[:-1], supervised=supervised[:-1])
    if text.ends:
        return Encoded(
            ids=np.append(ids, np.int32(tokenizer.eos_token_id or 0)), supervised=np.append(supervised, np.True_)
        )
    return Encoded(ids=ids, supervised=supervised)


def _from_pretrained(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: no tokenizer can be loaded from here ({reason}). Expected the folder of a model with its "
            "tokenizer.json, or a name on the hub."
        ) from error
    return found
