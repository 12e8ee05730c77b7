"""A language model of this machine as a writer: any AutoModelForCausalLM folder, no server between.

Its answers are kept like those that are paid for, in the same form, so a killed flow goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from potstill.core.catalog import part
from potstill.core.errors import DataError, UserError
from potstill.core.vocabulary import template_fingerprint
from potstill.core.writing import JSON, Message, Raw, Reply, Request, content_id
from potstill.data.voices import Sampling
from potstill.stores.requests import Requests
from potstill.students.hf import HfModel
from potstill.students.hf import hf as model_from
from potstill.students.pretrained import Attention, DType
from potstill.teachers import wire, wire_replies
from potstill.teachers.engine import Engine, Text, Told
from potstill.teachers.hf import identity_of
from potstill.teachers.limits import Gate, Limits
from potstill.teachers.recorded import Recorded
from potstill.teachers.spelling import Spelling
from potstill.teachers.writers import writer_over

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
"""In place of a chat template: what was said, one message per line, and nothing around it."""
NOT_DONE = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "schema")
EXTRAS = {"prompt", wire.ID_NAMES}
WITHOUT_LIMIT = 1024
"""Tokens of an answer where neither the request nor the model says how long it may be."""
CONTEXT = 8
"""Tokens of the prompt that an answer is decoded behind: a first piece is written differently at a text's start."""


@part("writer")
def local_writer(
    model: str,
    *,
    together: int = 32,
    template: str = "",
    dtype: DType = "float32",
    attention: Attention = "auto",
    device: str = "cpu",
    store: str | Requests = "",
    run: str = "",
    longer: float = 1.0,
) -> Recorded:
    """The model in the folder (or of the hub name) `model` writes, up to `together` texts at once. It costs nothing.

    template: a Jinja chat template, for a model that brings none; "plain" for none at all.
    longer: where an answer was cut short, ask once more with so many times `max_tokens`; 1 takes it as it is.
    Understood of a request: temperature (1 unless given), top_p, top_k, seed, stop, max_tokens, log-probabilities, and
    tools (shown to the model); anything else is refused. An answer follows from the request alone.
    """
    loaded = model_from(model, dtype=dtype, attention=attention)
    loaded.model.to(device)
    transport = LocalTransport(loaded, template=template, together=together)
    return writer_over(transport, model=loaded.title, price=0.0, store=store, run=run, longer=longer)


