"""How fast servers may be asked: requests and tokens per minute, and connections that shrink when they say 429.

`Limits` is arithmetic on the times that it is told; `Gate` waits, in order, for the first of several servers with room.
Each request costs a constant amount of work, however many wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

MINUTE_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
"""Of a refusal without Retry-After; each further one doubles it."""


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """Something counted in a minute. Its amount may be corrected until the minute is over."""

    time: float
    amount: float


class Minute:
    """At most `limit` in any 60 seconds, of requests or tokens; 0 is no limit.

    What holds in every window of 60 seconds also holds for a server that refills a bucket of this size.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._entries: deque[Entry] = deque()
        self._sum = 0.0

    def ready_at(self, now: float, amount: float) -> float:
        """`now`, or when to ask again: the oldest entry leaves then."""
        while self._entries and now - self._entries[0].time >= MINUTE_SECONDS:
            self._sum -= self._entries.popleft().amount
        # What is larger than a minute's worth goes alone.
        fits = not self._entries or self._sum + amount <= self.limit
        return now if fits or not self.limit else self._entries[0].time + MINUTE_SECONDS

    def count(self, now: float, amount: float) -> Entry:
        entry = Entry(time=now, amount=amount)
        if self.limit:
            self._entries.append(entry)
            self._sum += amount
        return entry

    def correct(self, entry: Entry, amount: float, *, now: float) -> None:
        """Nothing changes when the entry's minute is over."""
        if self.limit and now - entry.time < MINUTE_SECONDS:
            self._sum += amount - entry.amount
            entry.amount = amount


@dataclass(slots=True, kw_only=True, eq=False)
class Pass:
    """The right to send one request to one server; it must be given back."""

    limits: Limits
    started: float
    request: Entry
    tokens: Entry


@dataclass(slots=True, eq=False)
class Limits:
    """Of one server and key. Times are those of a clock that never goes back.

    Connections follow AIMD: halved by a refusal (once for all that were under way), one more per round of answers.
    """

    rpm: float = field(kw_only=True, default=0)
    tpm: float = field(kw_only=True, default=0)
    concurrency: int = field(kw_only=True, default=256)
    allowed: float = field(init=False)
    under_way: int = field(init=False, default=0)
    paused_until: float = field(init=False, default=-math.inf)
    _refusals: int = field(init=False, default=0)
    _last_cut: float = field(init=False, default=-math.inf)
    _requests: Minute = field(init=False)
    _tokens: Minute = field(init=False)

    def __post_init__(self) -> None:
        self.allowed = float(self.concurrency)
        self._requests, self._tokens = Minute(self.rpm), Minute(self.tpm)

    @property
    def load(self) -> float:
        return self.under_way / self.allowed

    def ready_at(self, now: float, tokens: float) -> float:
        """`now` when a request may start; later: ask again then; infinity: when another one is back."""
        if self.under_way >= int(self.allowed):
            return math.inf
        return max(now, self.paused_until, self._requests.ready_at(now, 1), self._tokens.ready_at(now, tokens))

    def start(self, now: float, tokens: float) -> Pass:
        self.under_way += 1
        request, counted = self._requests.count(now, 1), self._tokens.count(now, tokens)
        return Pass(limits=self, started=now, request=request, tokens=counted)

    def answered(self, which: Pass, *, now: float, tokens: float | None = None) -> None:
        """An answer came, of so many tokens where it says so."""
        self.under_way -= 1
        self._refusals = 0
        self.allowed = min(float(self.concurrency), self.allowed + 1 / self.allowed)
        if tokens is not None:
            self._tokens.correct(which.tokens, tokens, now=now)

    def refused(self, which: Pass, *, now: float, retry_after: float | None) -> None:
        """Too many requests. Nothing starts for `retry_after` seconds; a request refused still counts as one."""
        self.under_way -= 1
        self._tokens.correct(which.tokens, 0, now=now)
        if which.started > self._last_cut:
            self.allowed = max(1.0, self.allowed / 2)
            self._last_cut = now
            self._refusals += 1
        if retry_after is None:
            retry_after = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self._refusals - 1))
        self.paused_until = max(self.paused_until, now + retry_after)

    def lost(self, which: Pass) -> None:
        """No answer came. What the server counted is unknown, so the estimate stands."""
        self.under_way -= 1

    def withdrawn(self, which: Pass, *, now: float) -> None:
        """The request was never sent."""
        self.under_way -= 1
        self._requests.correct(which.request, 0, now=now)
        self._tokens.correct(which.tokens, 0, now=now)


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    tokens: float
    granted: asyncio.Future[Pass]


class Gate:
    """Requests in the order of their coming, each to the least loaded server that has room. Clock: the event loop's."""

    def __init__(self, servers: Sequence[Limits]) -> None:
        self.servers = tuple(servers)
        self._waiting: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, tokens: float) -> Pass:
        """Wait for room. The pass must be given back to its limits, and `moved` called then."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            free = self._free(loop.time(), tokens)
            if isinstance(free, Limits):
                return free.start(loop.time(), tokens)
        waiting = _Waiting(tokens=tokens, granted=loop.create_future())
        self._waiting.append(waiting)
        if len(self._waiting) == 1:  # else somebody before it has looked
            self.moved()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.done() and not waiting.granted.cancelled():
                which = waiting.granted.result()
                which.limits.withdrawn(which, now=loop.time())
            else:
                waiting.granted.cancel()
            self.moved()
            raise

    def moved(self) -> None:
        """Something has changed: let in who can go, and look again when the next minute or pause is over."""
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            first = self._waiting[0]
            if not first.granted.done():
                free = self._free(now, first.tokens)
                if not isinstance(free, Limits):
                    if free < math.inf:
                        self._timer = loop.call_at(free, self.moved)
                    return
                first.granted.set_result(free.start(now, first.tokens))
            self._waiting.popleft()

    def _free(self, now: float, tokens: float) -> Limits | float:
        """The least loaded server with room, or the time at which one may have some."""
        free: Limits | None = None
        soonest = math.inf
        for limits in self.servers:
            ready = limits.ready_at(now, tokens)
            if ready > now:
                soonest = min(soonest, ready)
            elif free is None or limits.load < free.load:
                free = limits
        return soonest if free is None else free


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What a server asks for: milliseconds, seconds, or a date, which is compared with the server's own clock."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds < math.inf else None
    try:
        until = parsedate_to_datetime(headers["retry-after"]).timestamp()
        sent = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
    except (KeyError, ValueError, TypeError):
        return None
    return max(0.0, until - sent)
