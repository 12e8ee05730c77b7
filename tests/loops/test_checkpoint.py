"""Killed at any moment and called again, a run ends as the uninterrupted one (law D26); torn files are found out."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.core.errors import RecipeError, StorageError
from potstill.core.types import Batch
from potstill.loops import checkpoint
from potstill.objective import Objective, term
from potstill.schemes.offline import Offline
from tests.loops.helpers import (
    Sentences,
    differences,
    in_child,
    label_error,
    layer_error,
    lines,
    scheme,
    soft_error,
    train,
    weights,
)

LONG: dict[str, Any] = {"steps": 9, "lr": 0.2, "log_every": 2, "checkpoint_every": 3, "clip": 1.0}


class Deadly:
    """Sentences, of which one micro-batch kills the process that asks for it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def batch(self, index: int) -> Batch:
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sentences().batch(index)


def noisy() -> Offline:
    """Dropout inside, so that the random stream matters, and a source of numpy's and Python's numbers."""
    return Stirred(scheme(dropout=0.3).student, scheme().teacher)


class Stirred(Offline):
    """Also depends on the other two random streams, on steps, and keeps a state of its own."""

    count = 0.0

    def lessons(self, *asked: Any) -> Any:
        for lesson in super().lessons(*asked):
            noise = 1.0 + 0.1 * (np.random.rand() + random.random()) + 0.01 * self.count
            logits = lesson.student.logits
            yield type(lesson)(
                student=type(lesson.student)(
                    logits=type(logits)(hidden=logits.hidden * noise, weight=logits.weight, bias=logits.bias),
                    features=lesson.student.features,
                ),
                teacher=lesson.teacher,
            )

    def after_step(self) -> None:
        self.count += 1.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: Any) -> None:
        self.count = float(state["count"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_killed_three_times_it_ends_as_if_it_had_not_been(optimizer: str, tmp_path: Path) -> None:
    asked = {**LONG, "optimizer": optimizer, "lr": 0.2 if optimizer == "sgd" else 0.01, "accumulate": 2}
    whole, last = noisy(), noisy()
    train(tmp_path / "whole", whole, **asked)
    points = sorted(random.Random(optimizer).sample(range(1, 18), 3))
    for point in points:
        assert (
            in_child(lambda at=point: train(tmp_path / "killed", noisy(), source=Deadly(at), **asked)) == signal.SIGKILL
        )
    run = train(tmp_path / "killed", last, **asked)
    assert run.resumed_from == points[-1] // 2 // 3 * 3
    assert differences(weights(whole), weights(last)) == 0.0
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_a_kill_while_a_checkpoint_is_written_costs_only_that_checkpoint(tmp_path: Path) -> None:
    whole, last = noisy(), noisy()
    train(tmp_path / "whole", whole, **LONG)
    assert in_child(lambda: train(tmp_path / "killed", Dying(noisy()), **LONG)) == signal.SIGKILL
    # What a kill between two files of a checkpoint leaves behind.
    draft = tmp_path / "killed" / "checkpoints" / ".step-00000006.draft-1"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    run = train(tmp_path / "killed", last, **LONG)
    assert run.resumed_from == 3
    assert differences(weights(whole), weights(last)) == 0.0
    assert not draft.exists()


class Dying:
    """A scheme that takes the process down when its state is asked for the second time."""

    def __init__(self, inner: Offline) -> None:
        self.inner, self.asked = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def state_dict(self) -> dict[str, Tensor]:
        self.asked += 1
        if self.asked == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.state_dict()


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path: Path) -> None:
    first, again = noisy(), noisy()
    run = train(tmp_path, first, **LONG)
    repeated = train(tmp_path, again, source=Deadly(1), **LONG)
    assert differences(weights(first), weights(again)) == 0.0
    assert (repeated.resumed_from, repeated.last, repeated.seconds) == (9, run.last, run.seconds)


def test_a_finished_run_is_left_in_eval_mode(tmp_path: Path) -> None:
    again = noisy()
    train(tmp_path, noisy(), **LONG)
    train(tmp_path, again, **LONG)
    assert not any(module.training for module in again.student.modules())


def test_stages_share_a_folder_and_each_continues(tmp_path: Path) -> None:
    whole, last = scheme(dropout=0.3), scheme(dropout=0.3)
    stages: list[dict[str, Any]] = [
        {"stage": 0, "objective": Objective(term(layer_error, at=["blocks.0"])), "steps": 4, "checkpoint_every": 2},
        {"stage": 1, "objective": Objective(term(label_error)), "steps": 6, "checkpoint_every": 2},
    ]
    for stage in stages:
        train(tmp_path / "whole", whole, **stage)

    def both() -> None:
        given = scheme(dropout=0.3)
        train(tmp_path / "killed", given, **stages[0])
        train(tmp_path / "killed", given, source=Deadly(3), **stages[1])

    assert in_child(both) == signal.SIGKILL
    resumed = [train(tmp_path / "killed", last, **stage).resumed_from for stage in stages]
    assert resumed == [4, 2]
    assert differences(weights(whole), weights(last)) == 0.0
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "settings.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(
    name: str, harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, last = noisy(), noisy()
    train(tmp_path, whole, **LONG)
    path = tmp_path / "checkpoints" / "step-00000009" / name
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        # The manifest's middle is inside a digest, so this changes a digit of it.
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if harm == "cut" else flipped)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, last, **LONG)
    assert run.resumed_from == 6
    assert "step-00000009" in caplog.text
    assert differences(weights(whole), weights(last)) == 0.0


