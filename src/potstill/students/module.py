"""Any nn.Module as a student: its logits and the outputs of its layers, by name. The model itself stays untouched."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from potstill.core.catalog import part
from potstill.core.errors import RecipeError, SignalError, nearest
from potstill.core.types import Batch, Dense, Need, Signal

_COMPILED = "_orig_mod"
_WRAPPERS = frozenset({_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that torch.compile, FSDP and activation checkpointing put into a dotted name; users do not write them."""


@part("student")
def module(model: nn.Module, *, inputs: Sequence[str] = ("image",)) -> Module:
    """A student from any nn.Module; `inputs` names the fields of the batch it is called with, in order."""
    return Module(model, inputs=inputs)


class Module(nn.Module):
    """Runs `model` on a batch and answers with its logits and the layers that were asked for.

    Layers are written as in `model.named_modules()`:
    `layer2` is what it returns (of a tuple, the first tensor); `linear@input` is what it is first given;
    `block#2` is what its second call returns, where it is called several times (alone: the last call).
    The logits are the output itself, the first tensor of a tuple, or the entry "logits" of a mapping.
    Raises SignalError for a layer that does not exist (before the forward), was never called, or was overwritten.
    """

    def __init__(self, model: nn.Module, *, inputs: Sequence[str] = ("image",)) -> None:
        super().__init__()
        if isinstance(inputs, str):
            raise RecipeError(f"students.module, inputs: found the word '{inputs}', expected a list: ['{inputs}'].")
        self.model = model
        self.inputs = tuple(inputs)

    def forward(self, batch: Batch, need: Need) -> Signal:
        if not need:
            return Signal()
        with recording(self.model, need.features) as features:
            output = self.model(*self._arguments(batch))
        return Signal(logits=_logits(output, self.model) if need.logits else None, features=features)

    def check(self, need: Need) -> None:
        """Raises SignalError where a layer does not exist, naming the nearest that does. Runs nothing."""
        _taps(self.model, need.features)

    def layers(self) -> tuple[str, ...]:
        """The dotted names that can be asked for, in the order the model lists them."""
        return tuple(_modules(self.model))

    def _arguments(self, batch: Batch) -> list[Tensor]:
        for name in self.inputs:
            if name not in batch.inputs:
                raise SignalError(
                    f"{type(self.model).__name__} reads the input '{name}'; the batch has: "
                    f"{', '.join(batch.inputs) or 'none'}. Say inputs=[...] where the model is wrapped."
                )
        return [batch.inputs[name] for name in self.inputs]


def as_student(model: nn.Module, *, inputs: Sequence[str] = ("image",)) -> nn.Module:
    """`model` itself where its forward takes (batch, need), as every student's does; otherwise wrapped."""
    inner = dict(model.named_children()).get(_COMPILED, model)
    if list(inspect.signature(inner.forward).parameters) == ["batch", "need"]:
        return model
    return Module(model, inputs=inputs)


