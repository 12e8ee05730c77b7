"""One arm of a run: a model trained through its stages, exported, scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from potstill.core.run import RunFolder, write_json, write_text
from potstill.recipe.building import load_student, make_model, objective_of, read_data, save_student, source_of
from potstill.recipe.calls import Call
from potstill.recipe.materials import Material
from potstill.recipe.solving import Problems, Solved, solved
from potstill.recipe.stages import Stage

if TYPE_CHECKING:
    from torch import nn

    from potstill.core.types import Teacher
    from potstill.loops.parallel import Ranks
    from potstill.schemes import Offline


def train(
    call: Call,
    stages: Sequence[Stage],
    scheme_of: Callable[[nn.Module], Offline],
    arm: RunFolder,
    *,
    seed: int,
    judge: Teacher | None,
    ranks: Ranks,
    task: Problems | None,
) -> nn.Module:
    """A model of this seed through all its stages, exported and scored. A finished one is read back."""
    if ranks.from_main(arm.scores.exists):
        return load_student(arm.student).to(ranks.device)
    data = read_data(stages[-1].data, seed=seed)
    model = make_model(call, data, seed=seed)
    train_and_export(call, model, stages, scheme_of, arm, seed=seed, ranks=ranks)
    ranks.from_main(lambda: score_into(arm, model, data, judge=judge, task=task))
    return model


def train_and_export(
    call: Call,
    model: nn.Module,
    stages: Sequence[Stage],
    scheme_of: Callable[[nn.Module], Offline],
    arm: RunFolder,
    *,
    seed: int,
    ranks: Ranks,
) -> None:
    """`model`, which `call` made, through all stages, then its clean export. It goes on from a checkpoint in `arm`."""
    from potstill.loops.fit import fit

    for number, stage in enumerate(stages):
        scheme = scheme_of(model)
        fit(
            scheme,
            objective_of(stage, scheme),
            source_of(stage, read_data(stage.data, seed=seed), scheme, seed=seed),
            out=arm.path,
            stage=number,
            seed=seed,
            train=stage.train,
            **stage.fit,
        )
    data = read_data(stages[-1].data, seed=seed)
    ranks.from_main(lambda: save_student(call, model, data, arm.student))


def score_into(
    arm: RunFolder,
    model: nn.Module,
    data: Material,
    *,
    judge: Teacher | None,
    task: Problems | None,
    more: Mapping[str, object] | None = None,
) -> None:
    """Write what an arm says and its scores, with what `more` there is to tell: the mark that it is finished."""
    done = solved_by(model, task)
    write_examples(arm, data.examples(model) if done is None else done.lines)
    write_json(arm.scores, {**scores_of(model, data, judge=judge, done=done), **(more or {})})


def write_examples(arm: RunFolder, lines: Sequence[Mapping[str, str]]) -> None:
    """What an arm's model says, for people to read."""
    if lines:
        write_text(arm.examples, "".join(f"{json.dumps(line)}\n" for line in lines))


def scores_of(model: nn.Module, data: Material, *, judge: Teacher | None, done: Solved | None) -> dict[str, object]:
    """By the test part, and by the problems that were `done`."""
    from potstill.evaluate import can_judge, evaluate, latency
    from potstill.students.module import as_student

    student, one = as_student(model), data.test.batch(0)
    judge = judge if judge is not None and can_judge(judge, one, student) else None
    scores = evaluate(student, data.test.batches(data.num_scored), teacher=judge)
    return {**({} if done is None else done.scores), **data.scores(scores, latency(student, one))}


def solved_by(model: nn.Module, task: Problems | None) -> Solved | None:
    """None where there is no task, or for a model that cannot write."""
    from potstill.students import Adapted, HfModel

    inside = model.student if isinstance(model, Adapted) else model
    return solved(inside, task) if task is not None and isinstance(inside, HfModel) else None
