"""Step time and peak memory of language-model distillation: from a cache, from a live teacher, and beside peers.

    .venv-bench/bin/python benchmarks/language_speed.py                    # one thread; about 20 minutes
    python benchmarks/language_speed.py --vocabularies 128000 --only "live teacher" "teacher forward" "student step"

Synthetic Llamas with random weights: a teacher of 6 blocks of width 384, a student of 4 of width 256, heads over 32,000
and 128,000 classes. Batches of 4 rows of 256 tokens, all supervised but the first; AdamW. Contestants:

    plain fine-tuning   cross-entropy through `fit`, fused head          peers: Hugging Face Trainer, dense
    sampled cache       forward KL to a remembered teacher, 32 draws
    top-50 cache        forward KL on 50 classes and a tail bucket
    live teacher        forward KL through `fit`                         dense KD step: by hand, whole logits
    teacher forward, student step                                        the parts of a live step, each by itself

The parts hold no divergence: the student's step is that of cross-entropy. The dense KD step holds all that a live step
has to do, so it is the fairer base, and stands beside the bar.

Everyone runs in a process of its own, so peak memory (resident, less what stood before the first step) is its own.
A round is everyone once; ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from peers import make_torchvision_importable

ROWS, LENGTH = 4, 256
SKIPPED = 2
"""Steps before the measured ones: memory is allocated there."""
PARTS = "teacher forward + student step"
BARS = {"sampled cache": ("plain fine-tuning", 1.10), "live teacher": (PARTS, 1.05)}
CACHED = {"sampled cache", "top-50 cache"}
APART = {"teacher forward", "student step"}


def prepare(folder: Path, vocabulary: int, *, rows: int, prompt: int) -> None:
    """Teacher and student folders, and rows of which the first `prompt` tokens are a question."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    # No word may begin with a special token: tokenizers would cut it there.
    words = ["<unk>", "<eos>", "<pad>", *(f"w{number}" for number in range(3, vocabulary))]
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )  # fmt: skip
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    for name, width, blocks in (("teacher", 384, 6), ("student", 256, 4)):
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.1 if name == "teacher" else 0.02, eos_token_id=1, pad_token_id=2, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in torch.randint(3, vocabulary, (rows, LENGTH)).tolist():
            spoken = [f"w{number}" for number in row]
            question, answer = " ".join(spoken[:prompt]), " ".join(spoken[prompt:])
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def store(folder: Path, steps: int) -> None:
    """What the two caches remember of the rows."""
    import potstill as ps
    from potstill.stores import Sampled, Top

    teacher = ps.teachers.hf(str(folder / "teacher"))
    for name, sketch in (("sampled", Sampled()), ("top", Top(k=50))):
        ps.teachers.build(folder / name, teacher, _source(folder), batches=steps, sketch=sketch)


def _source(folder: Path) -> Any:
    import potstill as ps

    return ps.data.chat(
        str(folder / "rows.jsonl"), tokenizer=str(folder / "student"), batch=ROWS, length=LENGTH, supervise="all",
        test_share=0.0,
    ).train  # fmt: skip


