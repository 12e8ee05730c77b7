"""Tiny language models of many architectures, batches for them, and the trained one of the shared data."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from potstill.core.types import IGNORED, Batch
from tests.data.places import shared

V = 40
"""Rows of every tiny model's head."""

SMALL = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CAUSAL = {
    "llama": ("LlamaForCausalLM", SMALL),
    "tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "qwen3": ("Qwen3ForCausalLM", SMALL),
    "gemma2": ("Gemma2ForCausalLM", SMALL | {"final_logit_softcapping": 0.5, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", SMALL | {"final_logit_softcapping": 0.5, "sliding_window": 4}),
    "cohere": ("CohereForCausalLM", SMALL | {"logit_scale": 0.0625}),
    "granite": ("GraniteForCausalLM", SMALL | {"logits_scaling": 6.0}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    "phi": ("PhiForCausalLM", SMALL),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("OPTForCausalLM", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
}
MASKED = {
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", SMALL | {"pad_token_id": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": V, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
}
HEADLESS = {"encoder": ("BertModel", SMALL)}
ALL = CAUSAL | MASKED | HEADLESS


def make_torchvision_importable() -> None:
    """Where a torchvision is installed that was built for another torch, transformers imports it and fails; declare
    the operators it looks for. No test calls one."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        make_torchvision_importable.kept = library


make_torchvision_importable()


def tiny(family: str, *, seed: int = 0, attention: str | None = None, **changes):
    """A model with random weights and random biases, so that a forgotten bias shows."""
    import transformers

    name, sizes = ALL[family]
    made = getattr(transformers, name)
    config = made.config_class(**(sizes | changes))
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = made(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Biases start at 0 and weights at 0.02: too little for a soft cap of 0.5 to bend anything.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter_name.endswith("bias") else 0.2))
    return model.eval()


def tokens(*rows: list[int], **more) -> Batch:
    """Rows padded on the right with 0; every token but the last is supervised with the next one."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return from_ids(ids, mask, **more)


def from_ids(ids: Tensor, attention_mask: Tensor, *, segments: Tensor | None = None, vocabulary: str = "") -> Batch:
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    real = torch.cat([attention_mask[:, 1:], torch.zeros_like(attention_mask[:, :1])], dim=1).bool()
    inputs = {"input_ids": ids, "attention_mask": attention_mask}
    labels = torch.where(real & attention_mask.bool(), following, IGNORED)
    return Batch(
        keys=tuple(map(str, range(len(ids)))),
        inputs=inputs if segments is None else {**inputs, "segments": segments},
        labels=labels,
        mask=labels != IGNORED,
        vocabulary=vocabulary,
    )


@cache
def stories_folder() -> Path:
    return shared("llama-stories-260k")
