"""One thread writes for everybody: records that gather while it works are committed together.

A commit costs milliseconds (the disk has to say that it has it), a record microseconds, and less where records of one
kind are written by one statement. Who waits for a record is told in its own event loop, all of a commit in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from potstill.stores.request_tables import drop_ballast, is_full, lay_ballast, open_store, trouble

MOST_RECORDS = 256
MOST_SECONDS = 0.004
"""Records go to the thread once this many wait, or so long after the first of them."""

Record = TypeVar("Record")
Write: TypeAlias = Callable[[sqlite3.Connection], None]
WriteAll: TypeAlias = Callable[[sqlite3.Connection, Sequence[Record]], None]
"""Writes records of its kind, in the order given. It may run twice: the first time failed, and was undone."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Records of one event loop, and who waits for them."""

    loop: asyncio.AbstractEventLoop
    kinds: dict[WriteAll[Any], list[Any]] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)


class GroupCommit:
    """Takes writes in the order given, from any number of event loops. The thread starts with the first of them."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._path = path
        self._durable = durable
        self._gathering: dict[asyncio.AbstractEventLoop, _Group] = {}
        self._queue: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._full = threading.Event()
        weakref.finalize(self, self._queue.put, None)  # the thread ends with what it works for

    @property
    def is_full(self) -> bool:
        """The disk is full, and what room was held back for it goes to answers under way: begin nothing new."""
        return self._full.is_set()

    def put(self, write: Write) -> asyncio.Future[None]:
        """Done once the write is on disk; StorageError where it never will be. Nobody has to wait for it.

        Within a commit writes run in the order given, after all records.
        """
        group = self._group()
        group.writes.append(write)
        return self._waiting(group)

    def put_record(self, write_all: WriteAll[Record], record: Record) -> asyncio.Future[None]:
        """The same for one of many of its kind: `write_all` gets those of a commit together.

        Kinds run in no order that counts: what needs another kind's record waits for that first.
        """
        group = self._group()
        group.kinds.setdefault(write_all, []).append(record)
        return self._waiting(group)

    async def flush(self) -> None:
        """Wait until all that was put from this event loop is on disk."""
        await self.put(lambda connection: None)

    def close(self) -> None:
        """Write what is left and end the thread; the next `put` starts another."""
        for group in list(self._gathering.values()):
            self._hand_over(group)
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
            self._full.clear()

    def _group(self) -> _Group:
        """What gathers in the running loop."""
        loop = asyncio.get_running_loop()
        group = self._gathering.get(loop)
        if group is None:
            group = self._gathering[loop] = _Group(loop)
            loop.call_later(MOST_SECONDS if self._durable else 0, self._hand_over, group)
        return group

    def _waiting(self, group: _Group) -> asyncio.Future[None]:
        done = group.loop.create_future()
        group.waiting.append(done)
        if len(group.waiting) >= MOST_RECORDS:
            self._hand_over(group)
        return done

    def _hand_over(self, group: _Group) -> None:
        if self._gathering.get(group.loop) is not group:
            return
        del self._gathering[group.loop]
        if self._thread is None:
            arguments = (self._path, self._durable, self._queue, self._full)
            self._thread = threading.Thread(target=_work, args=arguments, name="potstill-requests", daemon=True)
            self._thread.start()
        self._queue.put(group)


def _work(path: Path, durable: bool, waiting: queue.SimpleQueue[_Group | None], full: threading.Event) -> None:
    """The thread: everything that has gathered, one commit, again."""
    connection: sqlite3.Connection | None = None
    while (first := waiting.get()) is not None:
        groups, last = _gathered(first, waiting)
        error: Exception | None = None
        try:
            connection = connection or _open(path, durable)
            _commit_making_room(connection, path, groups, full)
        except sqlite3.Error as failed:
            error = trouble(path, failed)
        except Exception as failed:  # noqa: BLE001 - raised by those who wait
            error = failed
        for group in groups:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
                group.loop.call_soon_threadsafe(_tell, group.waiting, error)
        if last:
            break
    if connection is not None:
        connection.close()


def _open(path: Path, durable: bool) -> sqlite3.Connection:
    connection = open_store(path, durable=durable)
    if durable:
        lay_ballast(path)
    return connection


def _gathered(first: _Group, waiting: queue.SimpleQueue[_Group | None]) -> tuple[list[_Group], bool]:
    """All groups that wait, and whether the end is among them."""
    groups = [first]
    while True:
        try:
            group = waiting.get_nowait()
        except queue.Empty:
            return groups, False
        if group is None:
            return groups, True
        groups.append(group)


def _commit_making_room(
    connection: sqlite3.Connection, path: Path, groups: Sequence[_Group], full: threading.Event
) -> None:
    try:
        _commit(connection, groups)
    except sqlite3.Error as error:
        if not is_full(error):
            raise
        full.set()
        if not drop_ballast(path):
            raise
        _commit(connection, groups)


def _commit(connection: sqlite3.Connection, groups: Sequence[_Group]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for group in groups:
            for write_all, records in group.kinds.items():
                write_all(connection, records)
            for write in group.writes:
                write(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _tell(waiting: Sequence[asyncio.Future[None]], error: Exception | None) -> None:
    for done in waiting:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
            done.exception()  # looked at: nobody may be waiting for this one
