"""Every answer that was ever bought, by the content of its request. Outlives runs; several processes may share it.

Nothing is sent before `begin` has written the intent, nothing is read before `finish` has written the answer. What is
left of a killed process are attempts without an answer: `unresolved`, counted as spent at what was reserved. SQLite in
WAL mode with synchronous=FULL: an acknowledged answer survives a kill and a loss of power (not on a network file
system, where WAL does not work). Order is that of row ids, never of clocks.

Within a process one key is asked once at a time (`teachers.recorded`). Two processes that ask for the same new key at
the same moment both pay; the first answer is kept, and both get it from then on.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from potstill.core.writing import JSON, Finish, Raw, Usage
from potstill.stores.group_commit import GroupCommit
from potstill.stores.request_tables import headers_text, open_store, pack, trouble, unpack

KEPT_HEADERS = frozenset(
    (
        "content-type", "date", "server", "retry-after", "retry-after-ms", "request-id", "x-request-id", "x-served-by",
        "openai-model", "openai-version", "openai-processing-ms",
    )
)  # fmt: skip
"""All others are dropped: cookies, tokens and names of organisations are among them."""

State = Literal["begun", "received", "answered", "failed", "unknown"]
"""Sent or about to be; on disk but not read yet; read, cost known; no answer, cost known; no answer, cost not known."""


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """One try at one request, written before it is sent. `id` is known once it is on disk."""

    key: str
    reserved: float
    """Dollars that it can cost at most."""
    id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read out of an answer. `dollars` is None where the price was unknown."""

    finish: Finish
    model: str
    usage: Usage
    dollars: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A stored answer. `reading` is None for one that was kept but never read: its reader was killed."""

    raw: Raw
    reading: Reading | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one writer did for one step of a run, in dollars."""

    step: str
    writer: str
    spent: float
    """For attempts whose end is known."""
    maybe: float
    """Reserved for attempts whose end is not known: perhaps billed."""
    attempts: int
    unresolved: int


