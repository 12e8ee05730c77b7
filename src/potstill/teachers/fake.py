"""A teacher that is a function or a table, behind the store, purse and patience of a real one. For tests and demos.

    fake(str.upper)                                   # gets the last thing that the user said, or the raw prompt
    fake(lambda request: ...)                         # an argument called `request` gets the whole Request
    fake({"What is 1 + 1?": "2"})                     # or the path of a JSON file that holds such a table

Tokens are words. Log-probabilities are made up, the same each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from potstill.core.catalog import part
from potstill.core.errors import DataError
from potstill.core.writing import (
    Failure,
    Raw,
    Reply,
    Request,
    TokenLogProb,
    ToolCall,
    TransportError,
    Usage,
    whole,
)
from potstill.stores.requests import Requests
from potstill.teachers.money import Purse
from potstill.teachers.patience import Retries
from potstill.teachers.recorded import Recorded
from potstill.teachers.writers import Given, writer_over

Said: TypeAlias = str | Reply | Raw
Answers: TypeAlias = Callable[[str], Said] | Callable[[Request], Said] | Mapping[str, str] | str | Path
Fault: TypeAlias = Callable[[Request, int], Raw | Exception | None]
"""What goes wrong with a request at its n-th sending, from 1; None: nothing."""


@part("writer")
def fake(
    answers: Answers,
    *,
    name: str = "fake",
    seconds: float = 0.0,
    price: Given = 0.0,
    budget: float | Purse = math.inf,
    store: str | Requests = "",
    run: str = "",
    retries: Retries | None = None,
    longer: float = 1.0,
    fault: Fault | None = None,
) -> Recorded:
    """A writer whose answers come from `answers`: a function, a table, or the path of a JSON table.

    A function gives text, a Reply, a Raw (an HTTP answer as it comes), or raises. seconds: how long each answer takes.
    price, budget, run, longer: as for a real one; a token is a word. store: empty is one that goes with the writer.
    """
    transport = FakeTransport(answers, name=name, seconds=seconds, fault=fault)
    return writer_over(
        transport, model=name, price=price, budget=budget, store=store or Requests.temporary(), run=run,
        retries=retries, longer=longer,
    )  # fmt: skip


class FakeTransport:
    """Answers in this process. `sent` counts how often each request left, by key."""

    def __init__(
        self, answers: Answers, *, name: str = "fake", seconds: float = 0.0, fault: Fault | None = None
    ) -> None:
        self.sent: Counter[str] = Counter()
        self._answer = _function(answers)
        self._name = name
        self._seconds = seconds
        self._fault = fault
        self._closed_until = 0.0

    @property
    def identity(self) -> str:
        return self._name

    @property
    def num_sent(self) -> int:
        return self.sent.total()

    async def send(self, request: Request, *, before: Callable[[], Awaitable[None]]) -> Raw:
        loop = asyncio.get_running_loop()
        while loop.time() < self._closed_until:  # a 429 said to wait
            await asyncio.sleep(self._closed_until - loop.time())
        await before()
        key = request.key(self.identity)
        self.sent[key] += 1
        if self._seconds:
            await asyncio.sleep(self._seconds)
        wrong = self._fault(request, self.sent[key]) if self._fault is not None else None
        if isinstance(wrong, Exception):
            raise wrong
        raw = _raw(wrong if wrong is not None else self._answer(request), request, self._name)
        if raw.status == 429:
            self._closed_until = loop.time() + float(raw.headers.get("retry-after", 0.0))
        return raw

    def read(self, request: Request, raw: Raw) -> Reply:
        """Raises ValueError for a body that no fake wrote."""
        try:
            return _read(whole(json.loads(raw.body)))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not an answer of a fake teacher: {error}") from error

    def input_tokens(self, request: Request) -> int:
        return len(_asked(request).split())

    async def close(self) -> None:
        pass


def http(status: int, body: str = "", **headers: str) -> Raw:
    """An HTTP answer by hand: `http(429, retry_after="1")`."""
    return Raw(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}, body=body.encode())


def lost(message: str = "the connection broke", *, maybe_billed: bool = True) -> TransportError:
    """No answer came."""
    return TransportError(message, maybe_billed=maybe_billed)


def last_words(request: Request) -> str:
    """What the user said last, or the raw prompt."""
    said = [message.content for message in request.messages if message.role == "user"]
    return said[-1] if said else request.prompt


def _function(answers: Answers) -> Callable[[Request], Said]:
    if isinstance(answers, (str, Path)):
        answers = _table(Path(answers))
    if isinstance(answers, Mapping):
        return _looked_up(answers)
    function: Callable[[Any], Said] = answers
    try:
        first = next(iter(inspect.signature(answers).parameters.values()), None)
    except ValueError:  # written in C, like str.upper on some Pythons
        first = None
    wants_all = first is not None and (first.name == "request" or first.annotation in (Request, "Request"))
    return function if wants_all else lambda request: function(last_words(request))


def _table(path: Path) -> Mapping[str, str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a JSON table of answers: {error}.") from error
    if not isinstance(table, dict) or not all(isinstance(answer, str) for answer in table.values()):
        raise DataError(f'{path}: expected one JSON object, {{"prompt": "answer", ...}}.')
    return table


def _looked_up(table: Mapping[str, str]) -> Callable[[Request], Said]:
    def answer(request: Request) -> Said:
        words = last_words(request)
        return table[words] if words in table else http(400, f"the table has no answer for: {words[:100]}")

    return answer


def _raw(said: Said, request: Request, model: str) -> Raw:
    if isinstance(said, Raw):
        return said
    reply = said if isinstance(said, Reply) else _spoken(said, request)
    if reply.usage == Usage():
        words = Usage(input=len(_asked(request).split()), output=len(reply.text.split()) + len(reply.reasoning.split()))
        reply = replace(reply, usage=replace(words, reasoning=len(reply.reasoning.split())))
    body = json.dumps(whole(asdict(replace(reply, model=reply.model or model))), ensure_ascii=False)
    return Raw(status=200, headers={"content-type": "application/json"}, body=body.encode())


def _spoken(text: str, request: Request) -> Reply:
    """As a server gives it: cut at max_tokens words, with the log-probabilities that were asked for."""
    tokens = re.findall(r"\s*\S+", text)
    cut = request.max_tokens is not None and len(tokens) > request.max_tokens
    if cut:
        tokens = tokens[: request.max_tokens]
        text = "".join(tokens)
    log_probs = prompt_log_probs = None
    if request.log_probs is not None:
        log_probs = tuple(_made_up(token, request.log_probs) for token in tokens)
    if request.prompt_log_probs is not None:
        given = re.findall(r"\s*\S+", _asked(request))
        prompt_log_probs = tuple(_made_up(token, request.prompt_log_probs) for token in given)
    return Reply(
        key="", text=text, finish="length" if cut else "stop", log_probs=log_probs, prompt_log_probs=prompt_log_probs
    )


def _made_up(token: str, alternatives: int) -> TokenLogProb:
    """A law that depends on the token only: it had 0.5 to 1, the alternatives share what is left."""
    chance = 0.5 + hashlib.sha256(token.encode()).digest()[0] / 512
    rest = math.log((1 - chance) / max(1, alternatives - 1))
    top = ((token, math.log(chance)), *((f"{token}~{n}", rest) for n in range(1, alternatives)))
    return TokenLogProb(token=token, log_prob=math.log(chance), top=top[:alternatives])


def _asked(request: Request) -> str:
    return " ".join(message.content for message in request.messages) or request.prompt


def _read(plain: dict[str, Any]) -> Reply:
    given = dict(plain)
    failure = given.pop("failure")
    return Reply(
        **{
            **given,
            "usage": Usage(**given["usage"]),
            "tool_calls": tuple(ToolCall(**call) for call in given["tool_calls"]),
            "log_probs": _read_log_probs(given["log_probs"]),
            "prompt_log_probs": _read_log_probs(given["prompt_log_probs"]),
            "failure": None if failure is None else Failure(**failure),
        }
    )


def _read_log_probs(plain: list[dict[str, Any]] | None) -> tuple[TokenLogProb, ...] | None:
    if plain is None:
        return None
    return tuple(
        TokenLogProb(
            token=one["token"], log_prob=one["log_prob"], top=tuple((word, value) for word, value in one["top"])
        )
        for one in plain
    )
