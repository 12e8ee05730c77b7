"""What goes over the wire and what is read from it: shapes as the documentation of the servers shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from potstill.core.writing import Message, Request, ToolCall, Usage
from potstill.teachers import wire, wire_replies

CHAT = Request(messages=(Message(role="user", content="Hi"),))
TEXT = Request(prompt="Once")


def answer(**changes: Any) -> bytes:
    """OpenAI's documented example of a chat completion, changed."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello!", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = {
        "prompt_tokens": 19,
        "completion_tokens": 10,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 0},
    }
    return json.dumps({"id": "c", "model": "m-1", "choices": [choice | changes], "usage": usage}).encode()


def message(**fields: Any) -> bytes:
    return answer(message={"role": "assistant", "content": None} | fields)


def test_a_field_left_none_is_not_sent() -> None:
    assert wire.body(CHAT, model="m") == {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_raw_text_goes_to_completions_as_a_prompt() -> None:
    assert wire.path(TEXT) == "/completions"
    assert wire.body(TEXT, model="m") == {"model": "m", "prompt": "Once"}


def test_every_field_that_changes_the_answer_changes_the_body() -> None:
    changes: dict[str, Any] = {
        "messages": (Message(role="user", content="Ho"),),
        "sample": 1,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "stop": ("x",),
        "seed": 8,
        "logit_bias": {"5": -100.0},
        "log_probs": 0,
        "prompt_log_probs": 0,
        "schema": {"type": "object"},
        "tools": ({"name": "f"},),
        "tool_choice": "none",
        "reasoning_effort": "low",
        "extra": {"provider": "x"},
    }
    asked: dict[str, Any] = {"messages": CHAT.messages, "seed": 7}
    known = {name for name, field in Request.__dataclass_fields__.items() if field.metadata["in_key"]}
    assert known == changes.keys() | {"prompt"}
    bodies = [json.dumps(wire.body(Request(**{**asked, name: value}), model="m")) for name, value in changes.items()]
    bodies += [json.dumps(wire.body(Request(**asked), model="m")), json.dumps(wire.body(TEXT, model="m"))]
    # seed 7 of sample 1 is seed 8 of sample 0: two keys, one body.
    assert len(set(bodies)) == len(bodies) - 1


def test_samples_of_a_seeded_request_have_seeds_of_their_own() -> None:
    seeds = [wire.body(Request(prompt="x", seed=7, sample=sample), model="m")["seed"] for sample in range(3)]
    assert seeds == [7, 8, 9]


def test_log_probabilities_are_asked_in_the_form_of_each_route() -> None:
    chat = wire.body(Request(messages=CHAT.messages, log_probs=2), model="m")
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 2)
    assert wire.body(Request(prompt="x", log_probs=2), model="m")["logprobs"] == 2


def test_a_schema_is_asked_as_structured_output() -> None:
    sent = wire.body(Request(messages=CHAT.messages, schema={"type": "object"}), model="m")["response_format"]
    assert sent == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    }


def test_a_forced_tool_is_named() -> None:
    request = Request(messages=CHAT.messages, tools=({"name": "f", "parameters": {}},), tool_choice="f")
    sent = wire.body(request, model="m")
    assert sent["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_an_image_stands_beside_its_text() -> None:
    request = Request(messages=(Message(role="user", content="What?", images=("data:image/png;base64,AA",)),))
    [sent] = wire.body(request, model="m")["messages"]  # type: ignore[misc]
    assert sent["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]


def test_fields_of_one_provider_win() -> None:
    request = Request(prompt="x", max_tokens=5, extra={"max_tokens": 6})
    assert wire.body(request, model="m")["max_tokens"] == 6


def test_newer_models_are_told_the_length_by_its_newer_name() -> None:
    request = Request(messages=CHAT.messages, max_tokens=5)
    sent = wire.body(request, model="m", length_field="max_completion_tokens")
    assert sent["max_completion_tokens"] == 5 and "max_tokens" not in sent


def test_the_bound_on_input_tokens_holds_for_a_tokenizer_of_bytes() -> None:
    text = "\u00e9\u00e9\u00e9 caf\u00e9" * 50
    assert wire.most_input_tokens(Request(prompt=text)) >= len(text.encode())
    talk = Request(messages=(Message(role="system", content=text), Message(role="user", content=text)))
    assert wire.most_input_tokens(talk) >= 2 * len(text.encode())


def test_a_good_answer_is_read() -> None:
    reply = wire_replies.read(CHAT, answer())
    assert (reply.text, reply.finish, reply.model) == ("Hello!", "stop", "m-1")
    assert reply.usage == Usage(input=19, output=10, cached=3, reasoning=4)
    assert reply.log_probs is None


def test_reasoning_is_kept_apart_under_any_of_its_names() -> None:
    assert wire_replies.read(CHAT, message(content="4", reasoning_content="2+2")).reasoning == "2+2"
    assert wire_replies.read(CHAT, message(content="4", reasoning="2+2")).reasoning == "2+2"
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "4"}]
    reply = wire_replies.read(CHAT, message(content=parts))
    assert (reply.reasoning, reply.text) == ("2+2", "4")


def test_reasoning_tokens_that_the_server_counts_apart_are_part_of_the_output() -> None:
    said = json.loads(answer())
    said["usage"] = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 115,
        "completion_tokens_details": {"reasoning_tokens": 100},
    }
    assert wire_replies.read(CHAT, json.dumps(said).encode()).usage == Usage(input=10, output=105, reasoning=100)


