"""Attention transfer, against METHODS_CLASSIC B2 and fixtures P4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.core.errors import RecipeError, SignalError
from potstill.losses import attention as a

from .test_feature import MAP_S, MAP_T, drawn

BOTH = pytest.mark.parametrize(
    "loss", [a.attention_transfer, a.attention_transfer_norm], ids=["attention_transfer", "attention_transfer_norm"]
)


def test_the_mean_meets_the_published_value() -> None:
    assert a.attention_transfer(MAP_S, MAP_T).item() == pytest.approx(0.254642, abs=2e-6)


def test_the_norm_meets_the_published_value() -> None:
    assert a.attention_transfer_norm(MAP_S, MAP_T).item() == pytest.approx(1.009241, abs=2e-6)


def test_the_energy_maps_meet_the_published_values() -> None:
    # The norm at a teacher that looks at one place only, e, is sqrt(2 - 2 Q . e): it shows Q entry by entry.
    published = ([0.147442, 0.737210, 0.589768, 0.294884], [0.693375, 0.138675, 0.138675, 0.693375])
    for maps, golden in zip((MAP_S, MAP_T), published, strict=True):
        for place, entry in enumerate(golden):
            spot = torch.zeros(4).double().index_fill(0, torch.tensor([place]), 1.0).view(1, 1, 2, 2)
            shown = 1 - a.attention_transfer_norm(maps, spot).item() ** 2 / 2
            assert shown == pytest.approx(entry, abs=2e-6)


@BOTH
def test_scale_order_and_sign_of_the_channels_do_not_matter(loss) -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    signs = torch.tensor([1.0, -1, -1, 1]).view(4, 1, 1)
    changed = 5 * signs * student[:, [2, 0, 3, 1]]
    torch.testing.assert_close(loss(changed, teacher), loss(student, teacher))


@BOTH
def test_each_example_has_a_scale_of_its_own(loss) -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    scales = torch.tensor([0.01, 100.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(loss(scales * student, teacher), loss(student, teacher))


@BOTH
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_proportional_energies_are_equal(loss, power: float) -> None:
    # Twice the channels, halved: the same map up to a factor.
    teacher = drawn(2, 4, 3, 3)
    student = 0.5 * torch.cat((teacher, teacher), 1)
    assert loss(student, teacher, power=power).abs().max() < 1e-12


def test_an_odd_power_takes_the_absolute_value() -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)
    plain, flipped = (a.attention_transfer(s, teacher, power=3.0) for s in (student, student.abs()))
    torch.testing.assert_close(plain, flipped)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_high_power_neither_overflows_nor_vanishes(scale: float) -> None:
    student, teacher = drawn(2, 4, 3, 3).float(), drawn(2, 6, 3, 3, seed=4).float()
    plain, scaled = (a.attention_transfer(s, teacher, power=8.0) for s in (student, scale * student))
    torch.testing.assert_close(scaled, plain)


def test_the_mean_is_the_squared_norm_over_the_positions() -> None:
    student, teacher = drawn(2, 4, 3, 5), drawn(2, 6, 3, 5, seed=4)
    norm = a.attention_transfer_norm(student, teacher)
    torch.testing.assert_close(a.attention_transfer(student, teacher), norm.square() / 15)


def test_tokens_are_a_map_in_a_row() -> None:
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 6, 3, 3, seed=4)

    def tokens(maps: Tensor) -> Tensor:
        return maps.flatten(2).mT

    torch.testing.assert_close(
        a.attention_transfer(tokens(student), tokens(teacher)), a.attention_transfer(student, teacher)
    )


@BOTH
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
def test_features_without_positions_are_refused(loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(SignalError, match=rf"{loss.__name__}: .*at least two positions"):
        loss(torch.zeros(shape), torch.zeros(shape))


@BOTH
@pytest.mark.parametrize("power", [0.5, 0.0, float("nan")])
def test_a_power_below_one_is_refused(loss, power: float) -> None:
    with pytest.raises(RecipeError, match=rf"{loss.__name__}\.power: found"):
        loss(MAP_S, MAP_T, power=power)
