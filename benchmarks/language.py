"""A trained Llama of 5 blocks teaches fresh students of 2, otherwise of its shape: one by each divergence.

    python benchmarks/language.py [--losses cross_entropy forward_kl ...] [--seeds 0 1 2]
    python benchmarks/language.py --layers 5 --steps 500 --batch 16 --length 256 \
        --losses cross_entropy forward_kl --seeds 0

The second is the setting of the data's own reference: test perplexity 10.69 by cross-entropy, 9.26 by forward KL; the
teacher itself 4.11.

Same student, same initial weights per seed, same batches, same optimizer; only the loss differs. On the 100 test
stories, as many tokens of each as in training: perplexity, agreement with the teacher's first choice, KL to it. Quality
of what the student writes: it continues the first 32 tokens of each story by 64 tokens, sampled at temperature 1; we
give the teacher's mean negative log-likelihood of those tokens and the share of distinct token pairs (a student that
repeats itself is likely under the teacher, and dull).

Arms that the results file has are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

import potstill as ps
from potstill.core.types import Batch, Need, Teacher
from potstill.objective.representations import dense
from potstill.objective.schedules import taid_schedule
from potstill.objective.term import Term
from potstill.stores import Sampled

DATA = Path(os.environ.get("POTSTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEACHER = str(DATA / "llama-stories-260k")
STORIES = str(DATA / "tinystories-1k" / "stories.jsonl.gz")
LOSSES = (
    "cross_entropy",
    "forward_kl",
    "forward_kl_from_cache",
    "reverse_kl",
    "jeffreys",
    "jsd",
    "generalised_jsd",
    "skew_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "alpha_beta",
    "hellinger",
    "total_variation",
    "renyi",
    "taid",
    "logit_mse",
)
FROM_CACHE = "forward_kl_from_cache"
"""The same loss from 32 draws per token that were stored before: its perplexity should be forward_kl's."""
PROMPT, WRITTEN = 32, 64
SHAKEN = 0.03
"""Relative standard deviation of what --shake does to the first weights: is a result a matter of chance?"""


def term(loss: str) -> Term:
    """The loss with its defaults; beta 0.1 for the generalised JSD, because its default is the JSD."""
    if loss == "generalised_jsd":
        return ps.term(loss, beta=0.1)
    if loss == FROM_CACHE:
        return ps.term("forward_kl")
    if loss == "taid":
        return ps.term(loss, mix=taid_schedule())
    return ps.term(loss)


def trained(
    loss: str,
    seed: int,
    teacher: Teacher,
    *,
    steps: int,
    batch: int,
    length: int,
    layers: int,
    lr: float,
    schedule: Literal["cosine", "constant"],
    warmup: int,
    draws: int,
    shake: int,
) -> dict[str, float]:
    """One student by one loss: its scores on the test stories."""
    torch.manual_seed(seed)
    student = ps.students.hf_fresh(TEACHER, layers=layers)
    if shake:
        dice = torch.Generator().manual_seed(shake)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1 + SHAKEN * torch.randn(parameter.shape, generator=dice))
    stories = ps.data.chat(STORIES, tokenizer=TEACHER, batch=batch, length=length, seed=seed)
    taught = None if loss == "cross_entropy" else teacher
    with tempfile.TemporaryDirectory() as out:
        if loss == FROM_CACHE:
            ps.teachers.build(f"{out}/store", teacher, stories.train, batches=steps, sketch=Sampled(draws=draws))
            taught = ps.teachers.remembered(f"{out}/store")
        ps.fit(
            ps.Offline(student, taught),
            ps.Objective(term(loss)),
            stories.train,
            steps=steps, lr=lr, schedule=schedule, warmup=warmup or steps // 20, optimizer="adamw", clip=1.0,
            checkpoint_every=steps, out=f"{out}/run",
        )  # fmt: skip
    told = asdict(ps.evaluate.evaluate(student, stories.test.batches(20), teacher=teacher))
    surprise, distinct = written(student, stories.test.batches(50), teacher)
    return {
        "perplexity": math.exp(told["nll"]),
        "agreement": told["agreement"],
        "kl_to_teacher": told["kl_to_teacher"],
        "teacher_nll": surprise,
        "distinct_pairs": distinct,
    }


@torch.no_grad()
def written(student: torch.nn.Module, batches: Iterable[Batch], teacher: Teacher) -> tuple[float, float]:
    """Teacher's nats per token of what the student writes, and the share of distinct token pairs in it."""
    student.eval()
    surprises, pairs = [], []
    dice = torch.Generator().manual_seed(0)
    for batch in batches:
        ids = batch.inputs["input_ids"][:, :PROMPT]
        for _ in range(WRITTEN):
            logits = dense(student(_batch(ids, batch), Need(logits=True)).logits)
            ids = torch.cat([ids, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=dice)], dim=1)
        log_probs = dense(teacher(_batch(ids, batch), Need(logits=True)).logits).log_softmax(-1)
        told = log_probs[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        surprises.append(-told.mean(dim=1))
        pairs += [tuple(pair) for row in ids[:, PROMPT:].tolist() for pair in pairwise(row)]
    return torch.cat(surprises).mean().item(), len(set(pairs)) / len(pairs)


def _batch(ids: torch.Tensor, like: Batch) -> Batch:
    ones = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    inputs = {"input_ids": ids, "attention_mask": ones, "position_ids": positions}
    return Batch(keys=like.keys, inputs=inputs, labels=ids, mask=ones.bool(), vocabulary=like.vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    parser.add_argument("--warmup", type=int, default=0, help="steps; 0 is a twentieth of all")
    parser.add_argument("--draws", type=int, default=Sampled().draws, help="per token, from the cache")
    parser.add_argument("--shake", type=int, default=0, help="a seed to shake the first weights by; 0: not at all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language.json"))
    arguments = parser.parse_args()
    teacher = ps.teachers.hf(TEACHER)
    table = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    sizes = {name: getattr(arguments, name) for name in ("steps", "batch", "length", "layers")}
    setting = "x".join(str(size) for size in sizes.values())
    how = {name: getattr(arguments, name) for name in ("lr", "schedule", "warmup", "draws", "shake")}
    setting += "".join(f" {name} {value}" for name, value in how.items() if value != parser.get_default(name))
    for seed in arguments.seeds:
        for loss in arguments.losses:
            arm = f"{loss} {setting} {seed}"
            if arm not in table:
                table[arm] = trained(loss, seed, teacher, **sizes, **how)
                arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(
        "| loss | test perplexity | agreement | KL to the teacher | teacher's nats per written token | distinct pairs |"
    )
    print("|" + "---|" * 6)
    for loss in arguments.losses:
        rows = [table[f"{loss} {setting} {seed}"] for seed in arguments.seeds]
        columns = ("perplexity", "agreement", "kl_to_teacher", "teacher_nll", "distinct_pairs")
        print(f"| {loss} | " + " | ".join(_told([row[name] for row in rows]) for name in columns) + " |")


def _told(values: list[float]) -> str:
    digits = 2 if values[0] >= 2 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
