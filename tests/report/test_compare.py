"""Several runs in one table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.report import card, compare, comparison
from tests.report.helpers import write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a", {"alone": [0.90, 0.90], "distilled": [0.91, 0.90]}, name="small"),
        write_run(tmp_path / "b", {"distilled": [0.99, 0.99]}, name="baseless"),
        write_run(tmp_path / "c", {"alone": [0.90, 0.90], "distilled": [0.95, 0.96], "teacher": [0.97]}, name="large"),
        write_run(tmp_path / "d", {"alone": [0.90, 0.92], "distilled": [0.88, 0.88]}, name="lost"),
    ]


def test_the_largest_gain_stands_first_and_runs_without_one_last(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "all").read_text()
    assert re.findall(r'<th scope="row">(\w+)', page) == ["large", "small", "lost", "baseless"]


def test_a_row_has_gain_wins_teacher_and_seconds(runs: list[Path], tmp_path: Path) -> None:
    compare(runs, tmp_path / "all")
    text = (tmp_path / "all" / "compare.md").read_text()
    pm, no = "\u00b1", "\u2013"
    expected = f"| large | 90.0 {pm} 0.0 | 95.5 {pm} 0.7 | +5.5 {pm} 0.7 | 2 of 2 | 97.0 {pm} {no} | 12.4 |"
    assert expected in text


def test_the_terminal_has_the_same_rows_as_the_page(runs: list[Path], tmp_path: Path) -> None:
    compare(runs, tmp_path / "all")
    text = (tmp_path / "all" / "compare.md").read_text()
    for row in comparison(runs).rows:
        assert f"| {row.title} | {' | '.join(row.cells)} |" in text


def test_the_headline_counts_runs_that_lost(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "all").read_text()
    assert "2 of 3 runs" in page and "+5.5 points, by large" in page


def test_the_chart_has_a_whisker_for_every_run_with_a_gain(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "all").read_text()
    assert (page.count('class="whisker distilled"'), page.count('class="whisker alone"')) == (2, 1)


def test_a_run_with_a_page_is_linked_from_the_table(runs: list[Path], tmp_path: Path) -> None:
    card(runs[0])
    page = compare(runs, tmp_path / "all").read_text()
    assert re.findall(r'href="([^"]*)"', page) == ["../a/report.html"]


def test_names_are_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", {"alone": [0.9], "distilled": [0.9]}, name="<script>alert(1)</script>")
    assert "<script" not in compare([run], tmp_path / "all").read_text()


def test_runs_without_any_gain_are_listed_without_a_chart(runs: list[Path], tmp_path: Path) -> None:
    page = compare([runs[1]], tmp_path / "all").read_text()
    assert "None of these runs" in page and "<svg" not in page


def test_comparing_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run was given"):
        compare([], tmp_path)