class Requests:
    """The store at `path` (default: $POTSTILL_REQUESTS, or ~/.cache/potstill/requests.sqlite).

    Raises StorageError at once for a file that is not a store, is torn, cannot be written, or is of a newer version.
    """

    def __init__(self, path: str | Path | None = None, *, durable: bool = True) -> None:
        self.path = default_path() if path is None else Path(path).expanduser()
        self._durable = durable
        self._commits = GroupCommit(self.path, durable=durable)
        self._lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._read("SELECT version FROM schema")

    @classmethod
    def temporary(cls) -> Requests:
        """A store that goes when nobody holds it any more, for tests and dry runs. Fast, not durable."""
        folder = tempfile.TemporaryDirectory(prefix="potstill-")
        store = cls(Path(folder.name) / "requests.sqlite", durable=False)
        store._temporary = folder
        return store

    # Asking.

    def find(self, key: str) -> Answer | None:
        row = self._read(
            "SELECT status, headers, body, finish, model, input, output, cached, reasoning, dollars "
            "FROM answers LEFT JOIN readings ON answer = id WHERE key = ?",
            key,
        )
        if not row:
            return None
        status, headers, body, finish, model, given, written, cached, reasoning, dollars = row[0]
        raw = Raw(status=status, headers=json.loads(unpack(headers)), body=unpack(body))
        if finish is None:
            return Answer(raw=raw, reading=None)
        usage = Usage(input=given, output=written, cached=cached, reasoning=reasoning)
        return Answer(raw=raw, reading=Reading(finish=finish, model=model, usage=usage, dollars=dollars))

    def exchange(self, key: str) -> tuple[dict[str, JSON], Raw] | None:
        """What was asked (Request.asked) and what came, for those who read an answer anew."""
        row = self._read("SELECT request, status, headers, body FROM answers WHERE key = ?", key)
        if not row:
            return None
        asked, status, headers, body = row[0]
        return json.loads(unpack(asked)), Raw(status=status, headers=json.loads(unpack(headers)), body=unpack(body))

    async def begin(self, key: str, *, run: str, step: str, writer: str, reserved: float) -> Attempt:
        """Make the intent durable. Cancelled while it waits, it says in the store that nothing was sent."""
        if self._commits.is_full:
            raise trouble(self.path, OSError(errno.ENOSPC, "disk full"))
        attempt = Attempt(key=key, reserved=reserved)
        row = (key, run, step, writer, reserved, time.time())
        try:
            await self._commits.put_record(_begin, (attempt, row))
        except asyncio.CancelledError:
            self._end(attempt, state="failed", spent=0.0, error="stopped before it was sent")
            raise
        return attempt

    async def finish(self, attempt: Attempt, *, asked: str, writer: str, raw: Raw) -> bool:
        """Make the answer to `asked` (Request.text) durable; `read` says later what it cost.

        Cancelled while it waits, it is written even so.
        False where another process answered the key in the meantime: that answer stays, and is the one to read.
        """
        row = (attempt.key, writer, pack(asked.encode()), raw.status, *_kept(raw), time.time())
        given = _Given(attempt, row)
        await self._commits.put_record(_finish, given)
        return given.is_first

    def read(self, attempt: Attempt, reading: Reading) -> None:
        """What a durable answer says and costs. Lost in a crash, it is read again."""
        self._commits.put_record(_read, (attempt, reading, time.time()))

    def settle(self, attempt: Attempt, dollars: float) -> None:
        """What an attempt cost whose answer is not the one that stays."""
        self._end(attempt, state="answered", spent=dollars, error="")

    def note(self, key: str, reading: Reading) -> None:
        """What an answer says that was found unread, and that no open attempt of this run brought."""
        noted = (*_reading(reading), key)
        self._commits.put(lambda db: _run(db, _READ, *noted))

    async def fail(self, attempt: Attempt, *, error: str, maybe_billed: bool) -> None:
        """There is no answer. maybe_billed: the server may have done the work, which counts as what was reserved."""
        state: State = "unknown" if maybe_billed else "failed"
        await self._end(attempt, state=state, spent=0.0, error=error)

    def abandon(self, attempt: Attempt) -> None:
        """Nobody waits for the answer any more; whether it was billed, nobody knows."""
        self._end(attempt, state="unknown", spent=0.0, error="stopped while under way")

    async def spoil(self, key: str, *, error: str) -> None:
        """Nobody can read the stored answer: set it aside, so that it can be asked again."""

        def write(db: sqlite3.Connection) -> None:
            db.execute(_SET_ASIDE, (error, key))
            db.execute("DELETE FROM readings WHERE answer = (SELECT id FROM answers WHERE key = ?)", (key,))
            db.execute("DELETE FROM answers WHERE key = ?", (key,))

        await self._commits.put(write)

    async def flush(self) -> None:
        """Wait until everything noted so far is on disk."""
        await self._commits.flush()

    def close(self) -> None:
        """Write what is left and let go of the file. The next use opens it again."""
        self._commits.close()
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    # Money.

    def ledger(self, run: str) -> tuple[Bill, ...]:
        """What a run has cost, by step and writer."""
        rows = self._read(
            "SELECT step, writer, sum(spent), sum(iif(open, reserved, 0)), count(*), sum(open) FROM "
            "(SELECT *, state NOT IN ('answered', 'failed') AS open FROM attempts WHERE run = ?) "
            "GROUP BY step, writer ORDER BY min(id)",
            run,
        )
        names = ("step", "writer", "spent", "maybe", "attempts", "unresolved")
        return tuple(Bill(**dict(zip(names, row, strict=True))) for row in rows)

    def unresolved(self, run: str) -> tuple[Attempt, ...]:
        """Attempts of a run whose end is not known, in the order in which they began."""
        rows = self._read(
            "SELECT key, reserved, id FROM attempts WHERE run = ? AND state NOT IN ('answered', 'failed') ORDER BY id",
            run,
        )
        return tuple(Attempt(key=key, reserved=reserved, id=number) for key, reserved, number in rows)

    # Housekeeping.

    def rows(self, statement: str, *values: JSON) -> Iterator[tuple[object, ...]]:
        """Read row by row on a connection of its own, for what goes through the whole store."""
        connection = open_store(self.path, durable=self._durable)
        try:
            yield from connection.execute(statement, values)
        except sqlite3.Error as error:
            raise trouble(self.path, error) from error
        finally:
            connection.close()

    async def forget_refusals(self) -> int:
        """Forget requests that the server refused (4xx), so that they are asked again. How many there were."""
        told: list[int] = []
        refused = "(SELECT id FROM answers WHERE status >= 400)"

        def write(db: sqlite3.Connection) -> None:
            db.execute(f"DELETE FROM readings WHERE answer IN {refused}")
            told.append(db.execute("DELETE FROM answers WHERE status >= 400").rowcount)

        await self._commits.put(write)
        return told[-1]

    def _end(self, attempt: Attempt, *, state: State, spent: float, error: str) -> asyncio.Future[None]:
        ended = time.time()
        return self._commits.put(lambda db: _run(db, _END, state, spent, ended, error, attempt.id))

    def _read(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock:
            if self._reader is None:
                self._reader = open_store(self.path, durable=self._durable)
            try:
                return self._reader.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise trouble(self.path, error) from error


def default_path() -> Path:
    named = os.environ.get("POTSTILL_REQUESTS")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "potstill" / "requests.sqlite"


def _kept(raw: Raw) -> tuple[str | bytes, str | bytes]:
    headers = {name: value for name, value in raw.headers.items() if name in KEPT_HEADERS}
    return pack(headers_text(headers)), pack(raw.body)


def _reading(reading: Reading) -> tuple[str | int | float | None, ...]:
    usage = reading.usage
    tokens = (usage.input, usage.output, usage.cached, usage.reasoning)
    return (reading.finish, reading.model, *tokens, reading.dollars)


def _run(connection: sqlite3.Connection, statement: str, *values: object) -> None:
    connection.execute(statement, values)


Row: TypeAlias = tuple[str | bytes | int | float | None, ...]


@dataclass(slots=True, eq=False)
class _Given:
    """An answer on its way to the disk."""

    attempt: Attempt
    row: Row
    is_first: bool = False
    """Known once it is there: no other process was faster."""


def _begin(db: sqlite3.Connection, begun: Sequence[tuple[Attempt, Row]]) -> None:
    first = _last_id(db, "attempts") + 1
    for number, (attempt, _) in enumerate(begun, first):
        attempt.id = number
    db.executemany(_BEGIN, [(number, *row) for number, (_, row) in enumerate(begun, first)])


def _finish(db: sqlite3.Connection, given: Sequence[_Given]) -> None:
    first = _last_id(db, "answers") + 1
    written = db.executemany(_ANSWER, [(number, *one.row) for number, one in enumerate(given, first)]).rowcount
    there: Container[int] = range(first, first + written)
    if written < len(given):
        there = {number for (number,) in db.execute("SELECT id FROM answers WHERE id >= ?", (first,))}
    for number, one in enumerate(given, first):
        one.is_first = number in there
    db.executemany(_END, [("received", 0.0, one.row[-1], "", one.attempt.id) for one in given])


def _read(db: sqlite3.Connection, read: Sequence[tuple[Attempt, Reading, float]]) -> None:
    db.executemany(_READ, [(*_reading(reading), attempt.key) for attempt, reading, _ in read])
    ends = [("answered", reading.dollars or 0.0, ended, "", attempt.id) for attempt, reading, ended in read]
    db.executemany(_END, ends)


def _last_id(db: sqlite3.Connection, table: str) -> int:
    """Within a transaction that writes nobody else adds rows, so the next ones are known."""
    (last,) = db.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()
    assert isinstance(last, int)
    return last


_BEGIN = (
    "INSERT INTO attempts (id, key, run, step, writer, reserved, spent, state, started) "
    "VALUES (?, ?, ?, ?, ?, ?, 0, 'begun', ?)"
)
_ANSWER = (
    "INSERT OR IGNORE INTO answers (id, key, writer, request, status, headers, body, created) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_END = "UPDATE attempts SET state = ?, spent = ?, ended = ?, error = ? WHERE id = ?"
_READ = "INSERT OR REPLACE INTO readings SELECT id, ?, ?, ?, ?, ?, ?, ? FROM answers WHERE key = ?"
_SET_ASIDE = (
    "INSERT INTO unreadable (key, writer, request, status, headers, body, created, error) "
    "SELECT key, writer, request, status, headers, body, created, ? FROM answers WHERE key = ?"
)
