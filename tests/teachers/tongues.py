"""Small tokenizers that disagree, batches in their tokens, and tables that stand for models, for cross-tokenizer tests.

The teachers here are defined by what they say of text, so that every expected number can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from potstill.core.types import IGNORED, Batch, Dense, Need, Signal
from potstill.core.vocabulary import fingerprint

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CORPUS = [
    "In 2024 and in 2025 there were 2024 cats and 1999 dogs.",
    "the cat saw the other cat in 2024",
    "caf\u00e9 2024",
]


def fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(SPECIALS | names))


def bytewise() -> PreTrainedTokenizerFast:
    """One token per byte."""
    return pairwise()


def trained(*, splits_digits: bool, size: int = 330, corpus: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    """A byte-level BPE; without `splits_digits` it has learnt whole numbers."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level]) if splits_digits else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return fast(tokenizer)


def pairwise(*merges: str) -> PreTrainedTokenizerFast:
    """A vocabulary of all bytes, and of some pairs of letters that are always merged."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: at for at, piece in enumerate([*SPECIALS.values(), *letters, *merges])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[(pair[0], pair[1:]) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def rewriting() -> PreTrainedTokenizerFast:
    """It reads NFKC, as T5 and XLNet do."""
    letters = map(chr, range(256))
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate([*SPECIALS.values(), *letters])}, []))
    tokenizer.normalizer = normalizers.NFKC()
    return fast(tokenizer)


def rows(
    tokenizer: PreTrainedTokenizerFast, *texts: str, prompt: int = 0, left: bool = False, end: bool = True
) -> Batch:
    """Texts between begin and end, padded; the first `prompt` tokens behind the begin are not supervised."""
    ends = [tokenizer.eos_token_id] if end else []
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, *ends] for text in texts]
    width = max(map(len, ids))
    shape = len(ids), width
    tokens, real = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, text in enumerate(ids):
        start = width - len(text) if left else 0
        tokens[row, start : start + len(text)] = torch.tensor(text)
        real[row, start : start + len(text)] = 1
        labels[row, start + prompt : start + len(text) - 1] = torch.tensor(text[1 + prompt :])
    return Batch(
        keys=tuple(f"{text}/{prompt}" for text in texts),
        inputs={"input_ids": tokens, "attention_mask": real},
        labels=labels,
        mask=labels != IGNORED,
        vocabulary=fingerprint(tokenizer),
    )


class Table:
    """A teacher whose law of the next token depends on the tokens so far, by a function of ours."""

    identity = "table"

    def __init__(self, law: Callable[[tuple[int, ...]], Tensor]) -> None:
        self.law = law
        self.asked: list[Batch] = []

    def __call__(self, batch: Batch, need: Need) -> Signal:
        self.asked.append(batch)
        ids = batch.inputs["input_ids"].tolist()
        logits = [[self.law(tuple(row[: at + 1])) for at in range(len(row))] for row in ids]
        return Signal(logits=Dense(logits=torch.stack([torch.stack(row) for row in logits])))


def random_law(size: int, *, seed: int = 0) -> Callable[[tuple[int, ...]], Tensor]:
    """Some logits for each last token: a bigram table."""
    table = 2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda prefix: table[prefix[-1]]


__all__ = ["CORPUS", "SPECIALS", "Table", "bytewise", "fast", "pairwise", "random_law", "rewriting", "rows", "trained"]
