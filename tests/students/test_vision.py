"""The networks by their published sizes, their layers' shapes and names, and one trained checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.core.catalog import find
from potstill.core.errors import RecipeError
from potstill.students.vision import mobilenet, plain_cnn, resnet, wrn
from potstill.students.vision_tokens import mlp, positions, vit
from tests.data.places import shared

MODELS = {"resnet": resnet, "wrn": wrn, "plain_cnn": plain_cnn, "mobilenet": mobilenet, "vit": vit, "mlp": mlp}

SHALLOW = {"resnet": {"depth": 8}, "wrn": {"depth": 10}, "mobilenet": {"width": 0.5}, "vit": {"depth": 2}}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def outputs(model: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    """What every named module of the top two floors answered."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.update({name: output}))

    for name, _ in model.named_modules():
        if name and name.count(".") < 2:
            keep(name)
    model(images)
    return seen


def picture(*, channels: int = 3, side: int = 8, num: int = 4) -> Tensor:
    return torch.randn(num, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_catalog_knows_the_model(name):
    assert find("model", name) is MODELS[name]


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_one_column_per_class(name):
    assert MODELS[name](channels=3, classes=7)(picture()).shape == (4, 7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mlp"])
def test_a_larger_grey_image_will_do(name):
    assert MODELS[name](channels=1, classes=10)(picture(channels=1, side=28, num=2)).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_is_the_same_model(name):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(MODELS[name](channels=1, classes=4).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name](channels=3, classes=5)
    F.cross_entropy(model(picture()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_learn_four_pictures(name):
    torch.manual_seed(0)
    model, images, labels = MODELS[name](channels=3, classes=4, **SHALLOW.get(name, {})), picture(), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    ("build", "published"),
    [
        # The checkpoints' own counts; He et al. 2016, table 6, round them to 0.27M and 0.85M.
        (lambda: resnet(channels=3, classes=10, depth=20), 269_722),
        (lambda: resnet(channels=3, classes=10, depth=56), 853_018),
        # What others count for WRN-16-2 on CIFAR-100; Zagoruyko and Komodakis round it to 0.7M.
        (lambda: wrn(channels=3, classes=100, depth=16, widen=2), 703_284),
    ],
)
def test_parameters_are_as_many_as_published(build, published):
    with torch.device("meta"):
        assert size(build()) == published


@pytest.mark.parametrize(("depth", "widen", "channels", "classes"), [(16, 2, 3, 10), (22, 1, 1, 10), (10, 4, 3, 7)])
def test_a_wide_resnet_has_as_many_parameters_as_its_table_says(depth, widen, channels, classes):
    n, before, total = (depth - 4) // 6, 16, channels * 16 * 9
    for after in (16 * widen, 32 * widen, 64 * widen):
        convolutions = 9 * before * after + (2 * n - 1) * 9 * after * after
        norms = 2 * before + (2 * n - 1) * 2 * after
        total += convolutions + norms + (before * after if before != after else 0)
        before = after
    total += 2 * before + before * classes + classes
    assert size(wrn(channels=channels, classes=classes, depth=depth, widen=widen)) == total


def test_a_vision_transformer_has_as_many_parameters_as_its_equations_say():
    d, depth, patch, channels, classes = 32, 3, 4, 3, 10
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + 4 * d
    total = (channels * patch * patch * d + d) + d + depth * block + 2 * d + (d * classes + classes)
    assert size(vit(channels=channels, classes=classes, patch=patch, width=d, depth=depth)) == total


def test_an_inverted_residual_has_as_many_parameters_as_its_table_says():
    def row(before: int, after: int, t: int) -> int:
        wide = t * before
        widen = 0 if t == 1 else before * wide + 2 * wide
        return widen + 9 * wide + 2 * wide + wide * after + 2 * after

    total = 3 * 32 * 9 + 2 * 32 + row(32, 16, 1) + row(16, 24, 6) + row(24, 24, 6)
    total += row(24, 32, 6) + 2 * row(32, 32, 6) + row(32, 64, 6) + 3 * row(64, 64, 6)
    total += 64 * 256 + 2 * 256 + 256 * 10 + 10
    assert size(mobilenet(channels=3, classes=10)) == total


def test_a_narrow_mobilenet_has_channels_in_multiples_of_eight():
    seen = outputs(mobilenet(channels=3, classes=10, width=0.5), picture())
    assert [seen[f"layer{i}"].shape[1] for i in (1, 2, 3, 4)] == [8, 16, 16, 32]


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (resnet(channels=3, classes=5, depth=8), {"layer1": (16, 8), "layer2": (32, 4), "layer3": (64, 2)}),
        (wrn(channels=3, classes=5, depth=10), {"layer1": (32, 8), "layer2": (64, 4), "layer3": (128, 2)}),
        (plain_cnn(channels=3, classes=5), {"stage1": (16, 8), "stage2": (32, 4), "stage3": (64, 2)}),
        (
            mobilenet(channels=3, classes=5),
            {"layer1": (16, 8), "layer2": (24, 4), "layer3": (32, 2), "layer4": (64, 2)},
        ),
    ],
)
def test_layers_have_the_shapes_their_names_promise(model, shapes):
    seen = outputs(model, picture())
    assert {name: (seen[name].shape[1], seen[name].shape[2]) for name in shapes} == shapes


def test_an_odd_side_is_halved_upwards_in_both_ways_of_a_block():
    seen = outputs(resnet(channels=3, classes=5, depth=8), picture(side=7))
    assert [seen[f"layer{i}"].shape[2] for i in (1, 2, 3)] == [7, 4, 2]


@pytest.mark.parametrize("name", ["layer1", "layer2", "layer3"])
def test_groups_of_a_resnet_are_taken_after_their_relu(name):
    seen = outputs(resnet(channels=3, classes=5), picture())[name]
    assert seen.min() == 0
    assert seen.max() > 0


def test_no_layer_overwrites_what_a_hook_has_kept():
    torch.manual_seed(0)
    model = resnet(channels=3, classes=5, depth=8).eval()
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    model(picture())
    assert all(torch.equal(now, then) for now, then in kept)


def test_blocks_of_a_vision_transformer_carry_the_class_token_first():
    seen = outputs(vit(channels=3, classes=5, depth=2), picture())
    assert [seen[f"blocks.{i}"].shape for i in (0, 1)] == [(4, 1 + 4, 64)] * 2


def test_every_patch_has_a_position_of_its_own():
    table = positions(torch.zeros(1, 64, 7, 7))
    assert torch.cdist(table, table).fill_diagonal_(1.0).min() > 0.1


def test_rows_and_columns_are_told_apart():
    table = positions(torch.zeros(1, 8, 2, 3)).view(2, 3, 8)
    assert torch.equal(table[0, 1, :4], table[0, 2, :4])
    assert torch.equal(table[0, 1, 4:], table[1, 1, 4:])


def test_layers_of_a_perceptron_are_taken_after_their_relu():
    seen = outputs(mlp(channels=3, classes=5, depth=3), picture())
    assert [seen[f"layer{i}"].min().item() for i in (1, 2, 3)] == [0.0] * 3


def test_a_perceptron_takes_plain_vectors():
    assert mlp(channels=1, classes=3, pixels=20)(torch.randn(4, 20)).shape == (4, 3)


def test_dropout_of_a_wide_resnet_is_off_in_evaluation():
    model = wrn(channels=3, classes=5, depth=10, dropout=0.5).eval()
    assert torch.equal(model(picture()), model(picture()))


def test_dropout_of_a_wide_resnet_is_on_in_training():
    torch.manual_seed(0)
    model = wrn(channels=3, classes=5, depth=10, dropout=0.5)
    assert not torch.equal(model(picture()), model(picture()))


@pytest.mark.parametrize("module", [nn.Conv2d, nn.Linear])
def test_weights_keep_the_scale_of_their_inputs(module):
    torch.manual_seed(0)
    gain = {nn.Conv2d: 2.0, nn.Linear: 1.0}[module]
    weights = [m.weight for m in resnet(channels=3, classes=500, width=32).modules() if isinstance(m, module)]
    for weight in weights:
        # He et al. 2015, eq. 10; the least filled weight holds 864 draws, so its variance is good to a fifth.
        assert weight.var().item() * weight[0].numel() == pytest.approx(gain, rel=0.2)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: resnet(channels=3, classes=10, depth=18), r"resnet.depth: 18 is not 6 n \+ 2"),
        (lambda: resnet(channels=3, classes=10, depth=2), r"resnet.depth: 2 is not"),
        (lambda: resnet(channels=0, classes=10), "resnet.channels: 0 found"),
        (lambda: resnet(channels=3, classes=0), "resnet.classes: 0 found"),
        (lambda: resnet(channels=3, classes=10, width=0), "resnet.width: 0 found"),
        (lambda: wrn(channels=3, classes=10, depth=20), r"wrn.depth: 20 is not 6 n \+ 4"),
        (lambda: wrn(channels=3, classes=10, widen=0), "wrn.widen: 0 found"),
        (lambda: wrn(channels=3, classes=10, dropout=1.0), "wrn.dropout: 1.0 found"),
        (lambda: plain_cnn(channels=3, classes=10, blocks=0), "plain_cnn.blocks: 0 found"),
        (lambda: mobilenet(channels=3, classes=10, width=0.0), "mobilenet.width: 0.0 found"),
        (lambda: vit(channels=3, classes=10, width=60, heads=7), "vit.width: 60 must be a multiple"),
        (lambda: vit(channels=3, classes=10, width=66, heads=3), "vit.width: 66 must be a multiple"),
        (lambda: vit(channels=3, classes=10, patch=0), "vit.patch: 0 found"),
        (lambda: vit(channels=3, classes=10, patch=3)(picture()), "vit.patch: 3 does not divide images of 8 x 8"),
        (lambda: mlp(channels=3, classes=10, depth=0), "mlp.depth: 0 found"),
        (lambda: mlp(channels=3, classes=10)(picture(side=9)), "mlp.pixels: 64, but the images have 81"),
    ],
)
def test_an_impossible_knob_is_refused_in_a_sentence(build, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build()


def checkpoint(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(shared("cifar10-resnet-checkpoints") / name)


@pytest.mark.parametrize("depth", [20, 56])
def test_the_trained_checkpoints_load_strictly(depth):
    resnet(channels=3, classes=10, depth=depth).load_state_dict(checkpoint(f"resnet{depth}.safetensors"), strict=True)


def test_a_trained_resnet_answers_as_its_description_computes():
    """The checkpoint's own words: subsample by two, pad channels // 4 zeros on each side, global mean, linear."""
    state = checkpoint("resnet20.safetensors")
    model = resnet(channels=3, classes=10, depth=20).eval()
    model.load_state_dict(state)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)

    images = picture(side=32)
    x = norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for group in (1, 2, 3):
        for index in range(3):
            block = f"layer{group}.{index}"
            stride = 2 if group > 1 and index == 0 else 1
            new = F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1)
            new = norm(new, f"{block}.bn1").clamp(min=0)
            new = norm(F.conv2d(new, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            if stride == 2:
                small, zeros = x[:, :, ::2, ::2], torch.zeros(len(x), new.shape[1] // 4, *new.shape[2:])
                x = torch.cat([zeros, small, zeros], dim=1)
            x = (new + x).clamp(min=0)
    expected = x.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
