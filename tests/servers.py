"""A make-believe provider on loopback that speaks OpenAI's completions and batches, with all the faults of real ones.

In a test, on the test's own loop:

    async with serving(Manners(latency_seconds=0.01)) as provider:
        ... provider.url, provider.seen

In a process of its own, until it is killed; the port is written to a file when it listens:

    python tests/servers.py --port-file /tmp/port --latency-seconds 0.02 --failed 0.1 --journal /tmp/served.jsonl

An answer is a pure function of the request. Faults are drawn from (seed, number of arrival).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aiohttp import web

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How the provider behaves. Shares are of the requests, 0 to 1; the first fault drawn is the one that comes."""

    seed: int = 0
    model: str = "mock"
    key: str = ""
    """Wanted as a bearer token; empty: anyone may ask."""
    latency_seconds: float = 0.0
    spread: float = 0.0
    """Latency varies by this share of itself."""
    refused: float = 0.0
    """429 with Retry-After."""
    retry_after: str = "0.01"
    concurrency: int = 0
    """More at once than this are refused (0: no limit)."""
    failed: float = 0.0
    """503, nothing done."""
    torn: float = 0.0
    """The work is done and billed; half of the answer arrives, then the connection breaks."""
    silent: float = 0.0
    """The work is done and billed; the connection breaks before the first byte."""
    wrong_json: float = 0.0
    """A success whose body is no JSON."""
    wrong_shape: float = 0.0
    """A success without choices."""
    truncated: float = 0.0
    """finish_reason length: half of the text. Decided by the request, so the answer stays a function of it."""
    dripped: float = 0.0
    """The body comes in small pieces."""
    log_probs: bool = True
    usage: bool = True
    batch_seconds: float = 0.0
    """How long a batch job takes."""
    batch_expired: float = 0.0
    """Share of a job's requests that it does not get done."""


def shouted(body: Body) -> str:
    """The default answer: the last text in capitals, with the seed, where one was given."""
    text = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
    return f"{str(text).upper()} {body['seed']}" if "seed" in body else str(text).upper()


