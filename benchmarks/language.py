"""A trained Llama of 260 thousand parameters teaches a fresh student of its own shape on TinyStories.

    python benchmarks/language.py [--steps 500] [--seeds 0] [--losses cross_entropy forward_kl ...]

Same student, same initial weights per seed, same batches (16 rows of at most 256 tokens), same optimizer; only the loss
differs. Test perplexity and agreement with the teacher on the 100 test stories (their first 256 tokens). The data's own
reference, one seed, 500 steps: cross-entropy 10.69, forward KL 9.26; the teacher itself 4.11.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

import potstill as ps
from potstill.core.types import Teacher

DATA = Path(os.environ.get("POTSTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEACHER = str(DATA / "llama-stories-260k")
LOSSES = ("cross_entropy", "forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation")


def trained(loss: str, seed: int, steps: int, teacher: Teacher) -> dict[str, float]:
    """One student by one loss: its scores on the test stories."""
    torch.manual_seed(seed)
    student = ps.students.hf_fresh(TEACHER)
    stories = ps.data.chat(
        str(DATA / "tinystories-1k" / "stories.jsonl.gz"), tokenizer=TEACHER, batch=16, length=256, seed=seed
    )
    taught = None if loss == "cross_entropy" else teacher
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        ps.fit(
            ps.Offline(student, taught),
            ps.Objective(ps.term(loss)),
            stories.train,
            steps=steps, lr=3e-3, optimizer="adamw", warmup=steps // 20, clip=1.0, checkpoint_every=steps, out=out,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    scores = ps.evaluate.evaluate(student, stories.test.batches(20), teacher=teacher)
    told = asdict(scores)
    return {
        "perplexity": math.exp(told["nll"]),
        "agreement": told["agreement"],
        "kl_to_teacher": told["kl_to_teacher"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--out", default="benchmarks/results/language.json")
    arguments = parser.parse_args()
    teacher = ps.teachers.hf(TEACHER)
    table = {}
    print(f"| loss | test perplexity | agreement | KL to the teacher | seconds |\n|{'---|' * 5}")
    for loss in arguments.losses:
        rows = [trained(loss, seed, arguments.steps, teacher) for seed in arguments.seeds]
        table[loss] = rows
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        print(
            f"| {loss} | {means['perplexity']:.2f} | {means['agreement']:.3f} | {means['kl_to_teacher']:.3f} | "
            f"{means['seconds']:.0f} |",
            flush=True,
        )
    told = {"steps": arguments.steps, "seeds": arguments.seeds, "table": table}
    Path(arguments.out).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