class Clock:
    """Starts of the steps, and how much memory the process had at the first."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.cpu_starts: list[float] = []
        self.standing = 0
        self.extra: dict[str, float] = {}
        """What a contestant tells beside."""

    def __call__(self, *_: object, **__: object) -> None:
        self.standing = self.standing or resident()
        self.starts.append(time.perf_counter())
        self.cpu_starts.append(time.process_time())

    def told(self) -> dict[str, float]:
        spans, cpu_spans = (
            [after - before for before, after in pairwise(starts)][SKIPPED:]
            for starts in (self.starts, self.cpu_starts)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": statistics.median(spans),
            "cpu_seconds": statistics.median(cpu_spans),
            "peak_mib": (peak - self.standing) / 2**20,
            **self.extra,
        }


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def by_fit(folder: Path, steps: int, clock: Clock, *, teacher: Callable[[], Any] | None, loss: str) -> None:
    import potstill as ps

    source = _source(folder)

    class Ticking:
        def batch(self, index: int) -> Any:
            clock()
            return source.batch(index)

    taught = None if teacher is None else teacher()
    scheme = ps.Offline(ps.students.hf(str(folder / "student")), taught)
    with tempfile.TemporaryDirectory() as out:
        ps.fit(
            scheme, ps.Objective(ps.term(loss)), Ticking(), steps=steps, lr=1e-4, optimizer="adamw",
            checkpoint_every=steps, log_every=steps, out=out,
        )  # fmt: skip


def fine_tuning(folder: Path, steps: int, clock: Clock) -> None:
    by_fit(folder, steps, clock, teacher=None, loss="cross_entropy")


def sampled(folder: Path, steps: int, clock: Clock) -> None:
    import potstill as ps

    by_fit(folder, steps, clock, teacher=lambda: ps.teachers.remembered(folder / "sampled"), loss="forward_kl")


def top(folder: Path, steps: int, clock: Clock) -> None:
    import potstill as ps

    by_fit(folder, steps, clock, teacher=lambda: ps.teachers.remembered(folder / "top"), loss="forward_kl")


def live(folder: Path, steps: int, clock: Clock) -> None:
    import potstill as ps

    by_fit(folder, steps, clock, teacher=lambda: ps.teachers.hf(str(folder / "teacher")), loss="forward_kl")


def teacher_forward(folder: Path, steps: int, clock: Clock) -> None:
    """The teacher's logits of a batch, as plain transformers gives them."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    source = _source(folder)
    for step in range(steps):
        clock()
        with torch.no_grad():
            teacher(input_ids=source.batch(step).inputs["input_ids"]).logits  # noqa: B018 - the work is the point


def student_step(folder: Path, steps: int, clock: Clock) -> None:
    """The student's forward and backward pass and AdamW's step, by hand in plain transformers, dense cross-entropy."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    source = _source(folder)
    for step in range(steps):
        clock()
        batch = source.batch(step)
        optimizer.zero_grad()
        logits = student(input_ids=batch.inputs["input_ids"]).logits
        cross_entropy(logits[batch.mask], batch.labels[batch.mask]).backward()
        optimizer.step()


def dense_kd_step(folder: Path, steps: int, clock: Clock) -> None:
    """All of a live step by hand: both models' whole logits, forward KL as torch gives it, backward, AdamW."""
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    source = _source(folder)
    for step in range(steps):
        clock()
        batch = source.batch(step)
        optimizer.zero_grad()
        with torch.no_grad():
            said = log_softmax(teacher(input_ids=batch.inputs["input_ids"]).logits[batch.mask], dim=-1)
        logs = log_softmax(student(input_ids=batch.inputs["input_ids"]).logits[batch.mask], dim=-1)
        kl_div(logs, said, reduction="batchmean", log_target=True).backward()
        optimizer.step()


def by_trainer(folder: Path, steps: int, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DefaultDataCollator, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="float32")
    rows = [tokenizer.apply_chat_template(row, tokenize=False) for row in conversations(folder)]
    ids = [tokenizer(row)["input_ids"][:LENGTH] for row in rows]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model, TrainingArguments(out, **trainer_arguments(steps)), train_dataset=data,
            data_collator=DefaultDataCollator(), callbacks=[ticking(clock)],
        )  # fmt: skip
        trainer.train()


def conversations(folder: Path) -> list[list[dict[str, str]]]:
    """The messages of every row."""
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def trainer_arguments(steps: int) -> dict[str, Any]:
    """What every trainer of the Hugging Face kind is told: as many steps, and nothing beside them."""
    return {
        "max_steps": steps, "per_device_train_batch_size": ROWS, "use_cpu": True, "logging_strategy": "no",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-4, "max_grad_norm": 0.0,
        "dataloader_pin_memory": False, "bf16": False, "gradient_checkpointing": False, "remove_unused_columns": False,
    }  # fmt: skip


def ticking(clock: Clock) -> Any:
    """A callback that tells the clock where a step begins."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            clock()

    return Watch()


Told = Mapping[str, list[dict[str, float]]]
Contestant = Callable[[Path, int, Clock], None]
CONTESTANTS: Mapping[str, Contestant] = {
    "plain fine-tuning": fine_tuning,
    "sampled cache": sampled,
    "top-50 cache": top,
    "live teacher": live,
    "teacher forward": teacher_forward,
    "student step": student_step,
    "dense KD step": dense_kd_step,
    "Trainer, dense": by_trainer,
}


def run_one(contestant: Contestant, folder: Path, steps: int, threads: int) -> None:
    """In a process of its own: one contestant, its figures as the last line."""
    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    clock = Clock()
    contestant(folder, steps, clock)
    print(json.dumps(clock.told()))


def measure(script: str, name: str, folder: Path, steps: int, threads: int) -> dict[str, float]:
    """The figures of one contestant of a script."""
    command = [sys.executable, script, "--one", name, "--folder", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def rounds(
    script: str, names: Sequence[str], folder: Path, *, count: int, steps: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Everyone's figures in each round; every other round goes backwards."""
    told: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(count):
        for name in names if number % 2 == 0 else reversed(names):
            told[name].append(measure(script, name, folder, steps, threads))
    return told


