"""How long a writer goes on with a server that does not answer. Times are those of the event loop, never of a clock."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from potstill.core.errors import RunError, ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """A 429 costs no try: the transport waits as long as the server says."""

    tries: int = 5
    """Of one request, while the server fails or does not answer."""
    unreadable: int = 2
    """How often a request is asked again whose answer cannot be read. Each time is paid for."""
    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    """Before the first retry, doubled each time up to the longest."""
    stall_seconds: float = 900.0
    """Stop when requests are out and none was answered for so long. Reasoning models may think for minutes."""
    give_up_after: int = 20
    """Stop when so many requests in a row had all their tries in vain."""
    seed: int = 0
    """Of the jitter, which also depends on the request: the same run waits the same."""

    def seconds(self, key: str, tries: int) -> float:
        """Before try number `tries` + 1: half of it fixed, half random, so that a crowd spreads."""
        digest = hashlib.sha256(f"{self.seed}/{key}/{tries}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return min(self.longest_seconds, self.first_seconds * 2.0 ** (tries - 1)) * (0.5 + share / 2)


class Wait:
    """`with` around what may be stopped from outside: it ends with TimeoutError then, as under asyncio.timeout.

    `among` holds it while it lasts, in the order of their beginning. No timer of its own: hundreds of requests are
    under way, and setting and cancelling one for each cost a twentieth of a request's CPU.
    """

    __slots__ = ("_among", "_cancellings", "_is_stopped", "_task", "began")

    def __init__(self, among: dict[Wait, None]) -> None:
        task = asyncio.current_task()
        assert task is not None, "only a task can wait"
        self._among = among
        self._task = task
        self._cancellings = task.cancelling()
        self._is_stopped = False
        self.began = asyncio.get_running_loop().time()

    def stop(self) -> None:
        """Called by the event loop, never by who waits; nothing happens when the wait is over or stopped."""
        if self in self._among and not self._is_stopped:
            self._is_stopped = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._among[self] = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._among[self]
        # Who else cancelled the task has the last word.
        is_ours = self._is_stopped and self._task.uncancel() <= self._cancellings
        if is_ours and kind is asyncio.CancelledError:
            raise TimeoutError from error


class TimeLimit:
    """So many seconds for each of the waits of one event loop. One timer does: they end in the order they began."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waits: dict[Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def wait(self) -> Wait:
        """For `with`, which then raises TimeoutError when it takes too long."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)
        return Wait(self._waits)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Stop who is over the limit, and come again when the next one may be."""
        self._timer = None
        loop = asyncio.get_running_loop()
        for wait in self._waits:
            until = wait.began + self._seconds
            if until > loop.time():
                self._timer = loop.call_at(until, self._look)
                return
            wait.stop()


class Alarm:
    """Stops everybody when nothing comes any more. Whoever waits under `watching` is told."""

    def __init__(self, retries: Retries, writer: str) -> None:
        self._retries = retries
        self._writer = writer
        self._error: RunError | None = None
        self._waits: dict[Wait, None] = {}
        self._watch: asyncio.Task[None] | None = None
        self._last_answer = 0.0
        self._num_answers = 0
        self._in_vain = 0
        self._last_words = "none"

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a request is out. Raises the alarm's error here too, once it rings."""
        if not self._waits:
            self._last_answer = asyncio.get_running_loop().time()
            self._watch = asyncio.create_task(self._look())
        try:
            with Wait(self._waits):
                yield
        except TimeoutError:
            self.check()
            raise
        finally:
            if not self._waits:
                self._stop_looking()

    def answered(self) -> None:
        self._last_answer = asyncio.get_running_loop().time()
        self._num_answers += 1
        self._in_vain = 0

    def troubled(self, words: str) -> None:
        """A try went wrong: what was said, for the sentence."""
        self._last_words = words

    def gave_up(self) -> None:
        """A request had all its tries in vain. Raises when too many had."""
        self._in_vain += 1
        if self._in_vain >= self._retries.give_up_after:
            self.ring(
                ServiceError(
                    f"{self._writer}: the last {self._in_vain} requests had all their tries in vain "
                    f"({self._num_answers} were answered before; the last trouble: {self._last_words}). "
                    "Look after the server and run the same command again: what was answered is kept."
                )
            )
            self.check()

    def ring(self, error: RunError) -> None:
        """Everybody who waits, and whoever asks from now on, gets this error."""
        self._error = self._error or error
        asyncio.get_running_loop().call_soon(self._wake)  # who rings may be one of them

    def stop(self) -> None:
        """Forget what rang: a writer that is closed and used again starts afresh."""
        self._stop_looking()
        self._error = None
        self._in_vain = 0

    def _wake(self) -> None:
        for wait in self._waits:
            wait.stop()

    def _stop_looking(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _look(self) -> None:
        longest = self._retries.stall_seconds
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(longest / 4, 10.0))
            if loop.time() - self._last_answer > longest:
                self.ring(
                    ServiceError(
                        f"{self._writer}: no answer for {longest:g} seconds, with {len(self._waits)} requests out "
                        f"({self._num_answers} were answered before; the last trouble: {self._last_words}). "
                        "Look after the server and run the same command again: what was answered is kept."
                    )
                )
                return
