"""The pages in a real browser: they fit wide and narrow screens, ask for nothing and run nothing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from potstill.report import card, compare
from tests.report.helpers import write_run
from tests.report.test_card import HOSTILE

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1400,1000 "
    "--enable-logging=stderr --v=0 --dump-dom"
)
# A page as narrow as a phone only exists inside a frame: the browser's own window does not get that small.
MEASURE = """
<script>
addEventListener("load", () => {
  console.error("a line that the test must see");
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const charts = [...page.querySelectorAll(".chart text")].map((text) => text.getBoundingClientRect());
    return {
      name: frame.id, title: page.title, wide: root.scrollWidth, screen: root.clientWidth,
      cut: charts.filter((box) => box.width && (box.left < 0 || box.right > root.clientWidth)).length,
      smallest: Math.min(...charts.filter((box) => box.height).map((box) => box.height)),
    };
  });
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "END";
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    frames: dict[str, dict[str, float | str]]
    console: list[str]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Every page at 1280 and 400 pixels, seen in one start of the browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    folder = tmp_path_factory.mktemp("pages")
    arms = {"alone": [0.941, 0.947, 0.938], "distilled": [0.962, 0.958, 0.963], "teacher": [0.98], "other_arm": [0.5]}
    long = "a_name_without_any_place_to_break_" * 4
    recipe = f"note: {long * 3}\n"
    run = write_run(folder / "run", arms, name=long, recipe=recipe, class_names=[f"{i} {long}" for i in range(30)])
    hostile = write_run(
        folder / "hostile", arms, name=HOSTILE, about=HOSTILE, recipe=HOSTILE, class_names=[HOSTILE] * 9
    )
    pages = {"card": card(run).read_text(), "compare": compare([run, hostile], folder / "all").read_text()}
    frames = [_frame(f"{name}-{width}", text, width) for name, text in pages.items() for width in (1280, 400)]
    # Without its policy the page has only escaping between it and the script.
    frames.append(
        _frame("hostile", re.sub(r'<meta http-equiv="Content-Security.*', "", card(hostile).read_text()), 400)
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><title>w</title><body>{MEASURE}{''.join(frames)}")
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"SEEN(.*)END", done.stdout)
    assert found, f"the browser measured nothing: {done.stderr[-2000:]}"
    measured = json.loads(html.unescape(found[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(frames={frame["name"]: frame for frame in measured}, console=console)


@pytest.mark.parametrize("name", ["card-1280", "card-400", "compare-1280", "compare-400"])
def test_no_page_scrolls_sideways(seen: Seen, name: str) -> None:
    frame = seen.frames[name]
    assert frame["screen"] == int(name.rpartition("-")[2])
    assert frame["wide"] <= frame["screen"]


@pytest.mark.parametrize("name", ["card-1280", "card-400", "compare-1280", "compare-400"])
def test_no_text_of_a_chart_is_cut_or_too_small(seen: Seen, name: str) -> None:
    assert seen.frames[name]["cut"] == 0
    assert seen.frames[name]["smallest"] >= 9


def test_the_console_stays_silent(seen: Seen) -> None:
    # The page's policy forbids every request, so the browser would complain here about the first one tried.
    control, *others = seen.console
    assert "a line that the test must see" in control
    assert others == []


def test_a_script_in_the_recipe_does_not_run(seen: Seen) -> None:
    assert str(seen.frames["hostile"]["title"]).startswith("</title><script>")


def _frame(name: str, page: str, width: int) -> str:
    style = f"border:0;width:{width}px;height:900px"
    return f'<iframe id="{name}" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
