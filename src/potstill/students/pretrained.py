"""Folders in the layout of Hugging Face: safetensors only, and no code of theirs is ever run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from potstill.core.errors import DataError, RecipeError
from potstill.core.run import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Task: TypeAlias = Literal["causal", "masked", "features"]
"""The head: a language model's, a BERT-like encoder's, or none (hidden states only)."""
DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
Attention: TypeAlias = Literal["auto", "sdpa", "eager"]
"""auto: the fastest that the architecture has. Only eager says its attention probabilities."""

AUTO_CLASSES = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "features": "AutoModel"}
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_DOWNLOADED = ["*/*", "consolidated*"]
"""Subfolders hold other formats; consolidated weights are a second copy."""
WORTH_A_BAR = 2**30
"""Bytes of weights: fewer are loaded or written before a reader could look at a progress bar."""


def find_folder(model: str) -> Path:
    """The folder of a model: a path as it is, or what the hub (or its cache) holds under `owner/name`.

    Raises DataError where there is none, or one without a configuration.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _downloaded(model)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{model} holds no config.json, so it is not a model's folder. Give one saved by save_pretrained."
        )
    return folder


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration; DataError for an architecture that transformers has no code for."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    written = read_json(folder / "config.json")
    kind = written.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in written:
            raise DataError(
                f"{folder}: the model brings code of its own (trust_remote_code), which Potstill never runs. Take a "
                "model whose architecture transformers has, or wrap one you built yourself: students.module(model)."
            )
        raise DataError(
            f"{folder}: transformers {transformers.__version__} knows no model_type {kind!r}. "
            "Check config.json, or install the transformers that the model was made for."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ModuleNotFoundError as error:
        # What transformers then says does not name the culprit, which is nearly always the same.
        raise RecipeError(
            f"transformers cannot be used here: {error.__cause__ or error}. Where a torchvision is installed that does "
            "not fit this torch, install the fitting one or remove it."
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is not a valid configuration: {error}.") from error


def load_pretrained(folder: Path, *, task: Task, dtype: DType, attention: Attention, **more: Any) -> PreTrainedModel:
    """The model with its weights, every one of them read from safetensors.

    Raises DataError where weights are missing, torn, of other shapes, or stored in a format that can run code.
    """
    from safetensors import SafetensorError

    if not any(folder.glob("*.safetensors")):
        other = next((path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt*")]), "no weights")
        raise DataError(
            f"{folder}: found {other}, expected *.safetensors: other formats can run code when they are read. "
            "Save the model again with a current transformers, or ask its author to."
        )
    config = read_config(folder)
    auto = _auto_class(task, config, folder)
    how = {"dtype": getattr(torch, dtype), "attn_implementation": None if attention == "auto" else attention}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        with progress_for(size):
            model, told = auto.from_pretrained(
                folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                **how, **_without_pooler(task, config), **more,
            )  # fmt: skip
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{folder}: the weights lack '{missing[0]}'{count} of {type(model).__name__}. Give a folder of that "
            f"architecture, or another task than '{task}'."
        )
    return model


@contextmanager
def progress_for(size: int) -> Iterator[None]:
    """transformers draws its progress bars only for `size` bytes or more that are worth one."""
    from transformers.utils import logging

    if size >= WORTH_A_BAR or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def make_fresh(config: PretrainedConfig, *, task: Task, dtype: DType, attention: Attention) -> PreTrainedModel:
    """A model of this configuration with random weights, from torch's global random stream."""
    auto = _auto_class(task, config, config.name_or_path)
    how = {"dtype": getattr(torch, dtype), "attn_implementation": None if attention == "auto" else attention}
    try:
        return auto.from_config(config, trust_remote_code=False, **how, **_without_pooler(task, config))
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"no model can be made from these sizes: {_first_line(error)}") from error


def resized(
    config: PretrainedConfig, *, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int
) -> PretrainedConfig:
    """The configuration with other sizes; 0 keeps one, or its proportion to the sizes that change."""
    text = config.get_text_config()
    old: dict[str, Any] = {name: getattr(text, name, None) for name in (*SIZES, "head_dim")}
    new = {
        "num_hidden_layers": layers or old["num_hidden_layers"],
        "hidden_size": hidden or old["hidden_size"],
        "num_attention_heads": heads or old["num_attention_heads"],
    }
    widened = new["hidden_size"] / old["hidden_size"]
    if old["intermediate_size"] or intermediate:
        new["intermediate_size"] = intermediate or round(old["intermediate_size"] * widened)
    if old["num_key_value_heads"] or kv_heads:
        share = old["num_key_value_heads"] / old["num_attention_heads"]
        new["num_key_value_heads"] = kv_heads or max(1, round(new["num_attention_heads"] * share))
    if old["head_dim"] and (hidden or heads):
        share = old["head_dim"] * old["num_attention_heads"] / old["hidden_size"]
        new["head_dim"] = round(new["hidden_size"] * share / new["num_attention_heads"])
    _check_sizes(new)
    changed = type(config).from_dict(config.to_dict())
    changed.name_or_path = config.name_or_path
    kinds = getattr(text, "layer_types", None)
    for name, size in new.items():
        if size != old[name]:
            setattr(changed.get_text_config(), name, size)
    if kinds:
        # One kind of attention per layer: the pattern of the base, cut off or repeated.
        changed.get_text_config().layer_types = [kinds[i % len(kinds)] for i in range(new["num_hidden_layers"])]
    return changed


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights; None where the folder has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{folder}: the tokenizer cannot be read: {_first_line(error)}") from error


def _check_sizes(sizes: dict[str, int]) -> None:
    if min(sizes.values()) < 1:
        name, size = min(sizes.items(), key=lambda item: item[1])
        raise RecipeError(f"{name}: found {size}, expected at least 1.")
    heads = sizes["num_attention_heads"]
    for name, whole, divisor in (
        ("hidden", sizes["hidden_size"], heads),
        ("heads", heads, sizes.get("num_key_value_heads", heads)),
    ):
        if whole % divisor:
            of = "heads" if name == "hidden" else "kv_heads"
            raise RecipeError(f"{name}: {whole} is not a multiple of {of} ({divisor}). Choose sizes that divide.")


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise DataError(
            f"{model}: there is no such folder. Give the path of a model's folder, or owner/name on the hub."
        )
    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{model}: there is no such folder, and the hub did not give it ({_first_line(error)}). "
            "Check the name and the connection, or give the path of a folder."
        ) from error


def _auto_class(task: Task, config: PretrainedConfig, place: object) -> Any:
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task])
    if type(config) not in auto._model_mapping:
        raise DataError(
            f"{place}: a model of type '{config.model_type}' has no form for the task '{task}'. "
            "There is: causal (predicts the next token), masked (fills in tokens), features (hidden states only)."
        )
    return auto


def _without_pooler(task: Task, config: PretrainedConfig) -> dict[str, bool]:
    """BERT's pooler is not in every checkpoint, and nothing here reads it."""
    if task != "features":
        return {}
    made = _auto_class(task, config, config.name_or_path)._model_mapping[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made.__init__).parameters else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
