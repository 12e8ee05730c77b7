"""What benchmarks/parity.py compares: random inputs, both sides as functions of one, and the pairs with their reasons.

Dimension key: B examples, T positions, V tokens or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.types import IGNORED, Batch, Dense, Lesson, Projection, Signal
from potstill.losses.relation import fsp
from potstill.losses.shapes import unit
from potstill.objective import Objective, Term, term


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One random input; `leaves` are the student's tensors that the gradient is taken in."""

    lesson: Lesson
    batch: Batch
    leaves: tuple[Tensor, ...]


Scalar = Callable[[Problem], Tensor]


@dataclass(frozen=True, kw_only=True)
class Undone:
    """A known deviation, and both sides without it: then they must agree. `theirs` is None where it stays as it is."""

    reason: str
    how: str
    ours: Scalar
    theirs: Scalar | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    loss: str
    peer: str
    ours: Scalar
    theirs: Scalar
    deviation: Undone | None = None


def pairs() -> Iterator[tuple[Problem, Pair]]:
    """All of them, each with what it is computed on."""
    given = images()
    for of_images in (logits_with_torchdistill, layers_with_torchdistill, relations_with_torchdistill):
        yield from ((given, pair) for pair in of_images())
    given = tokens()
    yield from ((given, pair) for pair in tokens_with_trl())
    given = heads()
    yield from ((given, pair) for pair in heads_with_trl())
    given = heads(scale=0.5, softcap=3.0)
    yield given, fused_pair("forward_kl", beta=0.0, note=", scale 0.5, cap 3")


# Inputs.


def images() -> Problem:
    """16 examples, 10 classes, two layers of maps of unlike size, one layer of vectors, a variance per channel."""
    noise = generator(0)
    student = {"layer1": noise(16, 8, 8, 8), "layer2": noise(16, 12, 4, 4), "vector": noise(16, 20)}
    teacher = {"layer1": noise(16, 8, 8, 8), "layer2": noise(16, 12, 4, 4), "vector": noise(16, 24)}
    variance = noise(8, 1, 1).square() + 0.1
    logits, teacher_logits = 3 * noise(16, 10), 3 * noise(16, 10)
    leaves = tuple(x.requires_grad_() for x in (logits, *student.values(), variance))
    labels = torch.randint(10, (16,), generator=torch.Generator().manual_seed(1))
    return Problem(
        lesson=Lesson(
            student=Signal(logits=Dense(logits=logits), features={**student, "variance": variance}),
            teacher=Signal(logits=Dense(logits=teacher_logits), features=teacher),
        ),
        batch=Batch(keys=(), inputs={}, labels=labels, mask=torch.ones(16, dtype=torch.bool)),
        leaves=leaves,
    )


def tokens() -> Problem:
    """4 sequences of up to 9 positions, 50 tokens; lengths are unlike, and prompts do not count."""
    noise = generator(2)
    student, teacher = 3 * noise(4, 9, 50), 3 * noise(4, 9, 50)
    return Problem(
        lesson=Lesson(
            student=Signal(logits=Dense(logits=student.requires_grad_())),
            teacher=Signal(logits=Dense(logits=teacher)),
        ),
        batch=answers(),
        leaves=(student,),
    )


def heads(*, scale: float = 1.0, softcap: float = 0.0) -> Problem:
    """The same positions as hidden states before their heads, of unlike widths, in float32."""
    noise = generator(3, torch.float32)
    hidden, weight, bias = noise(4, 9, 16), noise(50, 16), noise(50)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    shape = {"scale": scale, "softcap": softcap}
    student = Projection(hidden=hidden, weight=weight, bias=bias, **shape)
    teacher = Projection(hidden=noise(4, 9, 24), weight=noise(50, 24), bias=noise(50), **shape)
    return Problem(
        lesson=Lesson(student=Signal(logits=student), teacher=Signal(logits=teacher)), batch=answers(), leaves=leaves
    )


def answers() -> Batch:
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate(((2, 9), (0, 4), (5, 6), (3, 8))):
        mask[row, start:stop] = True
    labels = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(4)).masked_fill(~mask, IGNORED)
    return Batch(keys=(), inputs={}, labels=labels, mask=mask)


