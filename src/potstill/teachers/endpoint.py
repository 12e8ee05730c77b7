"""A teacher behind an address: any server that speaks OpenAI's completions (vLLM, SGLang, llama.cpp, Ollama, hosted).

`endpoint` is the writer; `EndpointTransport` is the wire under it, which knows no memory, money or retries. A key that
a server quotes is taken out of everything that leaves this module.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic_core import to_json

from potstill.core.catalog import part
from potstill.core.writing import Raw, Reply, Request, TransportError
from potstill.stores.requests import KEPT_HEADERS, Requests
from potstill.teachers import wire, wire_replies
from potstill.teachers.address import Server, proxy_of, server, servers
from potstill.teachers.limits import Gate, Pass, retry_after_seconds
from potstill.teachers.money import TABLE, Purse
from potstill.teachers.patience import Retries, TimeLimit
from potstill.teachers.recorded import Recorded
from potstill.teachers.refusals import is_misdirected, misdirected, unreachable
from potstill.teachers.writers import Given, writer_over

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

OVERLOADED = frozenset({429, 529})
"""529 is how Anthropic and some others say 429."""
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 4.0
"""uvicorn, under most open servers, hangs up after 5 idle seconds: a request sent at that moment would be lost."""
TOTAL_TOKENS = re.compile(rb'"total_tokens"\s*:\s*(\d+)')


@part("writer")
def endpoint(
    model: str,
    *,
    url: str,
    key_env: str = "OPENAI_API_KEY",
    key_file: str = "",
    rpm: float = 0,
    tpm: float = 0,
    concurrency: int = 256,
    endpoints: Sequence[Mapping[str, float | str]] = (),
    timeout_seconds: float = 600.0,
    length_field: wire.LengthField = "max_tokens",
    identity: str = "",
    price: Given = TABLE,
    budget: float | Purse = math.inf,
    step_budgets: Mapping[str, float] | None = None,
    store: str | Requests = "",
    run: str = "",
    retries: Retries | None = None,
    longer: float = 1.0,
) -> Recorded:
    """A writer behind `url` (up to and with /v1). `key_env` to `concurrency`: see `server`; `budget` on: `writer_over`.

    endpoints: further servers or keys of the same model, each a mapping of url, key_env, rpm, ...
    identity: a word for what makes this server's answers others' (a fine-tune, a quantisation); it enters every key.
    length_field: hosted reasoning models want max_completion_tokens. price: the shipped table's, unless given.
    longer: where an answer was cut short, ask once more with so many times `max_tokens`; 1 takes it as it is.
    """
    first = server(url=url, key_env=key_env, key_file=key_file, rpm=rpm, tpm=tpm, concurrency=concurrency)
    transport = EndpointTransport(
        model,
        servers(first, endpoints),
        identity=identity,
        timeout_seconds=timeout_seconds,
        length_field=length_field,
    )
    return writer_over(
        transport, model=model, price=price, budget=budget, step_budgets=step_budgets, store=store, run=run,
        retries=retries, longer=longer,
    )  # fmt: skip


class EndpointTransport:
    """One try at one request, at the least loaded of several servers of one model."""

    def __init__(
        self,
        model: str,
        servers: Sequence[Server],
        *,
        identity: str = "",
        timeout_seconds: float = 600.0,
        length_field: wire.LengthField = "max_tokens",
    ) -> None:
        self.model = model
        self._identity = identity_of(model, identity)
        self._timeout_seconds = timeout_seconds
        self._length_field = length_field
        self._gate = Gate([one.limits for one in servers])
        self._lines = {one.limits: _Line(one) for one in servers}
        self._wires: _Wires | None = None

    @property
    def identity(self) -> str:
        return self._identity

    async def send(self, request: Request, *, before: Callable[[], Awaitable[None]]) -> Raw:
        """See core.writing.Transport. Raises ServiceError for an answer that every request would get."""
        sent = to_json(wire.body(request, model=self.model, length_field=self._length_field))
        which = await self._gate.enter(wire.likely_tokens(request))
        try:
            raw = await self._sent(which, wire.path(request), sent, before)
        finally:
            self._gate.moved()
        if raw.status >= 400 and is_misdirected(raw):
            line = self._lines[which.limits]
            raise await misdirected(
                raw,
                session=self._open().sessions[line],
                url=line.server.url,
                headers=line.server.headers,
                path=wire.path(request),
                model=self.model,
            )
        return raw

    def read(self, request: Request, raw: Raw) -> Reply:
        return wire_replies.read(request, raw.body)

    def input_tokens(self, request: Request) -> int:
        return wire.most_input_tokens(request)

    async def close(self) -> None:
        wires, self._wires = self._wires, None
        if wires is not None and wires.loop is asyncio.get_running_loop():
            await wires.close()

    async def _sent(self, which: Pass, path: str, sent: bytes, before: Callable[[], Awaitable[None]]) -> Raw:
        """The exchange while it holds the pass."""
        clock = asyncio.get_running_loop().time
        limits, line = which.limits, self._lines[which.limits]
        is_sent = False
        try:
            await before()
            is_sent = True
            raw = await self._exchange(line, path, sent)
        except BaseException:
            if is_sent:
                limits.lost(which)
            else:
                limits.withdrawn(which, now=clock())
            raise
        wait = retry_after_seconds(raw.headers) if raw.status in OVERLOADED or raw.status == 503 else None
        if raw.status in OVERLOADED or wait is not None:
            limits.refused(which, now=clock(), retry_after=wait)
        else:
            limits.answered(which, now=clock(), tokens=_total_tokens(raw) if limits.tpm else None)
        return raw

    async def _exchange(self, line: _Line, path: str, sent: bytes) -> Raw:
        import aiohttp

        try:
            wires = self._open()
            with wires.limit.wait():
                address = line.addresses[path]
                response = await wires.sessions[line].post(address, data=sent, proxy=line.proxy, allow_redirects=False)
                body = await response.read()  # which also gives the connection back
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, ssl.SSLError) as error:
            if not line.has_answered and len(self._lines) == 1:
                raise unreachable(line.server.url, error) from None
            raise TransportError(str(unreachable(line.server.url, error)), maybe_billed=False) from None
        except TimeoutError:
            raise TransportError(
                f"{line.server.url} gave no answer within {self._timeout_seconds:g} s.", maybe_billed=True
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The server hung up, or its answer is torn: the work may be done all the same.
            reason = line.server.without_key(f"{type(error).__name__}: {error}".encode()).decode()
            raise TransportError(f"{line.server.url} broke the exchange off ({reason}).", maybe_billed=True) from None
        line.has_answered = True
        return Raw(status=response.status, headers=_kept(response, line.server), body=line.server.without_key(body))

    def _open(self) -> _Wires:
        """What belongs to the running loop."""
        if self._wires is None or self._wires.loop is not asyncio.get_running_loop():
            self._wires = _Wires(self._lines.values(), self._timeout_seconds)
        return self._wires


class _Wires:
    """What belongs to one event loop: a session for each server, whose connections are kept for the next request."""

    def __init__(self, lines: Iterable[_Line], timeout_seconds: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.limit = TimeLimit(timeout_seconds)
        self.sessions = {line: open_session(headers=line.server.headers) for line in lines}

    async def close(self) -> None:
        self.limit.close()
        for session in self.sessions.values():
            await session.close()


class _Line:
    """What is worked out once for a server."""

    def __init__(self, server: Server) -> None:
        from yarl import URL

        self.server = server
        self.addresses = {path: URL(server.url + path) for path in (wire.CHAT, wire.TEXT)}
        self.proxy = proxy_of(server.url)
        self.has_answered = False


def identity_of(model: str, word: str) -> str:
    """Family and model. Not the address: the same model elsewhere gives the same answers, unless a declared word says
    that it does not. Not the way either: a batch job's answers are the endpoint's."""
    return f"openai:{model}@{word}" if word else f"openai:{model}"


def open_session(*, headers: Mapping[str, str] | None = None, timeout_seconds: float | None = None) -> ClientSession:
    """headers: sent with every request. timeout_seconds: of each request; None where somebody else looks after it."""
    import aiohttp

    return aiohttp.ClientSession(
        # The gate counts connections, so the connector need not.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, ttl_dns_cache=300),
        timeout=aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
    )


def _kept(response: ClientResponse, server: Server) -> dict[str, str]:
    """Headers worth keeping, names in lower case, the first of each. All others may name an account."""
    kept: dict[str, str] = {}
    for given, value in response.headers.items():
        name = given.lower()
        if name in KEPT_HEADERS and name not in kept:
            is_clean = value.isascii() and not (server.key and server.key in value)
            kept[name] = value if is_clean else server.without_key(value.encode(errors="replace")).decode()
    return kept


def _total_tokens(raw: Raw) -> float | None:
    """As the server counts them. Reading the answer comes later, when it is safe on disk."""
    found = TOTAL_TOKENS.search(raw.body, max(0, raw.body.rfind(b'"usage"')))
    return float(found[1]) if found else None