@dataclass
class Provider:
    """What is known of a running provider. `seen`: bodies as they came; `billed`: how often each was answered."""

    manners: Manners
    answer: Callable[[Body], str] = shouted
    tells: Callable[[str], list[Body]] | None = None
    """The log-probabilities that come with a chat's answer, token by token; None: made up, a token is a word."""
    journal: Path | None = None
    url: str = ""
    seen: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    billed: Counter[str] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    remembers: bool = True
    """Keep `seen` and `headers`; off in a process of its own, whose memory stays flat."""
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, Body] = field(default_factory=dict)
    _arrivals: int = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        number, self._arrivals = self._arrivals, self._arrivals + 1
        if not self._admits(request):
            return _error(401, "invalid_api_key", f"Incorrect API key provided: {_bearer(request)}.")
        body = json.loads(raw)
        if self.remembers:
            self.seen.append(body)
            self.headers.append(dict(request.headers))
        if body.get("model") != self.manners.model:
            return _error(404, "model_not_found", f"The model `{body.get('model')}` does not exist.")
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._behave(request, raw, body, random.Random(f"{self.manners.seed} {number}"))
        finally:
            self.at_once -= 1

    async def _behave(self, request: web.Request, raw: bytes, body: Body, draw: random.Random) -> web.StreamResponse:
        manners = self.manners
        crowded = manners.concurrency and self.at_once > manners.concurrency
        if crowded or draw.random() < manners.refused:
            return _error(429, "rate_limit_exceeded", "Slow down.", headers={"Retry-After": manners.retry_after})
        if manners.latency_seconds:
            await asyncio.sleep(manners.latency_seconds * (1 + manners.spread * (2 * draw.random() - 1)))
        if draw.random() < manners.failed:
            return _error(503, "overloaded", "The engine is overloaded.")
        self._bill(raw, body)
        said = json.dumps(self.completion(body)).encode()
        if draw.random() < manners.silent:
            return _hang_up(request)
        if draw.random() < manners.torn:
            return await _torn(request, said)
        if draw.random() < manners.wrong_json:
            return web.Response(body=b"<html>Bad gateway</html>", content_type="text/html")
        if draw.random() < manners.wrong_shape:
            return web.json_response({"object": "chat.completion", "choices": []})
        if draw.random() < manners.dripped:
            return await _dripped(request, said)
        return web.Response(body=said, content_type="application/json")

    def completion(self, body: Body) -> Body:
        """A good answer."""
        text = self.answer(body)
        cut = random.Random(json.dumps(body, sort_keys=True)).random() < self.manners.truncated
        words = text.split()
        if cut:
            words = words[: len(words) // 2]
            text = " ".join(words)
        finish = "length" if cut else "stop"
        choice: Body = {"index": 0, "finish_reason": finish, "logprobs": None}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
            if self.manners.log_probs and body.get("logprobs"):
                made_up = [_chat_log_prob(word, body["top_logprobs"]) for word in words]
                choice["logprobs"] = {"content": made_up if self.tells is None else self.tells(text)}
        else:
            choice["text"] = text
            if self.manners.log_probs and body.get("logprobs") is not None:
                choice["logprobs"] = _text_log_probs(words, body["logprobs"])
        said: Body = {"id": "cmpl", "model": self.manners.model, "choices": [choice]}
        if self.manners.usage:
            said["usage"] = _usage(body, len(words))
        return said

    async def models(self, request: web.Request) -> web.Response:
        if not self._admits(request):
            return _error(401, "invalid_api_key", "No.")
        return web.json_response({"object": "list", "data": [{"id": self.manners.model, "object": "model"}]})

    async def take_file(self, request: web.Request) -> web.Response:
        form = await request.post()
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        name = f"file-{len(self.files)}"
        self.files[name] = upload.file.read()
        return web.json_response({"id": name, "object": "file", "purpose": form["purpose"]})

    async def give_file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.files:
            return _error(404, "not_found", f"No such file: {name}")
        return web.Response(body=self.files[name])

    async def start_job(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = f"batch-{len(self.jobs)}"
        self.jobs[name] = {
            "id": name,
            "object": "batch",
            "status": "in_progress",
            "input_file_id": asked["input_file_id"],
            "endpoint": asked["endpoint"],
            "metadata": asked.get("metadata") or {},
            "created_at": time.time(),
        }
        return web.json_response(self.jobs[name])

    async def show_job(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["name"]]
        self._work_on(job)
        return web.json_response(job)

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Newest first, in pages, as the real ones list them."""
        names = list(reversed(self.jobs))
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = names[start : start + int(request.query.get("limit", 20))]
        for name in page:
            self._work_on(self.jobs[name])
        more = start + len(page) < len(names)
        return web.json_response({"object": "list", "data": [self.jobs[name] for name in page], "has_more": more})

    def _work_on(self, job: Body) -> None:
        if job["status"] != "in_progress" or time.time() - job["created_at"] < self.manners.batch_seconds:
            return
        done, undone = [], []
        for line in self.files[job["input_file_id"]].decode().splitlines():
            asked = json.loads(line)
            if random.Random(f"{job['id']} {asked['custom_id']}").random() < self.manners.batch_expired:
                error = {"code": "batch_expired", "message": "This request could not be executed in time."}
                undone.append({"custom_id": asked["custom_id"], "response": None, "error": error})
                continue
            self._bill(json.dumps(asked["body"]).encode(), asked["body"])
            response = {"status_code": 200, "request_id": "r", "body": self.completion(asked["body"])}
            done.append({"custom_id": asked["custom_id"], "response": response, "error": None})
        job["status"] = "expired" if undone else "completed"
        for name, lines in (("output_file_id", done), ("error_file_id", undone)):
            if lines:
                job[name] = f"file-{len(self.files)}"
                self.files[job[name]] = "\n".join(json.dumps(line) for line in lines).encode()

    def _bill(self, raw: bytes, body: Body) -> None:
        digest = hashlib.sha256(raw).hexdigest()[:16]
        if self.remembers:
            self.billed[digest] += 1
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps({"request": digest, **_usage(body, len(self.answer(body).split()))}) + "\n")

    def _admits(self, request: web.Request) -> bool:
        return not self.manners.key or _bearer(request) == self.manners.key


@asynccontextmanager
async def serving(
    manners: Manners | None = None,
    *,
    answer: Callable[[Body], str] = shouted,
    tells: Callable[[str], list[Body]] | None = None,
    journal: Path | None = None,
    remembers: bool = True,
) -> AsyncIterator[Provider]:
    """A provider on a free port of this machine, closed when the block ends."""
    provider = Provider(manners=manners or Manners(), answer=answer, tells=tells, journal=journal, remembers=remembers)
    app = web.Application(client_max_size=2**28)
    app.add_routes(
        [
            web.post("/v1/chat/completions", provider.complete),
            web.post("/v1/completions", provider.complete),
            web.get("/v1/models", provider.models),
            web.post("/v1/files", provider.take_file),
            web.get("/v1/files/{name}/content", provider.give_file),
            web.post("/v1/batches", provider.start_job),
            web.get("/v1/batches", provider.list_jobs),
            web.get("/v1/batches/{name}", provider.show_job),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield provider
    finally:
        await runner.cleanup()


def url_of(port_file: Path, *, seconds: float = 30.0) -> str:
    """Where the provider of another process listens, once it does."""
    until = time.monotonic() + seconds
    while not port_file.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no provider has written {port_file}")
        time.sleep(0.01)
    return f"http://127.0.0.1:{port_file.read_text()}/v1"


def _usage(body: Body, written: int) -> Body:
    texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
    given = sum(len(str(text).split()) for text in texts)
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}


def _chat_log_prob(word: str, num_top: int) -> Body:
    top = [{"token": word if i == 0 else f"{word}{i}", "logprob": -0.5 - i, "bytes": None} for i in range(num_top)]
    return {"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": top}


def _text_log_probs(words: list[str], num_top: int) -> Body:
    tops = [{word if i == 0 else f"{word}{i}": -0.5 - i for i in range(num_top)} for word in words]
    return {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": tops if num_top else None}


def _bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "error", "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def _hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _torn(request: web.Request, said: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(said))})
    await response.prepare(request)
    await response.write(said[: len(said) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


async def _dripped(request: web.Request, said: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for start in range(0, len(said), 64):
        await response.write(said[start : start + 64])
        await asyncio.sleep(0.001)
    await response.write_eof()
    return response


async def _serve_forever(manners: Manners, port_file: Path, journal: Path | None) -> None:
    async with serving(manners, journal=journal, remembers=False) as provider:
        draft = port_file.with_suffix(".draft")
        draft.write_text(provider.url.rsplit(":", 1)[1].removesuffix("/v1"))
        draft.replace(port_file)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--journal", type=Path, default=None)
    for one in fields(Manners):
        if isinstance(one.default, bool):
            parser.add_argument(f"--{one.name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=True)
        else:
            parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    given = vars(parser.parse_args())
    port_file, journal = given.pop("port_file"), given.pop("journal")
    asyncio.run(_serve_forever(Manners(**given), port_file, journal))


if __name__ == "__main__":
    main()
