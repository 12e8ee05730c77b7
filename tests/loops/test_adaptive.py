"""A schedule that follows the loss is training state: one update per step, kept over a kill, not shared by runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from potstill.loops import checkpoint
from potstill.objective import Objective, taid_schedule, term
from tests.loops.helpers import Sentences, differences, in_child, label_error, lines, scheme, train, weights
from tests.loops.test_checkpoint import Deadly

ASKED: dict[str, Any] = {"steps": 7, "lr": 0.2, "log_every": 2, "checkpoint_every": 3}


def annealed(speed: float = 0.5) -> Objective:
    """So quick that the schedule leaves the line."""
    return Objective(term(label_error, 0.3), term("taid", mix=taid_schedule(start=0.1, end=0.9, speed=speed)))


def memory(out: Path) -> Any:
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    return checkpoint.load(found).objective


def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, last = scheme(), scheme()
    train(tmp_path / "whole", whole, objective=annealed(), **ASKED)
    killed = in_child(lambda: train(tmp_path / "killed", scheme(), source=Deadly(5), objective=annealed(), **ASKED))
    assert killed == signal.SIGKILL
    train(tmp_path / "killed", last, objective=annealed(), **ASKED)
    assert memory(tmp_path / "killed") == memory(tmp_path / "whole")
    assert differences(weights(whole), weights(last)) == 0.0
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_the_schedule_reaches_the_training(tmp_path: Path) -> None:
    quick, slow = scheme(), scheme()
    train(tmp_path / "quick", quick, objective=annealed(0.5), **ASKED)
    train(tmp_path / "slow", slow, objective=annealed(0.0), **ASKED)
    assert differences(weights(quick), weights(slow)) > 1e-4


def test_accumulation_moves_it_no_faster(tmp_path: Path) -> None:
    train(tmp_path / "large", source=Sentences(size=4), objective=annealed(), **ASKED)
    train(tmp_path / "small", source=Sentences(size=1), objective=annealed(), accumulate=4, **ASKED)
    large, small = (memory(tmp_path / name)["taid.mix"] for name in ("large", "small"))
    assert small == {name: pytest.approx(value, abs=1e-10) for name, value in large.items()}
    assert large["share"] > 0.1


def test_two_runs_of_one_objective_do_not_share_it(tmp_path: Path) -> None:
    objective = annealed()
    first, second = scheme(), scheme()
    train(tmp_path / "first", first, objective=objective, **ASKED)
    train(tmp_path / "second", second, objective=objective, **ASKED)
    assert differences(weights(first), weights(second)) == 0.0


def test_the_loss_it_follows_is_that_of_its_own_term(tmp_path: Path) -> None:
    train(tmp_path, objective=annealed(), steps=1, lr=0.1)
    assert memory(tmp_path)["taid.mix"]["loss"] == pytest.approx(lines(tmp_path)[-1]["terms"]["taid"])


def test_a_run_without_one_keeps_nothing(tmp_path: Path) -> None:
    train(tmp_path, steps=1)
    assert memory(tmp_path) == {}
