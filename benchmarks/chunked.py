"""Speed and memory of the fused head: chunked against dense against TRL's chunked divergence, in one run.

    python benchmarks/chunked.py                # a CPU, one thread, 1,024 positions, V = 32,000
    python benchmarks/chunked.py --device cuda  # 8,192 positions, V = 128,000, bf16

Times are paired (dense, chunked, TRL in turn) and the ratio is the median over the pairs. Memory is the rise of the
peak over what the inputs take, one process per figure. Gradients are compared with the dense float32 path.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import make_torchvision_importable
from torch import Tensor

from potstill.core.types import Batch, Dense, Lesson, Projection, Signal
from potstill.objective import Objective, term

LOSSES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""Our name, and the beta TRL knows the same divergence by."""


def problem(rows: int, width: int, num_classes: int, device: str) -> tuple[Projection, Projection, Batch]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = []
    for trainable in (True, False):
        hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_(trainable)
        weight = (2 * torch.randn(num_classes, width, device=device, dtype=dtype) / width**0.5).requires_grad_(
            trainable
        )
        heads.append(Projection(hidden=hidden, weight=weight))
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    batch = Batch(keys=(), inputs={}, labels=labels, mask=torch.ones_like(labels, dtype=torch.bool))
    return heads[0], heads[1], batch


def chunked(name: str, student: Projection, teacher: Projection, batch: Batch) -> Tensor:
    lesson = Lesson(student=Signal(logits=student), teacher=Signal(logits=teacher))
    return Objective(term(name))(lesson, batch)


def dense(name: str, student: Projection, teacher: Projection, batch: Batch) -> Tensor:
    """The same loss on logits held whole, as most training scripts have it."""
    with torch.no_grad():
        said = Dense(logits=teacher.hidden @ teacher.weight.T)
    lesson = Lesson(student=Signal(logits=Dense(logits=student.hidden @ student.weight.T)), teacher=Signal(logits=said))
    return Objective(term(name))(lesson, batch)


def trl(name: str, student: Projection, teacher: Projection, batch: Batch) -> Tensor:
    make_torchvision_importable()
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        student.hidden[None], teacher.hidden[None], student.weight, teacher.weight, batch.mask[None], LOSSES[name]
    )
    return loss


PATHS: dict[str, Callable[[str, Projection, Projection, Batch], Tensor]] = {
    "dense": dense,
    "chunked": chunked,
    "trl": trl,
}


def seconds(path: str, name: str, inputs: tuple[Projection, Projection, Batch]) -> float:
    inputs[0].hidden.grad = inputs[0].weight.grad = None
    synchronize(inputs[0].hidden)
    start = time.perf_counter()
    PATHS[path](name, *inputs).backward()
    synchronize(inputs[0].hidden)
    return time.perf_counter() - start


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak_mib(path: str, name: str, rows: int, width: int, num_classes: int, device: str) -> float:
    """The rise of peak memory over the inputs, in a process of its own."""
    command = [sys.executable, __file__, "--peak", path, name, str(rows), str(width), str(num_classes), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_peak(path: str, name: str, rows: int, width: int, num_classes: int, device: str) -> float:
    torch.set_num_threads(1)
    # A first call on a tiny problem loads every library, so that the figure holds the arrays alone.
    PATHS[path](name, *problem(8, 8, 64, device)).backward()
    inputs = problem(rows, width, num_classes, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PATHS[path](name, *inputs).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts a new high-water mark
    before = resident_mib("VmRSS")
    PATHS[path](name, *inputs).backward()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS now, or VmHWM, the most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def gradient_error(name: str, width: int, num_classes: int) -> float:
    """Largest difference of a gradient entry between the chunked and the dense path, over the largest entry."""
    found = []
    for path in ("dense", "chunked"):
        # More rows than two chunks hold, and not a multiple.
        student, teacher, batch = problem(600, width, num_classes, "cpu")
        PATHS[path](name, student, teacher, batch).backward()
        assert student.hidden.grad is not None and student.weight.grad is not None
        found.append((student.hidden.grad, student.weight.grad))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/chunked.json")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        path, name, rows, width, num_classes, device = arguments.peak
        print(measure_peak(path, name, int(rows), int(width), int(num_classes), device))
        return
    torch.set_num_threads(1)
    rows, num_classes = (8192, 128_000) if arguments.device == "cuda" else (1024, 32_000)
    widths = (2048, 4096) if arguments.device == "cuda" else (512, 1024)
    paths = [path for path in PATHS if not (path == "trl" and arguments.without_trl)]
    results = []
    print(
        f"{rows} positions, V = {num_classes}, {arguments.device}, torch {torch.__version__}; medians of paired ratios"
    )
    for width in widths:
        for name in LOSSES:
            inputs = problem(rows, width, num_classes, arguments.device)
            times: dict[str, list[float]] = {path: [] for path in paths}
            for path in paths:
                seconds(path, name, inputs)
            for _ in range(arguments.repeats):
                for path in paths:
                    times[path].append(seconds(path, name, inputs))
            del inputs
            memory = {path: peak_mib(path, name, rows, width, num_classes, arguments.device) for path in paths}
            # The temporaries alone: the gradient of the head, which every path must return, is the same in all.
            twice = peak_mib("chunked", name, 2 * rows, width, num_classes, arguments.device)
            row = {
                "width": width,
                "loss": name,
                "seconds": {path: statistics.median(times[path]) for path in paths},
                "time_ratio": {
                    path: statistics.median(a / b for a, b in zip(times["chunked"], times[path], strict=True))
                    for path in paths
                    if path != "chunked"
                },
                "peak_mib": memory,
                "peak_mib_twice_the_positions": twice,
                "memory_ratio": {path: memory["chunked"] / memory[path] for path in paths if path != "chunked"},
                "gradient_error": gradient_error(name, width, 32_000),
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(
                {"rows": rows, "num_classes": num_classes, "device": arguments.device, "table": results}, file, indent=1
            )


if __name__ == "__main__":
    main()
