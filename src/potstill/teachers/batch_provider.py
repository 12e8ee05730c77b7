"""A provider's files and jobs, as OpenAI has them: upload, start, look, fetch. Knows nothing of who asks.

Every call is either harmless to repeat or followed by a look at what has become of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from potstill.core.errors import ServiceError
from potstill.core.writing import Raw, TransportError, content_id
from potstill.teachers.address import Server
from potstill.teachers.endpoint import open_session
from potstill.teachers.refusals import unreachable
from potstill.teachers.verdict import Answered, Busy, Down, judge

if TYPE_CHECKING:
    from aiohttp import ClientSession

MARK = "potstill"
"""Metadata by which a job of ours is known; its value is the writer's identity."""
WINDOW = "24h"
DAY_SECONDS = 86_400.0
ADOPTED_DAYS = 3
"""Finished jobs older than this have been taken in long ago, or never will be."""
RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
ENDED = frozenset({"completed", "expired", "cancelled"})
"""With answers, all or some."""
TRIES = 5


class Provider:
    """Raises TransportError for what may go better next time, ServiceError for what will not."""

    def __init__(self, where: Server, *, writer: str) -> None:
        self._server = where
        self._writer = writer
        self._session: ClientSession | None = None
        headers = where.headers
        self._headers = {name: value for name, value in headers.items() if name != "Content-Type"}

    async def submit(self, path: str, lines: Mapping[str, bytes]) -> str:
        """Upload a job and start it: its name. Where the start is in doubt, the job is looked for."""
        from aiohttp import FormData

        manifest = content_id([*sorted(lines)])
        form = FormData({"purpose": "batch"})
        form.add_field(
            "file", b"\n".join(lines.values()), filename=f"{MARK}-{manifest}.jsonl", content_type="application/jsonl"
        )
        uploaded = await self._call("POST", "/files", data=form)
        started = {
            "input_file_id": uploaded["id"],
            "endpoint": f"/v1{path}",
            "completion_window": WINDOW,
            "metadata": {MARK: self._writer, "manifest": manifest},
        }
        try:
            return str((await self._call("POST", "/batches", json=started))["id"])
        except TransportError:
            for job in await self.own_jobs():
                if job["metadata"].get("manifest") == manifest and job["input_file_id"] == uploaded["id"]:
                    return str(job["id"])
            raise

    async def job(self, name: str) -> dict[str, Any]:
        return await self._patient(f"/batches/{name}")

    async def own_jobs(self) -> list[dict[str, Any]]:
        """Those of this writer that still run, or ended lately. Raises ServiceError where the provider has no jobs."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = await self._patient(f"/batches?limit=100{after}")
            jobs = page["data"]
            mine = [job for job in jobs if (job.get("metadata") or {}).get(MARK) == self._writer]
            found += [job for job in mine if job["status"] in RUNNING or job["status"] in ENDED]
            # Newest first: behind the first one that is too old nothing is of use.
            if not page.get("has_more") or not jobs or _days_old(jobs[-1]) > ADOPTED_DAYS:
                return [job for job in found if job["status"] in RUNNING or _days_old(job) <= ADOPTED_DAYS]
            after = f"&after={jobs[-1]['id']}"

    async def lines(self, file: str) -> list[dict[str, Any]]:
        body = await self._bytes(f"/files/{file}/content")
        return list(_lines(body, file))

    async def answers(self, job: Mapping[str, Any]) -> dict[str, Raw | Exception]:
        """What a job gave, by key. Raises ServiceError for one that the provider refused as a whole."""
        found: dict[str, Raw | Exception] = {}
        for file in (job.get("output_file_id"), job.get("error_file_id")):
            if file:
                found |= {str(line["custom_id"]): _answer(line) for line in await self.lines(file)}
        if not found and job["status"] == "failed":
            said = [str(error.get("message")) for error in (job.get("errors") or {}).get("data", [])]
            raise ServiceError(f"{self._server.url} refused the job {job['id']}: {'; '.join(said[:3]) or 'no reason'}")
        return found

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _patient(self, path: str) -> dict[str, Any]:
        return _read_object(await self._bytes(path), path)

    async def _bytes(self, path: str) -> bytes:
        """A look, which costs nothing: tried again while the provider is away."""
        for tried in range(TRIES):
            try:
                return await self._exchange("GET", path)
            except TransportError:
                if tried == TRIES - 1:
                    raise
                await asyncio.sleep(0.5 * 2**tried)
        raise AssertionError("unreachable")

    async def _call(self, method: str, path: str, **sent: Any) -> dict[str, Any]:
        return _read_object(await self._exchange(method, path, **sent), path)

    async def _exchange(self, method: str, path: str, **sent: Any) -> bytes:
        import aiohttp

        if self._session is None:
            self._session = open_session(timeout_seconds=600.0)
        url = self._server.url
        try:
            async with self._session.request(method, f"{url}{path}", headers=self._headers, **sent) as response:
                body = self._server.without_key(await response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise TransportError(str(unreachable(url, error)), maybe_billed=False) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransportError(f"{url}{path}: {type(error).__name__}", maybe_billed=False) from None
        raw = Raw(status=response.status, headers={}, body=body)
        match judge(raw, writer=f"{url}{path}"):
            case Answered():
                return body
            case Busy() | Down():
                raise TransportError(f"{url}{path}: {response.status}", maybe_billed=False)
            case wrong:
                raise ServiceError(f"{wrong.message} Batch jobs need a provider that has /files and /batches.")


def _answer(line: Mapping[str, Any]) -> Raw | Exception:
    """A line of a job's output: an answer as it would have come online, or what kept it from coming."""
    response = line.get("response")
    if response:
        body = json.dumps(response["body"], ensure_ascii=False).encode()
        return Raw(status=int(response["status_code"]), headers={"content-type": "application/json"}, body=body)
    error = line.get("error") or {}
    return TransportError(f"{error.get('code', 'no answer')}: {error.get('message', '')}", maybe_billed=False)


def _lines(body: bytes, file: str) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        if line.strip():
            yield _read_object(line, file)


def _read_object(body: bytes, place: str) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise TransportError(f"{place}: the provider sent something that is no JSON object", maybe_billed=False)
    return said


def _days_old(job: Mapping[str, Any]) -> float:
    """By the provider's clock and ours; one that goes wrong by a day does no harm."""
    return (time.time() - float(job.get("created_at") or time.time())) / DAY_SECONDS
