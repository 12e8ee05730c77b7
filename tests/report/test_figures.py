"""Means, spreads and curves from run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError, StorageError
from potstill.report.figures import Estimate, Summary, mean_curve
from tests.report.helpers import write_run


def test_the_spread_is_the_sample_standard_deviation() -> None:
    # 1, 2, 3: mean 2, squares 1 + 0 + 1, divided by n - 1 = 2.
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(mean=2.0, sd=1.0, num_seeds=3)


def test_one_seed_has_no_spread() -> None:
    assert Estimate.of([0.5, None]) == Estimate(mean=0.5, sd=None, num_seeds=1)


def test_nothing_measured_is_no_estimate() -> None:
    assert Estimate.of([None]) is None


def test_a_change_is_the_mean_of_paired_differences(tmp_path: Path) -> None:
    # Differences .01, .02, .03: the seeds move together, so the spread of the change is that of these alone.
    run = write_run(tmp_path, {"alone": [0.5, 0.7, 0.9], "distilled": [0.51, 0.72, 0.93]})
    change = Summary.read(run).change("accuracy")
    assert change is not None
    assert (change.mean, change.sd) == (pytest.approx(0.02), pytest.approx(0.01))


def test_seeds_are_paired_by_number_not_by_place(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.5, 0.7, 0.9], "distilled": [0.6, 0.8]})
    content = json.loads((run / "summary.json").read_text())
    content["arms"]["alone"].reverse()
    (run / "summary.json").write_text(json.dumps(content))
    changes = Summary.read(run).changes("accuracy")
    assert [(change.seed, change.amount) for change in changes] == [(0, 0.1), (1, 0.1)]


def test_opposite_changes_cancel_exactly(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.7, 0.8], "distilled": [0.8, 0.7]})
    change = Summary.read(run).change("accuracy")
    assert change is not None and change.mean == 0.0


def test_scores_come_from_the_arm_where_the_summary_has_none(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"distilled": [0.9]})
    content = json.loads((run / "summary.json").read_text())
    del content["arms"]["distilled"][0]["scores"]
    (run / "summary.json").write_text(json.dumps(content))
    estimate = Summary.read(run).estimate("distilled", "accuracy")
    assert estimate is not None and estimate.mean == 0.9


def test_training_seconds_are_those_of_the_last_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]}, steps=100)
    seconds = Summary.read(run).estimate("alone", "seconds")
    assert seconds is not None and seconds.mean == pytest.approx(3.1)


def test_a_step_logged_again_after_a_kill_counts_once_and_as_the_later(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]})
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    _write_metrics(run, lines)
    assert _curve(run) == ((1, 3.0), (2, 2.0), (3, 1.0))


def test_a_stage_that_counts_anew_continues_the_one_before(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]})
    _write_metrics(run, [{"step": s, "stage": stage, "loss": 1.0} for stage in (0, 1) for s in (10, 20)])
    assert [step for step, _ in _curve(run)] == [10, 20, 30, 40]


def test_the_clock_of_each_stage_adds_to_the_training_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]})
    _write_metrics(run, [{"step": s, "stage": stage, "seconds": 2.0 * s} for stage in (0, 1) for s in (1, 2)])
    seconds = Summary.read(run).estimate("alone", "seconds")
    assert seconds is not None and seconds.mean == 8.0


def test_a_loss_that_is_no_number_is_left_out_of_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]})
    _write_metrics(run, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}])
    assert _curve(run) == ((1, 1.0),)


def test_the_mean_curve_stands_where_all_seeds_do() -> None:
    assert mean_curve([((1, 2.0), (2, 4.0), (3, 0.0)), ((2, 6.0), (1, 4.0))]) == ((1, 3.0), (2, 5.0))


def test_a_folder_without_a_summary_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no summary\.json.*finished run"):
        Summary.read(tmp_path)


def test_a_torn_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"arms": {')
    with pytest.raises(StorageError, match=r"summary\.json is torn"):
        Summary.read(tmp_path)


def test_a_summary_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"arms": {"alone": [{"scores": {}}]}}')
    with pytest.raises(StorageError, match=r"not the summary of a run.*seed"):
        Summary.read(tmp_path)


def test_a_torn_line_of_metrics_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"alone": [0.9]})
    (run / "alone-seed0" / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl is torn"):
        Summary.read(run)


def _write_metrics(run: Path, lines: list[dict[str, float]]) -> None:
    (run / "alone-seed0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _curve(run: Path) -> tuple[tuple[int, float], ...]:
    return Summary.read(run).arms["alone"].runs[0].curves["loss"]
