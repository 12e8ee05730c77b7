"""The page and the Markdown of one run."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.report import card
from tests.report.helpers import write_run

FULL = {"alone": [0.941, 0.947, 0.938], "distilled": [0.962, 0.958, 0.963], "teacher": [0.98]}
HOSTILE = "</title><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def _charts(page: str) -> list[str]:
    return re.findall(r"<svg class=\"chart\".*?</svg>", page, flags=re.DOTALL)


def test_the_page_holds_headline_table_charts_and_what_is_needed_to_repeat_it(tmp_path: Path) -> None:
    page = card(write_run(tmp_path, FULL)).read_text()
    for piece in ("96.1", "Distillation gained", "Agreement", "potstill run kd", "forward_kl, weight: 0.9", "2.13.0"):
        assert piece in page
    # Accuracy by seed, gain by seed, classes, and one curve for each of: alone, distilled and its two terms, teacher.
    assert len(_charts(page)) == 3 + 5


def test_every_chart_is_well_formed(tmp_path: Path) -> None:
    for chart in _charts(card(write_run(tmp_path, FULL, class_names=["<b>", "a & b"])).read_text()):
        assert ElementTree.fromstring(chart).attrib["role"] == "img"


def test_every_seed_is_a_mark_and_a_bar(tmp_path: Path) -> None:
    strip, gains, *_ = _charts(card(write_run(tmp_path, FULL)).read_text())
    assert (strip.count("ring alone"), strip.count("disc distilled"), strip.count("disc teacher")) == (3, 3, 1)
    assert gains.count('class="bar') == 3


def test_a_lost_seed_points_the_other_way_in_the_other_colour(tmp_path: Path) -> None:
    page = card(write_run(tmp_path, {"alone": [0.9, 0.9], "distilled": [0.95, 0.88]})).read_text()
    gains = _charts(page)[1]
    assert (gains.count("bar distilled"), gains.count("bar alone")) == (1, 1)


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = card(write_run(tmp_path, FULL)).read_text()
    assert not re.search(r"(src|href|url|@import|action|srcset)\s*[=(]|<link|<script|<img|https?://", page)


def test_what_the_recipe_says_is_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path, FULL, name=HOSTILE, about=HOSTILE, recipe=HOSTILE, class_names=[HOSTILE] * 10)
    page = card(run).read_text()
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;" in page


def test_markdown_shows_html_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path, FULL, name="a|b <script>", recipe="note: ```` four\n")
    card(run)
    text = (run / "report.md").read_text()
    assert r"# a\|b \<script\>" in text
    assert "`````yaml" in text


def test_markdown_has_the_same_figures_as_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, FULL)
    card(run)
    text = (run / "report.md").read_text()
    assert "| Accuracy, % | 94.2 \u00b1 0.5 | 96.1 \u00b1 0.3 | 98.0 \u00b1 \u2013 | +1.9 \u00b1 0.7 |" in text
    assert "| 2 | 93.8 | 96.3 | +2.5 |" in text


def test_every_markdown_table_has_as_many_cells_in_every_row(tmp_path: Path) -> None:
    run = write_run(tmp_path, FULL)
    card(run)
    tables = re.findall(r"(?:^\|.*\n)+", (run / "report.md").read_text(), flags=re.MULTILINE)
    assert len(tables) == 2
    for rows in tables:
        assert len({line.rstrip().count("|") for line in rows.splitlines()}) == 1


@pytest.mark.parametrize(
    "arms", [["distilled"], ["alone"], ["teacher"], ["alone", "distilled"], ["distilled", "teacher"]]
)
def test_missing_arms_leave_no_empty_places(tmp_path: Path, arms: list[str]) -> None:
    page = card(write_run(tmp_path, {arm: FULL[arm] for arm in arms})).read_text()
    assert "None" not in page and "nan" not in page
    assert ("Gain of every seed" in page) == (arms == ["alone", "distilled"])


def test_a_run_with_nothing_but_a_summary_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"name": "bare", "arms": {}}')
    assert "No accuracy was measured" in card(tmp_path).read_text()


def test_an_arm_without_a_folder_has_scores_and_no_curve(tmp_path: Path) -> None:
    content = {"name": "given", "arms": {"teacher": [{"seed": 0, "scores": {"accuracy": 0.5}}]}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    page = card(tmp_path).read_text()
    assert "50.0" in page and "Training" not in page


def test_of_many_classes_those_that_changed_most_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9], "distilled": [0.9]}, class_names=[f"kind {i}" for i in range(100)])
    content = json.loads((run / "summary.json").read_text())
    for arm, shares in (("alone", [0.5] * 100), ("distilled", [0.5 + i / 1000 for i in range(100)])):
        content["arms"][arm][0]["scores"]["per_class"] = shares
    (run / "summary.json").write_text(json.dumps(content))
    page = card(run).read_text()
    assert "40 of 100 classes" in page
    assert ">kind 99<" in page and ">kind 60<" in page and ">kind 59<" not in page


def test_a_class_without_examples_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"distilled": [0.9]}, class_names=["here", "absent"])
    content = json.loads((run / "summary.json").read_text())
    content["arms"]["distilled"][0]["scores"]["per_class"] = [0.9, None]
    (run / "summary.json").write_text(json.dumps(content))
    page = card(run).read_text()
    assert ">here<" in page and ">absent<" not in page


def test_a_long_run_does_not_make_a_large_page(tmp_path: Path) -> None:
    page = card(write_run(tmp_path, FULL, steps=20_000)).read_text()
    assert len(page) < 100_000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, FULL)
    assert card(run).read_bytes() == card(run).read_bytes()


def test_an_unfinished_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json"):
        card(tmp_path)
    assert list(tmp_path.iterdir()) == []
