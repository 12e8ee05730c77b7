"""How long a writer waits, on a clock that runs only while everybody sleeps."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from potstill.core.errors import ServiceError
from potstill.teachers.patience import Alarm, Retries, TimeLimit

STALL = Retries(stall_seconds=900.0)


class Skipping(selectors.SelectSelector):
    """Where an event loop would sleep, its time jumps."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.skipping = Skipping()
        super().__init__(self.skipping)

    def time(self) -> float:
        return self.skipping.now


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(work)


async def ask(alarm: Alarm, seconds: Sequence[float]) -> None:
    """One request after the other, each answered after so many seconds."""
    for each in seconds:
        with alarm.watching():
            await asyncio.sleep(each)
            alarm.answered()


def test_answers_that_come_slowly_do_not_ring() -> None:
    run(ask(Alarm(STALL, "big"), [800.0] * 5))


def test_one_that_hangs_among_others_that_are_answered_does_not_ring() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        await asyncio.gather(ask(alarm, [5000.0]), ask(alarm, [300.0] * 16))

    run(work())


def test_a_stall_rings_in_time_and_says_what_was_seen() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        await ask(alarm, [10.0, 10.0])
        began = asyncio.get_running_loop().time()
        alarm.troubled("503: down")
        with pytest.raises(
            ServiceError, match=r"big: no answer for 900 seconds, with 1 requests out \(2 were .*503: down"
        ):
            await ask(alarm, [5000.0])
        assert asyncio.get_running_loop().time() - began == pytest.approx(900.0, abs=11.0)

    run(work())


def test_everybody_who_waits_hears_it_and_so_does_who_comes_later() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        told = await asyncio.gather(*(ask(alarm, [5000.0]) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in told] == [ServiceError] * 3
        with pytest.raises(ServiceError):
            alarm.check()

    run(work())


def test_time_without_requests_is_no_stall() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        await ask(alarm, [10.0])
        await asyncio.sleep(5000.0)
        await ask(alarm, [800.0])

    run(work())


def test_a_time_out_of_ones_own_is_not_the_alarm() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        with pytest.raises(TimeoutError), alarm.watching():
            raise TimeoutError
        alarm.check()

    run(work())


def test_an_alarm_that_was_stopped_starts_afresh() -> None:
    async def work() -> None:
        alarm = Alarm(STALL, "big")
        with pytest.raises(ServiceError):
            await ask(alarm, [5000.0])
        alarm.stop()
        await ask(alarm, [10.0])

    run(work())


def test_waits_double_up_to_the_longest_and_half_of_each_is_chance() -> None:
    patience = Retries(first_seconds=1.0, longest_seconds=4.0)
    for tries, most in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0)):
        waits = [patience.seconds(f"key {number}", tries) for number in range(100)]
        assert most / 2 <= min(waits) < 0.6 * most
        assert 0.9 * most < max(waits) <= most


def test_the_same_seed_waits_the_same() -> None:
    assert Retries(seed=1).seconds("k", 2) == Retries(seed=1).seconds("k", 2) != Retries(seed=2).seconds("k", 2)


async def limited(limit: TimeLimit, seconds: float) -> str:
    began = asyncio.get_running_loop().time()
    try:
        with limit.wait():
            await asyncio.sleep(seconds)
    except TimeoutError:
        return f"stopped after {asyncio.get_running_loop().time() - began:.0f}"
    return "done"


def test_a_time_limit_counts_from_the_beginning_of_each_wait() -> None:
    async def work() -> None:
        limit = TimeLimit(100.0)
        first = asyncio.create_task(limited(limit, 1000.0))
        await asyncio.sleep(60.0)
        told = await asyncio.gather(first, limited(limit, 99.0), limited(limit, 1000.0), limited(limit, 30.0))
        assert told == ["stopped after 100", "done", "stopped after 100", "done"]
        await asyncio.sleep(500.0)
        assert await limited(limit, 200.0) == "stopped after 100"

    run(work())


def test_who_is_cancelled_under_a_time_limit_is_cancelled_and_not_late() -> None:
    async def work() -> None:
        task = asyncio.create_task(limited(TimeLimit(100.0), 1000.0))
        await asyncio.sleep(50.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())


def test_a_stopped_wait_leaves_its_task_able_to_wait_again() -> None:
    async def work() -> None:
        limit = TimeLimit(100.0)
        assert [await limited(limit, seconds) for seconds in (1000.0, 50.0)] == ["stopped after 100", "done"]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(work())
