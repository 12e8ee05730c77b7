"""A world small enough for every signal, divergence and regime: bigram models of bytes and of pieces, real stores.

Everything that is said here is also worked out by hand, in float64, from the tables of the models.
Dimension key: B rows, T positions, N counted positions, V classes, H hidden width, K kept classes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from potstill.core.types import (
    IGNORED,
    Batch,
    Dense,
    Logits,
    Mixture,
    Need,
    Projection,
    Signal,
    Source,
    Sparse,
    Teacher,
)
from potstill.core.vocabulary import fingerprint
from potstill.data.rollout import rewarded, rollout
from potstill.stores import Hidden, Sampled, Sketch, Top, Whole
from potstill.stores.signals import spread
from potstill.teachers import ensemble, local
from potstill.teachers.aligned import Aligned, aligned
from potstill.teachers.remembered import build, remembered
from tests.data import speakers
from tests.teachers.tongues import bytewise, rows, trained

TEXTS = ("the cat", "In 2024 the", "other")
WEIGHTS = (0.7, 0.3)
K, DRAWS = 6, 8
SIGNALS = ("dense", "projection", "mixture", "mixture of logits", "top", "sampled")
REGIMES = ("live", "cached", "on policy", "on policy, cached")


@cache
def bytes_() -> PreTrainedTokenizerFast:
    """The student's tokenizer: 259 classes."""
    return bytewise()


@cache
def pieces() -> PreTrainedTokenizerFast:
    """Another one, of a teacher that is asked across tokenizers."""
    return trained(splits_digits=False)


@cache
def letters(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, str]:
    """A liking for small letters, so that what is written is text; and the tokenizer's fingerprint."""
    ordered = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return torch.tensor([3.0 if piece[-1].islower() else 0.0 for piece in ordered]), fingerprint(tokenizer)


class Bigram(nn.Module):
    """What follows depends on the last token alone: logits = head(embedding[token]). It can speak."""

    device = torch.device("cpu")
    longest = 0

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, *, applied: bool = False, bias: bool = True):
        super().__init__()
        size, generator = len(tokenizer), torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(size, 6, generator=generator))
        self.head = nn.Parameter(torch.randn(size, 6, generator=generator))
        liking, self.fingerprint = letters(tokenizer)
        self.bias = nn.Parameter(liking.clone()) if bias else None
        self.applied, self.ends = applied, (tokenizer.eos_token_id,)

    def forward(self, batch: Batch, need: Need) -> Signal:
        states = self.embedding[batch.inputs["input_ids"]]
        said = Projection(hidden=states, weight=self.head, bias=self.bias)
        if not need.logits:
            return Signal(features=dict.fromkeys(need.features, states))
        logits = Dense(logits=self.table()[batch.inputs["input_ids"]]) if self.applied else said
        return Signal(logits=logits, features=dict.fromkeys(need.features, states))

    def table(self) -> Tensor:
        """Logits after each token, [V, V]."""
        logits = self.embedding @ self.head.T
        return logits if self.bias is None else logits + self.bias

    def speaking(self, ids: Tensor, mask: Tensor) -> AbstractContextManager[tuple[speakers.TableSpeech, Tensor]]:
        return speakers.Table(self.table().detach().float(), ends=self.ends).speaking(ids, mask)


def student(*, applied: bool = False) -> Bigram:
    """In float64, so that what differs from the reference differs for a reason."""
    return Bigram(bytes_(), 1, applied=applied).double()


def members(tokenizer: PreTrainedTokenizerFast, *, applied: bool = False) -> tuple[Bigram, Bigram]:
    return Bigram(tokenizer, 2, applied=applied), Bigram(tokenizer, 3, applied=False)


@cache
def law(signal: str, tokenizer: PreTrainedTokenizerFast, temperature: float) -> Tensor:
    """What the teacher behind a signal says after each token, by hand: float64 logits [V, V]."""
    one, other = (model.double().table().detach() for model in members(tokenizer))
    if signal == "mixture":
        shares = [w * (z / temperature).softmax(-1) for w, z in zip(WEIGHTS, (one, other), strict=True)]
        return temperature * sum(shares, start=torch.zeros(())).log()
    return WEIGHTS[0] * one + WEIGHTS[1] * other if signal == "mixture of logits" else one


