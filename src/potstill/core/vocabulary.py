"""Which piece of text a token id stands for: fingerprints that tell tokenizers, and chat templates, apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that a fingerprint reads."""

    chat_template: str | dict[str, str] | None

    @property
    def is_fast(self) -> bool: ...
    @property
    def backend_tokenizer(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...
    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal exactly where the same ids stand for the same pieces, and text is cut into them by the same rules.

    It covers every piece with its id, the added tokens and, of a fast tokenizer, its model (merges, scores). What
    only dresses the ids (special tokens put around a text, padding, truncation, the chat template) stays out.
    """
    # Truncation and padding are settings of the last call: of the backend's text only the model counts.
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if tokenizer.is_fast else {}
    added = {str(token_id): str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    return _digest(tokenizer.get_vocab(), added, model)


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal where conversations are rendered alike: the chat template and the special tokens it writes; "" for none."""
    if not tokenizer.chat_template:
        return ""
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest(tokenizer.chat_template, specials)


def _digest(*contents: object) -> str:
    """32 hexadecimal digits; the order in which a mapping happens to be listed does not matter."""
    text = json.dumps(contents, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()
