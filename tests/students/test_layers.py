"""Layer maps, against METHODS_LLM C2 and METHODS_CLASSIC B11, B14, B15."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from potstill.core.errors import RecipeError
from potstill.students import layers

Map = Callable[..., dict[str, str]]


def followed(mapping: dict[str, str]) -> list[int]:
    return [int(name.removeprefix("hidden/")) for name in mapping.values()]


@pytest.mark.parametrize(
    ("rule", "shallow", "deep", "golden"),
    [
        (layers.uniform, 6, 24, [4, 8, 12, 16, 20, 24]),
        (layers.uniform, 4, 12, [3, 6, 9, 12]),
        (layers.uniform, 6, 12, [2, 4, 6, 8, 10, 12]),
        (layers.last, 6, 24, [19, 20, 21, 22, 23, 24]),
        (layers.first, 6, 24, [1, 2, 3, 4, 5, 6]),
        # 0-based: 0, 5, 9, 14, 18, 23.
        (layers.endpoints, 6, 24, [1, 6, 10, 15, 19, 24]),
        (layers.endpoints, 1, 24, [24]),
    ],
)
def test_maps_meet_the_published_blocks(rule: Map, shallow: int, deep: int, golden: list[int]) -> None:
    mapping = rule(shallow, deep)
    assert followed(mapping) == golden
    assert list(mapping) == [f"hidden/{i}" for i in range(1, shallow + 1)]


def test_halves_are_rounded_up() -> None:
    # 2.5 and 7.5: Python's round would say 2 and 8.
    assert followed(layers.uniform(4, 10)) == [3, 5, 8, 10]
    # 0-based 2.5.
    assert followed(layers.endpoints(3, 6)) == [1, 4, 6]


def test_patient_distillation_skips_and_takes_the_last_of_twelve() -> None:
    # METHODS_CLASSIC B14, 0-based: skip 1, 3, 5, 7, 9; last 6 to 10.
    assert followed(layers.uniform(6, 12, with_last=False)) == [2, 4, 6, 8, 10]
    assert followed(layers.last(6, 12, with_last=False)) == [7, 8, 9, 10, 11]


def test_a_template_may_count_from_zero() -> None:
    assert layers.uniform(2, 4, "layers.{}", origin=0) == {"layers.0": "layers.1", "layers.1": "layers.3"}


@pytest.mark.parametrize("rule", [layers.uniform, layers.last, layers.first, layers.endpoints])
def test_equal_depth_follows_itself(rule: Map) -> None:
    assert all(student == teacher for student, teacher in rule(5, 5).items())


@pytest.mark.parametrize("depths", [(0, 4), (5, 4)])
@pytest.mark.parametrize("rule", [layers.uniform, layers.last, layers.first, layers.endpoints])
def test_a_student_deeper_than_its_teacher_is_refused(rule: Map, depths: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match=f"layer map: found {depths[0]} student layers for 4"):
        rule(*depths)
