"""Learning rates against their formulas, optimizers against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from potstill.core.errors import RecipeError
from potstill.loops.optimise import check_optimizer, learning_rate, make_optimizer


def test_a_constant_rate_stays() -> None:
    assert {learning_rate(step, schedule="constant", lr=0.3, steps=9) for step in range(9)} == {0.3}


def test_warmup_reaches_the_full_rate_in_its_last_step() -> None:
    rates = [learning_rate(step, schedule="constant", lr=1.0, steps=9, warmup=4) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_linear_rate_falls_by_the_same_amount_each_step() -> None:
    rates = [learning_rate(step, schedule="linear", lr=1.0, steps=5, warmup=1) for step in range(1, 5)]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_cosine_rate_is_half_at_half_of_the_way() -> None:
    assert learning_rate(6, schedule="cosine", lr=0.2, steps=10, warmup=2) == pytest.approx(0.1)


def test_a_cosine_rate_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for step in range(7):
        assert learning_rate(step, schedule="cosine", lr=0.1, steps=7) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_step_rate_is_that_of_the_240_epoch_cifar_protocol() -> None:
    # Epochs 150, 180 and 210 of 240 (METHODS_CLASSIC 0.5): a tenth after each.
    asked = {"schedule": "step", "lr": 0.05, "steps": 240, "milestones": (0.625, 0.75, 0.875)}
    rates = [learning_rate(epoch, **asked) for epoch in (149, 150, 179, 180, 209, 210, 239)]
    assert rates == pytest.approx([5e-2, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])


@pytest.mark.parametrize(
    ("name", "theirs"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_each_name_makes_its_optimizer(name: str, theirs: type[torch.optim.Optimizer]) -> None:
    made = make_optimizer(name, [nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5, weight_decay=0.01)
    assert type(made) is theirs


def test_momentum_is_the_first_beta_of_adam() -> None:
    made = make_optimizer("adamw", [nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5, weight_decay=0.0)
    assert made.param_groups[0]["betas"] == (0.5, 0.999)


def test_every_parameter_decays_vectors_included() -> None:
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.zeros(3)
    make_optimizer("sgd", [vector], lr=0.1, momentum=0.0, weight_decay=0.5).step()
    assert vector.tolist() == pytest.approx([0.95] * 3)


def test_an_outside_optimizer_gets_the_arguments_it_names() -> None:
    made = make_optimizer("torch.optim:RMSprop", [nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.5, weight_decay=0.2)
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.5, 0.2)


def test_a_weight_decay_that_an_outside_optimizer_cannot_take_is_refused() -> None:
    with pytest.raises(RecipeError, match="has no weight_decay, so it would be ignored"):
        make_optimizer("torch.optim:LBFGS", [nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.0, weight_decay=0.1)


def test_something_that_is_no_optimizer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"torch:stack is no torch\.optim\.Optimizer class"):
        check_optimizer("torch:stack")


def test_a_misspelt_optimizer_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'adamw'"):
        check_optimizer("AdamW8")


def test_a_missing_module_is_named() -> None:
    with pytest.raises(RecipeError, match="names the module nowhere"):
        check_optimizer("nowhere:Fast")


def test_no_rate_is_negative_or_above_the_one_asked_for() -> None:
    for schedule in ("constant", "linear", "cosine", "step"):
        rates = [learning_rate(s, schedule=schedule, lr=1.0, steps=20, warmup=3, milestones=(0.5,)) for s in range(20)]
        assert all(0.0 <= rate <= 1.0 and math.isfinite(rate) for rate in rates)
