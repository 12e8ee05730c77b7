"""The writer: a transport with a memory, a purse and patience.

It looks the request up in the store; else it waits for its turn (inside the transport), reserves money, writes the
intent, sends, writes the raw answer, and only then reads it. What goes wrong is judged by `verdict`: what concerns one
request becomes a Reply with a failure, what concerns all is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from dataclasses import dataclass, replace

from potstill.core.errors import ServiceError, StorageError
from potstill.core.writing import Failure, Raw, Reply, Request, Transport, TransportError, Usage, changed, key_of
from potstill.stores.requests import Answer, Attempt, Reading, Requests
from potstill.teachers.money import Hold, Price, Purse
from potstill.teachers.patience import Alarm, Retries
from potstill.teachers.verdict import Answered, Busy, Down, Everybody, Refused, judge, without_secrets

UNCOUNTED = Usage()


class Recorded:
    """A Writer around a transport.

    price: what the model costs; None where nobody knows, which a budget refuses.
    run: whose ledger is billed: a restart under the same name goes on with what is left of its budget. Empty: a run of
    its own each time.
    purse: what bounds its spending, made from the run's ledger; several writers of a run may share one. None: no bound.
    longer: where an answer was cut short, ask once more with `max_tokens` so many times larger; 1 takes it as it is.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        store: Requests,
        price: Price | None,
        run: str = "",
        purse: Purse | None = None,
        retries: Retries | None = None,
        longer: float = 1.0,
    ) -> None:
        self.transport = transport
        self.identity = transport.identity
        self.store = store
        self.price = price
        self.run = run or f"run-{uuid.uuid4().hex[:12]}"
        self.purse = purse or Purse(past=store.ledger(self.run))
        self.retries = retries or Retries()
        self.longer = longer
        self.open = {attempt.key: attempt for attempt in store.unresolved(self.run)}
        """Attempts of earlier calls of the run whose end is not known."""
        self._followers: dict[str, list[asyncio.Future[Reply | None]]] = {}
        self._alarm = Alarm(self.retries, transport.identity)
        assert price is not None or not self.purse.is_capped, "whoever gives a cap knows the price"

    @property
    def dollars(self) -> float:
        """Spent by this writer in its run, what interrupted requests may have cost included."""
        return self.purse.spent_on(self.identity)

    async def ask(self, request: Request) -> Reply:
        """The answer, remembered or bought. Raises ServiceError, BudgetError or StorageError: they concern all."""
        reply = await self._ask(request)
        if reply.finish != "length" or self.longer <= 1 or request.max_tokens is None:
            return reply
        whole = await self._ask(replace(request, max_tokens=math.ceil(request.max_tokens * self.longer)))
        return replace(whole, dollars=reply.dollars + whole.dollars)

    async def close(self) -> None:
        """Make everything durable and let go of connections. The next `ask` takes them up again."""
        self._alarm.stop()
        with contextlib.suppress(StorageError):  # whoever waited for what failed has been told
            await self.store.flush()
        self.store.close()
        await self.transport.close()

    def most(self, request: Request) -> float:
        """Dollars that a request can cost at most: what is reserved for it."""
        if self.price is None or self.price.is_free:
            return 0.0
        input_tokens = self.transport.input_tokens(request)
        if request.max_tokens is None and not self.purse.is_capped:
            return self.price.most(input_tokens, 0)
        return self.price.bound(request, input_tokens)

    async def _ask(self, request: Request) -> Reply:
        text = request.text()
        key = key_of(text, self.identity)
        while True:
            self._alarm.check()
            kept = self.store.find(key)
            if kept is not None:
                reply = await self._remember(request, key, kept)
                if reply is not None:
                    return reply
            if key not in self._followers:
                return await self._lead(request, text, key)
            # The same request is under way. Should its asker be stopped, one of those who wait takes its place.
            following: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
            self._followers[key].append(following)
            told = await following
            if told is not None:
                return replace(told, remembered=True)

    async def _lead(self, request: Request, text: str, key: str) -> Reply:
        self._followers[key] = []
        reply: Reply | None = None
        try:
            with self._alarm.watching():
                reply = await self._buy(request, text, key)
            return reply
        finally:
            for following in self._followers.pop(key):
                if not following.done():
                    following.set_result(reply)

    async def _remember(self, request: Request, key: str, kept: Answer) -> Reply | None:
        """From the store; None for an answer that nobody ever could read, which is set aside."""
        verdict = judge(kept.raw, writer=self.identity)
        if isinstance(verdict, Refused):
            return Reply(key=key, remembered=True, failure=Failure(reason=verdict.reason, message=verdict.message))
        try:
            reply = self.transport.read(request, kept.raw)
        except ValueError as error:
            if kept.reading is None:
                await self.store.spoil(key, error=_words(error))
                return None
            return _unreadable(key, error)  # it was read when it was bought, so it is not bought again
        reading = kept.reading
        if reading is None:
            reading = self._reading(request, reply)
            self._settle_past(request, key, reading)
        return changed(reply, key=key, remembered=True, dollars=reading.dollars or 0.0)

    async def _buy(self, request: Request, text: str, key: str) -> Reply:
        """Try until there is an answer, or none will come. A full house (429) is no try."""
        tries = unreadable = 0
        while True:
            trouble = await self._try(_Sending(self, request, text, key))
            if isinstance(trouble, Reply):
                return trouble
            self._alarm.troubled(trouble.words)
            if trouble.is_busy:
                continue
            tries += trouble.unreadable is None
            unreadable += trouble.unreadable is not None
            if trouble.unreadable is not None and unreadable > self.retries.unreadable:
                self._alarm.gave_up()
                return _unreadable(key, trouble.unreadable)
            if tries >= self.retries.tries:
                self._alarm.gave_up()
                message = f"no answer in {tries} tries; the last time: {trouble.words}"
                return Reply(key=key, failure=Failure(reason="server", message=message))
            seconds = max(self.retries.seconds(key, tries + unreadable), trouble.after_seconds)
            await asyncio.sleep(min(seconds, self.retries.longest_seconds))

    async def _try(self, sending: _Sending) -> Reply | _Trouble:
        """Send once. However it ends, the ledger says so."""
        try:
            raw = await self.transport.send(sending.request, before=sending.before)
            return await self._judged(sending, raw)
        except TransportError as error:
            await sending.fail(_words(error), maybe_billed=error.maybe_billed)
            return _Trouble(words=_words(error))
        except ServiceError as error:
            await sending.fail(_words(error), maybe_billed=False)
            self._alarm.ring(error)
            raise
        except BaseException:
            sending.abandon()
            raise

    async def _judged(self, sending: _Sending, raw: Raw) -> Reply | _Trouble:
        match judge(raw, writer=self.identity):
            case Answered():
                return await self._read(sending, raw)
            case Refused(reason=reason, message=words):
                await sending.keep(raw)
                sending.settle(Reading(finish="unknown", model="", usage=Usage(), dollars=0.0))
                self._alarm.answered()
                return Reply(key=sending.key, failure=Failure(reason=reason, message=words))
            case Busy(message=words):
                await sending.fail(words, maybe_billed=False)
                return _Trouble(words=words, is_busy=True)
            case Down(message=words, after_seconds=seconds):
                await sending.fail(words, maybe_billed=True)
                return _Trouble(words=words, after_seconds=seconds)
            case Everybody(message=words):
                raise ServiceError(f"{words} What was answered is kept.")

    async def _read(self, sending: _Sending, raw: Raw) -> Reply | _Trouble:
        """Keep first, then read."""
        is_first = await sending.keep(raw)
        try:
            reply = self.transport.read(sending.request, raw)
        except ValueError as error:
            if is_first:
                await self.store.spoil(sending.key, error=_words(error))
            await sending.fail(_words(error), maybe_billed=True)
            return _Trouble(words=_words(error), unreadable=error)
        self._alarm.answered()
        reading = self._reading(sending.request, reply)
        if is_first:
            sending.settle(reading)
            return changed(reply, key=sending.key, dollars=reading.dollars or 0.0)
        sending.lose(reading)
        kept = self.store.find(sending.key)
        theirs = await self._remember(sending.request, sending.key, kept) if kept else None
        return theirs or _Trouble(words="another process has an answer that nobody can read")

    def _reading(self, request: Request, reply: Reply) -> Reading:
        usage = reply.usage
        if self.price is None:
            dollars = None
        elif usage == UNCOUNTED:  # the server counted nothing, so it counts as the most that it can have been
            dollars = self.most(request)
        else:
            dollars = self.price.of(usage)
        return Reading(finish=reply.finish, model=reply.model, usage=usage, dollars=dollars)

    def _settle_past(self, request: Request, key: str, reading: Reading) -> None:
        """An answer whose reader was killed: now it is known what it cost."""
        attempt = self.open.pop(key, None)
        if attempt is None:
            self.store.note(key, reading)
            return
        self.store.read(attempt, reading)
        self.purse.correct(attempt.reserved, reading.dollars or 0.0, step=request.step, model=self.identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """Why a try brought no answer."""

    words: str
    after_seconds: float = 0.0
    is_busy: bool = False
    unreadable: ValueError | None = None


class _Sending:
    """One try at one request: its money and its line in the ledger."""

    def __init__(self, writer: Recorded, request: Request, text: str, key: str) -> None:
        self.request = request
        self._text = text
        self.key = key
        self._writer = writer
        self._hold: Hold | None = None
        self._attempt: Attempt | None = None
        self._is_kept = self._is_paid = False

    async def before(self) -> None:
        """What the transport awaits when it is about to send: money first, then the durable intent."""
        assert self._attempt is None, "a transport sends once"
        writer, step = self._writer, self.request.step
        most = writer.most(self.request)
        hold = await writer.purse.reserve(most, step=step, model=writer.identity)
        try:
            begun = writer.store.begin(self.key, run=writer.run, step=step, writer=writer.identity, reserved=most)
            self._attempt = await begun
        except BaseException:
            writer.purse.settle(hold, 0.0)
            raise
        self._hold = hold

    async def keep(self, raw: Raw) -> bool:
        """Make the answer durable; False where another process was faster."""
        self._attempt = self._attempt or await self._adopted()
        self._is_kept = True
        return await self._writer.store.finish(self._attempt, asked=self._text, writer=self._writer.identity, raw=raw)

    def settle(self, reading: Reading) -> None:
        assert self._attempt is not None, "an answer is kept before it is read"
        self._writer.store.read(self._attempt, reading)
        self._pay(reading.dollars or 0.0)

    def lose(self, reading: Reading) -> None:
        """It is paid for all the same."""
        assert self._attempt is not None, "an answer is kept before it is read"
        self._writer.store.settle(self._attempt, reading.dollars or 0.0)
        self._pay(reading.dollars or 0.0)

    async def fail(self, words: str, *, maybe_billed: bool) -> None:
        if self._attempt is not None:
            self._pay(self._attempt.reserved if maybe_billed else 0.0)
            await self._writer.store.fail(self._attempt, error=words, maybe_billed=maybe_billed)

    def abandon(self) -> None:
        """Stopped in the middle: it counts as billed, until an answer shows up."""
        if self._attempt is None or self._is_paid:
            return
        self._pay(self._attempt.reserved)
        self._writer.open[self.key] = self._attempt
        if not self._is_kept:
            self._writer.store.abandon(self._attempt)

    async def _adopted(self) -> Attempt:
        """The answer came without sending: a provider's job from before a crash. Its attempt was left open."""
        writer = self._writer
        left_open = writer.open.pop(self.key, None)
        if left_open is not None:
            return left_open
        return await writer.store.begin(
            self.key, run=writer.run, step=self.request.step, writer=writer.identity, reserved=0.0
        )

    def _pay(self, dollars: float) -> None:
        assert self._attempt is not None and not self._is_paid, "each try is paid once"
        self._is_paid = True
        purse, step, model = self._writer.purse, self.request.step, self._writer.identity
        if self._hold is not None:
            purse.settle(self._hold, dollars)
        else:
            purse.correct(self._attempt.reserved, dollars, step=step, model=model)


def _unreadable(key: str, error: ValueError) -> Reply:
    message = f"the answer cannot be read: {_words(error)}"
    return Reply(key=key, failure=Failure(reason="unreadable", message=message))


def _words(error: Exception) -> str:
    return without_secrets(str(error) or type(error).__name__)[:500]