@pytest.mark.parametrize(
    ("word", "finish"),
    [
        ("stop", "stop"), ("eos", "stop"), ("length", "length"), ("model_length", "length"), ("MAX_TOKENS", "length"),
        ("tool_calls", "tools"), ("content_filter", "filter"), ("SAFETY", "filter"), (None, "unknown"), ("", "unknown"),
    ],
)  # fmt: skip
def test_finish_reasons_of_many_servers(word: str | None, finish: str) -> None:
    assert wire_replies.read(CHAT, answer(finish_reason=word)).finish == finish


def test_an_answer_that_the_server_broke_off_is_none() -> None:
    with pytest.raises(ValueError, match="broke the answer off"):
        wire_replies.read(CHAT, answer(finish_reason="abort"))


def test_tool_calls_keep_their_arguments_as_written() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1 }'}}
    reply = wire_replies.read(CHAT, message(tool_calls=[call]))
    assert reply.tool_calls == (ToolCall(name="add", arguments='{"a": 1 }', id="c1"),)


def test_arguments_that_the_server_parsed_become_text_again() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    [found] = wire_replies.read(CHAT, message(tool_calls=[call])).tool_calls
    assert json.loads(found.arguments) == {"a": 1}


def test_a_refusal_is_a_filtered_answer() -> None:
    reply = wire_replies.read(CHAT, message(refusal="I cannot help."))
    assert (reply.finish, reply.text) == ("filter", "I cannot help.")


def test_log_probabilities_of_a_chat() -> None:
    token = {
        "token": "He",
        "logprob": -0.1,
        "bytes": [72, 101],
        "top_logprobs": [{"token": "He", "logprob": -0.1}, {"token": "Yo", "logprob": -2.5}],
    }
    reply = wire_replies.read(CHAT, answer(logprobs={"content": [token], "refusal": None}))
    assert reply.log_probs is not None
    assert reply.log_probs[0].top == (("He", -0.1), ("Yo", -2.5))


def test_log_probabilities_of_the_older_form() -> None:
    given = {"tokens": ["a", "b"], "token_logprobs": [-1, -2.0], "top_logprobs": [{"a": -1}, {"b": -2, "c": -3}]}
    reply = wire_replies.read(TEXT, answer(text="ab", logprobs=given))
    assert reply.log_probs is not None
    assert [token.log_prob for token in reply.log_probs] == [-1.0, -2.0]
    assert reply.log_probs[1].top == (("b", -2.0), ("c", -3.0))


def test_an_echoed_prompt_is_told_from_what_was_written_after_it() -> None:
    given = {"tokens": ["p", "q", "w"], "token_logprobs": [None, -1.0, -2.0], "top_logprobs": [None, {"q": -1.0}, {}]}
    said = json.loads(answer(text="pqw", logprobs=given))
    said["usage"] = {"prompt_tokens": 2, "completion_tokens": 1}
    reply = wire_replies.read(Request(prompt="pq", extra={"echo": True}), json.dumps(said).encode())
    assert reply.prompt_log_probs is not None and reply.log_probs is not None
    assert [token.token for token in reply.prompt_log_probs] == ["q"]
    assert [token.token for token in reply.log_probs] == ["w"]


PROMPT_LOG_PROBS = [
    None,
    {"9": {"logprob": -3.0, "rank": 7, "decoded_token": "x"}, "5": {"logprob": -0.2, "rank": 1, "decoded_token": "y"}},
]


def test_vllm_log_probabilities_of_the_prompt_start_with_its_second_token() -> None:
    reply = wire_replies.read(TEXT, answer(text="", prompt_logprobs=PROMPT_LOG_PROBS))
    assert reply.prompt_log_probs is not None
    [token] = reply.prompt_log_probs
    assert (token.token, token.log_prob, token.top) == ("x", -3.0, (("x", -3.0), ("y", -0.2)))


def test_tokens_are_named_by_their_ids_where_that_was_asked() -> None:
    request = Request(prompt="x", extra={wire.ID_NAMES: True})
    reply = wire_replies.read(request, answer(text="", prompt_logprobs=PROMPT_LOG_PROBS))
    assert reply.prompt_log_probs is not None
    assert reply.prompt_log_probs[0].top == (("token_id:9", -3.0), ("token_id:5", -0.2))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (answer()[:-20], "not JSON"),
        (b"<html>502</html>", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "expected an object"),
        (b'{"choices": []}', "found none"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "choices\\[0\\].message: found null"),
        (message(content=7), "content: found 7, expected text"),
        (answer(logprobs={"content": [{"token": "a", "logprob": None}]}), "logprob: found null, expected a number"),
        (b'{"error": {"message": "upstream died"}}', "upstream died"),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -1}}', "expected a count"),
    ],
)
def test_a_body_of_another_shape_is_one_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wire_replies.read(CHAT, body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "Bad key.", "code": "invalid_api_key"}}', "Bad key."),
        (b'{"error": "model not found"}', "model not found"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b'{"detail": [{"msg": "field required"}]}', '[{"msg": "field required"}]'),
        (b"404 page\nnot found", "404 page not found"),
        (b"", ""),
    ],
)
def test_an_error_says_what_is_wrong_in_any_of_its_forms(body: bytes, said: str) -> None:
    assert wire_replies.complaint(body) == said


@pytest.mark.parametrize("text", ["caf\u00e9 \U0001f600", "cut in the middle of one: \ud83d", "\x00 and \u2028"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_answer_is_read_whatever_its_letters_and_encoding(text: str, encoding: str) -> None:
    body = message(content=text).decode().encode(encoding)
    assert wire_replies.read(CHAT, body).text == text.replace("\ud83d", "\ufffd")
