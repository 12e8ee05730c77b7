"""Laws of the offline scheme: a dry run that leaves no trace, a teacher that never changes, heads that train and go."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.core.catalog import find, part
from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import IGNORED, Batch, Dense, Need, PerExample, PerItem, Projection, Signal
from potstill.objective import Objective, term
from potstill.schemes import Offline
from potstill.students import module
from potstill.teachers import local


@part("loss")
def right(student_logits: Tensor, labels: Tensor, /) -> PerItem:
    return functional.cross_entropy(student_logits, labels, reduction="none")


@part("loss")
def alike(student_logits: Tensor, teacher_logits: Tensor, /) -> PerItem:
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)


@part("loss")
def near(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    return (student_feature - teacher_feature).square().flatten(1).mean(dim=1)


@part("loss", head="projector")
def hint(student_feature: Tensor, teacher_feature: Tensor, /) -> PerExample:
    return (student_feature - teacher_feature).square().flatten(1).mean(dim=1)


@part("loss", head="variational")
def vague(student_feature: Tensor, student_variance: Tensor, teacher_feature: Tensor, /) -> PerExample:
    error = (student_feature - teacher_feature).square() / student_variance
    return (error + student_variance.log()).flatten(1).mean(dim=1)


def network(channels: int, *, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(16 * channels, classes),
    )


def images(seed: int = 0, *, labels: Tensor | None = None, mask: Tensor | None = None) -> Batch:
    random = torch.Generator().manual_seed(seed)
    return Batch(
        keys=tuple("abcdef"),
        inputs={"image": torch.randn(6, 2, 4, 4, generator=random)},
        labels=torch.randint(3, (6,), generator=random) if labels is None else labels,
        mask=torch.ones(6, dtype=torch.bool) if mask is None else mask,
    )


def everything() -> Objective:
    return Objective(
        term(right, 0.5), term(alike, 2.0), term(hint, 3.0, at={"0": "0"}), term(vague, 0.1, at={"1": "1"})
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def train(scheme: Offline, objective: Objective, *, steps: int = 5) -> None:
    scheme.prepare(objective, images())
    learners = scheme.learners().train()
    optimizer = torch.optim.SGD(learners.parameters(), lr=0.05)
    for step in range(steps):
        batch = images(step)
        for lesson in scheme.lessons(batch, objective.need("student"), objective.need("teacher")):
            optimizer.zero_grad()
            objective(lesson, batch).backward()
            optimizer.step()
        scheme.after_step()


# The dry run.


def test_dry_run_changes_no_parameter_statistic_or_mode():
    student, teacher = network(4), network(5, seed=1)
    student[1].eval()
    scheme = Offline(student, local(teacher))
    before = state_of(student), state_of(teacher), [m.training for m in student.modules()]
    scheme.prepare(everything(), images())
    assert same(state_of(student), before[0])
    assert same(state_of(teacher), before[1])
    assert [m.training for m in student.modules()] == before[2]


def test_dry_run_takes_nothing_from_the_random_stream():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1) + torch.randn(32))

    torch.manual_seed(5)
    expected = torch.rand(3)
    scheme = Offline(Noisy(), local(network(5)))
    torch.manual_seed(5)
    scheme.prepare(Objective(term(right), term(alike), term(hint, at={"layer": "4"})), images())
    assert torch.equal(torch.rand(3), expected)


def test_dry_run_puts_the_modes_back_when_it_fails():
    scheme = Offline(network(4), local(network(5)))
    with pytest.raises(SignalError):
        scheme.prepare(Objective(term(near, at=["nowhere"])), images())
    assert scheme.learners().training
    assert scheme.student.model[2].training


def test_plan_tells_what_each_side_says():
    plan = Offline(network(4), local(network(5))).prepare(everything(), images())
    shapes = {(one.side, one.name): one.shape for one in plan.captured}
    assert shapes == {
        ("student", "classes"): (3,),
        ("student", "0"): (6, 4, 4, 4),
        ("student", "1"): (6, 4, 4, 4),
        ("teacher", "classes"): (3,),
        ("teacher", "0"): (6, 5, 4, 4),
        ("teacher", "1"): (6, 5, 4, 4),
    }


def test_plan_counts_parameters_of_student_teacher_and_heads():
    student, teacher = network(4), network(5)
    plan = Offline(student, local(teacher)).prepare(everything(), images())
    assert plan.num_student_parameters == sum(p.numel() for p in student.parameters())
    assert plan.num_teacher_parameters == sum(p.numel() for p in teacher.parameters())
    # 1x1 convolution and batch norm; three 1x1 convolutions and a variance per channel.
    assert [head.num_parameters for head in plan.heads] == [4 * 5 + 2 * 5, 4 * 5 + 2 * 5 * 5 + 5]


def test_plan_has_the_loss_of_the_batch_in_eval_mode():
    student, batch = network(4), images()
    plan = Offline(student).prepare(Objective(term(right, 0.5)), batch)
    said = copy.deepcopy(student).eval()(batch.inputs["image"])
    assert plan.terms["right"] == pytest.approx(functional.cross_entropy(said, batch.labels).item())
    assert plan.loss == pytest.approx(0.5 * plan.terms["right"])


def test_plan_rows_read_as_lines():
    rows = dict(Offline(network(4), local(network(5))).prepare(everything(), images()).rows())
    assert rows["student 0"] == "[6, 4, 4, 4]"
    assert rows["head projector 0 > 0"] == "30 parameters"
    assert {"loss right", "loss alike", "loss hint", "loss vague", "loss, weighted"} <= rows.keys()


# What cannot work is said before the first step.


def test_objective_that_reads_a_teacher_needs_one():
    with pytest.raises(RecipeError, match="scheme offline, teacher: there is none, but the objective reads the logits"):
        Offline(network(4)).prepare(Objective(term(right), term(alike)), images())


@pytest.mark.parametrize(("at", "side"), [({"laier": "0"}, "laier"), ({"0": "laier"}, "laier")])
def test_unknown_layer_of_either_side_is_an_error(at, side):
    with pytest.raises(SignalError, match=f"Sequential has no layer '{side}'"):
        Offline(network(4), local(network(5))).prepare(Objective(term(hint, at=at)), images())


def test_other_numbers_of_classes_are_an_error():
    scheme = Offline(network(4), local(network(5, classes=100)))
    with pytest.raises(SignalError, match="the student has 3 classes, the teacher 100"):
        scheme.prepare(Objective(term(right), term(alike)), images())


@pytest.mark.parametrize("label", [3, -1])
def test_label_outside_the_students_classes_is_an_error(label):
    labels = torch.tensor([0, 1, 2, 0, 1, label])
    with pytest.raises(DataError, match=f"label {label} is outside the student's 3 classes"):
        Offline(network(4)).prepare(Objective(term(right)), images(labels=labels))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_label_outside_the_students_classes_is_said_before_an_accelerator_stops_on_it():
    device = torch.device("cuda")
    batch = images(labels=torch.tensor([0, 1, 2, 0, 1, 3])).to(device)
    with pytest.raises(DataError, match="label 3 is outside the student's 3 classes"):
        Offline(network(4).to(device)).prepare(Objective(term(right)), batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_dry_run_takes_nothing_from_the_accelerators_random_stream():
    device = torch.device("cuda")
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    scheme = Offline(network(4).to(device), local(network(5)).to(device))
    torch.manual_seed(5)
    scheme.prepare(everything(), images().to(device))
    assert torch.equal(torch.rand(3, device=device), expected)
    assert {parameter.device.type for parameter in scheme.learners().heads.parameters()} == {"cuda"}


def test_labels_that_do_not_count_may_be_anything():
    labels, mask = torch.tensor([0, 1, 2, 0, IGNORED, 9]), torch.tensor([True] * 5 + [False])
    assert Offline(network(4)).prepare(Objective(term(right)), images(labels=labels, mask=mask)).loss > 0.0


def test_labels_that_nobody_reads_may_be_anything():
    batch = images(labels=torch.full((6,), 9))
    assert Offline(network(4), local(network(5))).prepare(Objective(term(alike)), batch).loss > 0.0


def test_bare_module_as_teacher_is_refused():
    with pytest.raises(RecipeError, match=r"found a bare Sequential\. Freeze it first: teachers\.local"):
        Offline(network(4), network(5))


def test_teacher_that_is_the_student_is_refused():
    model = network(4)
    with pytest.raises(RecipeError, match="student and teacher share parameters"):
        Offline(model, local(model))


def test_student_that_leaves_out_a_layer_is_named():
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, batch: Batch, need: Need) -> Signal:
            return Signal(logits=Dense(logits=self.layer(batch.inputs["image"].flatten(1))))

    with pytest.raises(SignalError, match="The student was asked for the logits, '0' and left out '0'"):
        Offline(Forgetful(), local(network(5))).prepare(Objective(term(right), term(near, at=["0"])), images())


# Lessons.


def test_a_lesson_holds_both_sides_and_the_teachers_is_detached():
    scheme, objective = Offline(network(4), local(network(5))), everything()
    scheme.prepare(objective, images())
    [lesson] = scheme.lessons(images(), objective.need("student"), objective.need("teacher"))
    assert lesson.student.logits.logits.requires_grad
    assert not lesson.teacher.logits.logits.requires_grad
    assert set(lesson.teacher.features) == {"0", "1"}
    assert "hint/0>0.student_feature" in lesson.student.features


def test_a_teacher_of_which_nothing_is_needed_is_not_asked():
    def silent(batch: Batch, need: Need) -> Signal:
        raise AssertionError("nobody needs this")

    scheme = Offline(network(4), silent)
    plan = scheme.prepare(Objective(term(right)), images())
    [lesson] = scheme.lessons(images(), Need(logits=True), Need())
    assert lesson.teacher.logits is None
    assert plan.num_teacher_parameters is None


def test_a_teacher_that_forgets_to_detach_is_detached():
    weight = torch.ones(32, 3, requires_grad=True)

    def careless(batch: Batch, need: Need) -> Signal:
        return Signal(logits=Dense(logits=batch.inputs["image"].flatten(1) @ weight))

    [lesson] = Offline(network(4), careless).lessons(images(), Need(logits=True), Need(logits=True))
    assert not lesson.teacher.logits.logits.requires_grad


def test_lessons_are_asked_of_the_module_that_was_bound_last():
    calls = []
    scheme = Offline(network(4))
    scheme.prepare(Objective(term(right)), images())

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Batch, need: Need) -> Signal:
            calls.append(need)
            return self.inner(batch, need)

    scheme.rebind(Wrapped(scheme.learners()))
    list(scheme.lessons(images(), Need(logits=True), Need()))
    assert calls == [Need(logits=True)]


# Runs.


def test_a_run_leaves_the_teacher_as_it_was():
    teacher = network(5, seed=1)
    guide = local(teacher)
    identity, before = guide.identity, state_of(teacher)
    train(Offline(network(4), guide), everything())
    assert same(state_of(teacher), before)
    assert local(teacher).identity == identity
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_train_and_eval_of_the_learners_do_not_touch_the_teacher():
    teacher = network(5)
    scheme = Offline(network(4), local(teacher))
    scheme.prepare(everything(), images())
    scheme.learners().train()
    assert not any(m.training for m in teacher.modules())


def test_every_parameter_of_the_heads_moves_in_one_step():
    scheme, objective = Offline(network(4), local(network(5, seed=1))), everything()
    scheme.prepare(objective, images())
    heads = scheme.learners().train().heads
    before = state_of(heads)
    [lesson] = scheme.lessons(images(), objective.need("student"), objective.need("teacher"))
    objective(lesson, images()).backward()
    torch.optim.SGD(scheme.learners().parameters(), lr=0.1).step()
    assert len(heads) == 2
    assert [name for name, tensor in heads.named_parameters() if torch.equal(before[name], tensor)] == []


def test_the_exported_student_has_no_heads_and_gives_the_same_answer():
    scheme, batch = Offline(network(4), local(network(5, seed=1))), images()
    train(scheme, everything())
    scheme.learners().eval()
    fresh = module(network(4, seed=9)).eval()
    fresh.load_state_dict(scheme.student.state_dict())
    need = Need(logits=True)
    assert torch.equal(fresh(batch, need).logits.logits, scheme.learners()(batch, need).logits.logits)


def test_training_with_a_head_starts_the_student_like_training_without():
    def stream_after(objective: Objective) -> Tensor:
        scheme = Offline(network(4), local(network(5, seed=1)))
        torch.manual_seed(4)
        scheme.prepare(objective, images())
        return torch.rand(3)

    assert torch.equal(stream_after(everything()), stream_after(Objective(term(right))))


def test_each_stage_has_its_own_heads_and_the_same_student():
    scheme = Offline(network(4), local(network(5)))
    train(scheme, everything(), steps=1)
    student = scheme.student
    scheme.prepare(Objective(term(right)), images())
    assert len(scheme.learners().heads) == 0
    assert scheme.student is student is scheme.learners().student
    [lesson] = scheme.lessons(images(), Need(logits=True), Need())
    assert lesson.student.features == {}


def test_memory_of_the_last_lesson_is_not_held():
    scheme, objective = Offline(network(4), local(network(5))), everything()
    scheme.prepare(objective, images())
    [lesson] = scheme.lessons(images(), objective.need("student"), objective.need("teacher"))
    kept = [weakref.ref(t) for side in (lesson.student, lesson.teacher) for t in side.features.values()]
    del lesson
    assert kept
    assert all(reference() is None for reference in kept)


def test_a_student_that_gives_its_head_unapplied_is_rehearsed_too():
    class Unapplied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 3)

        def forward(self, batch: Batch, need: Need) -> Signal:
            hidden = batch.inputs["image"].flatten(1)
            return Signal(logits=Projection(hidden=hidden, weight=self.head.weight, bias=self.head.bias))

    student, batch = Unapplied(), images()
    plan = Offline(student).prepare(Objective(term(right)), batch)
    said = student.head(batch.inputs["image"].flatten(1))
    assert plan.loss == pytest.approx(functional.cross_entropy(said, batch.labels).item())


def test_the_scheme_itself_has_nothing_to_save():
    scheme = Offline(network(4))
    assert scheme.state_dict() == {}
    scheme.load_state_dict({})


def test_the_scheme_is_found_by_name():
    assert find("scheme", "offline") is Offline
