"""The wire against a make-believe provider on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import RecipeError, ServiceError
from potstill.core.writing import Message, Raw, Reply, Request, TransportError
from potstill.teachers.address import server, servers
from potstill.teachers.endpoint import EndpointTransport
from tests.servers import Manners, Provider, serving, url_of

HELLO = Request(messages=(Message(role="user", content="hello"),))
SERVERS = Path(__file__).parents[1] / "servers.py"
KEY = "zz-very-secret-0123456789"


async def nothing() -> None:
    """The intent of nobody."""


def with_provider(work: Callable[[Provider], Awaitable[Any]], manners: Manners | None = None, **settings: Any) -> Any:
    async def run() -> Any:
        async with serving(manners, **settings) as provider:
            return await work(provider)

    return asyncio.run(run())


def transport_to(url: str, *, model: str = "mock", timeout_seconds: float = 5.0, **settings: Any) -> EndpointTransport:
    return EndpointTransport(model, [server(url=url, **settings)], timeout_seconds=timeout_seconds)


async def asked(transport: EndpointTransport, request: Request = HELLO) -> Reply:
    try:
        return transport.read(request, await transport.send(request, before=nothing))
    finally:
        await transport.close()


def failing(work: Callable[[Provider], Awaitable[Any]], kind: type[Exception], manners: Manners | None = None) -> Any:
    with pytest.raises(kind) as caught:
        with_provider(work, manners)
    return caught.value


def test_a_chat_is_answered() -> None:
    assert with_provider(lambda provider: asked(transport_to(provider.url))).text == "HELLO"


def test_raw_text_is_continued() -> None:
    assert with_provider(lambda p: asked(transport_to(p.url), Request(prompt="once upon"))).text == "ONCE UPON"


def test_log_probabilities_come_with_the_answer() -> None:
    request = Request(messages=HELLO.messages, log_probs=2)
    reply = with_provider(lambda provider: asked(transport_to(provider.url), request))
    assert [token.top for token in reply.log_probs] == [(("HELLO", -0.5), ("HELLO1", -1.5))]


def test_a_server_without_log_probabilities_gives_none() -> None:
    request = Request(messages=HELLO.messages, log_probs=2)
    reply = with_provider(lambda p: asked(transport_to(p.url), request), Manners(log_probs=False))
    assert reply.log_probs is None and reply.text == "HELLO"


def test_the_intent_is_known_before_the_first_byte_leaves() -> None:
    async def work(provider: Provider) -> list[int]:
        seen = []

        async def before() -> None:
            await asyncio.sleep(0.01)
            seen.append(len(provider.seen))

        transport = transport_to(provider.url)
        await transport.send(HELLO, before=before)
        await transport.close()
        return [*seen, len(provider.seen)]

    assert with_provider(work) == [0, 1]


def test_nothing_is_sent_where_the_intent_fails() -> None:
    async def work(provider: Provider) -> tuple[int, int]:
        async def broke() -> None:
            raise ServiceError("no money")

        transport = transport_to(provider.url)
        with pytest.raises(ServiceError):
            await transport.send(HELLO, before=broke)
        await transport.close()
        return len(provider.seen), next(iter(transport._lines)).under_way

    assert with_provider(work) == (0, 0)


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)

    async def work(provider: Provider) -> tuple[str, str]:
        transport = transport_to(provider.url, key_env="SOME_KEY")
        raw = await transport.send(HELLO, before=nothing)
        await transport.close()
        return provider.headers[0]["Authorization"], repr(raw) + repr(vars(transport)) + repr(servers)

    # A server that quotes the key, as some do.
    sent, seen = with_provider(work, Manners(key=KEY), answer=lambda body: f"your key is {KEY}")
    assert sent == f"Bearer {KEY}"
    assert KEY not in seen and "[key]" in seen


def test_a_key_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    reply = with_provider(lambda p: asked(transport_to(p.url, key_file=str(tmp_path / "key"))), Manners(key=KEY))
    assert reply.text == "HELLO"


def test_a_refused_key_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)

    async def work(provider: Provider) -> Raw:
        transport = transport_to(provider.url, key_env="SOME_KEY")
        raw = await transport.send(HELLO, before=nothing)
        await transport.close()
        return raw

    raw = with_provider(work, Manners(key="another"))
    assert raw.status == 401 and KEY.encode() not in raw.body


@pytest.mark.parametrize("written", ["sk-proj-abc", "sk_abc", "two words"])
def test_a_key_in_the_place_of_its_name_is_refused_unseen(written: str) -> None:
    with pytest.raises(RecipeError, match="name of an environment variable") as caught:
        server(url="http://localhost:1/v1", key_env=written)
    assert written not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"url": "localhost:8000/v1"}, "expected an address such as"),
        ({"url": "http://me:secret@host/v1"}, "carries a password"),
        ({"url": "http://host/v1", "key_file": "/no/such/file"}, "cannot be read"),
        ({"url": "http://host/v1", "rpm": -1}, "must not be negative"),
    ],
)
def test_what_cannot_be_a_server_is_refused_before_anything_is_sent(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        server(**settings)
    assert "secret" not in str(caught.value)


def test_a_misspelt_setting_of_a_further_server_is_named() -> None:
    first = server(url="http://a/v1")
    with pytest.raises(RecipeError, match=r"endpoints\[0\].rmp.*'rpm'"):
        servers(first, [{"url": "http://b/v1", "rmp": 5}])


def test_no_server_is_one_sentence() -> None:
    async def run() -> None:
        await asked(transport_to("http://127.0.0.1:9/v1"))

    with pytest.raises(ServiceError, match=r"There is no server at http://127.0.0.1:9/v1 .*refused.* correct url"):
        asyncio.run(run())


def test_an_address_without_v1_is_corrected() -> None:
    error = failing(lambda p: asked(transport_to(p.url.removesuffix("/v1"))), ServiceError)
    assert "Set url to http://127.0.0.1:" in str(error) and str(error).endswith("/v1.")


def test_an_address_with_the_path_is_corrected() -> None:
    error = failing(lambda p: asked(transport_to(f"{p.url}/chat/completions")), ServiceError)
    assert str(error).endswith("/v1.")


def test_an_unknown_model_is_told_which_there_are() -> None:
    error = failing(lambda p: asked(transport_to(p.url, model="mokc")), ServiceError)
    assert "no model 'mokc'. Did you mean 'mock'? It has: mock." in str(error)


@pytest.mark.parametrize(
    "manners", [Manners(torn=1.0), Manners(silent=1.0), Manners(latency_seconds=1.0)], ids=["torn", "silent", "late"]
)
def test_an_exchange_broken_off_may_be_billed(manners: Manners) -> None:
    error = failing(lambda p: asked(transport_to(p.url, timeout_seconds=0.2)), TransportError, manners)
    assert error.maybe_billed


def test_a_server_that_went_away_is_not_billed() -> None:
    async def run() -> TransportError:
        async with serving() as provider:
            transport = transport_to(provider.url)
            await transport.send(HELLO, before=nothing)
        with pytest.raises(TransportError) as caught:
            for _ in range(2):  # the connection that was kept may break first
                await transport.send(HELLO, before=nothing)
        await transport.close()
        return caught.value

    assert "127.0.0.1" in str(asyncio.run(run()))


def test_a_slow_drip_is_put_together() -> None:
    assert with_provider(lambda p: asked(transport_to(p.url)), Manners(dripped=1.0)).text == "HELLO"


@pytest.mark.parametrize("manners", [Manners(wrong_json=1.0), Manners(wrong_shape=1.0)], ids=["json", "shape"])
def test_an_unreadable_answer_is_given_as_it_came(manners: Manners) -> None:
    async def work(provider: Provider) -> Raw:
        transport = transport_to(provider.url)
        raw = await transport.send(HELLO, before=nothing)
        with pytest.raises(ValueError, match=r"found none|not JSON"):
            transport.read(HELLO, raw)
        await transport.close()
        return raw

    assert with_provider(work, manners).status == 200


def test_a_refusal_is_given_as_it_came_and_slows_the_next_one_down() -> None:
    async def work(provider: Provider) -> tuple[int, float]:
        transport = transport_to(provider.url)
        raw = await transport.send(HELLO, before=nothing)
        [limits] = transport._lines
        wait = limits.ready_at(0.0, 1) - asyncio.get_running_loop().time()
        await transport.close()
        return raw.status, wait

    status, wait = with_provider(work, Manners(refused=1.0, retry_after="5"))
    assert status == 429 and 4.0 < wait <= 5.0


def test_a_server_of_small_capacity_is_found_out() -> None:
    async def work(provider: Provider) -> int:
        transport = transport_to(provider.url)

        async def insist(number: int) -> None:
            request = Request(prompt=str(number))
            while (await transport.send(request, before=nothing)).status == 429:
                pass

        await asyncio.gather(*(insist(number) for number in range(40)))
        await transport.close()
        return len(provider.billed)

    manners = Manners(concurrency=4, latency_seconds=0.002, retry_after="0.002")
    assert with_provider(work, manners) == 40


def test_two_servers_share_the_work() -> None:
    async def run() -> list[int]:
        async with serving(Manners(latency_seconds=0.005)) as one, serving(Manners(latency_seconds=0.005)) as two:
            first = server(url=one.url, concurrency=2)
            transport = EndpointTransport("mock", servers(first, [{"url": two.url, "concurrency": 2}]))
            await asyncio.gather(*(transport.send(Request(prompt=str(n)), before=nothing) for n in range(8)))
            await transport.close()
            return [len(one.seen), len(two.seen)]

    assert asyncio.run(run()) == [4, 4]


def test_connections_are_kept_for_the_next_request() -> None:
    async def work(provider: Provider) -> int:
        transport = transport_to(provider.url)
        for _ in range(5):
            await transport.send(HELLO, before=nothing)
        (session,) = transport._open().sessions.values()
        assert session.connector is not None
        open_now = sum(len(kept) for kept in session.connector._conns.values())
        await transport.close()
        return open_now

    assert with_provider(work) == 1


def test_a_transport_serves_one_event_loop_after_another(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    process = subprocess.Popen([sys.executable, str(SERVERS), "--port-file", str(port_file)])
    try:
        transport = transport_to(url_of(port_file))
        assert [asyncio.run(asked(transport)).text for _ in range(2)] == ["HELLO", "HELLO"]
    finally:
        process.kill()
        process.wait()


def test_the_address_is_no_part_of_the_identity_but_a_declared_word_is() -> None:
    def identity(url: str, word: str = "") -> str:
        return EndpointTransport("m", [server(url=url)], identity=word).identity

    assert identity("http://a/v1") == identity("http://b/v1") == "openai:m"
    assert identity("http://a/v1", "int4") == "openai:m@int4"
