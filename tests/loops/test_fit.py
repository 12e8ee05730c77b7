"""The loop against a bare PyTorch loop, and the laws of splitting, weights, memory and broken losses."""

from __future__ import annotations

import gc
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from potstill.core.catalog import part
from potstill.core.errors import NotFiniteError, RecipeError
from potstill.core.types import Batch, PerItem
from potstill.objective import Objective, term
from potstill.schemes.offline import Offline
from potstill.teachers.local import local
from tests.loops.helpers import (
    Sentences,
    differences,
    label_error,
    layer_error,
    lines,
    objective,
    scheme,
    soft_error,
    train,
    weights,
)


class Pictures:
    """Eight numbers per row and three classes; rows are a pure function of their number."""

    def __init__(self, size: int = 4) -> None:
        self.size = size

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        return Batch(
            keys=tuple(f"{index}.{row}" for row in range(self.size)),
            inputs={"image": torch.randn(self.size, 8, generator=generator)},
            labels=torch.randint(3, (self.size,), generator=generator),
            mask=torch.ones(self.size, dtype=torch.bool),
        )


def normed(*, seed: int = 0, width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


@part("loss", head="projector")
def projected_error(student_feature: Tensor, teacher_feature: Tensor, /) -> PerItem:
    return (student_feature - teacher_feature).square().mean(-1)


def infinite_error(student_logits: Tensor, /) -> PerItem:
    return student_logits.sum(-1) * math.inf


def weighed_error(student_logits: Tensor, labels: Tensor, advantages: Tensor, /) -> PerItem:
    return advantages * label_error(student_logits, labels)


def test_it_trains_as_a_bare_loop_does(tmp_path: Path) -> None:
    model, other = normed(), normed()
    train(
        tmp_path,
        Offline(model),
        source=Pictures(),
        objective=Objective(term(label_error)),
        steps=5,
        lr=0.2,
        weight_decay=0.1,
    )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for index in range(5):
        batch = Pictures().batch(index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(batch.inputs["image"]), batch.labels).backward()
        optimizer.step()
        rates.step()
    assert differences(model.state_dict(), other.state_dict()) < 1e-6


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (1, 8)])
def test_how_a_step_is_split_changes_nothing(size: int, accumulate: int, projected: bool, tmp_path: Path) -> None:
    whole, split = scheme(projected=projected), scheme(projected=projected)
    train(tmp_path / "whole", whole, source=Sentences(size=8))
    train(tmp_path / "split", split, source=Sentences(size=size), accumulate=accumulate)
    mine, other = weights(whole), weights(split)
    # How often the model was called is the one thing that may differ.
    assert mine.pop("student.calls") * accumulate == other.pop("student.calls")
    assert differences(mine, other) < 1e-12


def test_a_masked_micro_batch_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    with_it, without = scheme(), scheme()
    train(tmp_path / "with", with_it, source=Sentences(masked=lambda i: i % 2 == 1), accumulate=2)
    train(tmp_path / "without", without, source=Evens())
    mine, other = weights(with_it), weights(without)
    mine.pop("student.calls"), other.pop("student.calls")
    assert differences(mine, other) < 1e-12


class Evens:
    """Every second micro-batch."""

    def batch(self, index: int) -> Batch:
        return Sentences().batch(2 * index)


def test_a_step_without_anything_to_count_changes_nothing(tmp_path: Path) -> None:
    given = scheme()
    before = weights(given)
    run = train(tmp_path, given, source=Sentences(masked=lambda index: True))
    after = weights(given)
    before.pop("student.calls"), after.pop("student.calls")
    assert differences(before, after) == 0.0
    assert run.last["loss"] == 0.0


def test_a_term_of_weight_zero_trains_bit_for_bit_as_none(tmp_path: Path) -> None:
    given, other = scheme(dropout=0.5), scheme(dropout=0.5)
    train(tmp_path / "with", given, objective=Objective(term(label_error), term(soft_error, 0.0)))
    train(tmp_path / "without", other, objective=Objective(term(label_error)))
    assert differences(weights(given), weights(other)) == 0.0


def test_every_part_moves(tmp_path: Path) -> None:
    given = scheme()
    before = weights(given)
    train(tmp_path, given)
    after = weights(given)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_only_the_named_part_is_trained_and_the_rest_stays_as_it_is(tmp_path: Path) -> None:
    model = normed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path, Offline(model), source=Pictures(), objective=Objective(term(label_error)), train=["3"])
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]
    # "1" is the batch norm: frozen, so its statistics stand still too.
    assert moved == ["3.weight", "3.bias"]


