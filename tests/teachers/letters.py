"""A teacher of letters whose every word can be read back, and servers that tell what they were told to tell."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.core.writing import JSON, Example, Raw, Reply, Request
from potstill.knowledge import Elicited, elicit
from potstill.knowledge.label import label
from potstill.stores.requests import Requests
from potstill.students.hf import HfModel
from potstill.teachers import wire_replies
from potstill.teachers.local_writer import LocalTransport
from potstill.teachers.recorded import Recorded
from tests.students.lm import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789:?"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
HALF, QUARTER = math.log(0.5), math.log(0.25)


@cache
def letters() -> PreTrainedTokenizerFast:
    """One token per letter; nothing it says is cut into tokens otherwise."""
    vocab = {piece: at for at, piece in enumerate(("<pad>", "<end>", *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )


@cache
def model(seed: int = 0) -> HfModel:
    tokenizer = letters()
    made = tiny("llama", seed=seed, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    made.generation_config.eos_token_id = 1
    return HfModel(made, tokenizer=tokenizer)


def questions(num: int) -> list[Example]:
    return [Example.of(f"q{number}?") for number in range(num)]


def written(folder: Path, *, store: Requests, num: int = 16, log_probs: int | None = None) -> Elicited:
    """What the model of letters answers, with the log-probabilities of so many letters; None: of all."""
    writer = Recorded(LocalTransport(model()), store=store, price=None)
    listed = len(letters()) if log_probs is None else log_probs
    asking = label(teacher=writer, temperature=1.0, max_tokens=40, log_probs=listed)
    return elicit(questions(num), asking, out=folder)


def entry(name: str, *others: str, spelled: Sequence[int] | None = None, **fields: JSON) -> dict[str, JSON]:
    """A token of an answer as OpenAI tells it: at 1/2, the first of the others at 1/4, the next at 1/8."""
    top: list[JSON] = [{"token": name, "logprob": HALF, "bytes": None if spelled is None else list(spelled)}]
    top += [{"token": other, "logprob": QUARTER - number * math.log(2)} for number, other in enumerate(others)]
    own: dict[str, JSON] = {"token": name, "logprob": HALF, "top_logprobs": top}
    return own | ({} if spelled is None else {"bytes": list(spelled)}) | fields


def chat(text: str, told: JSON) -> JSON:
    """A chat completion with what it tells of its tokens."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"model": "canned", "choices": [choice | ({} if told is None else {"logprobs": {"content": told}})]}


class Canned:
    """A transport that answers each request with the body that a function makes of it."""

    identity = "canned"

    def __init__(self, answer: Callable[[Request], JSON]) -> None:
        self._answer = answer

    async def send(self, request: Request, *, before: Callable[[], Awaitable[None]]) -> Raw:
        await before()
        return Raw(status=200, headers={}, body=json.dumps(self._answer(request)).encode())

    def read(self, request: Request, raw: Raw) -> Reply:
        return wire_replies.read(request, raw.body)

    def input_tokens(self, request: Request) -> int:
        return 1

    async def close(self) -> None:
        pass


def canned(
    answer: Callable[[Request], JSON], folder: Path, *, store: Requests, rows: Iterable[Example] = (), **asking: int
) -> Elicited:
    """The rows that a server of canned answers gives to some questions."""
    writer = Recorded(Canned(answer), store=store, price=None)
    return elicit(rows or questions(4), label(teacher=writer, **asking), out=folder)
