"""Tokenizers and templates for the tests of chat data."""

from __future__ import annotations

import gzip
import json
import sys
from functools import cache
from pathlib import Path

import torch

from potstill.core.types import IGNORED, Batch
from potstill.data.chat import ChatData, chat
from tests.data.places import shared

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # A build for another torch: transformers would trip over it although nothing here needs pictures.
    sys.modules["torchvision"] = None  # type: ignore[assignment]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops earlier thinking, and writes an empty thought where the last answer has none, as several families do."""
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Asks for a thought that the answers in the data do not have."""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
"""No generation prompt, and a line's end as the only mark."""


@cache
def _bytes() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return backend


def byte_tokenizer(*, template: str = "", pad: str | None = "<pad>", eos: str | None = "</s>"):
    """One token per byte, and five special ones."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bytes(), bos_token="<s>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template or None
    return tokenizer


@cache
def _stories(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stories_tokenizer(*, template: str = ""):
    """The 512 pieces of the llama-stories models; one token both opens and ends a text."""
    import copy

    tokenizer = copy.deepcopy(_stories(shared("llama-stories-260k")))
    tokenizer.chat_template = template or None
    return tokenizer


def write(path: Path, rows: list[dict[str, object]]) -> str:
    """Rows as JSON lines, gzipped by the name."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def dialogue(*turns: str) -> list[dict[str, object]]:
    """user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def read(folder: Path, rows: list[dict[str, object]], tokenizer: object, **settings: object) -> ChatData:
    """`chat` over these rows, all for training."""
    path = write(folder / "rows.jsonl", rows)
    return chat(path, tokenizer=tokenizer, **{"test_share": 0.0, "batch": 1, **settings})  # type: ignore[arg-type]


def only(data: ChatData) -> Batch:
    """All training rows in one batch, in the order of the file."""
    return next(data.train.batches(data.train.num_rows))


def answers(batch: Batch, tokenizer, row: int = 0) -> str:
    """What the labels of a row spell."""
    labels = batch.labels[row]
    return tokenizer.decode(labels[labels != IGNORED].tolist(), skip_special_tokens=False)


def table_lookup(batch: Batch) -> torch.Tensor:
    """A model that knows the next token of the row it is in: logits [B, T, V]."""
    ids = batch.inputs["input_ids"]
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return 50.0 * torch.nn.functional.one_hot(following, 600).float()


def losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the counted positions: [N]."""
    return torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask], reduction="none")