def test_training_heads_move_and_are_saved(tmp_path: Path) -> None:
    given = Offline(normed(), local(normed(seed=1, width=5)))
    asked = Objective(term(label_error), term(projected_error, at=["0"]))
    given.prepare(asked, Pictures().batch(0))
    before = weights(given)
    train(tmp_path, given, source=Pictures(), objective=asked)
    heads = {name: tensor for name, tensor in weights(given).items() if name.startswith("heads.")}
    saved = load_file(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    assert heads
    for name, tensor in heads.items():
        assert not torch.equal(before[name], tensor)
        assert torch.equal(saved[name], tensor)


def test_heads_learn_also_where_a_part_of_the_student_is_named(tmp_path: Path) -> None:
    given = Offline(normed(), local(normed(seed=1, width=5)))
    asked = Objective(term(projected_error, at=["0"]))
    given.prepare(asked, Pictures().batch(0))
    before = weights(given)
    train(tmp_path, given, source=Pictures(), objective=asked, train=["0"])
    after = weights(given)
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"heads", "student"}


def test_what_was_frozen_for_a_stage_learns_again_after_it(tmp_path: Path) -> None:
    model = normed()
    train(tmp_path, Offline(model), source=Pictures(), objective=Objective(term(label_error)), train=["3"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_misspelt_part_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing called 'block\.0'\. Did you mean 'blocks\.0'\?.*embedding, blocks"):
        train(tmp_path, train=["block.0"])


def test_a_student_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    given = scheme()
    given.student.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing to train"):
        train(tmp_path, given)


def test_the_student_is_left_in_eval_mode_without_gradients(tmp_path: Path) -> None:
    given = scheme(dropout=0.5)
    train(tmp_path, given)
    assert not any(module.training for module in given.student.modules())
    assert all(parameter.grad is None for parameter in given.student.parameters())


def test_a_watcher_may_evaluate_and_draw_without_changing_the_run(tmp_path: Path) -> None:
    given, other = scheme(dropout=0.5), scheme(dropout=0.5)

    def look(step: int, record: object) -> None:
        given.student.eval()
        torch.rand(3), np.random.rand(), random.random()

    train(tmp_path / "watched", given, watch=[look], log_every=1)
    train(tmp_path / "alone", other, log_every=1)
    assert differences(weights(given), weights(other)) == 0.0


def test_another_seed_drops_out_other_units(tmp_path: Path) -> None:
    given, other = scheme(dropout=0.5), scheme(dropout=0.5)
    train(tmp_path / "0", given)
    train(tmp_path / "1", other, seed=1)
    assert differences(weights(given), weights(other)) > 1e-3


def test_losses_are_logged_as_means_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    train(tmp_path / "each", steps=5, log_every=1)
    train(tmp_path / "pairs", steps=5, log_every=2)
    each, pairs = lines(tmp_path / "each"), lines(tmp_path / "pairs")
    assert [line["step"] for line in pairs] == [2, 4, 5]
    assert pairs[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, abs=1e-12)
    assert pairs[2]["loss"] == each[4]["loss"]


def test_a_line_has_the_shares_of_all_terms_unweighted(tmp_path: Path) -> None:
    run = train(tmp_path)
    terms = run.last["terms"]
    assert set(terms) == set(objective().labels)
    weighted = 0.7 * terms["soft_error"] + 0.3 * terms["label_error"] + 0.1 * terms["layer_error"]
    assert run.last["loss"] == pytest.approx(weighted, abs=1e-12)


def test_a_scheduled_weight_follows_the_step(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def weight(step: int, steps: int) -> float:
        asked.append((step, steps))
        return 1.0

    train(tmp_path, objective=Objective(term(label_error, weight)))
    assert asked[-3:] == [(0, 3), (1, 3), (2, 3)]


def test_a_broken_loss_names_the_step_the_term_and_the_rate(tmp_path: Path) -> None:
    broken = Objective(term(label_error), term(infinite_error))
    with pytest.raises(NotFiniteError, match=r"in step 1, at lr 0\.5: infinite_error\. Lower lr"):
        train(tmp_path, objective=broken, schedule="constant")


def test_after_a_broken_loss_the_parameters_are_still_good(tmp_path: Path) -> None:
    given = scheme()
    with pytest.raises(NotFiniteError):
        train(tmp_path, given, source=Spoiled(at=4), objective=Objective(term(weighed_error)), steps=6)
    assert all(tensor.isfinite().all() for tensor in weights(given).values())


def test_after_a_broken_loss_only_earlier_checkpoints_are_there(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="in step 5"):
        train(tmp_path, source=Spoiled(at=4), objective=Objective(term(weighed_error)), steps=6, checkpoint_every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


class Spoiled:
    """Sentences with advantages, of which those of one micro-batch are not numbers."""

    def __init__(self, *, at: int) -> None:
        self.at = at

    def batch(self, index: int) -> Batch:
        plain = Sentences().batch(index)
        return replace(
            plain, extras={"advantages": torch.full(plain.labels.shape, math.nan if index == self.at else 1.0)}
        )


def test_an_overflowing_gradient_is_not_saved(tmp_path: Path) -> None:
    model = normed()
    with pytest.raises(NotFiniteError, match=r"0\.weight is no longer finite after step 1"):
        train(
            tmp_path,
            Offline(model),
            source=Pictures(),
            objective=Objective(term(steep_error)),
            steps=1,
        )
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def steep_error(student_logits: Tensor, /) -> PerItem:
    # sqrt has the value 0 and an infinite slope at 0.
    return (student_logits - student_logits.detach()).abs().sum(-1).sqrt()


def test_bf16_keeps_the_parameters_and_trains_nearly_the_same(tmp_path: Path) -> None:
    half, full = scheme(dtype=torch.float32), scheme(dtype=torch.float32)
    train(tmp_path / "half", half, precision="bf16")
    train(tmp_path / "full", full)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}
    assert 0.0 < differences(weights(half), weights(full)) < 0.05


def test_a_compiled_run_saves_and_leaves_the_plain_student(tmp_path: Path) -> None:
    compiled, plain = scheme(), scheme()
    # Generating code takes seconds; what is tested is what becomes of the modules.
    with torch.compiler.set_stance("force_eager"):
        train(tmp_path / "compiled", compiled, compile=True)
    train(tmp_path / "plain", plain)
    assert differences(weights(compiled), weights(plain)) == 0.0
    assert not any("_orig_mod" in name for name, _ in compiled.learners().named_modules())


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    given = scheme()
    before = weights(given)
    train(tmp_path, given, steps=1, lr=1.0, momentum=0.0, schedule="constant", clip=0.01)
    after = weights(given)
    before.pop("student.calls"), after.pop("student.calls")
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    teacher = normed(seed=5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train(tmp_path, Offline(normed(), local(teacher)), source=Pictures(), objective=Objective(term(soft_error)))
    assert differences(before, teacher.state_dict()) == 0.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, r"fit\.steps: found 0, expected a whole number, at least 1"),
        ({"lr": 0.0}, r"fit\.lr: found 0\.0, expected a finite number above 0"),
        ({"lr": math.nan}, r"fit\.lr: found nan"),
        ({"accumulate": 0}, r"fit\.accumulate: found 0"),
        ({"warmup": 3}, r"fit\.warmup: found 3, expected fewer than the 3 steps"),
        ({"clip": 0.0}, r"fit\.clip: found 0\.0"),
        ({"momentum": 1.0}, r"fit\.momentum: found 1\.0"),
        ({"weight_decay": -1.0}, r"fit\.weight_decay: found -1\.0"),
        ({"milestones": [2.0]}, r"fit\.milestones: found \(2\.0,\)"),
        ({"schedule": "cosin"}, r"fit\.schedule: no schedule is called 'cosin'\. Did you mean 'cosine'"),
        ({"precision": "fp16"}, r"fit\.precision: no precision is called 'fp16'"),
        ({"sharding": "ddp"}, r"fit\.sharding: no sharding is called 'ddp'"),
        ({"optimizer": "sdg"}, r"fit\.optimizer: no optimizer is called 'sdg'\. Did you mean 'sgd'"),
        ({"log_every": 0}, r"fit\.log_every: found 0"),
        ({"checkpoint_every": 0}, r"fit\.checkpoint_every: found 0"),
        (
            {"trackers": ["tensorbord"]},
            r"fit\.trackers: no tracker is called 'tensorbord'\. Did you mean 'tensorboard'",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_runs(
    wrong: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        train(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_number_of_living_tensors_is_flat_after_the_third_step(tmp_path: Path) -> None:
    counts = []

    def count(step: int, record: object) -> None:
        # By type: isinstance would wake the lazy modules among all the objects.
        living = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        counts.append(sum(tensor.numel() for tensor in living))

    train(tmp_path, steps=6, log_every=1, watch=[count], optimizer="adamw")
    assert len(set(counts[2:])) == 1


def test_the_process_does_not_grow_after_the_third_step(tmp_path: Path) -> None:
    sizes = []

    def measure(step: int, record: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * 4096)

    # One step's logits alone are 256 * 64 * 11 * 8 bytes, 1.4 MB: a graph kept per step would be 40 MB in all.
    train(tmp_path, source=Sentences(size=256, length=64), steps=30, log_every=1, watch=[measure])
    assert sizes[-1] - sizes[2] < 8 * 2**20


def test_layers_only_leave_what_is_behind_them_alone(tmp_path: Path) -> None:
    given = scheme()
    before = weights(given)
    train(tmp_path, given, objective=Objective(term(layer_error, at=["blocks.0"])), weight_decay=0.1)
    after = weights(given)
    # No gradient reaches the head, so weight decay must not either.
    assert torch.equal(before["student.head.weight"], after["student.head.weight"])
