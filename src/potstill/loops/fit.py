"""One training loop for every method: lessons in, optimizer steps out. It knows no loss, teacher or student by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from potstill.core.errors import RecipeError, nearest
from potstill.core.run import RunFolder
from potstill.core.types import Source
from potstill.loops import metrics, parallel
from potstill.loops.metrics import Record, Watcher
from potstill.loops.settings import Precision, Schedule, Settings, Sharding, at_least
from potstill.loops.training import Scheme, Training, seed_streams
from potstill.objective import Objective
from potstill.students.module import Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of a training run."""

    folder: Path
    steps: int
    seconds: float
    """Training time, that of earlier, interrupted calls included."""
    last: Record
    """The last line of metrics.jsonl."""
    resumed_from: int
    """The step that this call continued from; 0 for a new run, `steps` where there was nothing left to do."""


def fit(
    scheme: Scheme,
    objective: Objective,
    source: Source,
    *,
    steps: int,
    lr: float,
    out: str | Path,
    accumulate: int = 1,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    milestones: Sequence[float] = (0.625, 0.75, 0.875),
    clip: float | None = None,
    precision: Precision = "fp32",
    sharding: Sharding = "replicate",
    compile: bool = False,
    train: Sequence[str] = (),
    stage: int = 0,
    seed: int = 0,
    log_every: int = 10,
    checkpoint_every: int = 200,
    trackers: Sequence[str] = (),
    watch: Sequence[Watcher] = (),
) -> Run:
    """Train the scheme's learners for `steps` optimizer steps of `accumulate` micro-batches on each process.

    optimizer: sgd, adam, adamw (`momentum` is Adam's first beta) or "package.module:Class"; every parameter decays.
    schedule: constant, linear, cosine, or step (a tenth after each of `milestones`); `warmup` steps rise to `lr` first.
    clip: the largest 2-norm of all gradients together. precision: bf16 runs the models in autocast, losses in fp32.
    sharding: with several processes, "replicate" copies the learners, "shard" spreads them (FSDP2).
    train: dotted names of the student's parts that learn in this stage; the others stay as they are. Empty: all.
    stage: the number of this call among several with the same `out`.

    Called again with the same `out` it continues from the newest whole checkpoint, and a finished run returns at once.
    The result is the uninterrupted one: each step seeds the global random streams from (seed, stage, step, rank).
    At the end the student is in eval mode. Raises RecipeError for settings that cannot work or differ from those of
    the run in `out`, NotFiniteError for a diverged loss, StorageError for a full disk.
    """
    settings = Settings(
        steps=steps, lr=lr, accumulate=accumulate, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay,
        schedule=schedule, warmup=warmup, milestones=tuple(milestones), clip=clip, precision=precision,
        sharding=sharding, compile=compile, train=tuple(train), stage=stage, seed=seed,
    )  # fmt: skip
    at_least("log_every", log_every, 1)
    at_least("checkpoint_every", checkpoint_every, 1)
    metrics.check_trackers(trackers)
    ranks = parallel.join()
    seed_streams(seed, stage)
    with _only(scheme.student, settings.train):
        scheme.learners().to(ranks.device)
        scheme.prepare(objective, source.batch(0).to(ranks.device))
        training = Training(scheme, objective, source, settings=settings, ranks=ranks, folder=RunFolder(Path(out)))
        training.resume()
        resumed_from = training.done
        if resumed_from < steps:
            with metrics.trackers(trackers if ranks.is_main else (), Path(out), stage=stage) as tracking:
                training.run(log_every=log_every, checkpoint_every=checkpoint_every, watch=(*tracking, *watch))
        training.finish()
    return Run(folder=Path(out), steps=steps, seconds=training.seconds, last=training.last, resumed_from=resumed_from)


@contextmanager
def _only(student: nn.Module, parts: Sequence[str]) -> Iterator[None]:
    """For a while, nothing of the student learns but what is under the dotted names `parts`; without any, all does.

    Raises RecipeError for a name that no parameter is under.
    """
    model = student.model if isinstance(student, Module) else student
    named = list(model.named_parameters(remove_duplicate=False))
    under = {part: {p for name, p in named if f"{name}.".startswith(f"{part}.")} for part in parts}
    for part in parts:
        if not under[part]:
            known = {name.rsplit(".", depth)[0] for name, _ in named for depth in range(name.count(".") + 1)}
            guess = nearest(part, known)
            hint = f"Did you mean '{guess}'? " if guess else ""
            children = ", ".join(name for name, _ in model.named_children())
            raise RecipeError(f"fit.train: the student has nothing called '{part}'. {hint}It is made of: {children}.")
    chosen = set[nn.Parameter]().union(*under.values())
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter.requires_grad and (not parts or parameter in chosen))
    try:
        yield
    finally:
        for parameter, learnt in before:
            parameter.requires_grad_(learnt)
