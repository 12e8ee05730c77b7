"""A term refuses everything that cannot work, when it is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.core.errors import RecipeError
from potstill.objective import linear, term
from tests.objective.helpers import batch, label_error, layer_error, soft_error


def test_a_misspelt_knob_names_the_place_and_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"objective\[0\]\.sharpnes: .*sharpnes.* Did you mean 'sharpness'\?"):
        term(label_error, sharpnes=2.0, place="objective[0]")


def test_a_misspelt_loss_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'forward_kl'"):
        term("forward_lk")


def test_an_outside_callable_is_reached_by_module_and_name() -> None:
    assert term("tests.objective.helpers:soft_error").reads == ("student_logits", "teacher_logits")


def test_an_outside_module_that_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match="no_such_module_here"):
        term("no_such_module_here:loss")


def test_a_loss_without_a_return_kind_is_refused() -> None:
    def mean_error(student_logits: Tensor, /) -> Tensor:
        return student_logits.mean()

    with pytest.raises(RecipeError, match="PerItem"):
        term(mean_error)


def test_a_layer_loss_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="compares layers"):
        term(layer_error)


def test_layers_for_a_loss_that_ignores_them_are_refused() -> None:
    with pytest.raises(RecipeError, match="would be ignored"):
        term(soft_error, at=["layer1"])


@pytest.mark.parametrize("weight", ["0.9", float("nan"), float("inf"), None, True])
def test_a_weight_that_is_no_number_is_refused(weight: object) -> None:
    with pytest.raises(RecipeError, match="weight"):
        term(soft_error, weight)  # type: ignore[arg-type]


def test_equal_layer_names_need_no_mapping() -> None:
    assert term(layer_error, at=["a", "b"]).at == term(layer_error, at={"a": "a", "b": "b"}).at


def test_a_scheduled_weight_follows_the_run() -> None:
    ramp = term(soft_error, linear(start=0.0, end=2.0, finish=0.5))
    assert [ramp.weight_at(step, 100) for step in (0, 25, 50, 99)] == [0.0, 1.0, 2.0, 2.0]


def test_a_schedule_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(RecipeError, match="begin"):
        linear(start=0.0, end=1.0, begin=0.6, finish=0.5)


def test_unknown_labels_are_not_counted_by_a_term_that_reads_labels() -> None:
    rows = batch(torch.tensor([1, -100, 0]), torch.tensor([True, True, False]))
    assert term(label_error).counted(rows).tolist() == [True, False, False]
    assert term(soft_error).counted(rows).tolist() == [True, True, False]
