"""Convolutional networks for small images (8 to 64 pixels a side), by their published designs.

Features are taken from `layer1`, `layer2`, ... (`stage1`, ... of the plain one); `linear` is the head of all.
Shapes: images [B, channels, H, W] -> logits [B, classes]; a layer's output is [B, its channels, its H, its W].
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.core.catalog import part
from potstill.core.errors import RecipeError


@part("model", paper="He et al. 2016, section 4.2")
def resnet(*, channels: int, classes: int, depth: int = 20, width: int = 16) -> nn.Module:
    """The CIFAR ResNet: three groups of (depth - 2) / 6 basic blocks, shortcuts without parameters (option A).

    `layer1`, `layer2`, `layer3` have width, 2 x and 4 x width channels, each half the side of the one before, and
    are taken after their ReLU, as attention transfer wants them. RecipeError for another depth.
    """
    at_least_one("resnet", channels=channels, classes=classes, width=width)
    if depth < 8 or (depth - 2) % 6:
        raise RecipeError(f"resnet.depth: {depth} is not 6 n + 2. Take 8, 14, 20, 32, 44, 56 or 110.")
    return _initialised(ResNet(channels=channels, classes=classes, blocks=(depth - 2) // 6, width=width))


@part("model", paper="Zagoruyko and Komodakis 2016")
def wrn(*, channels: int, classes: int, depth: int = 16, widen: int = 2, dropout: float = 0.0) -> nn.Module:
    """The wide ResNet WRN-depth-widen: three groups of (depth - 4) / 6 pre-activation blocks, dropout inside them.

    `layer1` to `layer3` (16, 32, 64 times widen channels) are sums before the next ReLU; RecipeError for another depth.
    """
    at_least_one("wrn", channels=channels, classes=classes, widen=widen)
    if depth < 10 or (depth - 4) % 6:
        raise RecipeError(f"wrn.depth: {depth} is not 6 n + 4. Take 10, 16, 22, 28 or 40.")
    if not 0.0 <= dropout < 1.0:
        raise RecipeError(f"wrn.dropout: {dropout} found, a share from 0 and below 1 expected.")
    return _initialised(
        WideResNet(channels=channels, classes=classes, blocks=(depth - 4) // 6, widen=widen, dropout=dropout)
    )


@part("model")
def plain_cnn(*, channels: int, classes: int, width: int = 16, blocks: int = 3) -> nn.Module:
    """No shortcut anywhere: `stage1` to `stage<blocks>`, each one convolution, batch norm and ReLU.

    `stage1` keeps the side and has width channels; each further stage halves the side and doubles the channels.
    """
    at_least_one("plain_cnn", channels=channels, classes=classes, width=width, blocks=blocks)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = channels
    for index in range(blocks):
        after = width * 2**index
        layers[f"stage{index + 1}"] = nn.Sequential(*_conv_norm(before, after, stride=2 if index else 1), nn.ReLU())
        before = after
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), linear=nn.Linear(before, classes))
    return _initialised(nn.Sequential(layers))


@part("model", paper="Sandler et al. 2018")
def mobilenet(*, channels: int, classes: int, width: float = 1.0) -> nn.Module:
    """MobileNetV2 for small images: the paper's first four groups, two halvings of the side; width scales all channels.

    `layer1` to `layer4` are the linear bottlenecks (no ReLU), 16, 24, 32 and 64 channels at width 1.
    """
    at_least_one("mobilenet", channels=channels, classes=classes)
    if width <= 0.0:
        raise RecipeError(f"mobilenet.width: {width} found, a factor above 0 expected.")
    return _initialised(MobileNet(channels=channels, classes=classes, width=width))


def at_least_one(model: str, **knobs: int) -> None:
    """RecipeError for a count below 1, with the knob's full name."""
    for name, value in knobs.items():
        if value < 1:
            raise RecipeError(f"{model}.{name}: {value} found, a whole number of at least 1 expected.")


