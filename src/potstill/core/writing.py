"""What is asked of a teacher that writes, what it answers, and the example that the exchange is about. No tensors.

A request's key is the hash of everything that can change the answer. How it travels (time-outs, concurrency, batch or
online) and who pays for it (`step`) are not in the key: each field of `Request` says which, and a test reads that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache, lru_cache
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from potstill.core.errors import DataError

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

KEY_VERSION = 1
"""Of the way a key is made. Another version never meets an old key."""

CHANGES_THE_ANSWER = {"in_key": True}
TRAVELS_ONLY = {"in_key": False}

Noun = TypeVar("Noun")
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Finish: TypeAlias = Literal["stop", "length", "tools", "filter", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that a model asks for. `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. `images` are data URLs or addresses that the server can reach."""

    role: Role
    content: str = ""
    images: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer asked for: a conversation (`messages`), or raw text to continue (`prompt`), never both.

    n answers to one question are n requests with `sample` 0..n-1, so each is kept and paid once. A sampling field left
    None is not sent: the server's default holds.
    """

    messages: tuple[Message, ...] = field(default=(), metadata=CHANGES_THE_ANSWER)
    prompt: str = field(default="", metadata=CHANGES_THE_ANSWER)
    sample: int = field(default=0, metadata=CHANGES_THE_ANSWER)
    max_tokens: int | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    temperature: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    top_p: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    top_k: int | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    min_p: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    presence_penalty: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    frequency_penalty: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    repetition_penalty: float | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    stop: tuple[str, ...] = field(default=(), metadata=CHANGES_THE_ANSWER)
    seed: int | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    logit_bias: Mapping[str, float] = field(default_factory=dict, metadata=CHANGES_THE_ANSWER)
    log_probs: int | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    """Alternatives per written token; 0 asks for the written tokens' own log-probabilities only."""
    prompt_log_probs: int | None = field(default=None, metadata=CHANGES_THE_ANSWER)
    """The same for the tokens of the prompt, where the server can (vLLM, SGLang)."""
    schema: Mapping[str, JSON] = field(default_factory=dict, metadata=CHANGES_THE_ANSWER)
    """JSON Schema that the answer must follow."""
    tools: tuple[Mapping[str, JSON], ...] = field(default=(), metadata=CHANGES_THE_ANSWER)
    tool_choice: str = field(default="", metadata=CHANGES_THE_ANSWER)
    reasoning_effort: str = field(default="", metadata=CHANGES_THE_ANSWER)
    extra: Mapping[str, JSON] = field(default_factory=dict, metadata=CHANGES_THE_ANSWER)
    """Fields of one provider, sent as they are."""
    step: str = field(default="", metadata=TRAVELS_ONLY)
    """The step of the pipeline that is billed."""

    def __post_init__(self) -> None:
        assert bool(self.messages) != bool(self.prompt), "a request is either a conversation or raw text"

    def key(self, writer: str) -> str:
        """sha256 of what can change the answer, for the writer of this identity: 64 hexadecimal digits."""
        return key_of(self.text(), writer)

    def text(self) -> str:
        """`asked` in its one spelling."""
        return canonical(self.asked())

    def asked(self) -> dict[str, JSON]:
        """The fields of the key that are set. One at its empty default stays out, so a later field changes no key."""
        kind: type = type(self)
        return _plain_fields(self, _defaults(kind, in_key=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one exchange as the server counted them. `cached` are part of `input`, `reasoning` part of `output`."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogProb:
    """A written token, its log-probability in nats, and the alternatives (token, log-probability) that were asked."""

    token: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer. `reason` is one word for counting; `message` says it to a person, secrets removed."""

    reason: Literal["request", "key", "model", "policy", "too_long", "server", "unreadable", "budget", "stalled"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a writer said to one request, read from the raw answer that is on disk under `key`."""

    key: str
    text: str = ""
    reasoning: str = ""
    """What the server gave apart from the answer as the model's thinking."""
    finish: Finish = "unknown"
    tool_calls: tuple[ToolCall, ...] = ()
    log_probs: tuple[TokenLogProb, ...] | None = None
    """None where the server gave none."""
    prompt_log_probs: tuple[TokenLogProb, ...] | None = None
    usage: Usage = field(default_factory=Usage)
    dollars: float = 0.0
    """Paid for this answer, once, whenever that was."""
    remembered: bool = False
    """It came from the store: nothing was sent."""
    model: str = ""
    """The model as the server named it."""
    failure: Failure | None = None

    @property
    def is_whole(self) -> bool:
        """There is an answer, and it was not cut short."""
        return self.failure is None and self.finish != "length"


class Writer(Protocol):
    """A teacher known by its text (and log-probabilities where offered). Retries, limits and prices live inside."""

    @property
    def identity(self) -> str:
        """Provider family and model: it enters every request key."""
        ...

    async def ask(self, request: Request) -> Reply:
        """The answer, remembered or bought. A refused or failed request is a Reply with a `failure`, not an exception.

        Raises UserError or RunError only for what concerns all requests: a wrong key, a full disk, a spent budget.
        """
        ...

    @property
    def dollars(self) -> float:
        """Spent so far by its run, judged by the prices it knows; interrupted calls of the same run included."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where an example comes from: enough to find every answer that it is made of in the request store."""

    parents: tuple[str, ...] = ()
    """Ids of the examples that it was made from."""
    requests: tuple[str, ...] = ()
    """Keys of the answers that it holds, oldest first."""
    writers: tuple[str, ...] = ()
    """Identities of the writers, one for each request."""
    prompts: tuple[str, ...] = ()
    """Hash of the instruction template of each request: a changed prompt shows."""
    seed: int | None = None
    dollars: float = 0.0
    """What its own requests cost, its parents' apart."""
    steps: tuple[str, ...] = ()
    """The elicitors and filters that it passed, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of knowledge on its way from seed to training data. Never changed: `replace` makes the next one."""

    id: str
    """Unique within a flow and the same on every run: made from content or from the parent's id and a number."""
    prompt: str = ""
    """What the student will be asked."""
    answer: str = ""
    reasoning: str = ""
    """The thinking that leads to the answer, where it is kept apart."""
    reference: str = ""
    """The right answer, where it is known: for graders, never shown to a student."""
    system: str = ""
    turns: tuple[Message, ...] = ()
    """Earlier turns of the conversation, before `prompt`."""
    fields: Mapping[str, JSON] = field(default_factory=dict)
    """Anything else by name: topic, document, tests, candidates, scores, chosen, rejected, tools ..."""
    lineage: Lineage = field(default_factory=Lineage)
    rejection: str = ""
    """Why it was dropped, as "filter: reason"; empty while it is alive. Dropped rows travel on untouched to the end."""
    raw: str = ""
    """The text that a rejection is about."""

    @classmethod
    def of(cls, prompt: str, **given: object) -> Example:
        """An example whose id is the hash of its content."""
        made = cls(id="", prompt=prompt, **given)  # type: ignore[arg-type]
        return replace(made, id=content_id(made.plain()))

    def plain(self) -> dict[str, JSON]:
        """For a line of JSON: the fields that are set. `Example.read` is the way back."""
        kind: type = type(self)
        return _plain_fields(self, _defaults(kind))

    @classmethod
    def read(cls, plain: Mapping[str, JSON]) -> Example:
        """From `plain()`. Raises TypeError or ValueError for what no example wrote."""
        given: dict[str, Any] = dict(plain)
        turns = tuple(_read_message(turn) for turn in given.pop("turns", ()))
        lineage: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.pop("lineage", {}).items()
        }
        return cls(turns=turns, lineage=Lineage(**lineage), **given)

    def rejected(self, by: str, reason: str, *, raw: str = "") -> Example:
        return replace(self, rejection=f"{by}: {reason}", raw=raw or self.raw)

    def passed(self, step: str, **changes: object) -> Example:
        """The next example, with this step in its lineage: `passed("grade", answer=better)`."""
        return changed(self, lineage=changed(self.lineage, steps=(*self.lineage.steps, step)), **changes)

    def told(self, reply: Reply, *, by: Writer, template: str = "", **changes: object) -> Example:
        """The next example, with this reply in its lineage: `told(reply, by=teacher, answer=reply.text)`."""
        lineage = changed(
            self.lineage,
            requests=(*self.lineage.requests, reply.key),
            writers=(*self.lineage.writers, by.identity),
            prompts=(*self.lineage.prompts, _template_id(template)),
            dollars=self.lineage.dollars + reply.dollars,
        )
        return changed(self, lineage=lineage, **changes)

    def child(self, number: int, /, **changes: object) -> Example:
        """A new example made from this one: its id is the parent's and a number, and it costs nothing yet."""
        lineage = replace(self.lineage, parents=(self.id,), dollars=0.0)
        return replace(self, id=f"{self.id}.{number}", lineage=lineage, **changes)  # type: ignore[arg-type]


Rows: TypeAlias = AsyncGenerator[Example, None]


class Elicitor(Protocol):
    """Examples in, examples out, lazily, in order: the same inputs and answers give the same outputs on every run.

    `knowledge.flow` has what most need: `each` (rows by themselves, many in flight, order kept) and `gate` (a decision
    on one row after the other). A rejected row must be passed on as it is.
    """

    @property
    def name(self) -> str:
        """The step in reports, bills and rejections."""
        ...

    @property
    def writers(self) -> tuple[Writer, ...]:
        """Those it asks; the flow closes them."""
        ...

    def __call__(self, rows: AsyncIterator[Example]) -> Rows: ...


class Task(Protocol):
    """A task is examples and a grade; the grade serves evaluation, reward and filter."""

    def examples(self) -> Iterable[Example]: ...

    def grade(self, example: Example, answer: str) -> float:
        """From 0 (wrong) to 1 (right)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """An answer as it came, kept before anybody reads it. Header names in lower case, secrets never among them."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """One try at one request: no memory, no money, no retries. `teachers.recorded` puts those around it."""

    @property
    def identity(self) -> str: ...

    async def send(self, request: Request, *, before: Callable[[], Awaitable[None]]) -> Raw:
        """Wait for rate and concurrency limits, then `await before()` (it writes the intent), then send.

        Any HTTP answer is returned, errors included. Raises TransportError where none came.
        """
        ...

    def read(self, request: Request, raw: Raw) -> Reply:
        """Parse a good answer; key and dollars are filled in later. Raises ValueError for a torn or wrong body."""
        ...

    def input_tokens(self, request: Request) -> int:
        """An upper bound on the tokens that will be billed as input."""
        ...

    async def close(self) -> None: ...


class TransportError(Exception):
    """No answer came. `maybe_billed`: the server may have done the work all the same."""

    def __init__(self, message: str, *, maybe_billed: bool) -> None:
        super().__init__(message)
        self.maybe_billed = maybe_billed


def key_of(text: str, writer: str) -> str:
    """The key of a request from its `text`: the hash of {"request": ..., "version": ..., "writer": ...}, canonical."""
    whole = f'{{"request":{text},"version":{KEY_VERSION},"writer":{canonical(writer)}}}'
    return hashlib.sha256(whole.encode()).hexdigest()


def content_id(value: JSON) -> str:
    """A short stable name for plain data: 16 hexadecimal digits. Raises DataError for half of a surrogate pair."""
    try:
        spelled = canonical(value).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text holds half of a character (a lone surrogate): {error.object[max(0, error.start - 20) :][:30]!a}. "
            "Write it whole, or take it out."
        ) from error
    return hashlib.sha256(spelled).hexdigest()[:16]


def whole(value: JSON) -> JSON:
    """Halves of surrogate pairs, which JSON can say where an emoji was cut, as U+FFFD: no file can hold them."""
    match value:
        case str():
            return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [whole(entry) for entry in value]
        case dict():
            return {name: whole(entry) for name, entry in value.items()}
    return value


@lru_cache(maxsize=1024)
def _template_id(template: str) -> str:
    return content_id(template) if template else ""


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: JSON) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def changed(thing: Noun, /, **changes: object) -> Noun:
    """`dataclasses.replace`, twice as fast, for what every row goes through. It does not run __post_init__."""
    kind: type = type(thing)
    names = _names(kind)
    if not changes.keys() <= names.keys():
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(changes.keys() - names.keys()))}")
    made: Noun = object.__new__(kind)
    write = object.__setattr__
    for name in names:
        write(made, name, changes[name] if name in changes else getattr(thing, name))
    return made


def _read_message(plain: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in plain.get("tool_calls", ()))
    return Message(**{**plain, "images": tuple(plain.get("images", ())), "tool_calls": calls})


@cache
def _names(kind: type[Any]) -> Mapping[str, None]:
    return dict.fromkeys(f.name for f in fields(kind))


def _plain_fields(thing: object, defaults: tuple[tuple[str, object], ...]) -> dict[str, JSON]:
    """The fields that are not at their default, as plain data."""
    plain: dict[str, JSON] = {}
    for name, default in defaults:
        value = getattr(thing, name)
        if value is not default and value != default:
            plain[name] = _plain(value)
    return plain


@cache
def _defaults(kind: type, *, in_key: bool = False) -> tuple[tuple[str, object], ...]:
    """Each field and its default, worked out once: this is asked for several times per row."""
    chosen: Iterable[Field[Any]] = fields(kind)
    return tuple(
        (f.name, f.default_factory() if f.default_factory is not MISSING else f.default)
        for f in chosen
        if not in_key or f.metadata["in_key"]
    )


def _plain(value: object) -> JSON:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value  # temperature 1 and 1.0 ask for the same
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (Message, ToolCall, Lineage)):
        kind: type = type(value)
        return _plain_fields(value, _defaults(kind))
    assert isinstance(value, Mapping), f"{type(value).__name__} is not plain data"
    return {str(name): _plain(entry) for name, entry in value.items()}
