"""A teacher of 512 pieces teaches a student that reads bytes: each cross-tokenizer method beside cross-entropy alone.

    python benchmarks/cross_tokenizer.py [--methods cross_entropy alm ...] [--seeds 0 1 2] [--steps 300]

Same student (the teacher's shape, one class per byte), same initial weights per seed, same batches, same optimizer. All
arms learn from the labels by cross-entropy with weight 1; a method adds its own term. On the first bytes of the 100
test stories, as many of each as in training: bits per byte, the end of a story included, and the teacher's own beside
it, by the chain rule over its pieces of the same text. Arms that the results file has are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peers import make_torchvision_importable

import potstill as ps
from potstill.core.types import IGNORED, Need, Teacher
from potstill.objective.term import Term
from potstill.students.hf import HfModel

make_torchvision_importable()
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402 - what stands above lets them import
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

DATA = Path(os.environ.get("POTSTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEACHER = str(DATA / "llama-stories-260k")
STORIES = str(DATA / "tinystories-1k" / "stories.jsonl.gz")
METHODS = ("cross_entropy", "forward_kl", "uld", "mined", "dskd", "alm", "gold")
WEIGHTS = {"uld": 0.1}
ALONE = ("forward_kl",)
"""Says all that labels say, and more."""
"""ULD says how sure to be, not of what: METHODS advise at most 0.1. All others have weight 1."""


def bytewise() -> PreTrainedTokenizerFast:
    """One token per byte, and the teacher's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: token for token, piece in enumerate(["<s>", "</s>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=10**6
    )


def fresh(tokenizer: PreTrainedTokenizerFast, seed: int) -> HfModel:
    """A student of the teacher's shape over bytes."""
    config = AutoConfig.from_pretrained(TEACHER)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 4096
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    torch.manual_seed(seed)
    return HfModel(LlamaForCausalLM(config), tokenizer=tokenizer)


def terms(method: str) -> list[Term]:
    labels = ps.term("cross_entropy")
    if method == "cross_entropy":
        return [labels]
    if method in ALONE:
        return [ps.term(method)]
    at = {"at": ["hidden/0"]} if method == "dskd" else {}
    return [labels, ps.term(method, WEIGHTS.get(method, 1.0), **at)]


def teaching(method: str, tokenizer: PreTrainedTokenizerFast, teacher: Teacher) -> Teacher | None:
    """DSKD finds the counterparts itself; all others are told in the student's own tokens."""
    both = {"student_tokenizer": tokenizer, "teacher_tokenizer": TEACHER}
    if method == "cross_entropy":
        return None
    return ps.teachers.beside(teacher, **both) if method == "dskd" else ps.teachers.aligned(teacher, **both)


def stories(tokenizer: PreTrainedTokenizerFast, *, batch: int, length: int, seed: int) -> ps.data.ChatData:
    return ps.data.chat(STORIES, tokenizer=tokenizer, batch=batch, length=length, seed=seed)


def trained(
    method: str, seed: int, teacher: Teacher, *, steps: int, warmup: int, batch: int, length: int
) -> dict[str, float]:
    """One student by one method: its bits per byte on the test stories, and the time it took."""
    tokenizer = bytewise()
    student, data = fresh(tokenizer, seed), stories(tokenizer, batch=batch, length=length, seed=seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        ps.fit(
            ps.Offline(student, teaching(method, tokenizer, teacher)),
            ps.Objective(*terms(method)),
            data.train,
            steps=steps, lr=3e-3, optimizer="adamw", warmup=warmup, clip=1.0, checkpoint_every=steps, seed=seed,
            out=out,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    scores = ps.evaluate.evaluate(student, data.test.batches(20))
    return {"bits_per_byte": scores.nll * scores.num_items / math.log(2) / num_bytes(data), "seconds": seconds}


def num_bytes(data: ps.data.ChatData) -> int:
    """Bytes that the test part asks for: an end is none."""
    labels = data.test.rows.labels
    return int(((labels != IGNORED) & (labels != data.tokenizer.eos_token_id)).sum())


def teachers_own(teacher: Teacher, *, length: int) -> float:
    """The teacher's bits per byte on the same bytes."""
    tokenizer = bytewise()
    data = stories(tokenizer, batch=1, length=length, seed=0)
    asker = ps.teachers.aligned(teacher, student_tokenizer=tokenizer, teacher_tokenizer=TEACHER)
    need = Need(features=frozenset({"span_log_probs"}))
    total = sum(float(asker(batch, need).features["span_log_probs"].sum()) for batch in data.test.batches(20))
    return -total / math.log(2) / num_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="bytes per story")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cross_tokenizer.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher = ps.teachers.hf(TEACHER)
    table = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    setting = f"{arguments.steps}x{arguments.batch}x{arguments.length}"
    for seed in arguments.seeds:
        for method in arguments.methods:
            arm = f"{method} {setting} {seed}"
            if arm not in table:
                table[arm] = trained(
                    method, seed, teacher, steps=arguments.steps, warmup=arguments.warmup, batch=arguments.batch,
                    length=arguments.length,
                )  # fmt: skip
                arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    own = teachers_own(teacher, length=arguments.length)
    print(f"The teacher's own: {own:.3f} bits per byte.\n\n| method | bits per byte | below CE, by seed | seconds |")
    print("|" + "---|" * 4)
    for method in arguments.methods:
        rows = [table[f"{method} {setting} {seed}"] for seed in arguments.seeds]
        alone = [table.get(f"cross_entropy {setting} {seed}", rows[n]) for n, seed in enumerate(arguments.seeds)]
        found = [row["bits_per_byte"] for row in rows]
        below = ", ".join(
            f"{one['bits_per_byte'] - row['bits_per_byte']:+.3f}" for one, row in zip(alone, rows, strict=True)
        )
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        seconds = statistics.mean(row["seconds"] for row in rows)
        print(f"| {method} | {statistics.mean(found):.3f}{spread} | {below} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
