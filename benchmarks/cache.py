"""What a remembered teacher costs and what it is worth: bytes, time to look up, angle of the gradient. One table.

    python benchmarks/cache.py                 # a CPU, one thread; a few minutes
    python benchmarks/cache.py --rows 4        # smaller batches, for a quick look

Two teachers: a made-up law over 32,000 classes with the entropies of a language model, and the llama-stories model
(512 pieces) on tinystories, where transformers and the data are there. Each is built into a store of each kind by the
public `build`, read back by the public `remembered`, and compared with the live teacher in the gradient of mean forward
KL with respect to all parameters of a student, over one batch. Exit code 1 where the default misses its bars.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill.core.run import environment
from potstill.core.types import Batch, Dense, Lesson, Logits, Need, Projection, Signal, Sparse
from potstill.objective import Objective, term
from potstill.stores import Sampled, Sketch, Top, info
from potstill.teachers import local
from potstill.teachers.remembered import build, remembered

LOGITS = Need(logits=True)
BARS = {"bytes per position": 48.0, "angle, degrees": 5.0, "lookup, ms": 3.0}
SKETCHES: tuple[Sketch, ...] = (Sampled(draws=16), Sampled(), Sampled(draws=50), Top(k=50))
LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """A teacher, the batch it is asked about, and students to be taught, by how far they are."""

    name: str
    teacher: nn.Module
    students: dict[str, nn.Module]
    rows: Tensor
    """Token ids [B, T + 1]."""

    def batch(self, index: int) -> Batch:
        labels = self.rows[:, 1:]
        return Batch(
            keys=tuple(f"row {row}" for row in range(len(labels))),
            inputs={"input_ids": self.rows[:, :-1]},
            labels=labels,
            mask=torch.ones_like(labels, dtype=torch.bool),
            vocabulary=self.name,
        )


class MadeUp(nn.Module):
    """Tokens to hidden states to a head over a Zipf prior; `sharpness` differs between positions as it does in text."""

    def __init__(self, seed: int, *, classes: int = 32_000, width: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
        self.register_buffer("prior", -1.2 * (ranks + 3.0).log())
        self.embedding = nn.Parameter(torch.randn(512, width, generator=generator))
        self.head = nn.Parameter(torch.randn(classes, width, generator=generator) / width**0.5)
        self.sharpness = nn.Parameter(2.4 + 8.4 * torch.rand(512, 1, generator=generator))

    def forward(self, batch: Batch, need: Need) -> Signal:
        ids = batch.inputs["input_ids"]
        context = self.embedding[ids] + 0.5 * self.embedding[ids].roll(1, dims=1)
        hidden = self.sharpness[ids] * context / 1.25**0.5
        return Signal(logits=Projection(hidden=hidden, weight=self.head, bias=self.prior))


class Causal(nn.Module):
    """A model of transformers with its logits applied: the figures are about the store, not about the engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, need: Need) -> Signal:
        return Signal(logits=Dense(logits=self.model(batch.inputs["input_ids"]).logits))


def made_up(num_rows: int) -> Case:
    teacher, untrained = MadeUp(1), MadeUp(2)
    with torch.no_grad():
        untrained.head.mul_(0.02)
        halfway = copy.deepcopy(teacher)
        noise = torch.randn(teacher.head.shape, generator=torch.Generator().manual_seed(3))
        halfway.head.mul_(0.6).add_(0.3 * noise / noise.shape[1] ** 0.5)
    rows = torch.randint(0, 512, (num_rows, LENGTH + 1), generator=torch.Generator().manual_seed(4))
    return Case(
        name="made-up, V = 32,000", teacher=teacher, students={"untrained": untrained, "halfway": halfway}, rows=rows
    )


