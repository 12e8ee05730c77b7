"""Four ways from one teacher to a student several times smaller, on word problems with exact answers.

    python benchmarks/quickstart_llm.py [--seeds 0 1 2] [--problems 400] [--steps 200]

The shipped teacher solves fresh problems; those of its solutions that pass the check become the training set. The
student starts from a few of the teacher's blocks. Every arm takes the same number of steps over the same questions in
the same order:

answers      learns the final answers alone
reasoning    learns the teacher's solutions
logits       learns, at every token of these solutions, the teacher's distribution
on_policy    the same at first; for the last steps the student writes the solutions and the teacher corrects them

Exact match of greedy answers to held-out problems after the last step. No held-out computation is in a training
problem, whatever its words.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

import potstill as ps
from potstill.core.types import Source
from potstill.students.hf import HfModel
from potstill.tasks import arithmetic
from potstill.tasks.arithmetic import Problem
from potstill.teachers.hf import HfTeacher

TEACHER = str(Path(ps.__file__).parent / "recipes" / "quickstart" / "arithmetic")
ARMS = ("answers", "reasoning", "logits", "on_policy")
TOKENS = 48
"""Enough for any solution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What an arm learns from, for one seed."""

    teacher: HfTeacher
    start: HfModel
    answers: Source
    solutions: Source
    seed: int
    knobs: argparse.Namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--held", type=int, default=1000)
    parser.add_argument("--held-seed", type=int, default=2, help="the knobs here were chosen with 1")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--own", type=int, default=80, help="of these steps, the last ones on the student's own words")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--own-lr", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--own-loss", default="forward_kl")
    parser.add_argument("--own-temperature", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart_llm.json"))
    arguments = parser.parse_args()
    teacher = ps.teachers.hf(arguments.teacher)
    held = arithmetic.problems(arguments.held, seed=arguments.held_seed, split="test")
    start = ps.students.hf_inherited(arguments.teacher, layers=arguments.layers)
    told = {
        "teacher": exact_match(teacher.student, held),
        "untrained": exact_match(start, held),
        "parameters": {"teacher": size(teacher.student), "student": size(start)},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "runs": [],
    }
    print(
        f"teacher {size(teacher.student):,} parameters, {100 * told['teacher']:.1f} %; "
        f"student {size(start):,}, {100 * told['untrained']:.1f} % before it learns\n\n"
        f"| seed | arm | exact match, % | loss | seconds | CPU seconds |\n|{'---|' * 6}",
        flush=True,
    )
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            training = prepared(teacher, start, arguments, seed, Path(folder))
            for arm in arguments.arms:
                run = {"seed": seed, "arm": arm} | measured(arm, training, held, Path(folder))
                told["runs"].append(run)
                print(
                    f"| {seed} | {arm} | {100 * run['score']:.1f} | {run['loss']:.3f} | {run['seconds']:.0f} | "
                    f"{run['cpu_seconds']:.0f} |",
                    flush=True,
                )
    print_means(told["runs"], arguments.arms)
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def prepared(teacher: HfTeacher, start: HfModel, knobs: argparse.Namespace, seed: int, folder: Path) -> Training:
    """The teacher's solutions to problems of this seed, checked, as training data with and without the reasoning."""
    began = time.perf_counter()
    asked = arithmetic.problems(knobs.problems, seed=100 + seed, split="train")
    said = written(teacher.student, [problem.question for problem in asked])
    kept = [
        (problem, text)
        for problem, text in zip(asked, said, strict=True)
        if arithmetic.grade(problem, text) and arithmetic.holds(text)
    ]
    print(f"| {seed} | {len(kept)} of {len(asked)} kept | | | {time.perf_counter() - began:.0f} | |", flush=True)
    answers = [(problem.question, f"#### {problem.answer}") for problem, _ in kept]
    solutions = [(problem.question, text) for problem, text in kept]
    return Training(
        teacher=teacher,
        start=start,
        answers=source(answers, folder / "answers.jsonl", knobs, seed),
        solutions=source(solutions, folder / "solutions.jsonl", knobs, seed),
        seed=seed,
        knobs=knobs,
    )


def source(pairs: Sequence[tuple[str, str]], path: Path, knobs: argparse.Namespace, seed: int) -> Source:
    rows = [json.dumps({"prompt": question, "completion": answer}) + "\n" for question, answer in pairs]
    path.write_text("".join(rows), encoding="utf-8")
    return ps.data.chat(
        str(path), tokenizer=knobs.teacher, batch=knobs.batch, length=128, seed=seed, test_share=0.0
    ).train


def measured(arm: str, training: Training, held: Sequence[Problem], folder: Path) -> dict[str, float]:
    began, cpu_began = time.perf_counter(), time.process_time()
    student = deepcopy(training.start)
    loss = trained(student, arm, training, folder / arm)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"score": exact_match(student, held), "loss": loss, "seconds": seconds, "cpu_seconds": cpu_seconds}


def trained(student: HfModel, arm: str, training: Training, out: Path) -> float:
    """The last loss. Every arm takes the same number of steps."""
    knobs, teacher = training.knobs, training.teacher
    own = knobs.own if arm == "on_policy" else 0
    is_taught = arm in ("logits", "on_policy")
    term = ps.term("forward_kl", temperature=knobs.temperature) if is_taught else ps.term("cross_entropy")
    run = ps.fit(
        ps.Offline(student, teacher if is_taught else None),
        ps.Objective(term),
        training.answers if arm == "answers" else training.solutions,
        steps=knobs.steps - own, lr=knobs.lr, warmup=20, optimizer="adamw", clip=1.0, seed=training.seed,
        checkpoint_every=knobs.steps, out=out,
    )  # fmt: skip
    if own:
        run = ps.fit(
            ps.Offline(student, teacher),
            ps.Objective(ps.term(knobs.own_loss, temperature=knobs.temperature)),
            ps.data.rollout(
                student, training.solutions, tokens=TOKENS, temperature=knobs.own_temperature, seed=training.seed
            ),
            steps=own, lr=knobs.own_lr, optimizer="adamw", clip=1.0, seed=training.seed, stage=1,
            checkpoint_every=knobs.steps, out=out,
        )  # fmt: skip
    return run.last["loss"]


@torch.no_grad()
def written(model: HfModel, questions: Sequence[str], *, together: int = 250) -> list[str]:
    """What the model answers, greedily. Questions of like length are asked side by side."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    model.eval()
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    said: dict[int, str] = {}
    for first in range(0, len(order), together):
        some = order[first : first + together]
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": questions[number]}] for number in some],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        ids = model.model.generate(**prompts, max_new_tokens=TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        said |= zip(some, texts, strict=True)
    return [said[number] for number in range(len(questions))]


def exact_match(model: HfModel, held: Sequence[Problem]) -> float:
    said = written(model, [problem.question for problem in held])
    return sum(map(arithmetic.grade, held, said)) / len(held)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_means(runs: Sequence[dict[str, float]], arms: Sequence[str]) -> None:
    print(f"\n| arm | exact match, % | over the arm before, points | seconds |\n|{'---|' * 4}")
    before: list[float] = []
    for arm in arms:
        scores = [100 * run["score"] for run in runs if run["arm"] == arm]
        seconds = statistics.mean(run["seconds"] for run in runs if run["arm"] == arm)
        gains = [score - other for score, other in zip(scores, before, strict=True)] if before else []
        print(f"| {arm} | {spread(scores)} | {spread(gains) if gains else '-'} | {seconds:.0f} |")
        before = scores


def spread(values: Sequence[float]) -> str:
    """Mean +- sample standard deviation."""
    deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
