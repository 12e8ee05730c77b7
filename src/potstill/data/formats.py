"""What a row says, told by the names of its fields: a text, a prompt with its answer, a conversation, a preference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from potstill.core.errors import DataError
from potstill.data.records import Record

Message: TypeAlias = Mapping[str, object]
"""role, content, and whatever else a chat template reads (tool_calls, reasoning_content, name, ...)."""

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""The words of {"from", "value"} conversations, and the roles they stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document: every token is an answer to what stands before it."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A prompt and the text that follows it."""

    prompt: str
    answer: str
    bare_prompt: str
    """The prompt for when no chat template dresses it: with the headings that an instruction then needs."""
    finished: bool
    """False where the writer was cut off: then nothing marks an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages; those of the assistant, from number `first` on, are answers."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    first: int = 0
    finished: bool = True


Example: TypeAlias = Text | Answer | Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of rows: the fields that tell it, and how they are read."""

    fields: tuple[str, ...]
    read: Callable[[Record, tuple[str, ...]], Example]
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " + ".join(self.fields)

    def __str__(self) -> str:
        return self.name + (f" (+ {', '.join(self.optional)})" if self.optional else "")


class ExampleReader:
    """Rows to examples: the first row tells the format, which all others must have."""

    def __init__(self) -> None:
        self.form: Format | None = None

    def __call__(self, record: Record) -> tuple[Example]:
        """DataError where a field of the format is missing or of another type."""
        self.form = self.form or format_of(record)
        for field in self.form.fields:
            if field not in record.fields:
                raise DataError(
                    f"{record.place} lacks the field '{field}' that the rows before it have (it has: "
                    f"{', '.join(record.fields) or 'none'}). Fill it, or take the row away."
                )
        return (self.form.read(record, self.form.fields),)

    @property
    def name(self) -> str:
        return self.form.name if self.form else ""


class PreferenceReader:
    """Rows to two examples each, the chosen answer and the rejected one."""

    name = "chosen + rejected"

    def __call__(self, record: Record) -> tuple[Example, Example]:
        """DataError where an answer is missing, or neither side says what was asked."""
        for side in ("chosen", "rejected"):
            if side not in record.fields:
                found = ", ".join(record.fields) or "none"
                raise DataError(f"{record.place} lacks the field '{side}'. Expected chosen + rejected, found: {found}.")
        if "prompt" in record.fields:
            return _answer(record, ("prompt", "chosen")), _answer(record, ("prompt", "rejected"))
        texts = [side for side in ("chosen", "rejected") if isinstance(record.fields[side], str)]
        if texts:
            raise DataError(
                f"{record.place}: '{texts[0]}' is a text and there is no field 'prompt'. Give the prompt apart, or "
                "messages that begin with it."
            )
        chosen, rejected = _conversation(record, ("chosen",)), _conversation(record, ("rejected",))
        # What both begin with is the prompt: no preference is about it.
        first = _common(chosen.messages, rejected.messages)
        return replace(chosen, first=first), replace(rejected, first=first)


def format_of(record: Record) -> Format:
    """The first of FORMATS whose fields the row has. DataError lists them all and what was found."""
    if {"chosen", "rejected"} <= record.fields.keys():
        raise DataError(
            f"{record.place} holds a preference (chosen, rejected), which chat does not read. Use data.preferences, or "
            "rename 'chosen' to 'completion' to learn the chosen answers alone."
        )
    for form in FORMATS:
        if all(field in record.fields for field in form.fields):
            return form
    raise DataError(
        f"{record.place} has the fields {', '.join(record.fields) or 'none'}. "
        f"Expected one of: {'; '.join(map(str, FORMATS))}; chosen + rejected (+ prompt) in data.preferences."
    )