class Stories:
    """All texts in one batch of bytes; another batch holds them in another order, filled up on the left."""

    def __init__(self, prompt: int = 0) -> None:
        self.prompt = prompt

    def batch(self, index: int) -> Batch:
        texts = TEXTS if index == 0 else TEXTS[::-1]
        return rows(bytes_(), *texts, prompt=self.prompt, left=index > 0)


@dataclass(frozen=True)
class Sketched:
    """A live teacher that says no more than a sketch of its law, as behind an address."""

    teacher: Teacher
    sketch: Sketch

    @property
    def identity(self) -> str:
        return f"sketched:{self.teacher.identity}"

    def __call__(self, batch: Batch, need: Need) -> Signal:
        said = self.teacher(batch, Need(logits=True)).logits
        assert isinstance(said, Dense) and not isinstance(self.sketch, Hidden)
        logits = said.logits[batch.mask]
        uniforms = torch.cat([_uniforms(key, int(n)) for key, n in zip(batch.keys, batch.mask.sum(1), strict=True)])
        found = self.sketch.entries(logits, uniforms)
        return spread(Signal(logits=self.sketch.signal(found.numbers, len(logits), logits.shape[-1])), batch.mask)


class World:
    """Teachers of every signal, live and from stores in `folder`, and what is learnt from them, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stores: dict[str, Teacher] = {}
        self._batches: dict[object, Batch] = {}

    def batch(self, regime: str, *, praised_by: Teacher | None = None) -> Batch:
        """What is learnt from. Cached rows come in another order than they were stored in, padded otherwise."""
        slot = regime, praised_by and praised_by.identity
        if slot not in self._batches:
            self._batches[slot] = self._batch(regime, praised_by)
        return self._batches[slot]

    def _batch(self, regime: str, praised_by: Teacher | None) -> Batch:
        if "on policy" not in regime:
            return Stories().batch(int(regime == "cached"))
        learner, knobs = student(), {"tokens": 7, "seed": 3}
        if praised_by is not None:
            return rewarded(learner, Stories(prompt=4), teacher=praised_by, **knobs).batch(0)
        return rollout(learner, Stories(prompt=4), **knobs).batch(0)

    @cache  # noqa: B019 - a world lives as long as its module of tests
    def same_tokens(self, signal: str, regime: str, temperature: float) -> Teacher:
        """A teacher of the student's own tokens."""
        return self._teacher(signal, regime, temperature, bytes_(), Stories(), entries=K)

    @cache  # noqa: B019
    def across(self, signal: str, regime: str) -> Teacher:
        """A teacher of pieces, asked in the student's bytes; from a top store it knows every class, rounded."""
        source = asked_in_bytes(local(members(pieces())[0])).reading(Stories())
        return asked_in_bytes(self._teacher(signal, regime, 1.0, pieces(), source, entries=len(pieces())))

    def _teacher(
        self, signal: str, regime: str, temperature: float, tokenizer: PreTrainedTokenizerFast, source: Source, *,
        entries: int,
    ) -> Teacher:  # fmt: skip
        sketches: dict[str, Sketch] = {
            "top": Top(k=entries),
            "sampled": Sampled(draws=DRAWS, temperature=temperature),
            "dense": Whole(),
        }
        sketch = sketches.get(signal, Hidden(dtype="float32"))
        is_sparse, is_mixed = signal in ("top", "sampled"), "mixture" in signal
        models = [local(model) for model in members(tokenizer, applied=is_sparse or signal == "dense")[: 1 + is_mixed]]
        if "cached" in regime:
            name = f"{len(tokenizer)} {sketch}"
            said = [self._remembered(f"{name} {number}", model, source, sketch) for number, model in enumerate(models)]
        else:
            said = [Sketched(model, sketch) if is_sparse else model for model in models]
        if not is_mixed:
            return said[0]
        mean = "logits" if signal == "mixture of logits" else "probabilities"
        return ensemble(said, weights=WEIGHTS, mean=mean, temperature=temperature)

    def _remembered(self, name: str, teacher: Teacher, source: Source, sketch: Sketch) -> Teacher:
        if name not in self._stores:
            build(self._folder / name, teacher, source, batches=1, sketch=sketch)
            self._stores[name] = remembered(self._folder / name)
        return self._stores[name]


