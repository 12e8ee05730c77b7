"""Laws of a teacher that runs here: frozen, in eval mode, without gradient and the same after a run as before."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from potstill.core.errors import DataError, SignalError
from potstill.core.types import Batch, Dense, Need, Signal, Teacher
from potstill.students import module
from potstill.teachers import Local, load_weights, local

LOGITS = Need(logits=True)


def network(seed: int = 0, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, classes))


def images(seed: int = 0) -> Batch:
    return Batch(
        keys=tuple("abcde"),
        inputs={"image": torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))},
        labels=torch.zeros(5, dtype=torch.long),
        mask=torch.ones(5, dtype=torch.bool),
    )


class Own(nn.Module):
    """A student written by hand: forward(batch, need) -> Signal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Batch, need: Need) -> Signal:
        return Signal(logits=Dense(logits=self.layer(batch.inputs["image"])))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_local_teacher_is_a_teacher_and_not_a_module():
    teacher: Teacher = local(network())
    assert isinstance(teacher, Local)
    assert not isinstance(teacher, nn.Module)


def test_answers_are_those_of_the_model_in_eval_mode():
    model, batch = network(), images()
    expected = copy.deepcopy(model).eval()(batch.inputs["image"])
    assert torch.equal(local(model)(batch, LOGITS).logits.logits, expected)


def test_a_parents_train_does_not_reach_the_next_answer():
    model, batch = network(), images()
    teacher = local(model)
    first = teacher(batch, LOGITS).logits.logits
    nn.ModuleList([model]).train()
    assert torch.equal(teacher(batch, LOGITS).logits.logits, first)
    assert not any(part.training for part in model.modules())


def test_one_submodule_left_in_train_mode_is_put_right():
    model, batch = network(), images()
    teacher, before = local(model), state_of(model)
    model[1].train()
    teacher(batch, LOGITS)
    assert same(state_of(model), before)


def test_parameters_are_frozen():
    model = network()
    local(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_answers_carry_no_gradient_even_if_the_parameters_would():
    model = network()
    teacher = local(model)
    model.requires_grad_(True)
    said = teacher(images(), Need(logits=True, features=frozenset({"0", "3@input"})))
    assert not said.logits.logits.requires_grad
    assert not any(tensor.requires_grad for tensor in said.features.values())


@pytest.mark.parametrize("training_mode", [False, True])
def test_the_forward_itself_runs_without_gradient(training_mode):
    model, modes = network(), []
    model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    local(model, training_mode=training_mode)(images(), LOGITS)
    assert modes == [False]


def test_nothing_is_computed_when_nothing_is_needed():
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    said = local(model)(images(), Need())
    assert (said.logits, dict(said.features), calls) == (None, {}, [])


@pytest.mark.parametrize("make", [Own, lambda: module(network())], ids=["own", "module"])
def test_students_are_asked_as_they_are(make):
    student, batch = make().eval(), images()
    assert torch.equal(local(student)(batch, LOGITS).logits.logits, student(batch, LOGITS).logits.logits)


def test_inputs_are_read_by_name():
    batch = Batch(keys=(), inputs={"rgb": torch.ones(2, 4)}, labels=torch.zeros(2), mask=torch.ones(2).bool())
    assert local(network(), inputs=["rgb"])(batch, LOGITS).logits.logits.shape == (2, 3)
    with pytest.raises(SignalError, match="reads the input 'image'; the batch has: rgb"):
        local(network())(batch, LOGITS)


def test_to_moves_the_model_and_gives_the_teacher_back():
    teacher = local(network())
    assert teacher.to("meta") is teacher
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


# Identity.


def test_identity_is_the_content_and_not_the_object():
    assert local(network(seed=1)).identity == local(network(seed=1)).identity


def test_identity_does_not_depend_on_the_wrapping():
    first, second = local(network()), local(module(network()))
    assert first.identity == second.identity


@pytest.mark.parametrize("change", ["weight", "buffer", "class"])
def test_any_change_gives_another_identity(change):
    one, other = network(), network()
    match change:
        case "weight":
            with torch.no_grad():
                other[3].weight[2, 5] += 1e-6
        case "buffer":
            other[1].running_mean[0] += 1e-6
        case "class":
            other[2] = nn.Identity()
    assert local(one).identity != local(other).identity


def test_identity_sees_half_precision_weights_and_scalars():
    one, other = network().to(torch.bfloat16), network(seed=1).to(torch.bfloat16)
    other.load_state_dict({**one.state_dict(), "1.num_batches_tracked": torch.tensor(7)})
    assert local(one).identity != local(other).identity


def test_identity_is_the_same_in_another_process():
    code = (
        "import torch; from torch import nn; from potstill.teachers import local;"
        "model = nn.Linear(2, 2); nn.init.constant_(model.weight, 0.5); nn.init.zeros_(model.bias);"
        "print(local(model).identity)"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    assert there.stdout.strip() == local(model).identity


# Training mode, where a method asks for it.


def test_training_mode_answers_with_the_statistics_of_the_batch():
    model, batch = nn.Sequential(nn.BatchNorm1d(4)), images()
    said = local(model, training_mode=True)(batch, LOGITS).logits.logits
    assert torch.allclose(said.mean(dim=0), torch.zeros(4), atol=1e-6)


def test_training_mode_leaves_no_trace():
    model, batch = network(), images()
    teacher, before = local(model, training_mode=True), state_of(model)
    teacher(batch, LOGITS)
    assert same(state_of(model), before)
    assert not any(part.training for part in model.modules())


def test_training_mode_leaves_no_trace_when_the_forward_fails():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(9, 9))
    teacher, before = local(model, training_mode=True), state_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        teacher(images(), LOGITS)
    assert same(state_of(model), before)
    assert not model.training


def test_training_mode_is_another_identity():
    assert local(network()).identity != local(network(), training_mode=True).identity


# Weights from a file.


@pytest.fixture
def weights(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "teacher.safetensors"
    save_file(network(seed=7).state_dict(), path)
    return path


def test_weights_are_loaded_whole(weights):
    model = network(seed=1)
    assert load_weights(model, weights) is model
    assert same(state_of(model), state_of(network(seed=7)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.safetensors: there is no such file"):
        load_weights(network(), tmp_path / "gone.safetensors")


def test_a_torn_file_is_named(weights):
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"teacher\.safetensors is not a whole safetensors file"):
        load_weights(network(), weights)


def test_other_names_are_an_error_that_shows_some_of_them(weights):
    with pytest.raises(DataError, match=r"missing '0\.0\.weight'.* and 6 more; not expected '0\.bias'"):
        load_weights(nn.Sequential(network()), weights)


def test_another_shape_is_an_error_and_nothing_is_loaded(weights):
    model = network(seed=1, classes=5)
    before = state_of(model)
    with pytest.raises(DataError, match=r"'3\.(bias|weight)' has the shape \[3.*\], Sequential expects \[5"):
        load_weights(model, weights)
    assert same(state_of(model), before)


def test_tied_weights_stored_once_fill_both_names(tmp_path):
    from safetensors.torch import save_file

    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    save_file({"0.weight": torch.eye(4)}, tmp_path / "tied.safetensors")
    assert torch.equal(load_weights(tied(), tmp_path / "tied.safetensors")[1].weight, torch.eye(4))