def together(told: Told) -> list[dict[str, float]]:
    """The parts of a live step, one after the other."""
    return [
        {
            **{key: a[key] + b[key] for key in ("seconds", "cpu_seconds")},
            "peak_mib": max(a["peak_mib"], b["peak_mib"]),
        }
        for a, b in zip(told["teacher forward"], told["student step"], strict=True)
    ]


def ratio(told: Told, name: str, base: str, *, key: str = "seconds") -> tuple[float, float, float]:
    """Median and range over the rounds."""
    ratios = [a[key] / b[key] for a, b in zip(told[name], told[base], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_table(told: Told, *, base: str) -> None:
    """Everyone's medians, and their ratios to one of them."""
    print(f"| contestant | seconds per step | over {base} | CPU s | over {base} | peak memory, MiB |")
    print("|" + "---|" * 6)
    for name, each in told.items():
        seconds, cpu, peak = (
            statistics.median(one[key] for one in each) for key in ("seconds", "cpu_seconds", "peak_mib")
        )
        (middle, low, high), (cpu_ratio, _, _) = (
            ratio(told, name, base, key=key) for key in ("seconds", "cpu_seconds")
        )
        print(
            f"| {name} | {seconds:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {cpu:.3f} | {cpu_ratio:.2f} | "
            f"{peak:,.0f} |"
        )


def said_of(told: Told, name: str, base: str) -> str:
    """One ratio in words."""
    middle, low, high = ratio(told, name, base)
    cpu = ratio(told, name, base, key="cpu_seconds")[0]
    return f"{name} over {base}: {middle:.3f} ({low:.3f} to {high:.3f}), of the CPU {cpu:.3f}"


def print_bars(told: Told) -> bool:
    """The ratios that have a bar, as far as they were measured. Whether all are met."""
    met = True
    for name, (base, bar) in BARS.items():
        if name in told and base in told:
            below = ratio(told, name, base)[0] <= bar
            met &= below
            print(f"\n{said_of(told, name, base)}; bar {bar}: {'met' if below else 'MISSED'}")
    if {"live teacher", "dense KD step"} <= told.keys():
        print(f"\n{said_of(told, 'live teacher', 'dense KD step')}; no bar")
    return met


def parser_of(
    about: str | None, contestants: Mapping[str, Contestant], *, vocabularies: Sequence[int], steps: int, out: str
) -> argparse.ArgumentParser:
    """The options that a comparison of contestants has, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(vocabularies))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(contestants), default=list(contestants))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = parser_of(
        __doc__, CONTESTANTS, vocabularies=(32_000, 128_000), steps=8, out="benchmarks/results/language_speed.json"
    ).parse_args()
    make_torchvision_importable()
    if arguments.one:
        run_one(CONTESTANTS[arguments.one], arguments.folder, arguments.steps, arguments.threads)
        return
    results: dict[str, Any] = {}
    met = True
    for vocabulary in arguments.vocabularies:
        with tempfile.TemporaryDirectory() as made:
            prepare(Path(made), vocabulary, rows=ROWS * (arguments.steps + 1), prompt=1)
            if not CACHED.isdisjoint(arguments.only):
                store(Path(made), arguments.steps)
            told = rounds(
                __file__,
                arguments.only,
                Path(made),
                count=arguments.rounds,
                steps=arguments.steps,
                threads=arguments.threads,
            )
        if APART.issubset(arguments.only):
            told[PARTS] = together(told)
        results[str(vocabulary)] = told
        print(
            f"\nV = {vocabulary:,}; {arguments.rounds} rounds of {arguments.steps} steps, "
            f"{arguments.threads} thread(s)\n"
        )
        print_table(told, base="plain fine-tuning" if "plain fine-tuning" in told else arguments.only[0])
        met &= print_bars(told)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