class LocalTransport:
    """Requests to an engine and back, in the form in which a server would answer."""

    def __init__(self, model: HfModel, *, template: str = "", together: int = 32) -> None:
        if model.tokenizer is None:
            raise DataError(f"{model.title} has no tokenizer, so it cannot read or write text. Save one beside it.")
        self._model = model
        self._tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self._template = template
        self._engine = Engine(model, together=together)
        # Twice as many as write: the next ones wait at the engine's door, sorted by length.
        self._gate = Gate([Limits(concurrency=2 * together)])
        self._identity = f"{identity_of(model)}:{content_id(template or template_fingerprint(self._tokenizer))}"

    @property
    def identity(self) -> str:
        """The weights, and what a conversation is rendered with."""
        return self._identity

    async def send(self, request: Request, *, before: Callable[[], Awaitable[None]]) -> Raw:
        """See core.writing.Transport. What it cannot do is answered as a server would: 400 and a sentence.

        Raises DataError for a conversation that nothing says how to render.
        """
        try:
            _check(request)
        except UserError as error:
            return _refused(str(error))
        prompt = self._prompt(request)
        room = self._model.longest - len(prompt) if self._model.longest else WITHOUT_LIMIT
        if not prompt or room < 1:
            limit = self._model.longest
            return _refused(f"The prompt has {len(prompt)} tokens; the context length is {limit}.")
        which = await self._gate.enter(1)
        try:
            await before()
            return await self._written(request, prompt, room)
        finally:
            which.limits.lost(which)
            self._gate.moved()

    def read(self, request: Request, raw: Raw) -> Reply:
        return wire_replies.read(request, raw.body)

    def input_tokens(self, request: Request) -> int:
        return wire.most_input_tokens(request)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)

    async def _written(self, request: Request, prompt: list[int], room: int) -> Raw:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()

        def settle(deliver: Callable[[], None]) -> None:
            if not answer.done():
                deliver()

        def done(text: Text) -> None:
            body = json.dumps(self._answer(request, text)).encode()
            loop.call_soon_threadsafe(settle, lambda: answer.set_result(body))

        def failed(error: Exception) -> None:
            loop.call_soon_threadsafe(settle, lambda: answer.set_exception(error))

        text = Text(
            prompt=torch.tensor(prompt),
            sampling=_sampling(request),
            # Everything that can change the answer, the sample's number among it.
            seed=int(request.key(self.identity)[:15], 16),
            most_tokens=min(request.max_tokens or room, room),
            alternatives=request.log_probs,
            prompt_alternatives=request.prompt_log_probs,
            is_over=self._stopper(prompt, request.stop),
            done=done,
            failed=failed,
        )
        self._engine.write(text)
        try:
            return Raw(status=200, headers={}, body=await answer)
        finally:
            text.is_wanted = False

    def _prompt(self, request: Request) -> list[int]:
        given = request.extra.get("prompt")
        if isinstance(given, list):  # a text that has been cut into tokens already, as vLLM takes it
            return [int(token) for token in given if isinstance(token, int)]
        if request.prompt:
            return list(self._tokenizer(request.prompt, verbose=False).input_ids)
        if self._template == PLAIN:
            said = "\n".join(message.content for message in request.messages)
            return list(self._tokenizer(said, verbose=False).input_ids)
        if not self._template and not self._tokenizer.chat_template:
            raise DataError(
                f"{self._model.title} has no chat template. Give it one (template), say template: plain, or ask with a "
                "raw prompt."
            )
        rendered = self._tokenizer.apply_chat_template(
            [_turn(message) for message in request.messages],
            tools=[dict(tool) for tool in request.tools] or None,
            chat_template=self._template or None,
            add_generation_prompt=True,
            tokenize=False,
        )
        return list(self._tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids)

    def _stopper(self, prompt: list[int], stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether one of the stop texts stands in what was written last: each character is at most four tokens."""
        if not stops:
            return lambda tokens: False
        reach = 4 * max(map(len, stops)) + CONTEXT

        def is_over(tokens: Sequence[int]) -> bool:
            tail = self._decoded(prompt, tokens) if len(tokens) <= reach else self._text(list(tokens[-reach:]))
            return any(stop in tail for stop in stops)

        return is_over

    def _answer(self, request: Request, text: Text) -> dict[str, JSON]:
        """An OpenAI completion."""
        prompt = text.prompt.tolist()
        said = self._decoded(prompt, text.tokens)
        found = [place for stop in request.stop if (place := said.find(stop)) >= 0]
        said = said[: min(found)] if found else said
        by_id = bool(request.extra.get(wire.ID_NAMES))
        choice: dict[str, JSON] = {"index": 0, "finish_reason": text.finish}
        if request.messages:
            choice["message"] = {"role": "assistant", "content": said}
        else:
            choice["text"] = said
        if request.log_probs is not None:
            choice["logprobs"] = {"content": [self._told(told, by_id) for told in text.log_probs]}
        if request.prompt_log_probs is not None:
            choice["prompt_logprobs"] = [None, *(self._told_of_prompt(told) for told in text.prompt_log_probs)]
        counts: dict[str, JSON] = {"prompt_tokens": len(prompt), "completion_tokens": len(text.tokens)}
        return {"model": self._model.title, "choices": [choice], "usage": counts}

    def _told(self, told: Told, by_id: bool) -> JSON:
        top: list[JSON] = [{**self._named(token, by_id), "logprob": value} for token, value in told.top]
        return {**self._named(told.token, by_id), "logprob": told.log_prob, "top_logprobs": top}

    def _told_of_prompt(self, told: Told) -> JSON:
        entries = {told.token: told.log_prob} | dict(told.top)
        return {str(token): {"logprob": v, "decoded_token": self._text([token])} for token, v in entries.items()}

    def _named(self, token: int, by_id: bool) -> dict[str, JSON]:
        """A token as OpenAI names it: as text, special ones among them, with its bytes where they are known."""
        if by_id:
            return {"token": f"token_id:{token}"}
        spelled = self._pieces[token] if token < len(self._pieces) else None
        if spelled is None:
            return {"token": self._tokenizer.decode([token])}
        return {"token": spelled.decode(errors="replace"), "bytes": list(spelled)}

    @cached_property
    def _pieces(self) -> tuple[bytes | None, ...]:
        """The bytes of each token; empty where they cannot be told."""
        try:
            return Spelling(self._tokenizer, title=self._model.title).pieces
        except DataError:
            return ()

    def _decoded(self, prompt: list[int], tokens: Sequence[int]) -> str:
        before = prompt[-CONTEXT:]
        return self._text([*before, *tokens])[len(self._text(before)) :]

    def _text(self, tokens: list[int]) -> str:
        said: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return said


def _sampling(request: Request) -> Sampling:
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
    )


def _check(request: Request) -> None:
    """Raises DataError for what would otherwise be left out in silence, RecipeError for a sampling that cannot be."""
    asked = request.asked()
    for name in NOT_DONE:
        if name in asked:
            raise DataError(f"A local writer knows no {name}. Leave it out, or serve the model and use an endpoint.")
    for name in request.extra.keys() - EXTRAS:
        raise DataError(f"A local writer knows no {name}. Leave it out of extra.")
    if any(message.images for message in request.messages):
        raise DataError("A local writer reads no images. Serve the model and use an endpoint.")
    _sampling(request)


def _turn(message: Message) -> dict[str, object]:
    calls = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in message.tool_calls
    ]
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    return turn | ({"tool_calls": calls} if calls else {})


def _refused(message: str) -> Raw:
    return Raw(status=400, headers={}, body=json.dumps({"error": {"message": message}}).encode())