def generator(seed: int, dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=stream, dtype=dtype)


# Ours and theirs as functions of a problem.


def ours(*terms: Term) -> Scalar:
    """The objective of these terms. Where a head would stand, it passes the layer on as it is."""
    objective = Objective(*terms)

    def value(problem: Problem) -> Tensor:
        student = problem.lesson.student
        features = dict(student.features)
        for request in objective.heads():
            features[f"{request.key}.student_feature"] = features[request.student_layer]
            features[f"{request.key}.student_variance"] = features["variance"]
        lesson = replace(problem.lesson, student=replace(student, features=features))
        return objective(lesson, problem.batch)

    return value


def in_two_parts(one: Term) -> Scalar:
    """The same optimizer step in two micro-batches, whose counts are known before the first."""
    objective = Objective(one)

    def value(problem: Problem) -> Tensor:
        halves = list(halved(problem))
        counts = objective.counts([half.batch for half in halves])
        return sum((objective(half.lesson, half.batch, counts) for half in halves), start=torch.zeros(()))

    return value


def halved(problem: Problem) -> Iterator[Problem]:
    student, teacher = (token_logits(problem, side) for side in ("student", "teacher"))
    for rows in (slice(0, 2), slice(2, 4)):
        lesson = Lesson(
            student=Signal(logits=Dense(logits=student[rows])), teacher=Signal(logits=Dense(logits=teacher[rows]))
        )
        batch = replace(problem.batch, labels=problem.batch.labels[rows], mask=problem.batch.mask[rows])
        yield replace(problem, lesson=lesson, batch=batch)


def token_logits(problem: Problem, side: str) -> Tensor:
    said = problem.lesson.student.logits if side == "student" else problem.lesson.teacher.logits
    assert isinstance(said, Dense)
    return said.logits


def torchdistill(name: str, **settings: object) -> Scalar:
    """A mid-level loss as its boxes call it."""
    from torchdistill.losses.registry import get_mid_level_loss

    return called(get_mid_level_loss({"key": name, "kwargs": settings}))


def pytorch(name: str, *, path: str, against: str = "teacher", **settings: object) -> Scalar:
    """A loss of PyTorch in torchdistill's wrapper."""
    from torchdistill.losses.registry import get_mid_level_loss

    place = {"module_path": path, "io": "output"}
    target = {"uses_label": True} if against == "labels" else {**place, "is_from_teacher": True}
    wrapper = {"input": {**place, "is_from_teacher": False}, "target": target}
    return called(
        get_mid_level_loss({"key": name, "kwargs": settings}, {"key": "SimpleLossWrapper", "kwargs": wrapper})
    )


def called(loss: Callable[..., Tensor]) -> Scalar:
    return lambda problem: loss(
        spoken(problem.lesson.student), spoken(problem.lesson.teacher), targets=problem.batch.labels
    )


def spoken(signal: Signal) -> dict[str, dict[str, object]]:
    """A signal as torchdistill's hooks would have recorded it; "." is the whole model."""
    assert isinstance(signal.logits, Dense)
    said: dict[str, dict[str, object]] = {name: {"output": tensor} for name, tensor in signal.features.items()}
    said |= {".": {"output": signal.logits.logits}, "unit": {"output": unit(signal.features["vector"])}}
    if "variance" in signal.features:
        said["gaussian"] = {"output": (signal.features["layer1"], signal.features["variance"])}
    return said


def tap(path: str) -> dict[str, str]:
    return {"path": path, "io": "output"}


def gkd(*, beta: float, temperature: float = 1.0) -> Scalar:
    """TRL's GKD loss on whole logits."""
    from trl.experimental.gkd import GKDTrainer

    return lambda problem: GKDTrainer.generalized_jsd_loss(
        token_logits(problem, "student"), token_logits(problem, "teacher"), labels=problem.batch.labels,
        beta=beta, temperature=temperature,
    )  # fmt: skip