@dataclass(slots=True, kw_only=True)
class _Tap:
    """Listens to one layer during one forward."""

    layer: str
    module: nn.Module
    at_input: bool
    compiled: bool
    """It sits inside a compiled model, which would not run hooks."""
    call: int = 0
    """Which call to keep, from 1; 0 keeps the last."""
    calls: int = 0
    heard: list[tuple[Tensor, int]] = field(default_factory=list)
    """At most one tensor, with its version when it was captured."""

    def listen(self) -> torch.utils.hooks.RemovableHandle:
        if self.at_input:
            return self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        return self.module.register_forward_hook(self._on_output)

    def _on_input(self, _: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        self._hear((*arguments, *named.values()))

    def _on_output(self, _: nn.Module, arguments: object, output: object) -> None:
        self._hear(output)

    def _hear(self, said: object) -> None:
        self.calls += 1
        if self.call not in (0, self.calls):
            return
        tensor = _first_tensor(said)
        if tensor is None:
            raise SignalError(f"Layer '{self.layer}' gives {type(said).__name__} without a tensor. Ask another layer.")
        # Inference tensors keep no version, so a later overwriting could not be noticed: keep a copy.
        self.heard = [(tensor.clone(), 0) if tensor.is_inference() else (tensor, tensor._version)]

    def take(self) -> Tensor:
        """The captured tensor. Raises SignalError where there is none, or where it no longer is what it was."""
        if not self.heard:
            asked = f"call {self.call}" if self.call else "a call"
            raise SignalError(
                f"Layer '{self.layer}': the forward made {self.calls} calls of it, {asked} was asked for. "
                "Ask a layer that this forward runs."
            )
        [(tensor, version)] = self.heard
        if not tensor.is_inference() and tensor._version != version:
            raise SignalError(
                f"Layer '{self.layer}': a later in-place operation of the model (such as ReLU(inplace=True) or +=) "
                "overwrote what was captured. Ask for the layer that overwrites it, or take the operation out of place."
            )
        return tensor


@contextmanager
def recording(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """The named layers during one forward of `model`; the answer is filled in at the end.

    The hooks are gone afterwards, also where the forward fails. Raises SignalError as `Module` does.
    """
    taps = _taps(model, layers)
    features: dict[str, Tensor] = {}
    with ExitStack() as cleanup:
        if any(tap.compiled for tap in taps):
            cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        for tap in taps:
            cleanup.callback(tap.listen().remove)
        yield features
    features.update((tap.layer, tap.take()) for tap in taps)


def _taps(model: nn.Module, layers: Collection[str]) -> list[_Tap]:
    if not layers:
        return []
    modules = _modules(model)
    return [_tap(layer, modules, model) for layer in sorted(layers)]


def _tap(layer: str, modules: Mapping[str, tuple[nn.Module, bool]], model: nn.Module) -> _Tap:
    """Read `name`, `name@input`, `name#2` or `name@input#2`."""
    parsed = re.fullmatch(r"([^@#]+)(@input)?(?:#([1-9]\d*))?", layer)
    if parsed is None:
        raise SignalError(
            f"Layer '{layer}' cannot be read. Write 'name' (its output), 'name@input' (what it is given) "
            "or 'name#2' (its second call)."
        )
    name, at_input, call = parsed.groups()
    if name not in modules:
        guess = nearest(name, modules)
        hint = f"Did you mean '{guess}'?" if guess else f"It has {', '.join(list(modules)[:8]) or 'none'}."
        raise SignalError(
            f"{type(model).__name__} has no layer '{name}'. {hint} students.module(model).layers() lists all."
        )
    found, compiled = modules[name]
    return _Tap(layer=layer, module=found, at_input=bool(at_input), call=int(call or 0), compiled=compiled)


def _modules(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Every submodule by the name a user writes, seen through wrappers; True where it sits in a compiled one."""
    found: dict[str, tuple[nn.Module, bool]] = {}
    parallel: list[str] = []
    for name, child in model.named_modules(remove_duplicate=False):
        if isinstance(child, DistributedDataParallel | DataParallel):
            parallel.append(f"{name}.module".removeprefix("."))
        parts = name.split(".")
        plain = [
            part
            for depth, part in enumerate(parts, start=1)
            if part not in _WRAPPERS and ".".join(parts[:depth]) not in parallel
        ]
        if plain and name:
            # Of a wrapper and what it wraps, the later, inner one stays.
            found[".".join(plain)] = (child, _COMPILED in parts)
    return found


def _first_tensor(said: object) -> Tensor | None:
    """The tensor itself, or the first one of a tuple or mapping."""
    if isinstance(said, Tensor):
        return said
    several = said.values() if isinstance(said, Mapping) else said if isinstance(said, tuple | list) else ()
    return next((each for each in several if isinstance(each, Tensor)), None)


def _logits(output: object, model: nn.Module) -> Dense:
    """Logits [..., V] from what the model returned."""
    found = output.get("logits") if isinstance(output, Mapping) else _first_tensor(output)
    if not isinstance(found, Tensor):
        keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise SignalError(
            f"{type(model).__name__} returns {type(output).__name__}{keys}; expected logits: a tensor, a tuple that "
            "holds one, or a mapping with the key 'logits'."
        )
    return Dense(logits=found)