class ResNet(nn.Module):
    def __init__(self, *, channels: int, classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _basic_group(width, width, blocks, stride=1)
        self.layer2 = _basic_group(width, 2 * width, blocks, stride=2)
        self.layer3 = _basic_group(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(before, after, stride=stride)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _conv(after, after)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride = stride
        self.extra = after - before

    def forward(self, hidden: Tensor) -> Tensor:
        # Not in place anywhere: a hook may have kept what a ReLU would overwrite.
        new = F.relu(self.bn1(self.conv1(hidden)))
        return F.relu(self.bn2(self.conv2(new)) + self._shortcut(hidden))

    def _shortcut(self, hidden: Tensor) -> Tensor:
        """Option A: every second pixel, and channels of zeros on both sides."""
        if self.stride == 1 and self.extra == 0:
            return hidden
        left = self.extra // 2
        return F.pad(hidden[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, left, self.extra - left))


class WideResNet(nn.Module):
    def __init__(self, *, channels: int, classes: int, blocks: int, widen: int, dropout: float) -> None:
        super().__init__()
        one, two, three = 16 * widen, 32 * widen, 64 * widen
        self.conv1 = _conv(channels, 16)
        self.layer1 = _wide_group(16, one, blocks, stride=1, dropout=dropout)
        self.layer2 = _wide_group(one, two, blocks, stride=2, dropout=dropout)
        self.layer3 = _wide_group(two, three, blocks, stride=2, dropout=dropout)
        self.bn1 = nn.BatchNorm2d(three)
        self.linear = nn.Linear(three, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(F.relu(self.bn1(hidden)).mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Norm and ReLU before each convolution; where the shape changes, the shortcut is a 1 x 1 convolution."""

    def __init__(self, before: int, after: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = _conv(before, after, stride=stride)
        self.bn2 = nn.BatchNorm2d(after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(after, after)
        self.shortcut = nn.Identity() if before == after else _conv(before, after, side=1, stride=stride)
        self.changes_shape = before != after

    def forward(self, hidden: Tensor) -> Tensor:
        active = F.relu(self.bn1(hidden))
        new = F.relu(self.bn2(self.conv1(active)))
        # A projection reads the activated input, an identity the bare one (the paper's code).
        return self.conv2(self.dropout(new)) + self.shortcut(active if self.changes_shape else hidden)


MOBILENET_GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 1))
"""(expansion, channels, blocks, stride), table 2 of the paper, but the stem and the last group keep the side."""


class MobileNet(nn.Module):
    def __init__(self, *, channels: int, classes: int, width: float) -> None:
        super().__init__()
        size = _multiple_of_8(32 * width)
        self.stem = nn.Sequential(*_conv_norm(channels, size), nn.ReLU6())
        groups: list[nn.Module] = []
        for expansion, wanted, blocks, stride in MOBILENET_GROUPS:
            after = _multiple_of_8(wanted * width)
            groups.append(_inverted_group(size, after, blocks, stride=stride, expansion=expansion))
            size = after
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        # The paper ends on 1280 = 4 x 320 channels, and does not narrow them below width 1.
        last = max(4 * size, 4 * MOBILENET_GROUPS[-1][1])
        self.last = nn.Sequential(*_conv_norm(size, last, side=1), nn.ReLU6())
        self.linear = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last: depthwise convolutions on a CPU then take half the time (72 to 32 ms a step of 64 digits).
        hidden = self.stem(images).contiguous(memory_format=torch.channels_last)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.linear(self.last(hidden).mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Widen by 1 x 1, filter each channel by 3 x 3, narrow by 1 x 1 without a ReLU."""

    def __init__(self, before: int, after: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        widen = () if expansion == 1 else (*_conv_norm(before, wide, side=1), nn.ReLU6())
        filters = (*_conv_norm(wide, wide, stride=stride, groups=wide), nn.ReLU6())
        self.branch = nn.Sequential(*widen, *filters, *_conv_norm(wide, after, side=1))
        self.has_shortcut = stride == 1 and before == after

    def forward(self, hidden: Tensor) -> Tensor:
        new = self.branch(hidden)
        return hidden + new if self.has_shortcut else new


def _basic_group(before: int, after: int, blocks: int, *, stride: int) -> nn.Sequential:
    rest = (BasicBlock(after, after, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(before, after, stride=stride), *rest)


def _wide_group(before: int, after: int, blocks: int, *, stride: int, dropout: float) -> nn.Sequential:
    rest = (WideBlock(after, after, stride=1, dropout=dropout) for _ in range(blocks - 1))
    return nn.Sequential(WideBlock(before, after, stride=stride, dropout=dropout), *rest)


def _inverted_group(before: int, after: int, blocks: int, *, stride: int, expansion: int) -> nn.Sequential:
    rest = (InvertedResidual(after, after, stride=1, expansion=expansion) for _ in range(blocks - 1))
    return nn.Sequential(InvertedResidual(before, after, stride=stride, expansion=expansion), *rest)


def _conv(before: int, after: int, *, side: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, side, stride=stride, padding=side // 2, groups=groups, bias=False)


def _conv_norm(
    before: int, after: int, *, side: int = 3, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return _conv(before, after, side=side, stride=stride, groups=groups), nn.BatchNorm2d(after)


def _multiple_of_8(size: float) -> int:
    """The nearest multiple of 8, never more than a tenth below `size` (the paper's code)."""
    rounded = max(8, int(size + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * size else rounded


def _initialised(model: nn.Module) -> nn.Module:
    """Convolutions after He et al. 2015, eq. 10; the head so that it keeps variance; norms begin as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return model
