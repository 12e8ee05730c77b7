"""The nouns: what a batch made by hand holds, what a need asks, what detaching and finishing do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from potstill.core.types import IGNORED, Batch, Dense, Need, Projection, Signal, Sparse


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, requires_grad=True)


def test_a_batch_made_by_hand_names_its_inputs_and_counts_every_row() -> None:
    image = torch.zeros(3, 1, 2, 2)
    batch = Batch.of(torch.tensor([0, IGNORED, 1]), image=image)
    assert batch.inputs["image"] is image
    assert batch.mask.tolist() == [True, True, True]


def test_a_batch_of_token_labels_counts_every_position() -> None:
    assert Batch.of(torch.zeros(2, 5, dtype=torch.long)).mask.shape == (2, 5)


def test_a_batch_of_several_numbers_per_row_counts_rows() -> None:
    assert Batch.of(torch.zeros(4, 7)).mask.shape == (4,)


def test_a_given_mask_and_extras_are_kept() -> None:
    mask, pairs = torch.tensor([True, False]), torch.tensor([1, 0])
    batch = Batch.of(torch.tensor([0, 1]), mask, extras={"pairs": pairs})
    assert batch.mask is mask
    assert batch.extras["pairs"] is pairs


def test_moving_a_batch_moves_every_tensor_in_it() -> None:
    batch = Batch.of(torch.tensor([0]), image=torch.zeros(1, 2), extras={"ids": torch.tensor([3])})
    moved = batch.to(torch.device("meta"))
    tensors = (moved.inputs["image"], moved.labels, moved.mask, moved.extras["ids"])
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_batch_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        Batch.of(torch.tensor([0])).labels = torch.tensor([1])  # type: ignore[misc]


def test_a_need_for_nothing_is_false() -> None:
    assert not Need()


@pytest.mark.parametrize("need", [Need(logits=True), Need(features=frozenset({"layer1"}))])
def test_a_need_for_anything_is_true(need: Need) -> None:
    assert need


def test_two_needs_together_ask_for_all_that_either_asks() -> None:
    both = Need(logits=True, features=frozenset({"a"})) | Need(features=frozenset({"b"}))
    assert both == Need(logits=True, features=frozenset({"a", "b"}))


@pytest.mark.parametrize(
    "logits",
    [
        Dense(logits=leaf(2, 3)),
        Projection(hidden=leaf(2, 4), weight=leaf(3, 4), bias=leaf(3)),
        Projection(hidden=leaf(2, 4), weight=leaf(3, 4)),
        Sparse(ids=torch.zeros(2, 1, dtype=torch.long), log_probs=leaf(2, 1), size=3),
    ],
    ids=["dense", "projection", "projection without bias", "sparse"],
)
def test_no_gradient_passes_a_detached_signal(logits: Dense | Projection | Sparse) -> None:
    signal = Signal(logits=logits, features={"layer1": leaf(2, 2)}).detach()
    assert not any(tensor.requires_grad for tensor in pytree.tree_leaves(signal) if isinstance(tensor, torch.Tensor))


def test_detaching_a_projection_keeps_its_scale_and_cap() -> None:
    said = Projection(hidden=leaf(1, 1), weight=leaf(1, 1), scale=0.5, softcap=30.0).detach()
    assert (said.scale, said.softcap) == (0.5, 30.0)


def test_a_signal_without_logits_stays_without() -> None:
    assert Signal().detach().logits is None


def test_a_plain_projection_leaves_the_head_product_as_it_is() -> None:
    raw = torch.tensor([[1.0, -2.0]])
    assert Projection(hidden=raw, weight=raw).finish(raw) is raw


def test_a_projection_scales_before_it_caps() -> None:
    head = Projection(hidden=torch.zeros(1, 1), weight=torch.zeros(1, 1), scale=4.0, softcap=30.0)
    # 30 tanh(4 * 10 / 30); capping first would give 4 * 30 tanh(10 / 30) = 38.6.
    assert head.finish(torch.tensor(10.0)).item() == pytest.approx(30.0 * math.tanh(40.0 / 30.0), rel=1e-6)


def test_a_capped_logit_never_exceeds_the_cap() -> None:
    head = Projection(hidden=torch.zeros(1, 1), weight=torch.zeros(1, 1), softcap=30.0)
    assert head.finish(torch.tensor([1e6, -1e6])).tolist() == [30.0, -30.0]


def test_sharded_training_finds_the_tensors_inside_a_signal() -> None:
    signal = Signal(logits=Projection(hidden=leaf(2, 4), weight=leaf(3, 4)), features={"layer1": leaf(2, 2)})
    shapes = [tuple(tensor.shape) for tensor in pytree.tree_leaves(signal) if isinstance(tensor, torch.Tensor)]
    assert sorted(shapes) == [(2, 2), (2, 4), (3, 4)]


def test_a_signal_comes_back_whole_from_a_walk_over_its_tensors() -> None:
    signal = Signal(logits=Sparse(ids=torch.zeros(1, 1), log_probs=torch.zeros(1, 1), size=9, kind="sampled"))
    back = pytree.tree_map(lambda value: value, signal)
    assert isinstance(back.logits, Sparse)
    assert (back.logits.size, back.logits.kind) == (9, "sampled")
