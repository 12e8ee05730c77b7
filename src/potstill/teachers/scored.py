"""A teacher behind an address that says how likely it finds a given text: log-probabilities of the prompt as `Sparse`.

vLLM and SGLang do that for any text (`prompt_logprobs`, or the prompt echoed with its log-probabilities); hosted chat
models only for what they write themselves. Answers are kept in the request store: a text is paid for once.

Dimension key: B examples, T positions, N counted positions, K kept classes.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, ServiceError, SignalError
from potstill.core.types import Batch, Need, Signal, Sparse
from potstill.core.vocabulary import fingerprint
from potstill.core.writing import JSON, Request, Writer
from potstill.data.tokens import Tokenizer, load_tokenizer
from potstill.stores.requests import Requests
from potstill.stores.signals import spread
from potstill.teachers import wire
from potstill.teachers.crossing import Text, texts_of
from potstill.teachers.endpoint import endpoint
from potstill.teachers.money import TABLE
from potstill.teachers.token_names import TokenNames
from potstill.teachers.writers import Given

Asking: TypeAlias = Literal["prompt_logprobs", "echo"]
Result = TypeVar("Result")
STEP = "scored"


@part("teacher")
def scored(
    model: str,
    *,
    url: str,
    tokenizer: str | Tokenizer,
    k: int = 20,
    asking: Asking = "prompt_logprobs",
    key_env: str = "OPENAI_API_KEY",
    key_file: str = "",
    rpm: float = 0,
    tpm: float = 0,
    concurrency: int = 64,
    identity: str = "",
    price: Given = TABLE,
    budget: float = math.inf,
    store: str | Requests = "",
    run: str = "",
) -> Scored:
    """The `k` likeliest next tokens at each position, from the server at `url`; `tokenizer`: the model's own.

    asking: "prompt_logprobs" (vLLM), or "echo" (SGLang and older OpenAI completions). Ask for no more than the server
    allows (vLLM: --max-logprobs, 20 unless set). The rest: see teachers.endpoint.
    """
    writer = endpoint(
        model, url=url, key_env=key_env, key_file=key_file, rpm=rpm, tpm=tpm, concurrency=concurrency,
        identity=identity, price=price, budget=budget, store=store, run=run,
    )  # fmt: skip
    return Scored(writer, load_tokenizer(tokenizer), k=k, asking=asking)


class Scored:
    """A teacher from a writer that can speak about a prompt. It reads tokens: text is cut by nobody but the data."""

    def __init__(
        self, writer: Writer, tokenizer: Tokenizer, *, k: int = 20, asking: Asking = "prompt_logprobs"
    ) -> None:
        if k < 1:
            raise RecipeError(f"scored, k: found {k}, expected at least 1.")
        self._writer = writer
        self._tokenizer = tokenizer
        self._k = k
        self._asking = asking
        self._loop = _Loop()
        self.fingerprint = fingerprint(tokenizer)

    @property
    def identity(self) -> str:
        return f"{self._writer.identity}:top{self._k}"

    def __call__(self, batch: Batch, need: Need) -> Signal:
        """Sparse [B, T, K] with the tail as one more class. Raises SignalError where the server cannot say it."""
        if need.features:
            raise SignalError(
                f"{self._writer.identity} is behind an address and says probabilities only, no '{min(need.features)}'. "
                "Take terms over logits, or a teacher that runs here."
            )
        if not need:
            return Signal()
        if batch.vocabulary and batch.vocabulary != self.fingerprint:
            raise SignalError(
                f"{self._writer.identity} has another tokenizer than the one that made the batch. Read the data with "
                "the teacher's tokenizer, or learn from the texts it writes."
            )
        texts = list(texts_of(batch))
        entries = self._loop.run(self._entries(texts))
        return spread(Signal(logits=self._sparse(batch, texts, entries)), batch.mask)

    async def _entries(self, texts: Sequence[Text]) -> list[list[Mapping[int, float]]]:
        """For each text, for each of its tokens but the first, the classes that were named."""
        return list(await asyncio.gather(*(self._asked(text.ids) for text in texts)))

    async def _asked(self, ids: list[int]) -> list[Mapping[int, float]]:
        if len(ids) < 2:
            return []
        listed: list[JSON] = [*ids]
        extra: dict[str, JSON] = {"prompt": listed, wire.ID_NAMES: True}
        if self._asking == "echo":
            extra |= {"echo": True, "logprobs": self._k}
        reply = await self._writer.ask(
            Request(
                prompt=self._tokenizer.decode(ids),
                prompt_log_probs=self._k if self._asking == "prompt_logprobs" else None,
                max_tokens=1,
                temperature=1.0,
                extra=extra,
                step=STEP,
            )
        )
        if reply.failure is not None:
            refused = f"{self._writer.identity} does not score a text of {len(ids)} tokens"
            raise ServiceError(f"{refused}: {reply.failure.message}")
        if reply.prompt_log_probs is None:
            raise SignalError(
                f"{self._writer.identity} gives no log-probabilities for a given text (asked by '{self._asking}'). "
                "Serve the model with vLLM (asking: prompt_logprobs) or SGLang (asking: echo), or learn from the texts "
                "it writes."
            )
        if len(reply.prompt_log_probs) != len(ids) - 1:
            raise SignalError(
                f"{self._writer.identity} speaks of {len(reply.prompt_log_probs) + 1} tokens where the row has "
                f"{len(ids)}: it reads text its own way. Give the tokenizer of the served model."
            )
        told = zip(reply.prompt_log_probs, ids[1:], strict=True)
        return [self.names.entries(token, own=own) for token, own in told]

    def _sparse(self, batch: Batch, texts: Sequence[Text], entries: Sequence[Sequence[Mapping[int, float]]]) -> Sparse:
        """At the counted positions, end to end: [N, K]."""
        by_place: dict[tuple[int, int], Mapping[int, float]] = {}
        for text, told in zip(texts, entries, strict=True):
            # Token i is what the position of token i - 1 predicts.
            counted = zip(text.columns, told, text.counted[1:], strict=False)
            by_place |= {(text.row, column): named for column, named, counts in counted if counts}
        places = [(row, column) for row, column in batch.mask.nonzero().tolist()]
        if by_place.keys() != set(places):
            raise SignalError(
                "A counted label is not the token that comes next in its row: a server can speak only of the text as "
                "it is. Use data of chats or texts as they are read."
            )
        width = max((len(named) for named in by_place.values()), default=1)
        ids = torch.zeros(len(places), width, dtype=torch.int64)
        log_probs = torch.full((len(places), width), -torch.inf)
        for row, place in enumerate(places):
            named = by_place[place]
            ids[row, : len(named)] = torch.tensor(list(named))
            log_probs[row, : len(named)] = torch.tensor(list(named.values()))
        return Sparse(ids=ids, log_probs=log_probs, size=len(self._tokenizer))

    @cached_property
    def names(self) -> TokenNames:
        return TokenNames(self._tokenizer)


class _Loop:
    """An event loop in a thread of its own, so that a training step, or a notebook, can wait for answers."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="potstill-scored", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