def gkd_in_two_parts(problem: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    whole = problem.batch.mask.sum()
    losses = [
        GKDTrainer.generalized_jsd_loss(
            token_logits(half, "student"), token_logits(half, "teacher"), labels=half.batch.labels,
            beta=0.0, num_items_in_batch=whole,
        )
        for half in halved(problem)
    ]  # fmt: skip
    return torch.stack(losses).sum()


def fused(*, beta: float, temperature: float = 1.0) -> Scalar:
    """TRL's chunked divergence on hidden states, as its DistillationTrainer calls it."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def value(problem: Problem) -> Tensor:
        student, teacher = problem.lesson.student.logits, problem.lesson.teacher.logits
        assert isinstance(student, Projection) and isinstance(teacher, Projection)
        loss, _, _ = _chunked_divergence_loss(
            student.hidden, teacher.hidden, student.weight, teacher.weight, problem.batch.mask, beta,
            student_lm_head_bias=student.bias, teacher_lm_head_bias=teacher.bias,
            student_logit_scale=student.scale, teacher_logit_scale=teacher.scale,
            student_final_logit_softcapping=student.softcap or None,
            teacher_final_logit_softcapping=teacher.softcap or None,
            temperature=temperature,
        )  # fmt: skip
        return loss

    return value


# The pairs with torchdistill.

T4 = {"temperature": 4.0}
LOGITS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
"""Where its logit losses find what they read."""


def logits_with_torchdistill() -> Iterator[Pair]:
    hard = term("cross_entropy", 0.1)
    yield Pair(
        loss="cross_entropy (smoothing 0.1)",
        peer="CrossEntropyLoss",
        ours=ours(term("cross_entropy", smoothing=0.1)),
        theirs=pytorch("CrossEntropyLoss", path=".", against="labels", label_smoothing=0.1),
    )
    yield Pair(
        loss="0.1 cross_entropy + 0.9 kd (T 4)",
        peer="KDLoss (alpha 0.1)",
        ours=ours(hard, term("kd", 0.9, **T4)),
        theirs=torchdistill("KDLoss", **LOGITS, **T4, alpha=0.1),
    )
    yield Pair(
        loss="kd (T 4)",
        peer="KDLoss (alpha 0)",
        ours=ours(term("kd", **T4)),
        theirs=torchdistill("KDLoss", **LOGITS, **T4, alpha=0.0),
        deviation=Undone(
            reason="D-03, no T^2 without a hard loss",
            how="with scale_by_t2 off",
            ours=ours(term("forward_kl", **T4, scale_by_t2=False)),
        ),
    )
    yield Pair(
        loss="forward_kl (T 4, no T^2)",
        peer="SKDInstanceLoss (paper)",
        ours=ours(term("forward_kl", **T4, scale_by_t2=False)),
        theirs=torchdistill("SKDInstanceLoss", **LOGITS, **T4, mode="paper"),
    )
    yield Pair(
        loss="0.1 cross_entropy + 0.9 lskd (T 4)",
        peer="LogitStdKDLoss (alpha 0.1)",
        ours=ours(hard, term("lskd", 0.9, **T4)),
        theirs=torchdistill("LogitStdKDLoss", **LOGITS, **T4, alpha=0.1),
    )
    yield Pair(
        loss="lskd (T 4)",
        peer="LogitStdKDLoss (alpha 0)",
        ours=ours(term("lskd", **T4)),
        theirs=torchdistill("LogitStdKDLoss", **LOGITS, **T4, alpha=0.0),
        deviation=Undone(
            reason="as D-03, no T^2 without a hard loss",
            how="with weight 1 / T^2",
            ours=ours(term("lskd", 1 / 16, **T4)),
        ),
    )
    for tau in (1.0, 4.0):
        # D-10 (a clamped cosine against an epsilon) tells only where a class has the same probability in every row.
        yield Pair(
            loss=f"dist (T {tau:g})",
            peer=f"DISTLoss (tau {tau:g})",
            ours=ours(term("dist", temperature=tau)),
            theirs=torchdistill("DISTLoss", **LOGITS, tau=tau),
        )
    yield Pair(loss="logit_mse", peer="MSELoss", ours=ours(term("logit_mse")), theirs=pytorch("MSELoss", path="."))


def layers_with_torchdistill() -> Iterator[Pair]:
    both = ["layer1", "layer2"]
    maps = {name: {"student": tap(name), "teacher": tap(name)} for name in both}
    gaussian = {"pair": {"student": tap("gaussian"), "teacher": tap("layer1")}}
    first, second = map(tap, both)
    flow = {"student_first": first, "teacher_first": first, "student_second": second, "teacher_second": second}
    yield Pair(
        loss="hint",
        peer="MSELoss",
        ours=ours(term("hint", at=["layer1"])),
        theirs=pytorch("MSELoss", path="layer1"),
    )
    for name, mode in (("attention_transfer", "code"), ("attention_transfer_norm", "paper")):
        yield Pair(
            loss=f"{name} (2 layers)",
            peer=f"ATLoss ({mode})",
            ours=ours(term(name, at=both)),
            theirs=torchdistill("ATLoss", at_pairs=maps, mode=mode),
        )
    yield Pair(
        loss="vid",
        peer="VIDLoss",
        ours=ours(term("vid", at=["layer1"])),
        theirs=torchdistill("VIDLoss", feature_pairs=gaussian),
    )
    yield Pair(
        loss="fsp",
        peer="FSPLoss",
        ours=ours(term("fsp", at=both)),
        theirs=torchdistill("FSPLoss", fsp_pairs={"pair": flow}),
        deviation=Undone(
            reason="D-24, the sum of the columns' norms, not the squared norm",
            how="with the root of each column's fsp",
            ours=fsp_by_columns,
        ),
    )


def relations_with_torchdistill() -> Iterator[Pair]:
    paths = {"student_output_path": "vector", "teacher_output_path": "vector"}
    for name, distance, angle in (("rkd", 25.0, 50.0), ("rkd_distance", 1.0, 0.0), ("rkd_angle", 0.0, 1.0)):
        yield Pair(
            loss=name,
            peer=f"RKDLoss ({distance:g}, {angle:g}, mean)",
            ours=ours(term(name, at=["vector"])),
            theirs=torchdistill("RKDLoss", **paths, dist_factor=distance, angle_factor=angle, reduction="mean"),
        )
    yield Pair(
        loss="sp",
        peer="SPKDLoss (batchmean)",
        ours=ours(term("sp", at=["vector"])),
        theirs=torchdistill("SPKDLoss", **paths, reduction="batchmean"),
        deviation=Undone(
            reason="not in section O: its normalize(G, 1) sets p = 1, so that rows get L1 norm 1, not length 1",
            how="with p = 2 in that line of theirs",
            ours=ours(term("sp", at=["vector"])),
            theirs=similarity_at_length_1(paths),
        ),
    )
    ends = {f"{side}_module_{key}": value for side in ("student", "teacher") for key, value in tap("vector").items()}
    yield Pair(
        loss="pkt", peer="PKTLoss", ours=ours(term("pkt", at=["vector"])), theirs=torchdistill("PKTLoss", **ends)
    )
    bilinear, taylor = {"type": "bilinear"}, {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    yield Pair(
        loss="cc_bilinear",
        peer="CCKDLoss (bilinear)",
        ours=ours(term("cc_bilinear", at=["vector"])),
        theirs=congruence(bilinear, "vector"),
        deviation=Undone(
            reason="D-29, the norm is not squared", how="with sqrt(ours) / B", ours=unsquared("cc_bilinear")
        ),
    )
    yield Pair(
        loss="cc",
        peer="CCKDLoss (gaussian)",
        ours=ours(term("cc", at=["vector"])),
        theirs=congruence(taylor, "vector"),
        deviation=Undone(
            reason="D-29, the norm is not squared and the vectors are not of length 1",
            how="with sqrt(ours) / B, and unit vectors given to theirs",
            ours=unsquared("cc"),
            theirs=congruence(taylor, "unit"),
        ),
    )


def congruence(kernel: Mapping[str, object], path: str) -> Scalar:
    places = {"student_linear_path": path, "teacher_linear_path": path}
    return torchdistill("CCKDLoss", **places, kernel_config=kernel, reduction="batchmean")


def unsquared(name: str) -> Scalar:
    """The norm over B^2, from ours, which is the squared norm over B^2."""
    squared = ours(term(name, at=["vector"]))
    return lambda problem: squared(problem).sqrt() / len(problem.batch.labels)


def similarity_at_length_1(paths: Mapping[str, str]) -> Scalar:
    """torchdistill's SPKDLoss with the one call put right."""
    from torchdistill.losses.mid_level import SPKDLoss

    class Corrected(SPKDLoss):
        def matmul_and_normalize(self, z: Tensor) -> Tensor:
            return F.normalize(z.flatten(1) @ z.flatten(1).T, p=2.0, dim=1)

    return called(Corrected(**paths, reduction="batchmean"))


def fsp_by_columns(problem: Problem) -> Tensor:
    """Sum over the second layer's channels of the norm of what that channel alone gives, mean over examples."""
    student, teacher = problem.lesson.student.features, problem.lesson.teacher.features
    columns = [
        fsp(
            (student["layer1"], student["layer2"][:, channel : channel + 1]),
            (teacher["layer1"], teacher["layer2"][:, channel : channel + 1]),
        ).sqrt()
        for channel in range(student["layer2"].shape[1])
    ]
    return torch.stack(columns).sum(0).mean()


# The pairs with TRL.

ENDS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""Our name, and the beta TRL knows the same divergence by."""

NO_T2 = "language models 0.5, no T^2"


def tokens_with_trl() -> Iterator[Pair]:
    for name, beta in ENDS.items():
        yield Pair(loss=name, peer=f"GKD (beta {beta:g})", ours=ours(term(name)), theirs=gkd(beta=beta))
        yield Pair(
            loss=f"{name} (T 2)",
            peer=f"GKD (beta {beta:g}, T 2)",
            ours=ours(term(name, temperature=2.0)),
            theirs=gkd(beta=beta, temperature=2.0),
            deviation=Undone(
                reason=NO_T2, how="with scale_by_t2 off", ours=ours(term(name, temperature=2.0, scale_by_t2=False))
            ),
        )
    for beta in (0.1, 0.9):
        yield Pair(
            loss=f"generalised_jsd (beta {beta})",
            peer=f"GKD (beta {beta})",
            ours=ours(term("generalised_jsd", beta=beta)),
            theirs=gkd(beta=beta),
        )
    for beta in (0.0, 1.0):
        yield Pair(
            loss=f"generalised_jsd (beta {beta:g}, normalise)",
            peer=f"GKD (beta {beta:g})",
            ours=ours(term("generalised_jsd", beta=beta, normalise=True)),
            theirs=gkd(beta=beta),
        )
    yield Pair(
        loss="generalised_jsd (beta 0.1, normalise)",
        peer="GKD (beta 0.1)",
        ours=ours(term("generalised_jsd", beta=0.1, normalise=True)),
        theirs=gkd(beta=0.1),
        deviation=Undone(
            reason="Appendix 1 no. 13, not continuous at the ends",
            how="with weight beta (1 - beta)",
            ours=ours(term("generalised_jsd", 0.1 * 0.9, beta=0.1, normalise=True)),
        ),
    )
    yield Pair(
        loss="forward_kl, 2 micro-batches",
        peer="GKD (beta 0, num_items_in_batch)",
        ours=in_two_parts(term("forward_kl")),
        theirs=gkd_in_two_parts,
    )


def heads_with_trl() -> Iterator[Pair]:
    for name, beta in ENDS.items():
        yield fused_pair(name, beta=beta)
    yield fused_pair("generalised_jsd", beta=0.1, note=" (beta 0.1)", knobs={"beta": 0.1})
    yield Pair(
        loss="reverse_kl, fused head (T 2)",
        peer="chunked divergence (beta 1, T 2)",
        ours=ours(term("reverse_kl", temperature=2.0)),
        theirs=fused(beta=1.0, temperature=2.0),
        deviation=Undone(
            reason=NO_T2, how="with scale_by_t2 off", ours=ours(term("reverse_kl", temperature=2.0, scale_by_t2=False))
        ),
    )


def fused_pair(name: str, *, beta: float, note: str = "", knobs: Mapping[str, float] | None = None) -> Pair:
    return Pair(
        loss=f"{name}, fused head{note}",
        peer=f"chunked divergence (beta {beta:g})",
        ours=ours(term(name, **(knobs or {}))),
        theirs=fused(beta=beta),
    )
