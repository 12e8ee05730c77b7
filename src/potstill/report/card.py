"""One run as one page: report.html, which needs nothing beside it, and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from potstill.core.run import RunFolder, write_text
from potstill.report import charts, health, numbers, words
from potstill.report.figures import ARMS, Arm, Estimate, Summary, mean_curve, scaled
from potstill.report.pages import render
from potstill.report.samples import FOLDER, PAGE, ElicitedPage, samples

MOST_CLASSES = 40
"""More rows than this make no picture; then those with the largest change are shown."""
CLASSES_PER_CHART = 20


def card(folder: Path) -> Path:
    """Write report.html and report.md into a run's folder; returns the path of the page.

    Raises DataError where the folder holds no finished run, StorageError where one of its files is torn.
    """
    summary = Summary.read(folder)
    elicited = ElicitedPage.read(folder)
    if elicited is not None and not summary.arms:
        write_text(folder / "report.md", (folder / FOLDER / "README.md").read_text(encoding="utf-8"))
        return samples(folder, name=RunFolder(folder).report.name)
    if elicited is not None:
        samples(folder)
    classes = _class_rows(summary)
    shown = _most_changed(classes)
    shared = {
        "summary": summary,
        "headline": words.headline(summary),
        "verdict": words.verdict(summary),
        "arms": words.arms(summary),
        "table": words.table(summary),
        "notes": words.notes(summary),
        "facts": _facts(summary),
        "seeds": _seed_table(summary),
    }
    page = render(
        "card.html.jinja",
        **shared,
        lead=words.lead_of(summary),
        elicited=elicited,
        row_pages=_row_pages(summary),
        data=Markup(summary.data_page),
        samples=summary.samples,
        arm_title=words.title,
        strip=_strip(summary),
        gains=_gains(summary),
        gains_caption=_gains_caption(summary, words.lead_of(summary)),
        classes=_classes(shown),
        class_table=_class_table(summary, shown),
        num_classes=(len(shown), len(classes)),
        legend=charts.legend({part: words.title(name) for part, name in summary.roles.items()}),
        training=[panel for arm in summary.arms.values() for panel in _training(arm, summary.role(arm.name))],
        health=health.panels(summary),
        health_table=health.table(summary),
    )
    write_text(folder / "report.md", render("card.md.jinja", **shared))
    write_text(RunFolder(folder).report, page)
    return RunFolder(folder).report


def _row_pages(summary: Summary) -> tuple[tuple[str, str], ...]:
    """(title, address) of the pages with the rows of each round."""
    folders = ((words.title(arm.name), run.seed, run.folder) for arm in summary.arms.values() for run in arm.runs)
    return tuple(
        (f"{title}, seed {seed}", (folder.path / PAGE).relative_to(summary.folder).as_posix())
        for title, seed, folder in folders
        if folder is not None and (folder.path / PAGE).is_file()
    )


def _facts(summary: Summary) -> tuple[tuple[str, str], ...]:
    """The line under the verdict: what was run, on what, how long."""
    seeds = sorted({run.seed for name in summary.students for run in summary.arms[name].runs})
    items = {
        run.numbers["num_items"] for arm in summary.arms.values() for run in arm.runs if "num_items" in run.numbers
    }
    facts = [
        ("Seeds", ", ".join(str(seed) for seed in seeds)),
        ("Test items", f"{items.pop():,.0f}" if len(items) == 1 else ""),
        ("Classes", str(len(summary.class_names) or "")),
        ("Whole run", numbers.duration(summary.seconds) if summary.seconds is not None else ""),
        ("Cores", summary.machine.get("cores", "")),
    ]
    return tuple((name, value) for name, value in facts if value)


def _seed_table(summary: Summary) -> words.Table | None:
    """The leading measure seed by seed, paired."""
    lead = words.lead_of(summary)
    if summary.names_arms:
        return _seed_table_of_arms(summary, lead)
    rows = tuple(
        words.Row(
            title=str(change.seed),
            cells=(lead.write(change.alone), lead.write(change.distilled), lead.signed(change.amount)),
        )
        for change in summary.changes(lead.key)
    )
    unit = f", {lead.unit}" if lead.unit else ""
    change = "Gain, points" if lead.unit else "Change"
    columns = ("Seed", f"{words.title('alone')}{unit}", f"{words.title('distilled')}{unit}", change)
    return words.Table(columns=columns, rows=rows) if rows else None


def _seed_table_of_arms(summary: Summary, lead: words.Lead) -> words.Table | None:
    scores = {
        name: {run.seed: run.numbers[lead.key] for run in summary.arms[name].runs if lead.key in run.numbers}
        for name in summary.students
    }
    rows = tuple(
        words.Row(
            title=str(seed),
            cells=tuple(lead.write(of[seed]) if seed in of else words.UNKNOWN for of in scores.values()),
        )
        for seed in sorted({seed for of in scores.values() for seed in of})
    )
    unit = f", {lead.unit}" if lead.unit else ""
    columns = ("Seed", *(f"{words.title(name)}{unit}" for name in scores))
    return words.Table(columns=columns, rows=rows) if rows else None


def _strip(summary: Summary) -> Markup | None:
    lead, rows = words.lead_of(summary), []
    for name, arm in summary.arms.items():
        values = [lead.scale * run.numbers[lead.key] for run in arm.runs if lead.key in run.numbers]
        if values:
            spots = tuple(charts.Spot(arm=summary.role(name), value=value) for value in values)
            rows.append(charts.DotRow(label=words.title(name), spots=spots))
    title = f"{lead.name} of every seed{' in percent' if lead.unit else ''}"
    return charts.strip(rows, unit=lead.unit, title=title) if rows else None


def _gains(summary: Summary) -> Markup | None:
    lead = words.lead_of(summary)
    if summary.names_arms:
        return _gains_of_arms(summary, lead)
    changes, mean = summary.changes(lead.key), summary.change(lead.key)
    if mean is None:
        return None
    rows = [
        charts.Interval(
            label=f"seed {change.seed}",
            estimate=Estimate(mean=lead.scale * change.amount, sd=None, num_seeds=1),
            note=lead.signed(change.amount),
        )
        for change in changes
    ]
    title = f"Gain of every seed in {'percentage points' if lead.unit else lead.name.lower()}"
    return charts.gains(rows, scaled(mean, lead.scale), said=f"mean {lead.gain(mean)}", title=title, better=lead.better)


def _gains_of_arms(summary: Summary, lead: words.Lead) -> Markup | None:
    """What each arm has over the first."""
    changes = ((name, summary.change(lead.key, name)) for name in summary.students[1:])
    rows = [
        charts.Interval(label=words.title(name), estimate=scaled(change, lead.scale), note=lead.signed(change.mean))
        for name, change in changes
        if change is not None
    ]
    title = f"Gain of every arm in {'percentage points' if lead.unit else lead.name.lower()}"
    return charts.whiskers(rows, title=title, better=lead.better) if rows else None


def _gains_caption(summary: Summary, lead: words.Lead) -> str:
    unit = "in points" if lead.unit else lead.change_unit
    if summary.names_arms:
        first = words.title(summary.students[0]).lower()
        return f"Every arm over {first}, {unit}; lines are one standard deviation each way"
    return f"{'Gain' if lead.unit else 'Change'} of every seed, distilled minus alone, {unit}"


def _classes(rows: Sequence[charts.DotRow]) -> list[Markup]:
    """Accuracy of each class in every arm, in charts of a readable height and on one scale."""
    low = min((spot.value for row in rows for spot in row.spots), default=0.0)
    num_charts = max(1, -(-len(rows) // CLASSES_PER_CHART))
    height = max(1, -(-len(rows) // num_charts))
    return [
        charts.dots(rows[start : start + height], low=low, title="Accuracy of each class in percent")
        for start in range(0, len(rows), height)
    ]


def _class_table(summary: Summary, rows: Sequence[charts.DotRow]) -> words.Table:
    arms = [name for name in ARMS if any(spot.arm == name for row in rows for spot in row.spots)]
    compared = {"alone", "distilled"} <= set(arms)
    lines = []
    for row in rows:
        at = {spot.arm: spot.value for spot in row.spots}
        cells = [f"{at[arm]:.1f}" if arm in at else words.UNKNOWN for arm in arms]
        if compared:
            change = (at["distilled"] - at["alone"]) / 100 if {"alone", "distilled"} <= at.keys() else None
            cells.append(words.UNKNOWN if change is None else numbers.points(change))
        lines.append(words.Row(title=row.label, cells=tuple(cells)))
    titles = [summary.roles[arm].capitalize().replace("_", " ") for arm in arms]
    columns = ("Class", *titles, *(("Change",) if compared else ()))
    return words.Table(columns=columns, rows=tuple(lines))


def _most_changed(rows: Sequence[charts.DotRow]) -> Sequence[charts.DotRow]:
    """All rows where they make a picture; else those with the largest change, in the order of the classes."""
    if len(rows) <= MOST_CLASSES:
        return rows
    largest = sorted(range(len(rows)), key=lambda index: _class_change(rows[index]))[-MOST_CLASSES:]
    return [rows[index] for index in sorted(largest)]


def _class_rows(summary: Summary) -> list[charts.DotRow]:
    """One row per class that some arm was scored on; of named arms the first and the last are shown."""
    accuracies = {part: summary.arms[name].per_class() for part, name in summary.roles.items()}
    num_classes = max((len(values) for values in accuracies.values()), default=0)
    names = summary.class_names if len(summary.class_names) == num_classes else [str(i) for i in range(num_classes)]
    rows = []
    for index, label in enumerate(names):
        spots = tuple(
            charts.Spot(arm=arm, value=100 * accuracy)
            for arm, values in accuracies.items()
            if index < len(values) and (accuracy := values[index]) is not None
        )
        if spots:
            rows.append(charts.DotRow(label=label, spots=spots))
    return rows


def _class_change(row: charts.DotRow) -> float:
    at = {spot.arm: spot.value for spot in row.spots}
    return abs(at["distilled"] - at["alone"]) if {"alone", "distilled"} <= at.keys() else -1.0


def _training(arm: Arm, role: str) -> list[tuple[str, str, Markup]]:
    """The curves of one arm, the loss and then each of its terms: (arm, curve, chart)."""
    names = list(dict.fromkeys(name for run in arm.runs for name in run.curves))
    # With a single term the loss is that term times its weight: the same curve twice says nothing more.
    shown = ["loss"] if len(names) == 2 and "loss" in names else names
    panels = []
    for name in shown:
        seeds = [run.curves[name] for run in arm.runs if name in run.curves]
        drawn = charts.curves(role, seeds, mean_curve(seeds), title=f"{words.title(arm.name)}: {name} over steps")
        panels.append((words.title(arm.name), name, drawn))
    return panels
