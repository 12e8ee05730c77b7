"""Training heads: what stands between a student's layer and a loss while it learns, and is left out of the export.

Dimension key: B examples, C channels, H and W rows and columns, T tokens, D token width. Shapes here lack B:
a vector is (D,), tokens are (T, D), a map is (C, H, W).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.core.catalog import find, part
from potstill.core.errors import SignalError
from potstill.core.types import Batch, Need, Signal
from potstill.losses.dual_space import behind

Shape = tuple[int, ...]


class Request(Protocol):
    """A head that an objective asks for: `head` is its name in the catalog, `key` names this use of it."""

    @property
    def key(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def student_layer(self) -> str: ...
    @property
    def teacher_layer(self) -> str: ...


def equip(student: nn.Module, requests: Sequence[Request], student_signal: Signal, teacher_signal: Signal) -> Equipped:
    """The student with the heads asked for, sized from what both sides said about one batch.

    A head starts from weights that depend on its key only and takes nothing from the global random stream.
    Raises SignalError naming both layers and shapes where no head can join them.
    """
    heads = {
        request.key: _build(
            request, student_signal.features[request.student_layer], teacher_signal.features[request.teacher_layer]
        )
        for request in requests
    }
    return Equipped(student, heads, {request.key: request.student_layer for request in requests})


class Equipped(nn.Module):
    """A student and its training heads; `.student` alone is what is exported.

    The heads' keys are asked for like layers: for the key K each output `name` of the head is the feature `K.name`.
    """

    def __init__(self, student: nn.Module, heads: dict[str, nn.Module], layers: dict[str, str]) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleDict()
        self._layers = dict(layers)
        self._names = {}
        for index, (key, head) in enumerate(heads.items()):
            # A dot in a name would read as a submodule; the number keeps "a.b" and "a_b" apart.
            self._names[key] = re.sub(r"\W+", "_", f"{index}_{key}")
            self.heads[self._names[key]] = head

    def forward(self, batch: Batch, need: Need) -> Signal:
        keys = sorted(need.features & self._layers.keys())
        raw = need.features - self._layers.keys()
        behind = frozenset(self._layers[key] for key in keys)
        said = self.student(batch, Need(logits=need.logits, features=raw | behind))
        features = {name: tensor for name, tensor in said.features.items() if name in raw}
        for key in keys:
            outputs = self.heads[self._names[key]](said.features[self._layers[key]])
            features.update({f"{key}.{name}": tensor for name, tensor in outputs.items()})
        return Signal(logits=said.logits, features=features)


@part("head")
def projector(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    """Brings the student's feature to the teacher's kind and width: {"student_feature"}.

    Vectors and tokens: a linear map without bias. Maps: 1x1 convolution without bias, then batch norm. Where widths
    agree there are no parameters; equal shapes pass untouched. A larger map is pooled to the teacher's size first,
    except that one of exactly twice its rows and columns takes FitNet's 3x3 convolution of stride 2 (METHODS_CLASSIC
    0.4); a smaller one is left to the loss, which pools the teacher's.
    """
    arranged = _arranged(student_shape, teacher_shape)
    layout = _layout(student_shape, teacher_shape)
    if width(arranged) == width(teacher_shape):
        return _Head(layout, nn.Identity())
    if len(student_shape) == 3 and student_shape[1:] == tuple(2 * n for n in teacher_shape[1:]):
        stride_two = nn.Conv2d(width(student_shape), width(teacher_shape), 3, stride=2, padding=1, bias=False)
        return _Head(nn.Identity(), _normalized(stride_two, teacher_shape))
    return _Head(layout, _normalized(_pointwise(arranged, width(teacher_shape)), arranged))


@part("head", paper="Ahn et al. 2019, variational information distillation")
def variational(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    """The Gaussian q(teacher | student): {"student_feature": its mean, "student_variance": one per channel}.

    The mean is three bias-free 1x1 convolutions (linear maps for vectors and tokens) of the teacher's width with ReLU
    between. The variance, softplus(alpha) + 1e-5, starts at 5: [C, 1, 1] for maps, [D] otherwise.
    """
    arranged = _arranged(student_shape, teacher_shape)
    out = width(teacher_shape)
    inner = (out, *arranged[1:]) if len(arranged) == 3 else (*arranged[:-1], out)
    mean = nn.Sequential(
        _pointwise(arranged, out), nn.ReLU(), _pointwise(inner, out), nn.ReLU(), _pointwise(inner, out)
    )
    return _Variational(_Head(_layout(student_shape, teacher_shape), mean), teacher_shape)


@part("head", paper="Zhang et al. 2024, dual-space distillation")
def dual_space(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    """From the embeddings of tokens (T, D), for a teacher's of width E: {"student_feature": queries [B, T, 2 E] of each
    token with its next, "student_to_teacher": a map [E, D], "student_from_teacher": a map [D, E]}.

    Raises SignalError for shapes that are no tokens.
    """
    if len(student_shape) != 2 or len(teacher_shape) != 2:
        raise SignalError(
            f"dual_space reads embeddings of tokens, (T, D), on both sides, found shapes {list(student_shape)} and "
            f"{list(teacher_shape)}."
        )
    return _DualSpace(student_shape[-1], teacher_shape[-1])


class _DualSpace(nn.Module):
    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(2 * student_width, 2 * teacher_width, bias=False)
        self.to_teacher = nn.Linear(student_width, teacher_width, bias=False)
        self.from_teacher = nn.Linear(teacher_width, student_width, bias=False)
        for layer in (self.query, self.to_teacher, self.from_teacher):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, embeddings: Tensor) -> dict[str, Tensor]:
        # Embeddings learn from what they are for, not from how they are asked.
        both = torch.cat([embeddings, behind(embeddings)], dim=-1).detach()
        return {
            "student_feature": self.query(both),
            "student_to_teacher": self.to_teacher.weight,
            "student_from_teacher": self.from_teacher.weight,
        }


class _Head(nn.Module):
    """Arranges the student's feature like the teacher's, then maps its channels."""

    def __init__(self, layout: nn.Module, channels: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.channels = channels

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        return {"student_feature": self.channels(self.layout(feature))}


class _Variational(nn.Module):
    """Mean and variance of the teacher's feature given the student's."""

    FLOOR = 1e-5
    INITIAL = 5.0

    def __init__(self, mean: _Head, teacher_shape: Shape) -> None:
        super().__init__()
        self.mean = mean
        # The inverse of softplus(alpha) + FLOOR at INITIAL: 4.993229 (METHODS_CLASSIC B9).
        alpha = math.log(math.expm1(self.INITIAL - self.FLOOR))
        positions = (1, 1) if len(teacher_shape) == 3 else ()
        self.alpha = nn.Parameter(torch.full((width(teacher_shape), *positions), alpha))

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        return {**self.mean(feature), "student_variance": functional.softplus(self.alpha) + self.FLOOR}


class _Arrange(nn.Module):
    def __init__(self, teacher_shape: Shape) -> None:
        super().__init__()
        self.teacher_shape = teacher_shape

    def forward(self, feature: Tensor) -> Tensor:
        return arrange(feature, self.teacher_shape)


def _build(request: Request, student_feature: Tensor, teacher_feature: Tensor) -> nn.Module:
    """One head, on the student's device and of its type."""
    shapes = tuple(student_feature.shape[1:]), tuple(teacher_feature.shape[1:])
    make: Callable[[Shape, Shape], nn.Module] = find("head", request.head, place=f"{request.key}: head")
    digest = hashlib.blake2b(request.key.encode(), digest_size=8).digest()
    try:
        # Seeding only the CPU's generator leaves those of accelerators alone; the fork gives the CPU's back.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
            head = make(*shapes)
    except SignalError as error:
        raise SignalError(
            f"{request.head} between the student's '{request.student_layer}' and the teacher's "
            f"'{request.teacher_layer}': {error}"
        ) from error
    return head.to(student_feature.device, student_feature.dtype)


