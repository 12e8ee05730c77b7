"""Laws of the student made from any nn.Module: right captures, an untouched model, nothing kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Dense, Need
from potstill.students import Module, module
from potstill.students.module import as_student


class Net(nn.Module):
    """Two blocks and a head; `shared` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6))])
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.shared(self.shared(x)))


class Says(nn.Module):
    """Returns whatever it was made with, beside its logits."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(self.layer(x))


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(x)) + 1.0


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        raise ValueError("the model fails")


def batch_of(**inputs: Tensor) -> Batch:
    size = next(iter(inputs.values())).shape[0]
    return Batch(
        keys=tuple(map(str, range(size))),
        inputs=inputs,
        labels=torch.zeros(size, dtype=torch.long),
        mask=torch.ones(size, dtype=torch.bool),
    )


def images() -> Batch:
    return batch_of(image=torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


def asks(*features: str, logits: bool = False) -> Need:
    return Need(logits=logits, features=frozenset(features))


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_logits_are_the_models_own_output():
    net, batch = Net(), images()
    said = module(net)(batch, Need(logits=True))
    assert isinstance(said.logits, Dense)
    assert torch.equal(said.logits.logits, net(batch.inputs["image"]))
    assert said.features == {}


def test_logits_that_nobody_needs_are_left_out():
    assert module(Net())(images(), asks("head")).logits is None


def test_nothing_is_computed_when_nothing_is_needed():
    assert not module(Fails())(images(), Need()).features


def test_several_layers_are_captured_by_dotted_name():
    net, batch = Net(), images()
    said = module(net)(batch, asks("blocks.0", "blocks.0.0", "blocks.1"))
    first = net.blocks[0][0](batch.inputs["image"])
    assert torch.equal(said.features["blocks.0.0"], first)
    assert torch.equal(said.features["blocks.0"], first.tanh())
    assert torch.equal(said.features["blocks.1"], net.blocks[1](first.tanh()))


def test_input_of_the_head_is_the_penultimate_feature():
    net = Net()
    said = module(net)(images(), asks("head@input", logits=True))
    assert torch.equal(net.head(said.features["head@input"]), said.logits.logits)


def test_input_given_by_keyword_is_found():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    batch = images()
    said = module(Keywords())(batch, asks("layer@input"))
    assert said.features["layer@input"] is batch.inputs["image"]


def test_of_several_calls_the_last_is_kept():
    net = Net()
    said = module(net)(images(), asks("shared", "head@input"))
    assert said.features["shared"] is said.features["head@input"]


def test_a_number_chooses_the_call():
    net = Net()
    said = module(net)(images(), asks("shared#1", "shared#2", "shared", "blocks.1", "shared@input#2"))
    assert torch.equal(said.features["shared#1"], net.shared(said.features["blocks.1"]))
    assert said.features["shared#2"] is said.features["shared"]
    assert said.features["shared@input#2"] is said.features["shared#1"]


def test_captured_features_carry_the_gradient():
    net = Net()
    module(net)(images(), asks("blocks.0")).features["blocks.0"].sum().backward()
    assert net.blocks[0][0].weight.grad is not None
    assert net.head.weight.grad is None


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, "more"), lambda x: [None, x], lambda x: {"loss": None, "logits": x}],
    ids=["tuple", "list", "mapping"],
)
def test_logits_are_found_in_a_tuple_or_under_their_key(wrap):
    model, batch = Says(wrap), images()
    assert torch.equal(module(model)(batch, Need(logits=True)).logits.logits, model.layer(batch.inputs["image"]))


def test_logits_are_found_in_a_hugging_face_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Says(lambda x: outputs.ImageClassifierOutput(logits=x))
    assert module(model)(images(), Need(logits=True)).logits.logits.shape == (5, 3)


@pytest.mark.parametrize(
    "wrap", [lambda x: {"scores": x}, lambda x: "text", lambda x: ()], ids=["mapping", "text", "empty"]
)
def test_output_without_logits_is_an_error_that_names_what_was_returned(wrap):
    with pytest.raises(SignalError, match=r"Says returns (dict with the keys scores|str|tuple); expected logits"):
        module(Says(wrap))(images(), Need(logits=True))


def test_layer_that_returns_a_tuple_gives_its_first_tensor():
    said = module(nn.Sequential(Says(lambda x: (x, x + 1.0))))(images(), asks("0", "0.layer"))
    assert said.features["0"] is said.features["0.layer"]


def test_layer_without_a_tensor_is_an_error():
    with pytest.raises(SignalError, match="Layer '0' gives str without a tensor"):
        module(nn.Sequential(Says(lambda x: "text")))(images(), asks("0"))


def test_several_inputs_are_given_in_the_order_of_their_names():
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    batch = batch_of(depth=torch.ones(2, 3), rgb=torch.full((2, 3), 5.0))
    said = module(Difference(), inputs=["rgb", "depth"])(batch, Need(logits=True))
    assert torch.equal(said.logits.logits, torch.full((2, 3), 4.0))


def test_missing_input_names_what_the_batch_has():
    with pytest.raises(SignalError, match=r"Net reads the input 'rgb'; the batch has: image\."):
        module(Net(), inputs=["rgb"])(images(), Need(logits=True))


def test_inputs_as_one_word_are_refused():
    with pytest.raises(RecipeError, match=r"expected a list: \['image'\]"):
        module(Net(), inputs="image")


def test_misspelt_layer_is_named_with_the_nearest_before_any_forward():
    with pytest.raises(SignalError, match=r"Fails has no layer 'layr'\. Did you mean 'layer'\?"):
        module(Fails())(images(), asks("layr"))


def test_check_runs_nothing_and_finds_the_same_misspelling():
    student = module(Fails())
    student.check(asks("layer", "layer@input", "layer#3"))
    with pytest.raises(SignalError, match="Did you mean 'layer'"):
        student.check(asks("layer", "lyer@input"))


@pytest.mark.parametrize("layer", ["head@output", "head#0", "head#x", "@input", "head#1@input", ""])
def test_layer_that_cannot_be_read_is_an_error(layer):
    with pytest.raises(SignalError, match="cannot be read"):
        module(Net()).check(asks(layer))


@pytest.mark.parametrize(("layer", "found"), [("unused", "made 0 calls of it, a call"), ("shared#3", "made 2 calls")])
def test_layer_that_the_forward_does_not_run_is_an_error(layer, found):
    with pytest.raises(SignalError, match=found):
        module(Net())(images(), asks(layer))


@pytest.mark.parametrize("grad", [True, False], ids=["with grad", "without grad"])
@pytest.mark.parametrize("layer", ["norm", "relu@input"])
def test_layer_overwritten_in_place_is_an_error_and_not_another_value(layer, grad):
    with torch.set_grad_enabled(grad), pytest.raises(SignalError, match="overwrote what was captured"):
        module(Overwrites())(images(), asks(layer))


def test_the_overwriting_layer_itself_can_be_captured():
    student, batch = module(Overwrites()), images()
    expected = student.model.norm(batch.inputs["image"]).relu()
    assert torch.equal(student(batch, asks("relu")).features["relu"], expected)


def test_in_inference_mode_the_capture_survives_overwriting():
    student, batch = module(Overwrites().eval()), images()
    with torch.inference_mode():
        said = student(batch, asks("norm"))
        assert torch.equal(said.features["norm"], student.model.norm(batch.inputs["image"]))


def test_hooks_are_gone_after_a_forward():
    net = Net()
    module(net)(images(), asks("blocks.0", "head@input"))
    assert num_hooks(net) == 0


def test_hooks_are_gone_after_a_forward_that_raises():
    net = Fails()
    with pytest.raises(ValueError, match="the model fails"):
        module(net)(images(), asks("layer", "layer@input"))
    assert num_hooks(net) == 0


def test_hooks_are_there_during_the_forward():
    seen = []
    net = Says(lambda x: (seen.append(num_hooks(net)), x)[1])
    module(net)(images(), asks("layer", "layer@input"))
    assert seen == [2]


def test_state_dict_is_the_models_with_one_prefix():
    net = Net()
    assert set(module(net).state_dict()) == {f"model.{name}" for name in net.state_dict()}


def test_activations_are_released_with_the_signal():
    student = module(Net())
    said = student(images(), asks("blocks.0", "shared#1", "head@input"))
    kept = [weakref.ref(tensor) for tensor in said.features.values()]
    gc.disable()
    try:
        del said
        assert [ref() for ref in kept] == [None, None, None]
    finally:
        gc.enable()


def test_layers_lists_the_names_that_can_be_asked_for():
    student = module(nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.ReLU())))
    assert student.layers() == ("0", "1", "1.0")
    student(images(), asks(*student.layers()))


def test_module_known_under_two_names_answers_to_both():
    net = Net()
    net.alias = net.head
    said = module(net)(images(), asks("alias", "head"))
    assert said.features["alias"] is said.features["head"]


def test_names_are_seen_through_a_compiled_model_and_captured():
    net, batch = Net(), images()
    student = module(torch.compile(net, backend="eager"))
    student(batch, Need(logits=True))
    said = student(batch, asks("blocks.0", "head@input"))
    assert "blocks.0" in student.layers()
    assert torch.equal(said.features["blocks.0"], net.blocks[0](batch.inputs["image"]))


def test_names_are_seen_through_data_parallel_children():
    net = nn.Sequential(nn.DataParallel(Net()))
    assert "0.blocks.0" in module(net).layers()
    assert not any("module" in name for name in module(net).layers())


def test_child_that_the_user_called_module_keeps_its_name():
    assert module(nn.Sequential(Module(Net()))).layers()[:2] == ("0", "0.model")
    net = nn.Module()
    net.module = nn.Linear(4, 3)
    assert module(net).layers() == ("module",)


def test_a_student_is_not_wrapped_again():
    student = module(Net())
    assert as_student(student) is student
    assert isinstance(as_student(Net()), Module)


def test_a_compiled_student_is_not_wrapped_again():
    compiled = torch.compile(module(Net()), backend="eager")
    assert as_student(compiled) is compiled
