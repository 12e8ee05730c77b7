"""What servers answer, read strictly: the body of a chat or text completion as a reply, that of an error as a sentence.

Servers differ in details (vLLM, SGLang, llama.cpp, Ollama, hosted ones). What they are known to do differently is read
here, and nothing else is guessed: a body of another shape is a ValueError, and its raw bytes are kept by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

from pydantic_core import from_json

from potstill.core.writing import JSON, Finish, Reply, Request, TokenLogProb, ToolCall, Usage, whole
from potstill.teachers.wire import BYTE_NAME, ID_NAMES, Object, token_name

LogProbs: TypeAlias = tuple[TokenLogProb, ...] | None

FINISHES: Mapping[str, Finish] = {
    "stop": "stop", "end_turn": "stop", "eos": "stop", "eos_token": "stop", "stop_sequence": "stop",
    "complete": "stop", "completed": "stop",
    "length": "length", "max_tokens": "length", "model_length": "length", "max_output_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_calls": "tools", "function_call": "tools", "tool_use": "tools",
    "content_filter": "filter", "safety": "filter", "recitation": "filter", "refusal": "filter", "sensitive": "filter",
}  # fmt: skip
BROKEN_OFF = frozenset({"abort", "error", "network_error", "insufficient_system_resource"})
"""What servers say (SGLang, OpenRouter, Zhipu, DeepSeek) when they gave up in the middle: not an answer."""


def read(request: Request, answer: bytes) -> Reply:
    """A good answer's body as a reply; its key and dollars are filled in by the caller.

    Raises ValueError, in one sentence, for a torn body, another shape, or an answer that was broken off.
    """
    said = _parsed(answer)
    if said.get("error"):
        raise ValueError(f"The server calls it a success and sends an error: {complaint(answer)}")
    choice = _object(_first(said.get("choices"), "choices"), "choices[0]")
    finish = _finish(choice.get("finish_reason"))
    usage = _usage(said.get("usage"))
    own, of_prompt = _log_probs(request, choice, said, usage)
    model = said.get("model")
    message: Object = {"content": _text(choice.get("text"), "choices[0].text")}
    if request.messages:
        message = _object(choice.get("message"), "choices[0].message")
    text, thought = _content(message)
    refusal = _text(message.get("refusal"), "refusal")
    return Reply(
        key="",
        text=text or refusal,
        reasoning=thought,
        finish="filter" if refusal and not text else finish,
        tool_calls=_tool_calls(message.get("tool_calls")),
        log_probs=own,
        prompt_log_probs=of_prompt,
        usage=usage,
        model=model if isinstance(model, str) else "",
    )


def complaint(answer: bytes) -> str:
    """What the body of an error says to a person, in at most 300 characters: OpenAI's form, FastAPI's, or plain."""
    try:
        said: JSON = json.loads(answer)
    except ValueError:
        said = answer.decode(errors="replace")
    while isinstance(said, dict) and said:
        told = (said[name] for name in ("error", "message", "detail", "msg") if said.get(name))
        said = next(told, json.dumps(said))
    if isinstance(said, list):
        said = json.dumps(said)
    text = " ".join(str(said).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def code(answer: bytes) -> str:
    """The machine's word for an error (`model_not_found`, `insufficient_quota`, ...), or an empty string."""
    try:
        error = _parsed(answer).get("error")
    except ValueError:
        return ""
    word = (error.get("code") or error.get("type")) if isinstance(error, dict) else ""
    return word if isinstance(word, str) else ""


def _content(message: Object) -> tuple[str, str]:
    """Answer and thinking. Mistral gives both as a list of parts; others put the thinking beside the answer."""
    thought = _text(message.get("reasoning_content") or message.get("reasoning"), "reasoning_content")
    content = message.get("content")
    if not isinstance(content, list):
        return _text(content, "content"), thought
    parts = [_object(part, "content[]") for part in content]
    texts = "".join(_text(part.get("text"), "content[].text") for part in parts if part.get("type") == "text")
    thinking = [part.get("thinking") for part in parts if part.get("type") == "thinking"]
    thoughts = "".join(
        _text(_object(piece, "thinking[]").get("text"), "thinking[].text")
        for pieces in thinking
        for piece in (pieces if isinstance(pieces, list) else [])
    )
    return texts, thought or thoughts


