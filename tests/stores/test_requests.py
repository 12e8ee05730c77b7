"""The store of requests: what is acknowledged is kept, whatever happens next."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import sqlite3
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import StorageError
from potstill.core.writing import Message, Raw, Request, Usage
from potstill.stores.group_commit import GroupCommit
from potstill.stores.request_tables import VERSION, pack, unpack
from potstill.stores.requests import Answer, Reading, Requests, default_path

BODY = b'{"text": "4"}'


def asked(words: str) -> Request:
    return Request(messages=(Message(role="user", content=words),), max_tokens=8)


def raw(body: bytes = BODY, status: int = 200, **headers: str) -> Raw:
    return Raw(status=status, headers=headers, body=body)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def bought(
    store: Requests, words: str, answer: Raw | None = None, *, name: str = "r", dollars: float | None = 0.25
) -> str:
    """One request, answered and read; its key."""
    request = asked(words)
    key = request.key("w")
    attempt = await store.begin(key, run=name, step="label", writer="w", reserved=1.0)
    await store.finish(attempt, asked=request.text(), writer="w", raw=answer or raw())
    store.read(attempt, reading(dollars))
    return key


def reading(dollars: float | None = 0.25) -> Reading:
    return Reading(finish="stop", model="big", usage=Usage(input=3, output=1), dollars=dollars)


@pytest.fixture
def store(tmp_path: Path) -> Requests:
    return Requests(tmp_path / "requests.sqlite", durable=False)


# What is kept.


def test_an_answer_is_found_by_its_key(store: Requests) -> None:
    async def work() -> None:
        key = await bought(store, "2 + 2")
        await store.flush()
        assert store.find(key) == Answer(raw=raw(), reading=reading())

    run(work())


def test_an_unknown_key_is_not_found(store: Requests) -> None:
    assert store.find("0" * 64) is None


def test_an_answer_is_on_disk_before_finish_returns(store: Requests) -> None:
    async def work() -> None:
        request = asked("x")
        attempt = await store.begin("k", run="r", step="s", writer="w", reserved=0.0)
        await store.finish(attempt, asked=request.text(), writer="w", raw=raw())
        assert Requests(store.path, durable=False).find("k") == Answer(raw=raw(), reading=None)

    run(work())


def test_an_intent_is_on_disk_before_begin_returns(store: Requests) -> None:
    async def work() -> None:
        await store.begin("k", run="r", step="s", writer="w", reserved=0.5)
        assert [one.key for one in Requests(store.path, durable=False).unresolved("r")] == ["k"]

    run(work())


def test_an_answer_outlives_its_store_object(store: Requests) -> None:
    key = run(bought(store, "x"))
    store.close()
    found = Requests(store.path).find(key)
    assert found is not None
    assert found.raw.body == BODY


def test_a_closed_store_opens_again_when_it_is_used(store: Requests) -> None:
    run(bought(store, "x"))
    store.close()
    key = run(bought(store, "y"))
    assert store.find(key) is not None


def test_the_first_answer_to_a_key_stays(store: Requests) -> None:
    async def work() -> list[bool]:
        request, said = asked("x"), []
        for body in (b"first", b"second"):
            attempt = await store.begin("k", run="r", step="s", writer="w", reserved=0.0)
            said.append(await store.finish(attempt, asked=request.text(), writer="w", raw=raw(body)))
        return said

    assert run(work()) == [True, False]
    found = store.find("k")
    assert found is not None
    assert found.raw.body == b"first"


def test_of_two_answers_to_a_key_in_one_commit_the_first_stays(store: Requests) -> None:
    async def work() -> list[bool]:
        first, second = [await store.begin("k", run="r", step="s", writer="w", reserved=0.0) for _ in range(2)]
        other = await store.begin("other", run="r", step="s", writer="w", reserved=0.0)
        given = ((first, b"first"), (second, b"second"), (other, b"other"))
        return await asyncio.gather(
            *(store.finish(attempt, asked="{}", writer="w", raw=raw(body)) for attempt, body in given)
        )

    assert run(work()) == [True, False, True]
    found, other = store.find("k"), store.find("other")
    assert found is not None
    assert other is not None
    assert (found.raw.body, other.raw.body) == (b"first", b"other")


@settings(max_examples=50)
@given(st.binary(max_size=3000))
def test_any_body_comes_back_as_it_was(body: bytes) -> None:
    assert unpack(pack(body)) == body


def test_short_text_can_be_read_in_any_sqlite_shell_and_long_text_is_small() -> None:
    assert pack(BODY) == BODY.decode()
    assert len(pack(b"word " * 1000)) < 500


def test_headers_that_may_hold_secrets_are_dropped(store: Requests) -> None:
    secrets = {"authorization": "Bearer sk-123", "set-cookie": "session=sk-123", "openai-organization": "acme"}
    run(bought(store, "x", Raw(status=200, headers={**secrets, "x-request-id": "req_7"}, body=BODY)))
    found = store.find(asked("x").key("w"))
    assert found is not None
    assert found.raw.headers == {"x-request-id": "req_7"}
    store.close()
    for file in store.path.parent.iterdir():
        assert b"sk-123" not in file.read_bytes()


def test_an_unreadable_answer_is_set_aside_and_can_be_asked_again(store: Requests) -> None:
    async def work() -> None:
        key = await bought(store, "x", raw(b"torn{"))
        await store.spoil(key, error="torn")
        assert store.find(key) is None
        assert list(store.rows("SELECT body, error FROM unreadable")) == [("torn{", "torn")]
        assert await bought(store, "x") == key
        assert store.find(key) is not None

    run(work())


def test_refusals_can_be_forgotten(store: Requests) -> None:
    async def work() -> None:
        refused = await bought(store, "x", raw(b"no", status=400))
        kept = await bought(store, "y")
        assert await store.forget_refusals() == 1
        assert store.find(refused) is None
        assert store.find(kept) is not None

    run(work())


def test_the_environment_names_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POTSTILL_REQUESTS", str(tmp_path / "mine.sqlite"))
    assert default_path() == tmp_path / "mine.sqlite"


# Money and attempts.


def test_the_ledger_adds_up_by_step_and_writer(store: Requests) -> None:
    async def work() -> None:
        await bought(store, "x", dollars=0.25)
        await bought(store, "y", dollars=0.5)
        await store.begin("z", run="r", step="judge", writer="w", reserved=2.0)
        await store.begin("z", run="another", step="label", writer="w", reserved=4.0)
        await store.flush()

    run(work())
    label, judge = store.ledger("r")
    assert (label.step, label.spent, label.maybe, label.attempts, label.unresolved) == ("label", 0.75, 0.0, 2, 0)
    assert (judge.step, judge.spent, judge.maybe, judge.attempts, judge.unresolved) == ("judge", 0.0, 2.0, 1, 1)


def test_a_failed_attempt_costs_nothing_and_a_doubtful_one_what_was_reserved(store: Requests) -> None:
    async def work() -> None:
        for maybe_billed in (False, True):
            attempt = await store.begin("k", run="r", step="s", writer="w", reserved=1.0)
            await store.fail(attempt, error="broke", maybe_billed=maybe_billed)

    run(work())
    (bill,) = store.ledger("r")
    assert (bill.spent, bill.maybe) == (0.0, 1.0)


def test_an_answer_that_was_never_read_counts_as_reserved(store: Requests) -> None:
    async def work() -> None:
        attempt = await store.begin("k", run="r", step="s", writer="w", reserved=1.0)
        await store.finish(attempt, asked=asked("x").text(), writer="w", raw=raw())

    run(work())
    assert store.ledger("r")[0].maybe == 1.0
    assert [one.reserved for one in store.unresolved("r")] == [1.0]


def test_attempts_come_in_the_order_of_their_beginning_whatever_the_clock_said(store: Requests) -> None:
    async def work() -> None:
        for key in "abc":
            await store.begin(key, run="r", step="s", writer="w", reserved=0.0)

    run(work())
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("UPDATE attempts SET started = -id")  # the clock went back, again and again
    assert [one.key for one in store.unresolved("r")] == ["a", "b", "c"]


def test_a_cancelled_beginning_says_that_nothing_was_sent(store: Requests) -> None:
    async def work() -> None:
        task = asyncio.create_task(store.begin("k", run="r", step="s", writer="w", reserved=1.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.flush()

    run(work())
    (bill,) = store.ledger("r")
    assert (bill.maybe, bill.unresolved) == (0.0, 0)


def test_an_answer_is_kept_when_nobody_waits_for_it_any_more(store: Requests) -> None:
    async def work() -> None:
        attempt = await store.begin("k", run="r", step="s", writer="w", reserved=1.0)
        task = asyncio.create_task(store.finish(attempt, asked=asked("x").text(), writer="w", raw=raw()))
        await asyncio.sleep(0)
        task.cancel()

    run(work())
    store.close()
    assert store.find("k") is not None


# Group commit.


def test_records_are_written_in_the_order_given(tmp_path: Path) -> None:
    commits, seen = GroupCommit(tmp_path / "r.sqlite", durable=False), []

    async def work() -> None:
        for number in range(300):
            commits.put(lambda db, number=number: seen.append(number))  # type: ignore[misc]
        await commits.flush()

    run(work())
    commits.close()
    assert seen == list(range(300))


def test_records_that_gather_share_a_commit(tmp_path: Path) -> None:
    commits, statements = GroupCommit(tmp_path / "r.sqlite", durable=False), []

    async def work() -> None:
        await commits.put(lambda db: db.set_trace_callback(statements.append))
        statements.clear()
        for _ in range(640):
            commits.put(lambda db: None)
        await commits.flush()

    run(work())
    commits.close()
    assert statements.count("COMMIT") <= 11


def test_records_of_one_kind_are_written_together_in_their_order_and_before_single_writes(tmp_path: Path) -> None:
    commits, seen = GroupCommit(tmp_path / "r.sqlite", durable=False), []

    def note(db: sqlite3.Connection, numbers: Sequence[int]) -> None:
        seen.append(tuple(numbers))

    async def work() -> None:
        commits.put(lambda db: seen.append("single"))
        for number in range(1, 8):
            commits.put_record(note, number)
        await commits.flush()

    run(work())
    commits.close()
    assert seen == [(1, 2, 3, 4, 5, 6, 7), "single"]


def test_attempts_of_one_commit_are_told_their_own_ids(store: Requests) -> None:
    async def work() -> dict[str, int]:
        begun = [store.begin(key, run="r", step="s", writer="w", reserved=0.0) for key in "abc"]
        return {attempt.key: attempt.id for attempt in await asyncio.gather(*begun)}

    told = run(work())
    assert told == {one.key: one.id for one in store.unresolved("r")}


@pytest.mark.parametrize(("durable", "synchronous"), [(True, 2), (False, 0)])
def test_a_durable_store_waits_for_the_disk_at_every_commit(tmp_path: Path, durable: bool, synchronous: int) -> None:
    """2 is FULL in SQLite: with a write-ahead log, what was committed survives a loss of power."""
    commits, seen = GroupCommit(tmp_path / "r.sqlite", durable=durable), []

    async def work() -> None:
        await commits.put(lambda db: seen.append(db.execute("PRAGMA synchronous").fetchone()[0]))
        await commits.put(lambda db: seen.append(db.execute("PRAGMA journal_mode").fetchone()[0]))

    run(work())
    commits.close()
    assert seen == [synchronous, "wal"]


def test_several_event_loops_may_share_a_store(store: Requests) -> None:
    keys = [run(bought(store, f"row {number}")) for number in range(3)]
    assert all(store.find(key) for key in keys)


# Several processes.


def test_two_stores_on_one_file_see_each_others_answers(store: Requests) -> None:
    other = Requests(store.path, durable=False)
    key = run(bought(store, "x"))
    assert other.find(key) is not None


def in_a_child(work: Coroutine[Any, Any, Any]) -> int:
    """Run in a forked process, which starts in no time; its id."""
    child = os.fork()
    if child:
        work.close()
        return child
    try:
        asyncio.run(work)
    finally:
        os._exit(0)


def test_several_processes_write_to_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "requests.sqlite"

    async def fill(who: int) -> None:
        store = Requests(path, durable=False)
        await asyncio.gather(*(bought(store, f"{who} {number}") for number in range(50)))
        store.close()

    for child in [in_a_child(fill(who)) for who in range(4)]:
        assert os.waitpid(child, 0)[1] == 0
    store = Requests(path, durable=False)
    assert all(store.find(asked(f"{who} {number}").key("w")) for who in range(4) for number in range(50))
    assert store.ledger("r")[0].attempts == 200


@pytest.mark.parametrize("seed", range(10))
def test_no_acknowledged_answer_is_lost_when_the_process_is_killed(tmp_path: Path, seed: int) -> None:
    """Law 34. A child tells every answer that was acknowledged to it, and dies at a random moment."""
    path, (told, tell) = tmp_path / "requests.sqlite", os.pipe()
    in_flight = 32

    async def fill() -> None:
        os.close(told)
        store, numbers = Requests(path), iter(range(10**6))

        async def one() -> None:
            for number in numbers:
                os.write(tell, (await bought(store, f"row {number}")).encode())

        await asyncio.gather(*(one() for _ in range(in_flight)))

    child = in_a_child(fill())
    os.close(tell)
    heard = os.read(told, 64)  # it has begun
    time.sleep(random.Random(seed).uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(told, 2**16):
        heard += more
    os.close(told)
    keys = [heard[start : start + 64].decode() for start in range(0, len(heard), 64)]
    store = Requests(path)
    assert keys
    assert all(store.find(key) for key in keys)
    assert len([one for one in store.unresolved("r") if store.find(one.key) is None]) <= in_flight


# Bad files: one sentence each, and nothing is touched.


def test_a_newer_store_is_refused_and_left_as_it_is(store: Requests) -> None:
    run(bought(store, "x"))
    store.close()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("UPDATE schema SET version = ?", (VERSION + 1,))
    before = store.path.read_bytes()
    with pytest.raises(StorageError, match=r"newer Potstill .*another store with POTSTILL_REQUESTS"):
        Requests(store.path)
    assert store.path.read_bytes() == before


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("These are my notes. " * 200)
    with pytest.raises(StorageError, match=r"notes\.txt is no store of requests, or is torn"):
        Requests(path)
    assert path.read_text() == "These are my notes. " * 200


def test_a_database_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "music.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    before = path.read_bytes()
    with pytest.raises(StorageError, match="database of something else: it has the tables songs"):
        Requests(path)
    assert path.read_bytes() == before


def test_a_torn_store_is_named(store: Requests) -> None:
    async def work() -> None:
        await asyncio.gather(*(bought(store, f"row {number}") for number in range(200)))

    run(work())
    store.close()
    torn = bytearray(store.path.read_bytes())
    torn[4096:] = os.urandom(len(torn) - 4096)
    store.path.write_bytes(torn)
    with pytest.raises(StorageError, match="torn"):
        Requests(store.path).find(asked("row 7").key("w"))


def test_a_folder_in_place_of_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a folder"):
        Requests(tmp_path)


def test_a_place_where_nothing_can_be_written_is_named() -> None:
    with pytest.raises(StorageError, match="cannot be opened for writing"):
        Requests("/proc/requests.sqlite")


def enter_a_small_disk(folder: Path) -> None:
    """Mount a file system of 12 MB on `folder` that only this process sees. Raises OSError where that is forbidden."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x20000
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, line in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(line)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=12m"):
        raise OSError(ctypes.get_errno(), "mount")


