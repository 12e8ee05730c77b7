"""Networks that see an image as a vector or as a row of patches: the perceptron and the vision transformer.

Shapes: images [B, channels, H, W] -> logits [B, classes]. Dimension key: T tokens, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.core.catalog import part
from potstill.core.errors import RecipeError
from potstill.students.vision import at_least_one


@part("model")
def mlp(*, channels: int, classes: int, pixels: int = 64, width: int = 128, depth: int = 2) -> nn.Module:
    """A perceptron on the flattened image: `layer1` to `layer<depth>`, each linear and ReLU [B, width], then `linear`.

    pixels: height times width of the images, 64 for the digits; for plain vectors of length L, channels 1 and
    pixels L. RecipeError at the first image of another size.
    """
    at_least_one("mlp", channels=channels, classes=classes, pixels=pixels, width=width, depth=depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flat=Flat(pixels))
    before = channels * pixels
    for index in range(depth):
        layers[f"layer{index + 1}"] = nn.Sequential(_linear(before, width, follows="relu"), nn.ReLU())
        before = width
    layers["linear"] = _linear(before, classes, follows="linear")
    return nn.Sequential(layers)


@part("model", paper="Dosovitskiy et al. 2021; positions as in Beyer et al. 2022")
def vit(*, channels: int, classes: int, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4) -> nn.Module:
    """A small pre-norm vision transformer with a class token: `blocks.0` to `blocks.<depth - 1>` [B, 1 + T, D], `head`.

    Positions are sines and cosines of the patch's row and column, so that any image that `patch` divides will do.
    RecipeError for a width that 4 or `heads` does not divide, and at the first image that `patch` does not divide.
    """
    at_least_one("vit", channels=channels, classes=classes, patch=patch, width=width, depth=depth, heads=heads)
    if width % 4 or width % heads:
        raise RecipeError(f"vit.width: {width} must be a multiple of 4 and of heads ({heads}).")
    return VisionTransformer(channels=channels, classes=classes, patch=patch, width=width, depth=depth, heads=heads)


class Flat(nn.Module):
    """An image as a vector, if it has as many pixels as were said."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        found = images.shape[2:].numel() if images.ndim > 2 else images.shape[1]
        if found != self.pixels:
            raise RecipeError(
                f"mlp.pixels: {self.pixels}, but the images have {found} values per channel "
                f"(shape {list(images.shape)}). Set pixels to {found}."
            )
        return images.flatten(1)


class VisionTransformer(nn.Module):
    def __init__(self, *, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width=width, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.patch = patch
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise RecipeError(
                f"vit.patch: {self.patch} does not divide images of {images.shape[2]} x {images.shape[3]}. "
                "Choose one that divides both."
            )
        grid = self.patches(images)
        tokens = grid.flatten(2).transpose(1, 2) + positions(grid)
        tokens = torch.cat((self.class_token.expand(len(images), -1, -1), tokens), dim=1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class Block(nn.Module):
    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width=width, heads=heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Every token looks at every token: [B, T, D] -> [B, T, D]."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            some.unflatten(-1, (self.heads, -1)).transpose(1, 2) for some in self.qkv(tokens).chunk(3, dim=-1)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def positions(grid: Tensor) -> Tensor:
    """Sines and cosines of row and column, a quarter of the width each: grid [B, D, H, W] -> [H * W, D]."""
    width, rows, columns = grid.shape[1:]
    quarter = width // 4
    # 10,000: the longest wave, as in Vaswani et al. 2017.
    speeds = 10_000.0 ** -(torch.arange(quarter, device=grid.device, dtype=torch.float32) / quarter)
    down = torch.arange(rows, device=grid.device)[:, None] * speeds
    across = torch.arange(columns, device=grid.device)[:, None] * speeds
    by_row = torch.cat((down.sin(), down.cos()), dim=1)[:, None].expand(-1, columns, -1)
    by_column = torch.cat((across.sin(), across.cos()), dim=1)[None].expand(rows, -1, -1)
    return torch.cat((by_row, by_column), dim=2).flatten(0, 1).to(grid.dtype)


def _linear(before: int, after: int, *, follows: Literal["relu", "linear"]) -> nn.Linear:
    """After He et al. 2015, eq. 10, by what `follows`."""
    linear = nn.Linear(before, after)
    nn.init.kaiming_normal_(linear.weight, nonlinearity=follows)
    nn.init.zeros_(linear.bias)
    return linear
