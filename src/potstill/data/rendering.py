"""From an example to the text that a model reads, with the spans of it that are answers.

Conversations go through a chat template. Without one, a prompt and its completion are joined as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from potstill.core.errors import DataError, RecipeError
from potstill.data.formats import Answer, Conversation, Example, Message, Text
from potstill.data.tokens import Tokenizer
from potstill.data.turns import Span, Template, Turns

Supervise: TypeAlias = Literal["answers", "all", "last"]

EMPTY = "the answer is empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A text and the character spans of it that are supervised."""

    text: str
    spans: tuple[Span, ...]
    plain: bool
    """Not from a template: the tokenizer puts its own special tokens in front."""
    ends: bool = False
    """An end-of-sequence token follows, which the text does not show."""
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """All of it is supervised."""
        return self.spans == ((0, len(self.text)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Why an example teaches nothing."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """How examples become text: the template, the system message put in front, what is supervised."""

    template: Template
    supervise: Supervise
    system: str = ""

    def __call__(self, example: Example, *, place: str) -> Rendered | LeftOut:
        """The text with its supervised spans. DataError where the template cannot say it, or loses the answer."""
        if isinstance(example, Text):
            return self._text(example, place)
        if isinstance(example, Answer) and not self.template.text:
            return self._joined(example)
        if not self.template.text:
            raise DataError(
                f"{place} is a conversation, but the tokenizer has no chat template. Give template='<a .jinja file>', "
                "or rows with prompt + completion."
            )
        return self._turns(_as_conversation(example, self.system), place)

    def _text(self, example: Text, place: str) -> Rendered | LeftOut:
        if self.system:
            raise RecipeError(f"chat.system: {place} is a bare text, which has no system message. Leave it out.")
        if not example.text:
            return LeftOut(reason="the text is empty")
        return Rendered(text=example.text, spans=((0, len(example.text)),), plain=True, ends=True)

    def _joined(self, example: Answer) -> Rendered | LeftOut:
        if not example.answer:
            return LeftOut(reason=EMPTY)
        text = example.bare_prompt + example.answer
        start = 0 if self.supervise == "all" else len(example.bare_prompt)
        return Rendered(text=text, spans=((start, len(text)),), plain=True, ends=example.finished)

    def _turns(self, conversation: Conversation, place: str) -> Rendered | LeftOut:
        turns = Turns(conversation, self.template, place)
        answers = turns.answers[-1:] if self.supervise == "last" else turns.answers
        if not answers:
            return LeftOut(reason="no message is the assistant's")
        if any(turns.is_empty(number) for number in answers):
            return LeftOut(reason=EMPTY)
        found = [turns.span(number) for number in answers]
        spans = tuple(span for span in found if span is not None)
        if self.supervise == "all":
            # What an unfinished answer lacks is not supervised either.
            stop = spans[-1][1] if spans and not conversation.finished else len(turns.text)
            spans = ((0, stop),)
        return Rendered(text=turns.text, spans=spans, plain=False, notes=tuple(dict.fromkeys(turns.notes)))


def template_of(tokenizer: Tokenizer, template: str) -> Template:
    """ "own": the tokenizer's template, if it has one; "plain": none; else the Jinja file of this name."""
    if template == "plain":
        return Template(tokenizer=tokenizer, text="")
    if template != "own":
        return Template(tokenizer=tokenizer, text=_read(Path(template).expanduser()))
    own = tokenizer.chat_template
    # Several templates by name: "default" is the one without tools or retrieval.
    return Template(tokenizer=tokenizer, text=(own.get("default", "") if isinstance(own, dict) else own) or "")


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"chat.template: there is no file {path}. Expected 'own', 'plain' or the path of a Jinja file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"chat.template: {path} is no UTF-8 text ({error}). Save it as UTF-8.") from error


def _as_conversation(example: Answer | Conversation, system: str) -> Conversation:
    if isinstance(example, Answer):
        messages = ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer})
        example = Conversation(messages=messages, finished=example.finished)
    if not system or example.messages[0]["role"] == "system":
        return example
    lead: Message = {"role": "system", "content": system}
    return replace(example, messages=(lead, *example.messages), first=example.first + 1)
