"""Servers that speak about a given text, in the forms in which they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from potstill.core.errors import SignalError
from potstill.core.types import Batch, Need
from potstill.core.writing import Reply, Request, TokenLogProb, Usage
from potstill.teachers.fake import fake
from potstill.teachers.scored import Scored
from potstill.teachers.token_names import TokenNames
from tests.teachers.tongues import bytewise, rows

LOGITS = Need(logits=True)


def told(ids: list[int], *, by_id: bool = True) -> tuple[TokenLogProb, ...]:
    """Own token at 1/2, and the one after it in the vocabulary at 1/4."""
    tokenizer = bytewise()

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else tokenizer.decode([token])

    half, quarter = torch.tensor([0.5, 0.25]).log().tolist()
    return tuple(
        TokenLogProb(token=name(token), log_prob=half, top=((name(token), half), (name(token + 1), quarter)))
        for token in ids[1:]
    )


def teacher(*, by_id: bool = True, drop: int = 0, shift: int = 0, silent: bool = False) -> Scored:
    def answer(request: Request) -> Reply:
        listed: Any = request.extra["prompt"]
        given = told([token + shift for token in listed], by_id=by_id)
        usage = Usage(input=len(listed), output=1)
        return Reply(key="", text="x", prompt_log_probs=None if silent else given[drop:], usage=usage)

    return Scored(fake(answer), bytewise(), k=2)


def batch(*texts: str, **layout: Any) -> Batch:
    return rows(bytewise(), *(texts or ("abc",)), **layout)


def test_each_counted_position_has_the_law_of_the_token_that_follows() -> None:
    read = batch("abc", "de", prompt=1)
    said = teacher()(read, LOGITS).logits
    labels = read.labels[read.mask]
    ids = said.ids[read.mask].sort(dim=1).values
    assert torch.equal(ids, torch.stack([labels, labels + 1], dim=1))
    assert torch.allclose(said.log_probs[read.mask].exp().sum(1), torch.tensor(0.75))


def test_positions_that_do_not_count_hold_nothing() -> None:
    read = batch("abc", "de", prompt=1)
    said = teacher()(read, LOGITS).logits
    assert bool(said.log_probs[~read.mask].isneginf().all())


def test_padding_on_the_left_changes_nothing() -> None:
    right, left = (batch("abc", "de", left=left) for left in (False, True))
    said = [teacher()(each, LOGITS).logits.log_probs[each.mask] for each in (right, left)]
    assert torch.equal(*said)


def test_tokens_named_by_their_text_are_found() -> None:
    read = batch("abc")
    assert torch.equal(
        teacher(by_id=False)(read, LOGITS).logits.ids[read.mask][:3], teacher()(read, LOGITS).logits.ids[read.mask][:3]
    )


def test_a_name_that_two_tokens_have_means_neither() -> None:
    names = TokenNames(bytewise())
    # Half a character is no text: all such bytes are written alike.
    assert names.id_of("\ufffd") is None
    assert names.id_of("a") is not None


def test_an_id_beyond_the_tokenizer_is_padding_of_the_head() -> None:
    assert TokenNames(bytewise()).id_of("token_id:999999") is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"silent": True}, "gives no log-probabilities for a given text.*vLLM"),
        ({"drop": 1}, "speaks of 4 tokens where the row has 5"),
        ({"shift": 1}, "Give the tokenizer of the served model"),
    ],
)
def test_what_a_server_fails_to_say_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SignalError, match=sentence):
        teacher(**settings)(batch("abc"), LOGITS)


def test_features_are_not_to_be_had() -> None:
    with pytest.raises(SignalError, match="probabilities only"):
        teacher()(batch(), Need(features=frozenset({"hidden/1"})))


def test_a_batch_of_another_tokenizer_is_refused() -> None:
    read = batch()
    other = Batch(keys=read.keys, inputs=read.inputs, labels=read.labels, mask=read.mask, vocabulary="other")
    with pytest.raises(SignalError, match="another tokenizer"):
        teacher()(other, LOGITS)


def test_nothing_is_asked_where_nothing_is_needed() -> None:
    assert teacher(silent=True)(batch(), Need()).logits is None