def test_on_a_full_disk_answers_under_way_are_kept_and_nothing_new_is_begun(tmp_path: Path) -> None:
    body = random.Random(0).randbytes(200_000)
    under_way = asked("under way")

    async def fill_up() -> list[str]:
        store = Requests(tmp_path / "requests.sqlite")
        before = await bought(store, "before")
        attempt = await store.begin(under_way.key("w"), run="r", step="s", writer="w", reserved=1.0)
        with contextlib.suppress(OSError), (tmp_path / "of somebody else").open("wb", buffering=0) as file:
            while file.write(body[:4096]):
                pass
        await store.finish(attempt, asked=under_way.text(), writer="w", raw=raw(body))
        with pytest.raises(StorageError) as caught:
            while True:
                await store.begin("next", run="r", step="s", writer="w", reserved=1.0)
        store.close()
        again = Requests(store.path)
        found = again.find(attempt.key)
        return [
            str(caught.value),
            str(again.find(before) is not None),
            str(found is not None and found.raw.body == body),
        ]

    told, tell = os.pipe()

    async def report() -> None:
        try:
            enter_a_small_disk(tmp_path)
        except OSError as error:
            os.write(tell, f"forbidden: {error}".encode())
            return
        try:
            os.write(tell, "\n".join(await fill_up()).encode())
        except Exception as error:  # noqa: BLE001 - read by the parent
            os.write(tell, f"{type(error).__name__}: {error}".encode())

    child = in_a_child(report())
    os.close(tell)
    os.waitpid(child, 0)
    heard = os.read(told, 2**16).decode()
    os.close(told)
    if heard.startswith("forbidden"):
        pytest.skip(f"this machine does not let a process mount a file system of its own ({heard})")
    sentence, *kept = heard.splitlines()
    assert sentence.startswith("The disk is full while writing")
    assert kept == ["True", "True"]
