"""Distillation from a live teacher beside TRL's trainers: time and peak memory of a step, offline and on policy.

    .venv-bench/bin/python benchmarks/language_peers.py --vocabularies 32000 --rounds 3 --steps 6

The models of benchmarks/language_speed.py. Rows are a question of 64 tokens and an answer of 192, and only answers are
supervised: 4 x 192 tokens per step. Everyone: forward KL at temperature 1, float32, AdamW, no clipping, no gradient
checkpointing, no evaluation, no checkpoint within the steps. Contestants:

    live teacher     potstill's `fit`            offline: the answers of the data
    GKD, lmbda 0     TRL's GKDTrainer
    rollout          potstill's `fit`            on policy: the student writes 192 tokens after each question
    GKD, lmbda 1     TRL's GKDTrainer
    Distillation     TRL's DistillationTrainer   (on policy is all that it does)

What is not the same: GKDTrainer computes whole logits and the divergence at all 255 positions before it drops the
questions'; DistillationTrainer counts the student's entropy as well, for its log; potstill keeps the log-probability of
each token that the student writes; TRL takes AdamW's fused form, potstill torch's default. An answer ends early
where the student happens to write the end token: once in 170 rows at V = 32,000.

The loss of the first measured step is printed: everyone trains the same student on the same law, so they are close.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from language_speed import (
    LENGTH,
    ROWS,
    Clock,
    Contestant,
    conversations,
    parser_of,
    prepare,
    print_table,
    rounds,
    run_one,
    said_of,
    ticking,
    trainer_arguments,
)  # fmt: skip
from peers import make_torchvision_importable

PROMPT = 64
ANSWER = LENGTH - PROMPT
OFFLINE = ("live teacher", "GKD, lmbda 0")
ON_POLICY = ("rollout", "GKD, lmbda 1", "Distillation")


def _questions(folder: Path, clock: Clock) -> Any:
    """The rows, with answers that are supervised; asked for a batch, it tells the clock."""
    import potstill as ps

    rows = ps.data.chat(
        str(folder / "rows.jsonl"), tokenizer=str(folder / "student"), batch=ROWS, length=LENGTH, test_share=0.0,
    ).train  # fmt: skip

    class Ticking:
        def batch(self, index: int) -> Any:
            clock()
            return rows.batch(index)

    return Ticking()


def _by_fit(folder: Path, steps: int, clock: Clock, *, writes: bool) -> None:
    import potstill as ps

    student, teacher = ps.students.hf(str(folder / "student")), ps.teachers.hf(str(folder / "teacher"))
    source = _questions(folder, clock)
    if writes:
        source = ps.data.rollout(student, source, tokens=ANSWER)
    with tempfile.TemporaryDirectory() as out:
        ps.fit(
            ps.Offline(student, teacher), ps.Objective(ps.term("forward_kl")), source, steps=steps, lr=1e-4,
            optimizer="adamw", checkpoint_every=steps, log_every=1, out=out,
        )  # fmt: skip
        told = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    clock.extra["loss"] = told[0]["loss"]


def live(folder: Path, steps: int, clock: Clock) -> None:
    _by_fit(folder, steps, clock, writes=False)


def rollout(folder: Path, steps: int, clock: Clock) -> None:
    _by_fit(folder, steps, clock, writes=True)


def _models(folder: Path) -> tuple[Any, Any, Any]:
    """Student, teacher and tokenizer, for trainers that take them made."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32") for name in ("student", "teacher")
    )
    return student, teacher, AutoTokenizer.from_pretrained(folder / "student", padding_side="left")


def _trained(trainer: Any, clock: Clock) -> None:
    trainer.train()
    clock.extra["loss"] = next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def _by_gkd(folder: Path, steps: int, clock: Clock, *, lmbda: float) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = _models(folder)
    with tempfile.TemporaryDirectory() as out:
        arguments = GKDConfig(
            out, **{**trainer_arguments(steps), "logging_strategy": "steps", "logging_steps": 1},
            lmbda=lmbda, beta=0.0, temperature=1.0, max_new_tokens=ANSWER, max_length=LENGTH,
        )  # fmt: skip
        _trained(
            GKDTrainer(
                student, teacher, arguments, processing_class=tokenizer, callbacks=[ticking(clock)],
                train_dataset=Dataset.from_dict({"messages": conversations(folder)}),
            ),
            clock,
        )  # fmt: skip


def gkd_offline(folder: Path, steps: int, clock: Clock) -> None:
    _by_gkd(folder, steps, clock, lmbda=0.0)


def gkd_on_policy(folder: Path, steps: int, clock: Clock) -> None:
    _by_gkd(folder, steps, clock, lmbda=1.0)


def distillation(folder: Path, steps: int, clock: Clock) -> None:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer = _models(folder)
    questions = [turns[:-1] for turns in conversations(folder)]
    with tempfile.TemporaryDirectory() as out:
        arguments = DistillationConfig(
            out, **{**trainer_arguments(steps), "logging_strategy": "steps", "logging_steps": 1},
            beta=0.0, temperature=1.0, max_completion_length=ANSWER,
        )  # fmt: skip
        _trained(
            DistillationTrainer(
                student, teacher, arguments, processing_class=tokenizer, callbacks=[ticking(clock)],
                train_dataset=Dataset.from_dict({"prompt": questions}),
            ),
            clock,
        )  # fmt: skip


CONTESTANTS: Mapping[str, Contestant] = {
    "live teacher": live,
    "GKD, lmbda 0": gkd_offline,
    "rollout": rollout,
    "GKD, lmbda 1": gkd_on_policy,
    "Distillation": distillation,
}


def main() -> None:
    given = parser_of(
        __doc__, CONTESTANTS, vocabularies=(32_000,), steps=6, out="benchmarks/results/language_peers.json"
    ).parse_args()
    make_torchvision_importable()
    if given.one:
        run_one(CONTESTANTS[given.one], given.folder, given.steps, given.threads)
        return
    results: dict[str, Any] = {}
    for vocabulary in given.vocabularies:
        with tempfile.TemporaryDirectory() as made:
            prepare(Path(made), vocabulary, rows=ROWS * (given.steps + 1), prompt=PROMPT)
            told = rounds(
                __file__, given.only, Path(made), count=given.rounds, steps=given.steps, threads=given.threads
            )
        results[str(vocabulary)] = told
        print(f"\nV = {vocabulary:,}; {given.rounds} rounds of {given.steps} steps, {given.threads} thread(s)")
        for names in (OFFLINE, ON_POLICY):
            group = {name: told[name] for name in names if name in told}
            if names[0] in group:
                print_table(group, base=names[0])
                for name in [*group][1:]:
                    print(f"\n{said_of(group, names[0], name)}")
        for name, each in told.items():
            print(f"first loss of {name}: {statistics.median(one['loss'] for one in each):.4f}")
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