def asked_in_bytes(teacher: Teacher) -> Aligned:
    return aligned(teacher, student_tokenizer=bytes_(), teacher_tokenizer=pieces(), entries=16)


@cache
def across_by_hand(signal: str) -> Teacher:
    """The teacher of pieces behind a signal as dense logits worked out by hand, asked in the student's bytes."""
    said = law(signal, pieces(), 1.0)
    return asked_in_bytes(Spoken(half(said.float().log_softmax(-1)) if signal == "top" else said))


@dataclass(frozen=True)
class Spoken:
    """Dense logits from a table [V, V]."""

    table: Tensor
    identity = "spoken"

    def __call__(self, batch: Batch, need: Need) -> Signal:
        return Signal(logits=Dense(logits=self.table[batch.inputs["input_ids"]]))


def half(values: Tensor) -> Tensor:
    """Rounded as a store rounds log-probabilities."""
    return values.half().double()


def coarse(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """METHODS_LLM B11 by hand: log-laws of the teacher's K likeliest classes and a tail, [N, V] -> [N, K + 1] twice."""
    log_p, ids = teacher_logits.float().log_softmax(-1).topk(K, dim=-1)
    p, q = half(log_p).exp(), student_logits.softmax(-1).gather(-1, ids)
    student, teacher = (torch.cat([law, 1 - law.sum(-1, keepdim=True)], dim=-1).log() for law in (q, p))
    return student, teacher


def counts_at(teacher: Teacher, batch: Batch, temperature: float) -> Tensor:
    """The weights that a sampled teacher gives the classes, as logits at a temperature: [N, V]."""
    said = teacher(batch, Need(logits=True)).logits
    assert isinstance(said, Sparse) and said.kind == "sampled"
    ids, shares = said.ids[batch.mask], (said.log_probs[batch.mask].double() / temperature).exp()
    weights = torch.zeros(len(ids), said.size, dtype=torch.float64)
    for row, (which, much) in enumerate(zip(ids.tolist(), shares.tolist(), strict=True)):
        for place, share in zip(which, much, strict=True):
            weights[row, place] += share
    return temperature * weights.log()


def copies(batch: Batch, row: int, count: int) -> Batch:
    """One row so many times, each under a key of its own: whoever draws, draws anew for each."""
    keys = tuple(f"{batch.keys[row]} copy {number}" for number in range(count))
    return replace(part(batch, [row] * count), keys=keys)


def part(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Some rows of a batch."""
    return replace(
        batch,
        keys=tuple(batch.keys[place] for place in chosen),
        inputs={name: tensor[chosen] for name, tensor in batch.inputs.items()},
        labels=batch.labels[chosen],
        mask=batch.mask[chosen],
        extras={name: tensor[chosen] for name, tensor in batch.extras.items()},
    )


def padded(batch: Batch, left: int, right: int) -> Batch:
    """More columns that do not count, on both sides."""

    def wider(tensor: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, right), value=fill) if tensor.ndim == 2 else tensor

    fills = {"input_ids": bytes_().pad_token_id}
    return replace(
        batch,
        inputs={name: wider(tensor, fills.get(name, 0)) for name, tensor in batch.inputs.items()},
        labels=wider(batch.labels, IGNORED),
        mask=wider(batch.mask, False),
        extras={name: wider(tensor, math.nan) for name, tensor in batch.extras.items()},
    )


def spoiled(signal: Signal, mask: Tensor) -> Signal:
    """No number where nothing counts; a sparse teacher has nothing there."""

    def broken(tensor: Tensor) -> Tensor:
        where = mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim))
        return torch.where(where, tensor, math.nan) if tensor.is_floating_point() else tensor

    def said(logits: Logits | None) -> Logits | None:
        match logits:
            case Dense():
                return Dense(logits=broken(logits.logits))
            case Projection():
                return replace(logits, hidden=broken(logits.hidden))
            case Mixture():
                return replace(logits, members=tuple(map(said, logits.members)))
        return logits

    return Signal(logits=said(signal.logits), features={n: broken(t) for n, t in signal.features.items()})


def _uniforms(key: str, count: int) -> Tensor:
    """Random numbers of a row, whatever is beside it."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(count, generator=generator, dtype=torch.float64)