def _tool_calls(said: JSON) -> tuple[ToolCall, ...]:
    calls = []
    for entry in _list(said, "tool_calls") if said else []:
        call = _object(entry, "tool_calls[]")
        function = _object(call.get("function"), "tool_calls[].function")
        arguments = function.get("arguments")
        calls.append(
            ToolCall(
                name=_text(function.get("name"), "tool_calls[].function.name"),
                # Text as the model wrote it; some servers parse it first.
                arguments=arguments if isinstance(arguments, str) else json.dumps(arguments or {}),
                id=_text(call.get("id"), "tool_calls[].id"),
            )
        )
    return tuple(calls)


def _finish(said: JSON) -> Finish:
    word = said.lower() if isinstance(said, str) else ""
    if word in BROKEN_OFF:
        raise ValueError(f"The server broke the answer off (finish_reason {word!r}).")
    return FINISHES.get(word, "unknown")


def _usage(said: JSON) -> Usage:
    if said is None:
        return Usage()
    counts = _object(said, "usage")
    given, written = _count(counts, "prompt_tokens"), _count(counts, "completion_tokens")
    of_input = counts.get("prompt_tokens_details")
    of_output = counts.get("completion_tokens_details")
    cached = _count(of_input, "cached_tokens") if isinstance(of_input, dict) else 0
    reasoning = _count(of_output, "reasoning_tokens") if isinstance(of_output, dict) else 0
    # xAI leaves the thinking out of completion_tokens; its total tells.
    if reasoning and _count(counts, "total_tokens") == given + written + reasoning:
        written += reasoning
    cached = cached or _count(counts, "prompt_cache_hit_tokens")  # DeepSeek
    return Usage(input=given, output=written, cached=cached, reasoning=reasoning)


def _log_probs(request: Request, choice: Object, said: Object, usage: Usage) -> tuple[LogProbs, LogProbs]:
    """Of the written tokens and of the prompt's, its first left out: nothing stands before it."""
    given = choice.get("logprobs")
    of_prompt = choice.get("prompt_logprobs") or said.get("prompt_logprobs")  # vLLM: text and chat
    prompt = None if of_prompt is None else _of_prompt(of_prompt, by_id=bool(request.extra.get(ID_NAMES)))
    if given is None:
        return None, prompt
    given = _object(given, "logprobs")
    if given.get("content") is not None:
        return tuple(_chat_token(entry) for entry in _list(given["content"], "logprobs.content")), prompt
    if given.get("tokens") is None:
        return None, prompt
    first = usage.input if request.extra.get("echo") else 0
    if request.extra.get("echo") and not first:
        raise ValueError("The server echoed the prompt and does not say how many tokens it has (usage.prompt_tokens).")
    written = _columns(given)
    echoed = tuple(written[1:first]) if first else None
    if None in written[1 if first else 0 :]:
        raise ValueError("The server gave no log-probability (null) for a token in the middle.")
    return tuple(token for token in written[first:] if token), prompt or echoed  # type: ignore[return-value]


def _chat_token(said: JSON) -> TokenLogProb:
    entry = _object(said, "logprobs.content[]")
    top = [_object(other, "top_logprobs[]") for other in _list(entry.get("top_logprobs") or [], "top_logprobs")]
    return TokenLogProb(
        token=_name(entry),
        log_prob=_number(entry.get("logprob"), "logprob"),
        top=tuple((_name(other), _number(other.get("logprob"), "logprob")) for other in top),
    )


def _name(entry: Object) -> str:
    """The token as text, or by its bytes where they are only a part of a character, which no text can tell."""
    token = _text(entry.get("token"), "token")
    if "\ufffd" not in token:
        return token
    try:
        exact = token_name(bytes(entry.get("bytes") or []))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no bytes at all; the text is there all the same
        return token
    return exact if exact.startswith(BYTE_NAME) else token