def _layout(student_shape: Shape, teacher_shape: Shape) -> nn.Module:
    """Nothing where the positions agree, so that they may change from batch to batch; else the first batch's sizes."""
    if len(student_shape) == len(teacher_shape) and _positions(student_shape) == _positions(teacher_shape):
        return nn.Identity()
    return _Arrange(teacher_shape)


def _arranged(student_shape: Shape, teacher_shape: Shape) -> Shape:
    return tuple(arrange(torch.empty(1, *student_shape, device="meta"), teacher_shape).shape[1:])


def _positions(shape: Shape) -> Shape:
    return shape[1:] if len(shape) == 3 else shape[:-1]


def _pointwise(shape: Shape, out: int) -> nn.Conv2d | nn.Linear:
    """The same linear map at every position, without bias; it keeps the scale: variance 1 / fan in."""
    layer = nn.Conv2d(shape[0], out, 1, bias=False) if len(shape) == 3 else nn.Linear(shape[-1], out, bias=False)
    nn.init.normal_(layer.weight, std=width(shape) ** -0.5)
    return layer


def _normalized(layer: nn.Conv2d | nn.Linear, shape: Shape) -> nn.Module:
    """Batch norm behind a convolution, started as He et al. 2015, fan out.

    Not behind a vector or a map of one pixel: a batch of one example has no statistics there.
    """
    if not isinstance(layer, nn.Conv2d) or _positions(shape) == (1, 1):
        return layer
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def width(shape: Shape) -> int:
    """Channels of a map (C, H, W), width of tokens (T, D) or of a vector (D,)."""
    return shape[0] if len(shape) == 3 else shape[-1]


