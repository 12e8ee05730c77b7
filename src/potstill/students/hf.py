"""Any transformers model as a student: its head not yet applied, hidden states and attentions by name.

The model runs as it is, except that its head is given no rows: what it would have been given, with the head's weight,
is the signal. What the model does to the logits after its head (scale, soft cap) is measured when it is wrapped, so
no list of architectures can be out of date.

Dimension key: B examples, T positions, V vocabulary, H hidden width, A attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from potstill.core.catalog import part
from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.run import replacing
from potstill.core.types import Batch, Need, Projection, Signal, Speech
from potstill.core.vocabulary import fingerprint
from potstill.students.manners import keeps_apart, observe, withheld
from potstill.students.module import recording
from potstill.students.pretrained import (
    Attention,
    DType,
    Task,
    find_folder,
    load_pretrained,
    make_fresh,
    progress_for,
    read_config,
    read_tokenizer,
    resized,
)
from potstill.students.speaking import end_ids, speaking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@part("student")
def hf(
    model: str,
    *,
    task: Task = "causal",
    dtype: DType = "float32",
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
    vocabulary: int = 0,
) -> HfModel:
    """A student from a folder (or hub name) with its weights. `vocabulary`: see HfModel.

    Raises DataError for what cannot be loaded: see students/pretrained.
    """
    folder = find_folder(model)
    loaded = load_pretrained(folder, task=task, dtype=dtype, attention=attention)
    student = HfModel(loaded, tokenizer=read_tokenizer(folder), vocabulary=vocabulary)
    return checkpointing(student) if gradient_checkpointing else student


@part("student")
def hf_fresh(
    model: str,
    *,
    task: Task = "causal",
    layers: int = 0,
    hidden: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    intermediate: int = 0,
    dtype: DType = "float32",
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
    vocabulary: int = 0,
) -> HfModel:
    """A student with random weights, of the architecture and with the tokenizer of the folder `model`.

    A size of 0 stays as it is there; those that follow from others (width of a head, of the feed-forward part, number
    of key-value heads) keep their proportion. Raises RecipeError where the sizes do not fit together.
    """
    folder = find_folder(model)
    config = resized(
        read_config(folder), layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, intermediate=intermediate
    )
    made = make_fresh(config, task=task, dtype=dtype, attention=attention)
    student = HfModel(made, tokenizer=read_tokenizer(folder), vocabulary=vocabulary)
    return checkpointing(student) if gradient_checkpointing else student


class HfModel(nn.Module):
    """Answers a batch of tokens with a Projection [B, T, H] and the features asked for.

    Inputs read: input_ids [B, T]; attention_mask and position_ids [B, T] where given; for packed rows segments [B, T]
    (1, 2, ... per text, 0 for padding), which keep the texts of a row apart.

    Features: `hidden/0` is the embeddings, `hidden/i` what block i returns, [B, T, H]; the last is taken after the
    final norm, as transformers counts (METHODS_LLM 0.2): compare last with last, or take the block by its dotted name.
    `attention/i` is block i's probabilities, [B, A, T, T], and needs attention="eager". Dotted names as in `Module`.

    The logits are cut to the first `vocabulary` classes, by default as many as the tokenizer has: rows beyond are
    padding, whose number differs within a family (METHODS_LLM 0.7).
    """

    def __init__(
        self, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None, vocabulary: int = 0
    ) -> None:
        super().__init__()
        self.model = model.train()
        self.tokenizer = tokenizer
        self.title = model.name_or_path or type(model).__name__
        self.fingerprint = "" if tokenizer is None else fingerprint(tokenizer)
        self.vocabulary = _width(model, tokenizer, vocabulary, title=self.title)
        self._manners = observe(model, title=self.title)

    def forward(self, batch: Batch, need: Need) -> Signal:
        if not need:
            return Signal()
        self._check_batch(batch)
        named = self._named(need)
        head = self.model.get_output_embeddings()
        arguments = self._packed(batch) if "segments" in batch.inputs else self._padded(batch)
        with recording(self.model, named.dotted) as features, withheld(head) as given:
            output = self.model(**arguments, **named.switches, **self._manners.fixed)
        for layer, index in named.hidden.items():
            features[layer] = self._one_of(output.hidden_states, index, layer)
        for layer, index in named.attention.items():
            # Block i stands behind the embeddings among the hidden states, but not among the attentions.
            features[layer] = self._one_of(output.attentions, index - 1, layer)
        return Signal(logits=self._projection(given) if need.logits else None, features=features)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of its generation configuration and of its tokenizer."""
        return end_ids(self.model, self.tokenizer)

    @property
    def longest(self) -> int:
        """The longest text it can read; 0 where its configuration names none."""
        return self._limit

    def speaking(self, ids: Tensor, mask: Tensor) -> AbstractContextManager[tuple[Speech, Tensor]]:
        """A speech that has begun with ids [B, T], filled up on the left, and logits [B, V]: see core.types.Speaker."""
        if self.model.get_output_embeddings() is None:
            raise SignalError(f"{self.title} has no head, so it cannot write. Load it as task 'causal'.")
        nothing = self._projection([torch.empty(0, device=self.device)])
        return speaking(
            self.model, ids, mask, takes_positions=self._manners.takes_positions, finish=nothing, title=self.title
        )

    def export(self, folder: str | Path) -> None:
        """Weights, configuration and tokenizer, whole or not at all: a folder that `from_pretrained` loads."""
        save_folder(self.model, self.tokenizer, Path(folder))

    def _projection(self, given: list[Tensor]) -> Projection:
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if self.vocabulary < weight.shape[0]:
            weight, bias = weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]
        [hidden] = given
        manners = self._manners
        return Projection(hidden=hidden, weight=weight, bias=bias, scale=manners.scale, softcap=manners.softcap)

    def _named(self, need: Need) -> _Named:
        """The features of a need by kind. Raises SignalError for those the model cannot give; runs nothing."""
        head = self.model.get_output_embeddings()
        if need.logits and head is None:
            raise SignalError(f"{self.title} has no head, so it says no logits. Load it as task 'causal' or 'masked'.")
        named = _Named.read(need.features, num_blocks=self.model.config.get_text_config().num_hidden_layers)
        if named.attention and self.model.config._attn_implementation != "eager":
            raise SignalError(
                f"{self.title}: '{min(named.attention)}' is not computed by the attention kernel "
                f"'{self.model.config._attn_implementation}'. Load the model with attention: eager."
            )
        path = "" if head is None else next(name for name, module in self.model.named_modules() if module is head)
        for layer in named.dotted:
            if f"{path}.".startswith(f"{layer.partition('#')[0]}."):
                raise SignalError(
                    f"{self.title}: '{layer}' is the head, which is not applied here. Ask for the logits."
                )
        return named

    def _one_of(self, said: tuple[Tensor | None, ...] | None, index: int, layer: str) -> Tensor:
        tensor = said[index] if said is not None and index < len(said) else None
        if tensor is None:
            raise SignalError(f"{self.title} does not give '{layer}'. Ask for a module by its dotted name instead.")
        return tensor

    def _check_batch(self, batch: Batch) -> None:
        if "input_ids" not in batch.inputs:
            raise SignalError(
                f"{self.title} reads the input 'input_ids'; the batch has: {', '.join(batch.inputs) or 'none'}. "
                "Give it tokens: data of chats or texts."
            )
        if batch.vocabulary and self.fingerprint and batch.vocabulary != self.fingerprint:
            raise SignalError(
                f"{self.title} has another tokenizer than the one that made the batch, so it would read other pieces. "
                "Take two models of one tokenizer, or compare across tokenizers: teachers.aligned."
            )

    def _padded(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.inputs["input_ids"]
        self._check_length(ids.shape[1])
        mask = batch.inputs.get("attention_mask", torch.ones_like(ids))
        positions = batch.inputs.get("position_ids", (mask.cumsum(dim=-1) - 1).clamp(min=0))
        return {"input_ids": ids, "attention_mask": mask, **self._manners.positions(positions)}

    def _packed(self, batch: Batch) -> dict[str, Tensor]:
        """No mask, and positions that start again at 0: transformers then keeps the texts apart in every layer, also
        in those with a sliding window, which a 4-D mask of ours would switch off."""
        if not self._keeps_apart:
            raise SignalError(
                f"{self.title} ({type(self.model).__name__}) cannot keep the texts of a packed row apart. "
                "Switch packing off where the data are read."
            )
        positions = positions_within(batch.inputs["segments"])
        if positions.shape[1] > self._limit > 0:
            self._check_length(int(positions.max()) + 1)
        return {"input_ids": batch.inputs["input_ids"], "position_ids": positions}

    def _check_length(self, length: int) -> None:
        if length > self._limit > 0:
            raise DataError(
                f"{self.title}: a text has {length} tokens, the model reads at most {self._limit}. "
                "Cut or leave out longer texts where the data are read."
            )

    @cached_property
    def _keeps_apart(self) -> bool:
        return self._manners.takes_positions and keeps_apart(self.model)

    @cached_property
    def _limit(self) -> int:
        """The longest text the model can read; 0 where its configuration names none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        # RoBERTa counts positions from padding_idx + 1, so its table is that much longer than its texts.
        tables = (module for name, module in self.model.named_modules() if name.endswith("position_embeddings"))
        unused = [t.padding_idx + 1 for t in tables if isinstance(t, nn.Embedding) and t.padding_idx is not None]
        return int(limit) - max(unused, default=0)


def checkpointing(student: HfModel) -> HfModel:
    """Blocks forget their activations and compute them again for the backward pass: same gradients, less memory."""
    try:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"gradient_checkpointing: {type(student.model).__name__} has none. Switch it off.") from error
    return student


def positions_within(segments: Tensor) -> Tensor:
    """Positions that start at 0 with each text; padding (segment 0) stays at 0. [B, T] -> [B, T]"""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return torch.where(segments > 0, index - first, 0)


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a model and its tokenizer, whole or not at all."""
    with replacing(folder) as draft:
        draft.mkdir()
        with progress_for(model.get_memory_footprint()):
            model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """Features asked for, by kind: {name: index} of hidden states and attentions, and dotted names of modules."""

    hidden: Mapping[str, int]
    attention: Mapping[str, int]
    dotted: tuple[str, ...]

    @classmethod
    def read(cls, features: frozenset[str], *, num_blocks: int) -> _Named:
        counted: dict[str, dict[str, int]] = {"hidden": {}, "attention": {}}
        first = {"hidden": 0, "attention": 1}
        for name in sorted(features):
            kind, slash, number = name.partition("/")
            if not slash:
                continue
            if kind not in first or not number.isdigit() or not first[kind] <= int(number) <= num_blocks:
                raise SignalError(
                    f"Feature '{name}' is none of this model: it has hidden/0 to hidden/{num_blocks}, attention/1 to "
                    f"attention/{num_blocks}, and modules by their dotted names."
                )
            counted[kind][name] = int(number)
        return cls(**counted, dotted=tuple(name for name in sorted(features) if "/" not in name))

    @property
    def switches(self) -> dict[str, bool]:
        asked = {"output_hidden_states": bool(self.hidden), "output_attentions": bool(self.attention)}
        return {name: True for name, is_asked in asked.items() if is_asked}


def _width(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, *, title: str) -> int:
    """How many classes the logits have; 0 for a model without a head."""
    head = model.get_output_embeddings()
    if head is None:
        return 0
    rows = head.weight.shape[0]
    wanted = vocabulary or (rows if tokenizer is None else len(tokenizer))
    if not 0 < wanted <= rows:
        whose = "vocabulary asks for" if vocabulary else "its tokenizer has"
        raise DataError(
            f"{title}: {whose} {wanted} tokens, but the model has {rows}. Resize its embeddings "
            f"(resize_token_embeddings) and save it, or set vocabulary to at most {rows}."
        )
    return wanted
