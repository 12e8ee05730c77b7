"""Two workers on one machine, one of them killed. Everything listens on loopback and ends with the tests."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from potstill.core.errors import RecipeError
from potstill.core.writing import Reply, Request, Transport
from potstill.stores.requests import Requests
from potstill.teachers.address import server
from potstill.teachers.endpoint import EndpointTransport
from potstill.teachers.patience import Retries
from potstill.teachers.recorded import Recorded
from potstill.teachers.spread import SpreadTransport
from tests.servers import url_of

SERVERS = Path(__file__).parents[1] / "servers.py"
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="ray is not installed (extra ray)")
SECONDS = 180.0
"""Workers import torch before they answer: 17 s on a half free machine, a minute where six programs share two cores."""
STORE_BYTES = 100_000_000
"""Of shared memory, for Ray's objects. Nothing here is large."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with room for two workers, on loopback."""
    if not Path("/dev/shm").is_dir() or shutil.disk_usage("/dev/shm").free < 2 * STORE_BYTES:
        pytest.skip("Ray wants 200 MB of shared memory in /dev/shm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray reads this when it is imported. Otherwise it takes the machine's address, even where it is given another.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray = pytest.importorskip("ray", reason="Ray is an extra: pip install potstill[ray]")
        patch.setattr(sys.modules[SpreadTransport.__module__], "START_SECONDS", SECONDS)
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=STORE_BYTES,
            )  # fmt: skip
        except (OSError, RuntimeError, ConnectionError, TimeoutError) as error:
            ray.shutdown()
            pytest.skip(f"Ray cannot start here: {error}")
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def transport(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpreadTransport]:
    port_file = tmp_path_factory.mktemp("provider") / "port"
    command = [sys.executable, str(SERVERS), "--port-file", str(port_file), "--latency-seconds", "0.02"]
    process = subprocess.Popen(command)

    def build() -> Transport:
        return EndpointTransport("mock", [server(url=url)])

    try:
        url = url_of(port_file)
        yield SpreadTransport(build, workers=2, together=8, cpus=0.5)
    finally:
        process.kill()
        process.wait()


async def asked(transport: SpreadTransport, texts: list[str]) -> list[Reply]:
    teacher = Recorded(transport, store=Requests.temporary(), price=None, retries=Retries(first_seconds=0.01))
    try:
        asking = asyncio.gather(*(teacher.ask(Request(prompt=text, max_tokens=9)) for text in texts))
        return list(await asyncio.wait_for(asking, SECONDS))
    finally:
        await teacher.close()


@needs_ray
@pytest.mark.processes
def test_workers_answer_as_their_transport_does(transport: SpreadTransport) -> None:
    assert transport.identity == "openai:mock"
    assert [reply.text for reply in asyncio.run(asked(transport, ["a", "b"]))] == ["A", "B"]


@needs_ray
@pytest.mark.processes
def test_nothing_listens_beyond_this_machine(transport: SpreadTransport) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        socket.laddr.ip for each in family for socket in each.net_connections("tcp") if socket.status == "LISTEN"
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@needs_ray
@pytest.mark.processes
def test_losing_a_worker_loses_nothing(transport: SpreadTransport) -> None:
    import ray

    async def run() -> list[Reply]:
        texts = [f"text {number}" for number in range(60)]
        asking = asyncio.create_task(asked(transport, texts))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        return await asking

    pid = ray.get(transport.workers[0].pid.remote(), timeout=SECONDS)
    assert [reply.text for reply in asyncio.run(run())] == [f"TEXT {number}" for number in range(60)]


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(RecipeError, match=r"pip install 'potstill\[ray\]'"):
        SpreadTransport(lambda: EndpointTransport("m", []), workers=1)