def _columns(given: Object) -> list[TokenLogProb | None]:
    """The older form: lists of tokens, of log-probabilities, of alternatives. None where there is none."""
    tokens = _list(given["tokens"], "logprobs.tokens")
    log_probs = _list(given.get("token_logprobs"), "logprobs.token_logprobs")
    tops = _list(given.get("top_logprobs") or [None] * len(tokens), "logprobs.top_logprobs")
    if not len(tokens) == len(log_probs) == len(tops):
        raise ValueError(f"logprobs: found {len(tokens)} tokens and {len(log_probs)} log-probabilities.")
    return [
        None
        if log_prob is None
        else TokenLogProb(
            token=_text(token, "logprobs.tokens[]"),
            log_prob=_number(log_prob, "logprobs.token_logprobs[]"),
            top=tuple((name, _number(p, "top_logprobs[]")) for name, p in _object(top or {}, "top_logprobs[]").items()),
        )
        for token, log_prob, top in zip(tokens, log_probs, tops, strict=True)
    ]


def _of_prompt(said: JSON, *, by_id: bool) -> tuple[TokenLogProb, ...]:
    """vLLM: for each token of the prompt {id: {logprob, rank, decoded_token}}, the token itself in front."""
    tokens = []
    for entry in _list(said, "prompt_logprobs")[1:]:
        named = []
        for token_id, fields in _object(entry, "prompt_logprobs[]").items():
            told = _object(fields, "prompt_logprobs[][]")
            name = f"token_id:{token_id}" if by_id else _text(told.get("decoded_token"), "decoded_token")
            named.append((name, _number(told.get("logprob"), "logprob")))
        if not named:
            raise ValueError("prompt_logprobs: found an empty entry, expected the token of the prompt.")
        tokens.append(TokenLogProb(token=named[0][0], log_prob=named[0][1], top=tuple(named)))
    return tuple(tokens)


def _parsed(answer: bytes) -> Object:
    try:
        said: JSON = _loaded(answer)
    except ValueError as error:
        raise ValueError(f"The answer is not JSON, torn or of another kind: {complaint(answer[:200])!r}.") from error
    return _object(said, "the answer")


def _loaded(answer: bytes) -> JSON:
    """As json.loads reads it, in a third of its time where nothing is odd. Raises ValueError."""
    try:
        said: JSON = from_json(answer)
    except ValueError:  # half of a surrogate pair, where an emoji was cut; UTF-16; depths that json can bear
        said = whole(json.loads(answer))
    return said


def _first(said: JSON, place: str) -> JSON:
    entries = _list(said, place)
    if not entries:
        raise ValueError(f"{place}: found none, expected an answer.")
    return entries[0]


def _object(said: JSON, place: str) -> Object:
    if not isinstance(said, dict):
        raise ValueError(_other_shape(said, place, "an object"))
    return said


def _list(said: JSON, place: str) -> list[JSON]:
    if not isinstance(said, list):
        raise ValueError(_other_shape(said, place, "a list"))
    return said


def _text(said: JSON, place: str) -> str:
    """A text; null is an empty one."""
    if said is None:
        return ""
    if not isinstance(said, str):
        raise ValueError(_other_shape(said, place, "text"))
    return said


def _number(said: JSON, place: str) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        raise ValueError(_other_shape(said, place, "a number"))
    return float(said)


def _count(counts: Object, name: str) -> int:
    said = counts.get(name) or 0
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    if isinstance(said, bool) or not isinstance(said, int) or said < 0:
        raise ValueError(_other_shape(said, f"usage.{name}", "a count"))
    return said


def _other_shape(said: JSON, place: str, expected: str) -> str:
    found = json.dumps(said)
    shown = found if len(found) <= 80 else f"{found[:77]}..."
    return f"{place}: found {shown}, expected {expected}."
