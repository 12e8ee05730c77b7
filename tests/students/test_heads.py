"""Laws of the training heads: they join any two layers, start alike, train wholly and leave the student as it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from potstill.core.catalog import parts
from potstill.core.errors import RecipeError, SignalError
from potstill.core.types import Batch, Need, Signal
from potstill.students import module
from potstill.students.heads import Equipped, arrange, equip, projector, variational

VECTOR, TOKENS, MAP = (6,), (10, 6), (6, 8, 8)


@dataclass(frozen=True)
class Asked:
    key: str = "fitnet/0>0"
    head: str = "projector"
    student_layer: str = "0"
    teacher_layer: str = "0"


def feature(shape: tuple[int, ...], *, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def images(size: int = 4) -> Batch:
    return Batch(
        keys=tuple(map(str, range(size))),
        inputs={"image": feature((3, 8, 8), batch=size)},
        labels=torch.zeros(size, dtype=torch.long),
        mask=torch.ones(size, dtype=torch.bool),
    )


def network(channels: int, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 64, 5))


def equipped(*requests: Asked, student_channels: int = 4) -> Equipped:
    student, teacher, batch = module(network(student_channels)), module(network(7)), images()
    need = Need(logits=True, features=frozenset({"0", "1", "3@input"}))
    return equip(student, requests, student(batch, need), teacher(batch, need))


def num_parameters(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def asks(*features: str) -> Need:
    return Need(features=frozenset(features))


# The projector, pair by pair.


@pytest.mark.parametrize("shape", [VECTOR, TOKENS, MAP], ids=str)
def test_equal_shapes_pass_untouched_without_parameters(shape):
    head, said = projector(shape, shape), feature(shape)
    assert head(said)["student_feature"] is said
    assert num_parameters(head) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "out"),
    [
        ((6,), (9,), (9,)),
        ((10, 6), (10, 9), (10, 9)),
        ((10, 6), (9,), (9,)),
        ((6, 8, 8), (9,), (9,)),
        ((6, 8, 8), (9, 8, 8), (9, 8, 8)),
        ((6, 8, 8), (9, 4, 4), (9, 4, 4)),
        ((6, 8, 8), (9, 3, 5), (9, 3, 5)),
        ((6, 8, 8), (6, 4, 4), (6, 4, 4)),
        ((6, 8, 2), (9, 4, 4), (9, 4, 2)),
        ((6, 4, 4), (9, 8, 8), (9, 4, 4)),
        ((6, 8, 8), (17, 9), (17, 9)),
        ((6, 4, 4), (17, 9), (17, 9)),
        ((6, 8, 8), (7, 9), (7, 9)),
        ((17, 6), (9, 8, 8), (9, 4, 4)),
        ((16, 6), (9, 2, 2), (9, 2, 2)),
        ((7, 6), (9, 2, 3), (9, 2, 3)),
        ((11, 6), (9, 2, 3), (9, 2, 3)),
        ((197, 6), (50, 9), (50, 9)),
        ((12, 6), (7, 9), (7, 9)),
        ((6,), (9, 1, 1), (9, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("head", [projector, variational])
def test_student_feature_takes_the_teachers_kind_and_width(head, student, teacher, out):
    assert head(student, teacher)(feature(student))["student_feature"].shape == (3, *out)


@pytest.mark.parametrize(("student", "teacher"), [((6,), (9,)), ((10, 6), (9,)), ((10, 6), (10, 9))], ids=str)
def test_vectors_and_tokens_take_one_linear_map_without_bias(student, teacher):
    assert num_parameters(projector(student, teacher)) == 6 * 9


def test_maps_of_other_channels_take_a_1x1_convolution_and_batch_norm():
    assert num_parameters(projector((6, 8, 8), (9, 8, 8))) == 6 * 9 + 2 * 9


def test_a_map_of_twice_the_size_takes_a_3x3_convolution_of_stride_two():
    assert num_parameters(projector((6, 8, 8), (9, 4, 4))) == 6 * 9 * 3 * 3 + 2 * 9


def test_convolutions_before_batch_norm_start_with_he_fan_out():
    weight = next(projector((64, 8, 8), (256, 8, 8)).parameters())
    assert weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    weight = next(projector((64, 8, 8), (256, 4, 4)).parameters())
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("teacher", [(9,), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("student", [(6, 8, 8), (6, 2, 2), (6, 1, 1)], ids=str)
def test_a_batch_of_one_trains_where_no_position_is_left(student, teacher):
    head = projector(student, teacher).train()
    assert head(feature(student, batch=1))["student_feature"].isfinite().all()


def test_tokens_that_agree_may_change_their_number_from_batch_to_batch():
    head = projector((10, 6), (10, 9))
    assert head(feature((13, 6)))["student_feature"].shape == (3, 13, 9)


@pytest.mark.parametrize(("student", "teacher"), [((6,), (10, 9)), ((6,), (9, 4, 4)), ((), (9,)), ((6,), (2, 3, 4, 5))])
@pytest.mark.parametrize("head", [projector, variational])
def test_a_pair_that_cannot_be_joined_is_an_error(head, student, teacher):
    with pytest.raises(SignalError, match="no head leads from shape"):
        head(student, teacher)


# Arranging.


def test_rows_and_columns_are_pooled_apart():
    said = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert torch.equal(arrange(said, (1, 4, 2)), torch.tensor([[[[0.5, 2.5], [4.5, 6.5]]]]))


def test_tokens_of_a_map_are_its_pixels_row_by_row():
    said = feature((2, 3, 3))
    assert torch.equal(arrange(said, (9, 5))[:, 4], said[:, :, 1, 1])


def test_the_class_token_that_only_the_teacher_has_is_the_mean_over_the_map():
    said = feature((2, 3, 3))
    tokens = arrange(said, (10, 5))
    assert torch.allclose(tokens[:, 0], said.mean(dim=(2, 3)))
    assert torch.equal(tokens[:, 1:], said.flatten(2).mT)


def test_the_class_token_that_only_the_student_has_is_dropped():
    said = feature((10, 6))
    assert torch.equal(arrange(said, (6, 3, 3)), arrange(said[:, 1:], (6, 3, 3)))


def test_the_class_token_that_both_have_stays_itself():
    said = feature((17, 6))
    tokens = arrange(said, (5, 6))
    assert torch.equal(tokens[:, 0], said[:, 0])
    assert torch.allclose(tokens[:, 1:].mean(dim=1), said[:, 1:].mean(dim=1), atol=1e-6)


def test_a_map_to_tokens_and_back_is_the_same_map():
    said = feature((6, 3, 5))
    assert torch.equal(arrange(arrange(said, (16, 6)), (6, 3, 5)), said)


def test_tokens_that_make_no_square_are_pooled_in_one_dimension():
    said = torch.arange(6.0).reshape(1, 6, 1)
    assert torch.equal(arrange(said, (3, 1)), torch.tensor([[[0.5], [2.5], [4.5]]]))


# The variational head (METHODS_CLASSIC B9).


@pytest.mark.parametrize(("teacher", "shape"), [((9, 8, 8), (9, 1, 1)), ((10, 9), (9,)), ((9,), (9,))], ids=str)
def test_variance_starts_at_five_for_each_channel(teacher, shape):
    variance = variational((6, *teacher[1:]) if len(teacher) == 3 else teacher, teacher)
    said = variance(feature((6, 8, 8) if len(teacher) == 3 else teacher))["student_variance"]
    assert said.shape == shape
    assert torch.allclose(said, torch.tensor(5.0))


def test_alpha_starts_at_the_published_number():
    assert variational(MAP, (9, 8, 8)).alpha.detach().flatten()[0].item() == pytest.approx(4.993229, abs=1e-6)


def test_variance_meets_the_teachers_feature_channel_by_channel():
    head, taught = variational((4, 8, 8), (6, 8, 8)), feature((6, 8, 8))
    with torch.no_grad():
        head.alpha[2] = 0.0
    scaled = taught / head(feature((4, 8, 8)))["student_variance"]
    assert torch.allclose(scaled[:, 2], taught[:, 2] / (torch.log(torch.tensor(2.0)) + 1e-5))
    assert torch.allclose(scaled[:, 3], taught[:, 3] / 5.0)


def test_variance_stays_above_its_floor():
    head = variational(VECTOR, (9,))
    nn.init.constant_(head.alpha, -100.0)
    assert head(feature(VECTOR))["student_variance"].min().item() == pytest.approx(1e-5)


def test_mean_is_three_bias_free_maps_of_the_teachers_width():
    assert num_parameters(variational((6, 8, 8), (9, 8, 8))) == 6 * 9 + 9 * 9 + 9 * 9 + 9


def test_mean_is_linear_in_the_scale_of_its_input():
    head, said = variational(VECTOR, (9,)), feature(VECTOR)
    once, twice = (head(scale * said)["student_feature"] for scale in (1.0, 2.0))
    assert torch.allclose(twice, 2.0 * once, atol=1e-6)


# Equipping a student.


def test_both_heads_are_in_the_catalog():
    assert {"projector", "variational"} <= parts("head").keys()


def test_head_outputs_appear_under_the_key_of_the_request():
    student = equipped(Asked(), Asked(key="vid/0>0", head="variational"))
    said = student(images(), asks("fitnet/0>0", "vid/0>0"))
    assert set(said.features) == {"fitnet/0>0.student_feature", "vid/0>0.student_feature", "vid/0>0.student_variance"}
    assert said.logits is None


def test_raw_layers_and_logits_are_answered_beside_the_heads():
    student, batch = equipped(Asked()), images()
    said = student(batch, Need(logits=True, features=frozenset({"fitnet/0>0", "0", "1"})))
    alone = student.student(batch, Need(logits=True, features=frozenset({"0", "1"})))
    assert torch.equal(said.logits.logits, alone.logits.logits)
    assert set(said.features) == {"fitnet/0>0.student_feature", "0", "1"}
    assert torch.equal(said.features["0"], alone.features["0"])


def test_student_runs_once_for_all_heads():
    flat = Asked(key="c", student_layer="3@input", teacher_layer="3@input")
    student = equipped(Asked(), Asked(key="b", student_layer="1"), flat)
    calls = []
    student.student.model.register_forward_hook(lambda *_: calls.append(1))
    student(images(), asks("fitnet/0>0", "b", "c", "0"))
    assert calls == [1]


def test_without_requests_the_student_answers_as_alone():
    student, batch = equipped(), images()
    need = Need(logits=True, features=frozenset({"1"}))
    said, alone = student(batch, need), student.student(batch, need)
    assert torch.equal(said.logits.logits, alone.logits.logits)
    assert torch.equal(said.features["1"], alone.features["1"])
    assert all(name.startswith("student.") for name in student.state_dict())


def test_heads_are_saved_apart_from_the_student():
    student = equipped(Asked(), Asked(key="vid/0>0", head="variational"))
    rest = {name for name in student.state_dict() if not name.startswith("student.")}
    assert rest
    assert all(name.startswith("heads.") for name in rest)
    assert set(student.student.state_dict()) == {f"model.{name}" for name in network(4).state_dict()}


def test_keys_that_differ_in_punctuation_only_have_heads_of_their_own():
    student = equipped(Asked(key="a.b"), Asked(key="a_b"), Asked(key="keys"))
    assert len(student.heads) == 3
    assert len({id(head) for head in student.heads.values()}) == 3


@pytest.mark.parametrize("head", ["projector", "variational"])
def test_every_parameter_of_a_head_moves_in_one_step(head):
    student = equipped(Asked(head=head)).train()
    before = {name: tensor.clone() for name, tensor in student.heads.named_parameters()}
    said = student(images(), asks("fitnet/0>0")).features
    mean, target = said["fitnet/0>0.student_feature"], feature((7, 8, 8), batch=4, seed=5)
    variance = said.get("fitnet/0>0.student_variance", torch.tensor(1.0))
    (variance.log() + (target - mean).square() / variance).mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert before
    assert all(not torch.equal(before[name], tensor) for name, tensor in student.heads.named_parameters())


def test_building_heads_takes_nothing_from_the_global_random_stream():
    torch.manual_seed(3)
    expected = torch.rand(4)
    requests = (Asked(), Asked(key="vid", head="variational"))
    student, teacher = (Signal(features={"0": feature((channels, 8, 8))}) for channels in (4, 7))
    torch.manual_seed(3)
    equip(nn.Identity(), requests, student, teacher)
    assert torch.equal(torch.rand(4), expected)


def test_a_head_starts_from_its_key_alone():
    torch.manual_seed(1)
    one = equipped(Asked(), Asked(key="other")).heads.state_dict()
    torch.manual_seed(2)
    two = equipped(Asked()).heads.state_dict()
    assert two
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    first, second = (one[f"{name}.channels.0.weight"] for name in ("0_fitnet_0_0", "1_other"))
    assert not torch.equal(first, second)


def test_heads_follow_the_type_of_the_students_feature():
    said = Signal(features={"0": feature((4, 8, 8)).double()})
    heads = equip(nn.Identity(), [Asked()], said, Signal(features={"0": feature((7, 8, 8))})).heads
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float64}


def test_a_pair_that_cannot_be_joined_names_both_layers_and_shapes():
    said, taught = Signal(features={"pool": feature((4,))}), Signal(features={"layer2": feature((7, 8, 8))})
    message = (
        r"projector between the student's 'pool' and the teacher's 'layer2': "
        r"no head leads from shape \[4\] to \[7, 8, 8\]"
    )
    with pytest.raises(SignalError, match=message):
        equip(nn.Identity(), [Asked(student_layer="pool", teacher_layer="layer2")], said, taught)


def test_an_unknown_head_is_named_with_the_nearest():
    said = Signal(features={"0": feature((4,))})
    with pytest.raises(RecipeError, match="Did you mean 'projector'"):
        equip(nn.Identity(), [Asked(head="projektor")], said, said)
