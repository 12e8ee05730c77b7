"""Several runs in one table, the largest gain first: compare.html and compare.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from potstill.core.errors import DataError
from potstill.core.run import RunFolder, write_text
from potstill.report import charts, words
from potstill.report.figures import Estimate, Summary
from potstill.report.pages import render


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write compare.html and compare.md into the folder `out`; returns the path of the page.

    Raises what reading a run raises, and DataError where no run was given.
    """
    runs = _ranked(folders)
    values = {"table": _table(runs), "headline": _headline(runs), "note": words.SPREAD_NOTE}
    drawn = [charts.Interval(label=run.name, estimate=gain, note=note) for run, gain, note in _gains(runs)]
    chart = charts.whiskers(drawn, title="Gain of every run in percentage points") if drawn else None
    page = out / "compare.html"
    write_text(out / "compare.md", render("compare.md.jinja", **values))
    write_text(page, render("compare.html.jinja", **values, links=[_link(run, out) for run in runs], chart=chart))
    return page


def comparison(folders: Sequence[Path]) -> words.Table:
    """The table of `compare`, for a terminal: the largest gain first, runs without a gain last."""
    return _table(_ranked(folders))


def _ranked(folders: Sequence[Path]) -> list[Summary]:
    if not folders:
        raise DataError("compare: no run was given. Give the folders of two or more finished runs.")
    return sorted((Summary.read(folder) for folder in folders), key=_by_gain)


def _table(runs: Sequence[Summary]) -> words.Table:
    columns = ("Run", "Alone, %", "Distilled, %", "Gain, points", "Wins", "Teacher, %", "Training, s")
    rows = (words.Row(title=run.name, cells=_cells(run), tone=words.tone(run)) for run in runs)
    return words.Table(columns=columns, rows=tuple(rows))


def _by_gain(run: Summary) -> tuple[bool, float, str]:
    gain = run.change("accuracy")
    return (gain is None, 0.0 if gain is None else -gain.mean, run.name)


def _cells(run: Summary) -> tuple[str, ...]:
    alone, distilled, teacher = (run.estimate(arm, "accuracy") for arm in ("alone", "distilled", "teacher"))
    gain, seconds = run.change("accuracy"), run.estimate("distilled", "seconds")
    return (
        words.share_cell(alone),
        words.share_cell(distilled),
        words.UNKNOWN if gain is None else words.gain_cell(gain),
        words.UNKNOWN if gain is None else words.wins(run),
        words.share_cell(teacher),
        words.UNKNOWN if seconds is None else f"{seconds.mean:,.1f}",
    )


def _gains(runs: Sequence[Summary]) -> list[tuple[Summary, Estimate, str]]:
    """Runs with a gain, that gain in percentage points, and how it is written."""
    found = []
    for run in runs:
        gain = run.change("accuracy")
        if gain is not None:
            sd = None if gain.sd is None else 100 * gain.sd
            in_points = Estimate(mean=100 * gain.mean, sd=sd, num_seeds=gain.num_seeds)
            found.append((run, in_points, words.points(gain.mean)))
    return found


def _headline(runs: Sequence[Summary]) -> str:
    gains = _gains(runs)
    if not gains:
        return "None of these runs has both a student alone and a distilled one."
    best, gain, said = gains[0]
    caution = " (one seed)" if gain.sd is None else ""
    num_better = sum(gain.mean > 0 for _, gain, _ in gains)
    return (
        f"Better distilled than alone on average: {num_better} of {len(gains)} runs. "
        f"The largest gain is {said} points, by {best.name}{caution}."
    )


def _link(run: Summary, out: Path) -> str:
    """Where the run's own page lies, seen from `out`; empty where it has none."""
    page = RunFolder(run.folder).report
    return quote(os.path.relpath(page, out).replace(os.sep, "/")) if page.is_file() else ""