def arrange(feature: Tensor, teacher_shape: Shape) -> Tensor:
    """The student's feature in the teacher's kind, channels as they are: [B, ...] -> [B, ...].

    Maps are pooled to the smaller of both sizes, rows and columns apart. Tokens that make a square, with or without
    a class token in front, are a map; a class token that only the teacher has is the mean over the map, one that
    only the student has is dropped. Other token counts are pooled in one dimension. A vector takes the mean.
    Raises SignalError where the student has no positions and the teacher has.
    """
    match feature.ndim - 1, len(teacher_shape):
        case (1, 1):
            return feature
        case (2, 1):
            return feature.mean(dim=1)
        case (3, 1):
            return feature.mean(dim=(2, 3))
        case (1, 3) if _positions(teacher_shape) == (1, 1):
            return feature[:, :, None, None]
        case (2, 2):
            return _tokens_like(feature, teacher_shape[0])
        case (2, 3):
            return _shrink(_map_from(feature, teacher_shape[1:]), teacher_shape[1:])
        case (3, 2):
            return _tokens_from(feature, teacher_shape[0])
        case (3, 3):
            return _shrink(feature, teacher_shape[1:])
        case _:
            raise SignalError(
                f"no head leads from shape {list(feature.shape[1:])} to {list(teacher_shape)}. Vectors [D], tokens "
                "[T, D] and maps [C, H, W] can be joined, but a vector has no positions: choose layers of one kind."
            )


def _shrink(feature: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> at most `size`; a dimension that is smaller already stays."""
    rows, columns = min(feature.shape[2], size[0]), min(feature.shape[3], size[1])
    return functional.adaptive_avg_pool2d(feature, (rows, columns))


def _tokens_like(tokens: Tensor, count: int) -> Tensor:
    """[B, T, D] -> [B, count, D]."""
    if tokens.shape[1] == count:
        return tokens
    have, want = _grid(tokens.shape[1]), _grid(count)
    if not (have and want):
        return _pool_tokens(tokens, count)
    arranged = _tokens_from(_map_from(tokens, (want.side, want.side)), count)
    if have.has_class and want.has_class:
        return torch.cat([tokens[:, :1], arranged[:, 1:]], dim=1)
    return arranged


def _map_from(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """[B, T, D] -> [B, D, H, W]: the tokens' own square where they make one, else `size`."""
    rows, columns = size
    count = tokens.shape[1]
    grid = _grid(count)
    if count == rows * columns:
        body = tokens
    elif count == rows * columns + 1:
        body = tokens[:, 1:]
    elif grid:
        rows = columns = grid.side
        body = tokens[:, 1:] if grid.has_class else tokens
    else:
        body = _pool_tokens(tokens, rows * columns)
    return body.mT.reshape(*body.mT.shape[:2], rows, columns)


def _tokens_from(feature: Tensor, count: int) -> Tensor:
    """[B, C, H, W] -> [B, count, C]."""
    positions = feature.shape[2] * feature.shape[3]
    grid = _grid(count)
    if count not in (positions, positions + 1) and grid:
        feature = functional.adaptive_avg_pool2d(feature, grid.side)
        positions = grid.side**2
    tokens = feature.flatten(2).mT
    if count == positions + 1:
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    return tokens if count == positions else _pool_tokens(tokens, count)


class _Grid(NamedTuple):
    side: int
    has_class: bool


def _grid(count: int) -> _Grid | None:
    """The square that so many tokens make, with or without a class token in front."""
    for has_class in (False, True):
        side = math.isqrt(count - has_class)
        if side > 0 and side**2 == count - has_class:
            return _Grid(side, has_class)
    return None


def _pool_tokens(tokens: Tensor, count: int) -> Tensor:
    return functional.adaptive_avg_pool1d(tokens.mT, count).mT
