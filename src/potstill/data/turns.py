"""Where the assistant's turns stand in a conversation that a chat template wrote.

By the template's {% generation %} marks where it has them. Else by rendering the conversation as it grows: what a turn
adds to the prompt that asks for it, up to its end-of-turn mark, is the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from potstill.core.errors import DataError
from potstill.data.formats import Conversation, Message
from potstill.data.tokens import Tokenizer

Span: TypeAlias = tuple[int, int]
"""From one character of a text up to another."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields in which a message may keep its reasoning; a template reads one of them, or none."""
PROBE = "potstill-answer-stands-here"

REWRITTEN = (
    "an answer is not supervised, because the chat template writes it otherwise once the conversation goes on "
    "(many drop earlier reasoning)"
)
UNASKED = "an answer begins otherwise than the chat template's own generation prompt asks for it"
ENDLESS = "an answer ends without an end-of-turn mark, so the student does not learn to stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a tokenizer's model expects conversations to be written."""

    tokenizer: Tokenizer
    text: str
    """Jinja; empty: there is none, and prompt and completion are joined as they are."""

    @property
    def fingerprint(self) -> str:
        """Equal where conversations are written alike; "none" without a template."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest() if self.text else "none"

    @property
    def has_marks(self) -> bool:
        return GENERATION.search(self.text) is not None

    @property
    def asks(self) -> bool:
        """It knows of a generation prompt."""
        return "add_generation_prompt" in self.text

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]], *, ask: bool = False) -> str:
        """The text of these messages; `ask`: with the words that call for the assistant's next one."""
        text: str = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=ask,
        )
        return text

    def marked(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> tuple[str, list[Span]]:
        """The text and the spans inside the template's {% generation %} marks."""
        # Not the mask of tokens that apply_chat_template offers: of a character spelled in several byte tokens at the
        # end of a span it keeps only the first.
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, stop) for start, stop in spans[0]]


class Turns:
    """One conversation under one template: its text, and the span of each of the assistant's turns."""

    def __init__(self, conversation: Conversation, template: Template, place: str) -> None:
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.finished = conversation.finished
        self.template = template
        self.place = place
        self.turns = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        self.answers = [number for number in self.turns if number >= conversation.first]
        """The turns that are to be learnt, by the number of their message."""
        self.text = self._render(self.messages)
        self.notes: list[str] = []
        self._befores: dict[tuple[int, bool], str] = {}

    def is_empty(self, number: int) -> bool:
        message = self.messages[number]
        return not _words(message) and not message.get("tool_calls")

    def span(self, number: int) -> Span | None:
        """Where turn `number` stands, with its end-of-turn mark. None: it is rewritten as the conversation goes on."""
        span = self._marked(number) if self.marks else self._grown(number)
        if span is None or number != self.turns[-1]:
            return span
        if not self.finished:
            return self._unended(span)
        if self.text[slice(*span)].endswith(tuple(_words(self.messages[number])[-1:])):
            self.notes.append(ENDLESS)
        return span

    @cached_property
    def marks(self) -> dict[int, Span]:
        """The template's own marks by turn. Empty where it has none, or not one for each."""
        if not self.template.has_marks:
            return {}
        marked, spans = self.template.marked(self.messages, self.tools)
        usable = marked == self.text and len(spans) == len(self.turns)
        return dict(zip(self.turns, spans, strict=True)) if usable else {}

    def _marked(self, number: int) -> Span | None:
        start, stop = self.marks[number]
        if _holds(self.text[start:stop], self.messages[number]):
            return start, stop
        self._check_kept(number, self._upto(number))
        self.notes.append(REWRITTEN)
        return None

    def _grown(self, number: int) -> Span | None:
        upto = self._upto(number)
        self._check_kept(number, upto)
        stop = len(upto.rstrip())
        # White space after an end-of-turn mark is no part of it. Where nothing but white space ends a turn, it is one.
        if upto[:stop].endswith(tuple(_words(self.messages[number])[-1:])):
            stop = len(upto)
        if self.text[:stop] != upto[:stop]:
            self.notes.append(REWRITTEN)
            return None
        return self._begin(number, upto), stop

    def _begin(self, number: int, upto: str) -> int:
        """Where the prompt that asks for turn `number` ends."""
        asked = self._before(number, ask=True)
        words = tuple(_words(self.messages[number])[:1])
        if self.template.asks and asked and upto.startswith(asked) and upto[len(asked) :].startswith(words):
            return len(asked)
        before = self._before(number)
        if asked != before and upto.startswith(asked):
            return len(asked)  # The template puts something in front of the words: thinking, a call of a tool.
        head = shared_start(self._around(number)[0], upto)
        if asked == before:
            return head  # There is no generation prompt.
        self.notes.append(UNASKED)
        # The words they share, but never more than stands in front of any answer, nor a prompt that was rewritten.
        return min(head, shared_start(asked, upto)) if upto.startswith(before) else head

    def _unended(self, span: Span) -> Span:
        """Without the end-of-turn mark: the writer was cut off and did not come to an end."""
        start, stop = span
        tail = self._around(self.turns[-1])[1]
        mark = next(mark for mark in (tail, tail.rstrip(), "") if self.text[:stop].endswith(mark))
        return start, stop - len(mark)

    def _check_kept(self, number: int, upto: str) -> None:
        """DataError unless what turn `number` adds holds all its words."""
        asked = self._before(number, ask=True)
        before = asked if upto.startswith(asked) else self._before(number)
        added = upto[len(before) :] if upto.startswith(before) else upto
        if _holds(added, self.messages[number]):
            return
        answer = " ".join(_words(self.messages[number]))
        raise DataError(
            f"{self.place}: the chat template loses the answer or a part of it: {quoted(answer)} is written as "
            f"{quoted(added)}. Give another template=, or take that part out of the data."
        )

    def _around(self, number: int) -> tuple[str, str]:
        """What the template writes before and after the content of turn `number`."""
        message = {key: value for key, value in self.messages[number].items() if key not in REASONING}
        text = self._render((*self.messages[:number], {**message, "content": PROBE}))
        head, _, tail = text.partition(PROBE)
        return head, tail

    def _upto(self, number: int) -> str:
        return self.text if number == len(self.messages) - 1 else self._render(self.messages[: number + 1])

    def _before(self, number: int, *, ask: bool = False) -> str:
        """The text before turn `number`; empty where a template wants more than that: a user's message first."""
        from jinja2 import TemplateError

        if (number, ask) not in self._befores:
            try:
                text = self.template.render(self.messages[:number], self.tools, ask=ask) if number else ""
            except TemplateError:
                text = ""
            self._befores[number, ask] = text
        return self._befores[number, ask]

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self.template.render(messages, self.tools)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in self.messages)
            raise DataError(
                f"{self.place}: the chat template refuses this conversation ({error}). Correct its messages (roles: "
                f"{roles}), or give another template=."
            ) from error


def _words(message: Message) -> list[str]:
    """The texts of a message that a template must keep, reasoning first, without white space around them."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    reasoning = next((message[field] for field in REASONING if message.get(field)), "")
    return [text.strip() for text in (reasoning, *texts) if isinstance(text, str) and text.strip()]


def _holds(text: str, message: Message) -> bool:
    """All words of the message are in the text; how they are spaced is the template's matter."""
    dense = "".join(text.split())
    return all("".join(words.split()) in dense for words in _words(message))


def shared_start(left: str, right: str) -> int:
    """How many characters both begin with."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def quoted(text: str) -> str:
    """A text for a message: escaped, and its middle left out where it is long."""
    return json.dumps(text if len(text) <= 80 else f"{text[:40]} ... {text[-36:]}")