def _common(left: Sequence[Message], right: Sequence[Message]) -> int:
    """How many messages both begin with."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def _text(record: Record, fields: tuple[str, ...]) -> Text:
    return Text(text=_string(record, fields[0]))


def _answer(record: Record, fields: tuple[str, ...]) -> Answer | Conversation:
    """prompt + completion: two texts, or two lists of messages of which the second is learnt."""
    prompt, answer = fields
    if isinstance(record.fields[prompt], str) and isinstance(record.fields[answer], str):
        text = _string(record, prompt)
        return Answer(prompt=text, bare_prompt=text, answer=_string(record, answer), finished=_is_finished(record))
    messages = _messages(record, prompt)
    return Conversation(
        messages=(*messages, *_messages(record, answer, role="assistant")),
        tools=_tools(record),
        first=len(messages),
        finished=_is_finished(record),
    )


def _question(record: Record, fields: tuple[str, ...]) -> Answer:
    """question + answer, which nobody wrote to be joined: a line's end stands between them where no template does."""
    question = _string(record, fields[0])
    return Answer(
        prompt=question,
        bare_prompt=f"{question}\n",
        answer=_string(record, fields[1]),
        finished=_is_finished(record),
    )


def _instruction(record: Record, fields: tuple[str, ...]) -> Answer:
    """instruction (+ input) + output, with the headings of Taori et al. 2023 where no chat template sets them apart."""
    instruction = _string(record, fields[0])
    given = _string(record, "input") if record.fields.get("input") else ""
    headed = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"
    return Answer(
        prompt=f"{instruction}\n\n{given}" if given else instruction,
        bare_prompt=headed,
        answer=_string(record, fields[1]),
        finished=_is_finished(record),
    )


def _conversation(record: Record, fields: tuple[str, ...]) -> Conversation:
    return Conversation(
        messages=_messages(record, fields[0]),
        tools=_tools(record),
        finished=_is_finished(record),
    )


def _messages(record: Record, field: str, *, role: str = "user") -> tuple[Message, ...]:
    """A list of messages, {"role", "content"} or {"from", "value"}; a plain text is one message of `role`."""
    given = record.fields[field]
    if isinstance(given, str):
        return ({"role": role, "content": given},)
    if not isinstance(given, Sequence) or not given:
        raise DataError(
            f"{record.place}: '{field}' is {_kind(given)}. Expected a list of messages with role and content."
        )
    return tuple(_message(entry, f"{record.place}: {field}[{number}]") for number, entry in enumerate(given))


def _message(entry: object, place: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{place} is {_kind(entry)}. Expected a message with role and content.")
    # A table gives every message the columns of all: those that are null are not there.
    message = {key: value for key, value in entry.items() if value is not None}
    if "from" in message and "role" not in message:
        if message["from"] not in ROLES or not isinstance(message.get("value"), str):
            raise DataError(
                f"{place}: 'from' is {message['from']!r}. Expected one of {', '.join(ROLES)}, with a value."
            )
        return {"role": ROLES[str(message["from"])], "content": message["value"]}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{place} has no role (it has: {', '.join(entry) or 'nothing'}). Expected role and content.")
    if not isinstance(message.get("content", ""), str | list):
        raise DataError(f"{place}: 'content' is {_kind(message['content'])}. Expected a text.")
    return message


def _tools(record: Record) -> tuple[Mapping[str, object], ...]:
    """The functions that a conversation may call: a list of JSON schemas, or the same written as one text."""
    given = record.fields.get("tools") or ()
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DataError(f"{record.place}: 'tools' is a text that is not JSON ({error}). Give a list.") from error
    if not isinstance(given, Sequence) or not all(isinstance(tool, Mapping) for tool in given):
        raise DataError(f"{record.place}: 'tools' is not a list of objects. Give one JSON schema per tool.")
    return tuple(given)


def _is_finished(record: Record) -> bool:
    return record.fields.get(CUT) != "length"


def _string(record: Record, field: str) -> str:
    value = record.fields[field]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: '{field}' is {_kind(value)}. Expected a text.")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}" if value else f"an empty {type(value).__name__}"


CUT = "finish_reason"
"""Where this field says "length", the answer was cut by a limit and has no end."""

FORMATS = (
    Format(fields=("messages",), read=_conversation, optional=("tools", CUT)),
    Format(fields=("conversations",), read=_conversation, optional=("tools", CUT)),
    Format(fields=("prompt", "completion"), read=_answer, optional=("tools", CUT)),
    Format(fields=("prompt", "response"), read=_answer, optional=(CUT,)),
    Format(fields=("question", "answer"), read=_question, optional=(CUT,)),
    Format(fields=("instruction", "output"), read=_instruction, optional=("input", CUT)),
    Format(fields=("instruction", "response"), read=_instruction, optional=("input", CUT)),
    Format(fields=("text",), read=_text),
)
