"""What elicitation costs by itself: rows per second, own CPU per request, memory as rows go by.

    python benchmarks/elicit_speed.py                     # 20,000 rows
    python benchmarks/elicit_speed.py --rows 1000000      # is memory flat? (about 8 minutes on one core)
    python benchmarks/elicit_speed.py --profile           # where the time goes

A make-believe provider (tests/servers.py) answers after 20 ms from a process of its own. Everything is as in a real
run: label -> endpoint -> request store with fsync, budget kept, every row written. Own CPU is this process's alone, all
of its threads. Exit code 1 where a bar is missed: 3,000 rows per second of one core, 32 MB more memory at the end than
at 10,000 rows. The other form of the first bar, 0.3 ms per request, is stricter, and reported.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.servers import url_of

from potstill.core.run import environment, write_json
from potstill.core.writing import Example
from potstill.knowledge.flow import elicit
from potstill.knowledge.label import label
from potstill.teachers.endpoint import endpoint

SERVERS = Path(__file__).parents[1] / "tests" / "servers.py"
LEAST_ROWS_PER_CORE_SECOND = 3_000
MOST_MEGABYTES_GROWN = 32.0
FEW_MS = 0.3
SETTLED = 10_000
"""Rows after which memory should stay as it is."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    rows: int
    rows_per_second: float
    cpu_ms_per_request: float
    rows_per_core_second: float
    """What one core could do if it did nothing but this."""
    megabytes_settled: float
    megabytes_at_the_end: float
    megabytes_grown: float
    bytes_stored_per_row: float


def run(num_rows: int, *, latency_seconds: float, concurrency: int, folder: Path) -> Measured:
    port_file = folder / "port"
    command = [sys.executable, str(SERVERS), "--port-file", str(port_file), "--latency-seconds", str(latency_seconds)]
    provider = subprocess.Popen(command)
    try:
        return _measure(num_rows, url_of(port_file), concurrency=concurrency, folder=folder)
    finally:
        provider.kill()
        provider.wait()


def _measure(num_rows: int, url: str, *, concurrency: int, folder: Path) -> Measured:
    store = folder / "requests.sqlite"
    price = {"input": 1.0, "output": 2.0}
    teacher = endpoint("mock", url=url, concurrency=concurrency, store=str(store), run="speed", budget=1e6, price=price)
    megabytes: list[float] = []

    def seeds() -> Iterator[Example]:
        for number in range(num_rows):
            if number == min(SETTLED, num_rows // 2):
                megabytes.append(resident_megabytes())
            yield Example(id=str(number), prompt=f"What is {number} plus {number}?")

    wall, cpu = time.perf_counter(), time.process_time()
    elicited = elicit(seeds(), label(teacher=teacher, max_tokens=32, seed=1), out=folder / "out")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert elicited.num_accepted == num_rows, f"{elicited.num_accepted} of {num_rows}: {elicited.reasons}"
    megabytes.append(resident_megabytes())
    return Measured(
        rows=num_rows,
        rows_per_second=num_rows / wall,
        cpu_ms_per_request=1e3 * cpu / num_rows,
        rows_per_core_second=num_rows / cpu,
        megabytes_settled=megabytes[0],
        megabytes_at_the_end=megabytes[1],
        megabytes_grown=megabytes[1] - megabytes[0],
        bytes_stored_per_row=sum(f.stat().st_size for f in folder.glob("requests.sqlite*")) / num_rows,
    )


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--latency-seconds", type=float, default=0.02)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="a file for the figures, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        profile = cProfile.Profile()
        if given.profile:
            profile.enable()
        measured = run(
            given.rows, latency_seconds=given.latency_seconds, concurrency=given.concurrency, folder=Path(name)
        )
        if given.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    print(json.dumps(asdict(measured), indent=2))
    if given.out is not None:
        about = {"environment": environment(" ".join(sys.argv)), "load": os.getloadavg()[0]}
        write_json(given.out, {**about, **asdict(measured)})
    rows, grown = measured.rows_per_core_second, measured.megabytes_grown
    bars = {
        f"{rows:,.0f} rows per second of one core, bar {LEAST_ROWS_PER_CORE_SECOND:,}": rows
        >= LEAST_ROWS_PER_CORE_SECOND,
        f"{grown:+.1f} MB from {SETTLED:,} rows on, bar {MOST_MEGABYTES_GROWN:+.0f}": grown <= MOST_MEGABYTES_GROWN,
    }
    for told, is_met in bars.items():
        print(f"{told}: {'met' if is_met else 'MISSED'}")
    by_time = "met" if measured.cpu_ms_per_request <= FEW_MS else "not reached"
    print(f"{measured.cpu_ms_per_request:.3f} ms of own CPU per request, {FEW_MS} is the stricter form: {by_time}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
