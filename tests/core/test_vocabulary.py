"""Fingerprints: equal for equal tokenizers and templates, different for any difference in meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from potstill.core.vocabulary import fingerprint, template_fingerprint
from tests.students.lm import stories_folder


@dataclass
class Fake:
    """A tokenizer of three pieces; with merges it is a fast one."""

    pieces: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 1, "ab": 2})
    merges: tuple[str, ...] = ()
    added_tokens_decoder: Mapping[int, object] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    special_tokens_map: Mapping[str, object] = field(default_factory=dict)
    padding: int = 0

    @property
    def is_fast(self) -> bool:
        return bool(self.merges)

    @property
    def backend_tokenizer(self):
        whole = {"model": {"vocab": self.pieces, "merges": list(self.merges)}, "padding": self.padding}
        return SimpleNamespace(to_str=lambda: json.dumps(whole))

    def get_vocab(self) -> dict[str, int]:
        return self.pieces

    def __len__(self) -> int:
        return len(self.pieces)


PLAIN = Fake(merges=("a b",))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(PLAIN, pieces={"a": 1, "b": 0, "ab": 2}), id="ids"),
        pytest.param(replace(PLAIN, pieces={"a": 0, "c": 1, "ab": 2}), id="pieces"),
        pytest.param(replace(PLAIN, merges=("b a",)), id="merges"),
        pytest.param(replace(PLAIN, added_tokens_decoder={2: "ab"}), id="added tokens"),
    ],
)
def test_tokenizers_that_differ_in_meaning_have_different_fingerprints(other):
    assert fingerprint(other) != fingerprint(PLAIN)


def test_the_order_in_which_pieces_are_listed_does_not_matter():
    assert fingerprint(replace(PLAIN, pieces={"ab": 2, "b": 1, "a": 0})) == fingerprint(PLAIN)


def test_padding_settings_of_the_last_call_do_not_matter():
    assert fingerprint(replace(PLAIN, padding=7)) == fingerprint(PLAIN)


def test_the_chat_template_does_not_change_the_vocabulary():
    assert fingerprint(replace(PLAIN, chat_template="{{ x }}")) == fingerprint(PLAIN)


def test_a_slow_tokenizer_has_a_fingerprint_too():
    assert len(fingerprint(Fake())) == 32


def test_no_template_has_the_empty_fingerprint():
    assert template_fingerprint(PLAIN) == ""


def test_another_template_has_another_fingerprint():
    one, two = (template_fingerprint(replace(PLAIN, chat_template=text)) for text in ("{{ x }}", "{{ x }} "))
    assert one != two


def test_special_tokens_are_part_of_the_template():
    one = replace(PLAIN, chat_template="{{ bos_token }}", special_tokens_map={"bos_token": "<s>"})
    assert template_fingerprint(one) != template_fingerprint(replace(one, special_tokens_map={"bos_token": "<b>"}))


def test_a_saved_and_reloaded_tokenizer_keeps_its_fingerprint(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_folder())
    before = fingerprint(tokenizer)
    tokenizer(["one", "two words"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before == fingerprint(tokenizer)
