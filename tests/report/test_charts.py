"""Charts: the right place on the board, whatever the values."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from potstill.report.charts import DotRow, Interval, Spot, curves, dots, gains, strip, whiskers
from potstill.report.figures import Estimate

finite = st.floats(-1e6, 1e6, allow_nan=False)


def _numbers(chart: Markup) -> list[float]:
    found = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', chart)
    return [float(number) for number in found]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=6))
def test_nothing_leaves_the_board(values: list[float]) -> None:
    rows = [Interval(label="seed", estimate=Estimate(mean=v, sd=None, num_seeds=1), note="x") for v in values]
    spots = [DotRow(label="arm", spots=tuple(Spot(arm="alone", value=v) for v in values))]
    line = tuple(enumerate(values, 1))
    for chart in (
        gains(rows, Estimate(mean=values[0], sd=1.0, num_seeds=2), said=""),
        whiskers(rows, title=""),
        strip(spots),
        curves("alone", [line], line, title=""),
    ):
        _, _, width, height = map(float, ElementTree.fromstring(chart).attrib["viewBox"].split())
        assert all(-0.1 <= number <= max(width, height) + 0.1 for number in _numbers(chart))


def test_equal_values_stand_at_equal_places_in_both_halves_of_the_classes() -> None:
    first = dots([DotRow(label="aa", spots=(Spot(arm="alone", value=90.0),))], low=40.0, title="")
    second = dots([DotRow(label="bb", spots=(Spot(arm="alone", value=90.0),))], low=40.0, title="")
    assert re.findall('cx="([^"]*)"', first) == re.findall('cx="([^"]*)"', second)


def test_bars_start_at_zero() -> None:
    rows = [Interval(label="seed 0", estimate=Estimate(mean=m, sd=None, num_seeds=1), note="") for m in (2.0, -1.0)]
    chart = gains(rows, Estimate(mean=0.5, sd=None, num_seeds=2), said="")
    (zero,) = re.findall(r'class="zero" x1="([^"]*)"', chart)
    won, lost = re.findall(r'<rect class="bar \w+" x="([^"]*)" y="[^"]*" width="([^"]*)"', chart)
    assert float(won[0]) == pytest.approx(float(zero), abs=0.02)
    assert float(lost[0]) + float(lost[1]) == pytest.approx(float(zero), abs=0.02)
    assert float(won[1]) == pytest.approx(2 * float(lost[1]), rel=0.01)


def test_a_curve_falls_on_the_page_when_the_loss_falls() -> None:
    line = ((1, 4.0), (2, 1.0))
    chart = curves("alone", [line], line, title="")
    x0, y0, x1, y1 = map(float, re.findall(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)[0])
    assert x0 < x1 and y0 < y1


def test_a_single_logged_step_is_still_seen() -> None:
    assert "<circle" in curves("alone", [((5, 1.0),)], ((5, 1.0),), title="")


def test_a_long_name_is_cut_and_kept_in_its_title() -> None:
    chart = dots([DotRow(label="a" * 40, spots=(Spot(arm="alone", value=1.0),))], low=0.0, title="")
    assert f"<title>{'a' * 40}</title>{'a' * 19}\u2026</text>" in chart


def test_large_numbers_on_an_axis_are_short() -> None:
    line = ((1, 40_000.0), (2_000_000, 10.0))
    ticks = re.findall(r'class="tick"[^>]*>([^<]*)<', curves("alone", [line], line, title=""))
    assert "40k" in ticks and "2M" in ticks
    assert max(map(len, ticks)) <= 5
