"""OpenAI's chat and text completions as JSON: what a request looks like on the wire. `wire_replies` reads the answers.

Knows no network, no key, no money.
"""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

from potstill.core.writing import JSON, Message, Request

Object: TypeAlias = dict[str, JSON]
LengthField: TypeAlias = Literal["max_tokens", "max_completion_tokens"]

CHAT, TEXT = "/chat/completions", "/completions"
SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
"""Fields of a request that are called the same on the wire."""

ID_NAMES = "return_tokens_as_token_ids"
"""vLLM's switch: tokens are then named "token_id:123", since two tokens can be written alike."""
BYTE_NAME = "bytes:"
"""Begins the name of a token that is only a part of a character: bytes:\\xe2\\x80, as OpenAI writes it."""

TEMPLATE_TOKENS = 512
"""Upper bound on what a chat template adds by itself: dates, default system text, how to call tools."""
MESSAGE_TOKENS = 16
IMAGE_TOKENS = 50_000
"""The dearest way to count one image that is known: gpt-4o-mini bills up to about 48 thousand tokens."""


def path(request: Request) -> str:
    """Where a request goes, behind the server's base address."""
    return CHAT if request.messages else TEXT


def body(request: Request, *, model: str, length_field: LengthField = "max_tokens") -> Object:
    """What is sent. Sample i of a seeded request is asked with seed + i: the same seed would write the same answer."""
    sent: Object = {"model": model}
    if request.messages:
        sent["messages"] = [_message(message) for message in request.messages]
    else:
        sent["prompt"] = request.prompt
    if request.max_tokens is not None:
        sent[length_field if request.messages else "max_tokens"] = request.max_tokens
    for name in SAME_NAME:
        if (value := getattr(request, name)) is not None:
            sent[name] = value
    if request.seed is not None:
        sent["seed"] = request.seed + request.sample
    if request.stop:
        sent["stop"] = list(request.stop)
    if request.logit_bias:
        sent["logit_bias"] = dict(request.logit_bias)
    if request.reasoning_effort:
        sent["reasoning_effort"] = request.reasoning_effort
    if request.log_probs is not None or request.prompt_log_probs is not None:
        sent |= _log_probs_asked(request)
    if request.schema or request.tools or request.tool_choice:
        sent |= _form_asked(request)
    return sent | dict(request.extra) if request.extra else sent


def token_name(spelled: bytes) -> str:
    """A token's name by its bytes: their text, or bytes:\\xe2\\x80 where they are only a part of a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return BYTE_NAME + "".join(f"\\x{byte:02x}" for byte in spelled)


def most_input_tokens(request: Request) -> int:
    """An upper bound on the tokens billed as input, without a tokenizer: no token is shorter than a byte."""
    most = len(request.prompt.encode()) + MESSAGE_TOKENS
    for message in request.messages:
        most += len(message.content.encode()) + MESSAGE_TOKENS + IMAGE_TOKENS * len(message.images)
        for call in message.tool_calls:
            most += len(call.name) + len(call.arguments.encode()) + MESSAGE_TOKENS
    if request.tools or request.schema:
        most += len(json.dumps([*request.tools, request.schema]))
    return most + TEMPLATE_TOKENS if request.messages else most


def likely_tokens(request: Request) -> int:
    """What a request will probably count as in tokens per minute, answer included, until the server says so."""
    written = len(request.prompt) + sum(len(message.content) for message in request.messages)
    return written // 3 + MESSAGE_TOKENS + (request.max_tokens or 0)


def _message(message: Message) -> Object:
    sent: Object = {"role": message.role, "content": message.content}
    if message.images:
        pictures: list[JSON] = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
        sent["content"] = [{"type": "text", "text": message.content}, *pictures]
    if message.tool_calls:
        sent["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        sent["tool_call_id"] = message.tool_call_id
    return sent


def _log_probs_asked(request: Request) -> Object:
    sent: Object = {}
    if request.log_probs is not None and request.messages:
        sent = {"logprobs": True, "top_logprobs": request.log_probs}
    elif request.log_probs is not None:
        sent = {"logprobs": request.log_probs}
    if request.prompt_log_probs is not None:
        sent["prompt_logprobs"] = request.prompt_log_probs
    return sent


def _form_asked(request: Request) -> Object:
    sent: Object = {}
    if request.schema:
        form: Object = {"name": "answer", "schema": dict(request.schema), "strict": True}
        sent["response_format"] = {"type": "json_schema", "json_schema": form}
    if request.tools:
        sent["tools"] = [
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in request.tools
        ]
    if request.tool_choice in ("auto", "none", "required"):
        sent["tool_choice"] = request.tool_choice
    elif request.tool_choice:
        sent["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    return sent
