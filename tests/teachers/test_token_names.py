"""Which id a server means by a token's name."""

from __future__ import annotations

import json
import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potstill.core.errors import SignalError
from potstill.core.writing import Message, Request, TokenLogProb
from potstill.teachers import wire_replies
from potstill.teachers.token_names import TokenNames
from potstill.teachers.wire import token_name
from tests.teachers.letters import entry
from tests.teachers.tongues import bytewise, fast, pairwise

EURO = "\u20ac".encode()


def spaced() -> TokenNames:
    """A vocabulary with a meta space: the same word with and without the space in front."""
    pieces = ("<s>", "</s>", "<pad>", "\u2581he", "he", "\u2581she")
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TokenNames(fast(tokenizer))


def test_a_word_with_its_space_is_one_token() -> None:
    assert spaced().id_of(" he") == 3


def test_a_word_that_may_have_lost_its_space_is_nobody_s_name_and_may_stand_for_either() -> None:
    names = spaced()
    assert names.id_of("he") is None
    assert set(names.meant("he")) == {3, 4}


def test_a_word_that_only_one_token_can_be_is_its_name() -> None:
    assert spaced().id_of("she") == 5


def test_a_part_of_a_character_is_known_by_its_bytes() -> None:
    tokenizer = bytewise()
    names = TokenNames(tokenizer)
    parts = [token_name(EURO[at : at + 1]) for at in range(3)]
    assert parts[0] == "bytes:\\xe2"
    assert [names.id_of(part) for part in parts] == tokenizer("\u20ac").input_ids


def test_bytes_that_are_a_text_are_that_text() -> None:
    names = TokenNames(bytewise())
    assert names.id_of("bytes:\\x61") == names.id_of("a") is not None


def test_a_text_goes_before_a_piece_that_looks_like_it() -> None:
    # In GPT-2's alphabet the piece of the byte 0xe9 is an e with an accent, whose two bytes are a token, too.
    accented = "\u00c3\u00a9"
    names = TokenNames(pairwise(accented))
    assert names.id_of("\u00e9") == pairwise(accented).convert_tokens_to_ids(accented)
    assert len(names.meant("\u00e9")) == 2


def test_another_token_in_the_place_of_the_row_s_own_is_refused() -> None:
    with pytest.raises(SignalError, match="speaks of token"):
        spaced().entries(TokenLogProb(token=" she", log_prob=-1.0), own=4)


def test_what_is_not_told_is_left_to_the_tail() -> None:
    told = TokenLogProb(token=" he", log_prob=-9999.0, top=((" she", math.log(0.5)),))
    assert spaced().entries(told, own=3) == {5: math.log(0.5)}


# From the wire.


def name_read(token: str, spelled: object) -> str:
    told = entry(token) | ({} if spelled is None else {"bytes": spelled})  # type: ignore[dict-item]
    choice = {"finish_reason": "stop", "message": {"content": "x"}, "logprobs": {"content": [told]}}
    request = Request(messages=(Message(role="user", content="?"),))
    reply = wire_replies.read(request, json.dumps({"choices": [choice]}).encode())
    assert reply.log_probs is not None
    return reply.log_probs[0].token


@pytest.mark.parametrize(
    ("token", "spelled", "name"),
    [
        ("\ufffd", [0xE2, 0x82], "bytes:\\xe2\\x82"),
        (" the", [32, 116, 104, 101], " the"),
        # A server that spells its own replacement mark knows no better.
        ("\ufffd", [0xEF, 0xBF, 0xBD], "\ufffd"),
        ("\ufffd", None, "\ufffd"),
        ("\ufffd", [999], "\ufffd"),
        ("\ufffd", "no", "\ufffd"),
    ],
)
def test_a_token_that_no_text_can_tell_is_named_by_its_bytes(token: str, spelled: object, name: str) -> None:
    assert name_read(token, spelled) == name
