"""A run under way: what is trained, how far it is, and one optimizer step after another."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from potstill.core.errors import NotFiniteError, RecipeError
from potstill.core.run import RunFolder
from potstill.core.types import Batch, Frozen, Lesson, Living, Need, Source
from potstill.loops import checkpoint, metrics, parallel
from potstill.loops.health import Health, Timed
from potstill.loops.metrics import Record, Watcher
from potstill.loops.optimise import learning_rate, make_optimizer
from potstill.loops.parallel import Ranks
from potstill.loops.settings import Settings, compare
from potstill.objective import Objective


class Scheme(Protocol):
    """Who teaches whom, as far as the loop must know it."""

    @property
    def student(self) -> nn.Module: ...
    def learners(self) -> nn.Module: ...
    def rebind(self, module: nn.Module) -> None: ...
    def frozen(self) -> Iterable[Frozen]: ...
    def prepare(self, objective: Objective, batch: Batch) -> object: ...
    def lessons(self, batch: Batch, student_need: Need, teacher_need: Need) -> Iterable[Lesson]: ...
    def after_step(self) -> None: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Training:
    """The state of one call of `fit`."""

    def __init__(
        self,
        scheme: Scheme,
        objective: Objective,
        source: Source,
        *,
        settings: Settings,
        ranks: Ranks,
        folder: RunFolder,
    ) -> None:
        self.scheme, self.objective, self.source = scheme, objective, source
        self.settings, self.ranks, self.folder = settings, ranks, folder
        self.learners = scheme.learners()
        # Users' students may start differently on each process.
        ranks.share(_tensors(self.learners))
        self.fingerprint = settings.fingerprint(
            objective,
            processes=ranks.world,
            parameters=sum(p.numel() for p in self.learners.parameters()),
            stores=scheme.stores(),
        )
        is_sharded = settings.sharding == "shard" and ranks.world > 1
        if isinstance(source, Living):
            if is_sharded:
                raise RecipeError(
                    "fit.sharding: the source asks the student while it learns, which no process holds whole. Take "
                    "sharding: replicate, or a source of texts that are there."
                )
            together = settings.accumulate * ranks.world
            source.begin(batches=settings.steps * together, together=together)
        self.module = parallel.shard(self.learners.cpu(), ranks) if is_sharded else self.learners
        """What holds the parameters that learn: the learners, or their sharded copy."""
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise RecipeError("fit: every parameter of the student is frozen, so there is nothing to train.")
        self.optimizer = make_optimizer(
            settings.optimizer, self.parameters,
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.needs = objective.need("student"), objective.need("teacher")
        self.memory = objective.start()
        exact = torch.float32 if ranks.device.type == "mps" else torch.float64
        self.window = torch.zeros(2 + len(objective.terms), dtype=exact, device=ranks.device)
        """How many steps since the last logged one, and the sums of the loss and its terms over them."""
        self.done, self.seconds = 0, 0.0
        self.last = Record(step=0, stage=settings.stage, loss=math.nan, terms={}, lr=0.0, seconds=0.0, health={})
        self.called = parallel.replicate(self.module, ranks) if ranks.world > 1 and not is_sharded else self.module
        """What the lessons call: the module, wrapped where gradients are to be averaged."""
        self.health = Health(source, ranks)
        compiled = cast(nn.Module, torch.compile(self.called)) if settings.compile else self.called
        scheme.rebind(Timed(compiled, self.health.clock))
        self.frozen = list(scheme.frozen()) if is_sharded else []
        """What answers through a sharded copy."""
        for model in self.frozen:
            model.rebind(parallel.shard(model.module.cpu(), ranks))

    def resume(self) -> None:
        """Take up the newest whole checkpoint, where there is one."""
        found = self.ranks.from_main(self._find)
        if found is None:
            return
        snapshot = checkpoint.load(found)
        parallel.load_module_state(self.module, snapshot.model)
        parallel.load_optimizer_state(self.optimizer, snapshot.optimizer)
        self.scheme.load_state_dict(snapshot.scheme)
        self.memory = snapshot.objective
        if isinstance(self.source, Living):
            self.source.load_state_dict(snapshot.source[self.ranks.rank])
        self.window.copy_(snapshot.window)
        self.done, self.seconds = snapshot.step, snapshot.seconds
        self.last = cast(Record, dict(snapshot.last))

    def run(self, *, log_every: int, checkpoint_every: int, watch: Sequence[Watcher]) -> None:
        """Every step that is left. Watchers are called on the main process only."""
        began = time.perf_counter() - self.seconds
        if self.ranks.is_main:
            metrics.cut(self.folder.metrics, stage=self.settings.stage, step=self.done)
        self._train_mode()
        with metrics.progress(self.settings.steps, done=self.done, shown=self.ranks.is_main) as advance:
            for step in range(self.done, self.settings.steps):
                is_last = step + 1 == self.settings.steps
                is_logged = is_last or (step + 1) % log_every == 0
                is_saved = is_last or (step + 1) % checkpoint_every == 0
                self.health.begin(logged=is_logged)
                lr = self._step(step, checked=is_logged or is_saved)
                self.done, self.seconds = step + 1, time.perf_counter() - began
                if is_logged:
                    self._report(lr, watch)
                if is_saved:
                    self._save()
                advance()

    def finish(self) -> None:
        """Give the scheme its own modules back, whole and in eval mode."""
        if self.module is not self.learners:
            state = parallel.module_state(self.module, self.ranks)
            if self.ranks.is_main:
                parallel.load_module_state(self.learners, state)
            self.ranks.share(_tensors(self.learners))
        self.optimizer.zero_grad()
        self.scheme.rebind(self.learners)
        for model in self.frozen:
            model.rebind(model.module)
        self.learners.eval()

    def _step(self, step: int, *, checked: bool) -> float:
        """One optimizer step; gives its learning rate."""
        settings = self.settings
        seed_streams(settings.seed, settings.stage, step, self.ranks.rank)
        lr = learning_rate(
            step, schedule=settings.schedule, lr=settings.lr, steps=settings.steps,
            warmup=settings.warmup, milestones=settings.milestones,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        seen = self._backward(step)
        self.window += seen
        # On accelerators a look at the loss waits for the device, so it is left to the steps that are reported.
        if checked or self.ranks.device.type == "cpu":
            self._check_finite(step, lr)
        if self.module is not self.learners:
            self.ranks.average_scalars(self.parameters)
        if settings.clip is not None:
            parallel.clip_gradients(self.parameters, settings.clip)
        self.optimizer.step()
        self.ranks.share(self.module.buffers())
        self.scheme.after_step()
        self.memory = self.objective.after_step(self.memory, seen[2:], step=step, steps=settings.steps)
        self.health.clock.lap("optimizer")
        return lr

    def _backward(self, step: int) -> Tensor:
        """All micro-batches of one step: [2 + num_terms], a 1, the loss and its terms over all ranks."""
        ranks, accumulate = self.ranks, self.settings.accumulate
        first = step * accumulate
        batches = [self.source.batch((first + k) * ranks.world + ranks.rank) for k in range(accumulate)]
        counts = self.objective.counts(batches, step=step, steps=self.settings.steps, memory=self.memory)
        counts = replace(counts, divisors=ranks.sum(counts.divisors))
        self.health.count(batches)
        seen = torch.zeros_like(self.window)
        for k, batch in enumerate(batches):
            here = batch.to(ranks.device)
            self.health.clock.lap("data")
            with parallel.reducing(self.called, k + 1 == accumulate):
                outcomes = []
                for lesson in self._lessons(here):
                    self.health.clock.lap("teacher")
                    outcomes.append(self.objective.evaluate(lesson, here, counts))
                    self.health.clock.lap("objective")
                    self.health.observe(lesson, here)
                total = torch.stack([outcome.total for outcome in outcomes]).sum()
                (total * ranks.world).backward()  # type: ignore[no-untyped-call]
                self.health.clock.lap("backward")
            for outcome in outcomes:
                seen[1:] += torch.cat([outcome.total.detach()[None], outcome.terms])
        seen = ranks.sum(seen)
        seen[0] = 1.0
        return seen

    def _lessons(self, batch: Batch) -> Iterator[Lesson]:
        """The scheme's lessons, made in the precision asked for; what is done with them is not."""
        lessons = iter(self.scheme.lessons(batch, *self.needs))
        while True:
            with parallel.autocast(self.ranks.device, self.settings.precision):
                lesson = next(lessons, None)
            if lesson is None:
                return
            yield lesson

    def _check_finite(self, step: int, lr: float) -> None:
        """Before the optimizer step, so that the parameters are still good. All ranks see the same sums."""
        num_steps, loss, *terms = self.window.tolist()
        if all(map(math.isfinite, (loss, *terms))):
            return
        bad = [label for label, value in zip(self.objective.labels, terms, strict=True) if not math.isfinite(value)]
        unseen = 1 if self.ranks.device.type == "cpu" else int(num_steps)
        when = f"step {step + 1}" if unseen == 1 else f"steps {step + 2 - unseen} to {step + 1}"
        raise NotFiniteError(
            f"The loss became {loss} in {when}, at lr {lr:g}: {', '.join(bad) or 'the weighted sum'}. Lower lr, set "
            "clip=1.0, or look for broken values in the data; checkpoints from before are intact."
        )

    def _report(self, lr: float, watch: Sequence[Watcher]) -> None:
        num_steps, loss, *terms = self.window.tolist()
        self.window.zero_()
        self.last = Record(
            step=self.done,
            stage=self.settings.stage,
            loss=loss / num_steps,
            terms={label: term / num_steps for label, term in zip(self.objective.labels, terms, strict=True)},
            lr=lr,
            seconds=round(self.seconds, 3),
            health=self.health.take(),
        )
        if self.ranks.is_main:
            metrics.append(self.folder.metrics, self.last)
            for watcher in watch:
                watcher(self.done, self.last)
            # A watcher may have measured the student in eval mode.
            self._train_mode()

    def _save(self) -> None:
        snapshot = checkpoint.Snapshot(
            step=self.done,
            seconds=self.seconds,
            model=parallel.module_state(self.module, self.ranks),
            optimizer=parallel.optimizer_state(self.optimizer, self.ranks),
            scheme=dict(self.scheme.state_dict()),
            objective=self.memory,
            window=self.window.cpu(),
            last=self.last,
            source=self.ranks.gathered(dict(self.source.state_dict())) if isinstance(self.source, Living) else [],
        )
        self.ranks.from_main(lambda: self._write(snapshot))

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        for name in dict(self.learners.named_parameters()):
            if not bool(snapshot.model[name].isfinite().all()):
                raise NotFiniteError(
                    f"{name} is no longer finite after step {self.done}, though the loss was: a gradient overflowed. "
                    "Lower lr or set clip=1.0; checkpoints from before are intact."
                )
        metrics.make_durable(self.folder.metrics)
        checkpoint.save(self.home, snapshot, self.fingerprint)

    def _find(self) -> Path | None:
        """The checkpoint to continue from. Raises RecipeError where it belongs to another run."""
        checkpoint.tidy(self.home)
        found = checkpoint.newest(self.home)
        if found is not None:
            compare(self.folder.path, checkpoint.read_settings(found), self.fingerprint)
        return found

    @property
    def home(self) -> Path:
        """Where the checkpoints of this stage are."""
        stage = self.settings.stage
        return self.folder.checkpoints / f"stage-{stage}" if stage else self.folder.checkpoints

    def _train_mode(self) -> None:
        """Everything in train mode, but in a stage that trains parts the rest in eval mode, statistics and all."""
        self.module.train()
        if self.settings.train:
            for part in self.module.modules():
                parameters = list(part.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    part.eval()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def seed_streams(*words: int) -> None:
    """Start the global random streams anew, from these words alone.

    So none has to be saved, and nothing that others draw between two steps is felt.
    """
    digest = int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big")
    # Without an accelerator torch.manual_seed formats a stack trace for each kind there might be: half a millisecond.
    seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed(digest >> 1)
    np.random.seed(digest % 2**32)
    random.seed(digest)