def stories(num_rows: int) -> Case | None:
    """The real model, with a fresh student of its shape and the weaker model that was trained; None without them."""
    from peers import make_torchvision_importable

    make_torchvision_importable()
    data = Path(os.environ.get("POTSTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    try:
        from transformers import AutoTokenizer, LlamaForCausalLM
    except ImportError:
        return None
    if not (data / "llama-stories-260k").is_dir():
        return None
    tokenizer = AutoTokenizer.from_pretrained(data / "llama-stories-260k")
    model = LlamaForCausalLM.from_pretrained(data / "llama-stories-260k")
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(model.config)
    weak = LlamaForCausalLM.from_pretrained(data / "llama-stories-279k-weak")
    rows = []
    with gzip.open(data / "tinystories-1k" / "stories.jsonl.gz", "rt") as file:
        for line in file:
            ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=LENGTH + 1)["input_ids"]
            if len(ids) == LENGTH + 1:
                rows.append(ids)
    students = {"untrained": Causal(fresh), "halfway": Causal(weak)}
    return Case(
        name="llama-stories, V = 512", teacher=Causal(model), students=students, rows=torch.tensor(rows[:num_rows])
    )


def gradient(student: nn.Module, batch: Batch, said: Logits) -> Tensor:
    """Of mean forward KL, all parameters end to end, in float64."""
    student.zero_grad()
    lesson = Lesson(student=student(batch, LOGITS), teacher=Signal(logits=said))
    Objective(term("forward_kl"))(lesson, batch).backward()
    return torch.cat([p.grad.double().flatten() for p in student.parameters() if p.grad is not None])


def degrees(one: Tensor, other: Tensor) -> float:
    return math.degrees(math.acos(min(1.0, float(one @ other / (one.norm() * other.norm())))))


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """The median of calls, one to warm up left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def beside(case: Case, batch: Batch, default_bytes: float) -> dict[str, Sparse]:
    """What others keep: independent draws as published; the top classes renormalised, without a tail.

    The top 50, and as many as the default's bytes would pay for.
    """
    with torch.no_grad():
        said = case.teacher(batch, LOGITS).logits
        whole = said.finish(said.hidden @ said.weight.T + said.bias) if isinstance(said, Projection) else said.logits
        probs = whole.softmax(dim=-1)
        draws = Sampled().draws
        drawn = torch.multinomial(
            probs.flatten(0, 1), draws, replacement=True, generator=torch.Generator().manual_seed(5)
        ).unflatten(0, probs.shape[:-1])
    size = probs.shape[-1]
    weight = torch.full(drawn.shape, -math.log(draws))
    found = {f"independent draws {draws}": Sparse(ids=drawn, log_probs=weight, size=size, kind="sampled")}
    affordable = round(8 * default_bytes / Top().width(size))
    for name, k in (("top 50 without tail", 50), (f"top {affordable} without tail, equal bytes", affordable)):
        top, ids = probs.topk(k, dim=-1)
        renormalised = (top / top.sum(dim=-1, keepdim=True)).log()
        found[name] = Sparse(ids=ids, log_probs=renormalised, size=size, kind="sampled")
    entropy = -(probs * probs.clamp(min=1e-30).log()).sum(dim=-1).mean()
    mass = probs.topk(50, dim=-1).values.sum(dim=-1).mean()
    print(f"{case.name}: mean entropy {float(entropy):.2f} nats, mass of the top 50 {float(mass):.4f}")
    return found


def measure(case: Case) -> list[dict[str, Any]]:
    batch, teacher = case.batch(0), local(copy.deepcopy(case.teacher))
    live = teacher(batch, LOGITS).logits
    assert live is not None
    full = {name: gradient(student, batch, live) for name, student in case.students.items()}

    def row(name: str, said: Sparse, **cost: float | None) -> dict[str, Any]:
        angles = {who: degrees(full[who], gradient(student, batch, said)) for who, student in case.students.items()}
        kept = float((said.log_probs > -torch.inf).sum(dim=-1).double().mean())
        return {"teacher": case.name, "kept": name, "entries": kept, "degrees": angles, **cost}

    found = []
    for sketch in SKETCHES:
        size = sketch.draws if isinstance(sketch, Sampled) else sketch.k
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            build(folder, teacher, case, batches=1, sketch=sketch)
            seconds = time.perf_counter() - start
            store = remembered(folder)
            said = store(batch, LOGITS).logits
            assert isinstance(said, Sparse)
            found.append(
                row(
                    f"{sketch.kind} {size}" + (" (default)" if sketch == Sampled() else ""),
                    said,
                    bytes=info(folder).bytes_per_position,
                    lookup_ms=milliseconds(lambda store=store: store(batch, LOGITS)),
                    build_seconds=seconds,
                )
            )
    default_bytes = next(row["bytes"] for row in found if "default" in row["kept"])
    others = beside(case, batch, default_bytes)
    return found + [row(name, said, bytes=None, lookup_ms=None, build_seconds=None) for name, said in others.items()]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| teacher | kept | entries | bytes per position | lookup, ms | degrees, untrained | degrees, halfway |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cost = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("bytes", "lookup_ms")]
        angles = [f"{row['degrees'][who]:.2f}" for who in ("untrained", "halfway")]
        lines.append(" | ".join(["| " + row["teacher"], row["kept"], f"{row['entries']:.1f}", *cost, *angles]) + " |")
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that the default misses."""
    out = []
    for row in rows:
        if "default" in row["kept"]:
            values = (row["bytes"], max(row["degrees"].values()), row["lookup_ms"])
            bars = zip(BARS.items(), values, strict=True)
            out += [f"{row['teacher']}: {name} {value:.2f} > {bar}" for (name, bar), value in bars if value > bar]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="rows of 256 positions in a batch")
    parser.add_argument("--out", default="benchmarks/results/cache.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [made_up(arguments.rows), stories(arguments.rows)]
    rows = [row for case in cases if case is not None for row in measure(case)]
    print(f"One batch of {arguments.rows} x {LENGTH} positions; one thread.\n\n{markdown(rows)}")
    found = missed(rows)
    result = {"positions": arguments.rows * LENGTH, "bars": BARS, "missed": found, "table": rows}
    Path(arguments.out).write_text(json.dumps({**result, **environment(" ".join(sys.argv))}, indent=1) + "\n")
    print("\n" + ("\n".join(found) or "All bars hold."))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