def test_with_every_checkpoint_torn_the_run_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, last = noisy(), noisy()
    train(tmp_path, whole, **LONG)
    written = lines(tmp_path)
    for state in tmp_path.rglob("state.pt"):
        state.unlink()
    assert train(tmp_path, last, **LONG).resumed_from == 0
    assert caplog.text.count("state.pt is torn") == 2
    assert lines(tmp_path) == written
    assert differences(weights(whole), weights(last)) == 0.0


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000009"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 0.05}, r"holds a run with lr 0\.2, this one says 0\.05"),
        ({"steps": 10}, "with steps 9, this one says 10"),
        ({"optimizer": "adamw"}, "with optimizer sgd, this one says adamw"),
        ({"train": ["blocks"]}, r"with train \[\], this one says \['blocks'\]"),
        ({"seed": 1, "clip": None}, r"with clip 1\.0, this one says None; with seed 0, this one says 1"),
        (
            {"objective": Objective(term(soft_error, 0.5))},
            r"with objective soft_error x 0\.7, .*, this one says soft_error x 0\.5",
        ),
    ],
)
def test_other_settings_are_refused_and_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    with pytest.raises(RecipeError, match=f"{said}; choose another out= or delete the folder"):
        train(tmp_path, **{**LONG, **changed})


def test_another_student_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    larger = scheme()
    larger.student.register_parameter("more", nn.Parameter(torch.zeros(5)))
    with pytest.raises(RecipeError, match=r"with parameters \d+, this one says \d+"):
        train(tmp_path, larger, **LONG)


def test_how_often_it_saves_and_logs_may_change(tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000009")
    assert train(tmp_path, **{**LONG, "checkpoint_every": 1, "log_every": 1}).resumed_from == 6


def test_a_disk_that_refuses_leaves_the_checkpoints_before_and_no_draft(tmp_path: Path) -> None:
    asked = {**LONG, "steps": 6}
    train(tmp_path, **asked)
    for name in ("model.safetensors", "state.pt"):
        limit = (tmp_path / "checkpoints" / "step-00000006" / name).stat().st_size - 100
        out = tmp_path / name

        def constrained(out: Path = out, limit: int = limit) -> None:
            from contextlib import suppress

            def tighten(step: int, record: object) -> None:
                if step == 4:
                    # Larger files are refused from here on, as a full disk would.
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            with suppress(StorageError):
                train(out, watch=[tighten], **asked)
                raise AssertionError("nothing was refused")

        assert in_child(constrained) == 0
        left = [path.name for path in (out / "checkpoints").iterdir()]
        assert left == ["step-00000003"]
        assert checkpoint.newest(out / "checkpoints") is not None


def test_lines_of_a_metrics_file_cut_short_are_written_again(tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    written = lines(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000009")
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    train(tmp_path, **LONG)
    assert lines(tmp_path) == written


def test_the_settings_of_a_run_are_readable(tmp_path: Path) -> None:
    train(tmp_path, **LONG)
    settings = json.loads((tmp_path / "checkpoints" / "step-00000009" / "settings.json").read_text())
    assert (settings["lr"], settings["processes"], settings["accumulate"]) == (0.2, 1, 1)
    assert settings["objective"].startswith("soft_error x 0.7, label_error x 0.3, layer_error x 0.1 blocks.0>blocks.0")
