"""Which id of a tokenizer a server means by the name of a token.

Servers write a token as the text it decodes to, as its piece of the vocabulary, or as "token_id:123" (vLLM's switch);
one that is a part of a character, which no text can be, as "bytes:\\xe2\\x80" (`wire.token_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from potstill.core.errors import SignalError
from potstill.core.writing import TokenLogProb
from potstill.data.tokens import Tokenizer
from potstill.teachers.spelling import Spelling
from potstill.teachers.wire import BYTE_NAME, token_name

BYTE = re.compile(r"\\x([0-9a-fA-F]{2})")
NOT_TOLD = -9999.0
"""OpenAI's word for a log-probability it does not tell: the token was not among the 20 likeliest. vLLM's for -inf."""


class TokenNames:
    """The names of a tokenizer's ids. Raises DataError for a tokenizer whose bytes cannot be told."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spelled = Spelling(tokenizer, title=tokenizer.name_or_path or "the tokenizer").pieces
        self._size = len(tokenizer)
        self._pieces = tokenizer.get_vocab()
        self._known: dict[str, int | None] = {}
        self._texts: dict[str, tuple[int, ...]] = {}
        """The tokens that a text may stand for. Alone, a token may be written without the space it begins with."""
        for token in self._pieces.values():
            exact = spelled[token] if token < self._size else None
            names = {tokenizer.decode([token]), *(() if exact is None else (token_name(exact),))}
            for name in names:
                self._texts[name] = (*self._texts.get(name, ()), token)

    def meant(self, name: str) -> tuple[int, ...]:
        """The ids that a server may mean, those that it writes as text first; none where nobody is called so."""
        word, _, number = name.partition(":")
        if word == "token_id" and number.isdigit():
            return (int(number),) if int(number) < self._size else ()
        name, piece = _as_text(name), self._pieces.get(name)
        return (*self._texts.get(name, ()), *(() if piece is None else (piece,)))

    def id_of(self, name: str) -> int | None:
        """None for a name that several tokens have, or none: its probability counts with the rest.

        A text goes before a piece that happens to look like it: of a byte-level vocabulary an e with an accent is one.
        """
        if name not in self._known:
            meant = self.meant(name)
            num_texts = len(self._texts.get(_as_text(name), ())) or len(meant)
            self._known[name] = meant[0] if num_texts == 1 else None
        return self._known[name]

    def entries(self, told: TokenLogProb, *, own: int) -> Mapping[int, float]:
        """Classes and their log-probabilities, the token `own` that stands there among them where its own is told.

        Raises SignalError where the server names another token in its place.
        """
        meant = self.meant(told.token)
        if meant and own not in meant:
            raise SignalError(
                f"The server speaks of token {meant[0]} ('{told.token}') where the row has {own}. Give the tokenizer "
                "of the served model."
            )
        named = {self.id_of(name): log_prob for name, log_prob in told.top} | {own: told.log_prob}
        return {token: value for token, value in named.items() if token is not None and value > NOT_TOLD}


def _as_text(name: str) -> str:
    """A name by bytes as `token_name` spells it; any other as it is."""
    if not name.startswith(BYTE_NAME):
        return name
    return token_name(bytes(int(byte, 16) for byte in BYTE.findall(name)))
