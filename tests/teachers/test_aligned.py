"""A teacher of another tokenizer: bytes decide what is compared, and the chain rule what it is worth."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import Batch, Lesson, Need, Signal, Sparse
from potstill.objective import Objective, term
from potstill.schemes import Offline
from potstill.stores import Top
from potstill.students.hf import HfModel
from potstill.students.module import module
from potstill.students.pretrained import read_tokenizer
from potstill.teachers import hf
from potstill.teachers.aligned import Aligned, aligned, beside
from potstill.teachers.answers import WORDS
from potstill.teachers.remembered import build, remembered
from potstill.teachers.spans import Span, matched
from potstill.teachers.spelling import Spelling
from tests.data.places import shared
from tests.students.lm import stories_folder, tiny
from tests.teachers.tongues import SPECIALS, Table, bytewise, pairwise, random_law, rewriting, rows, trained

EVERYTHING = Need(logits=True, features=frozenset(WORDS))


def span(student: tuple[int, int], teacher: tuple[int, int]) -> Span:
    return Span(student_start=student[0], student_stop=student[1], teacher_start=teacher[0], teacher_stop=teacher[1])


def between(student, teacher, law=None, **knobs) -> Aligned:
    """A bigram table of random numbers behind `aligned`."""
    return aligned(
        Table(law or random_law(len(teacher))), student_tokenizer=student, teacher_tokenizer=teacher, **knobs
    )


def log_probs_of(said: Signal) -> Tensor:
    return said.features["span_log_probs"]


# Matching


def test_spans_are_the_shortest_pieces_of_equal_bytes() -> None:
    own, theirs = [b"he", b"llo", b" ", b"world"], [b"hello", b" wor", b"ld"]
    assert list(matched(own, theirs)) == [span((0, 2), (0, 1)), span((2, 4), (1, 3))]


def test_a_token_without_bytes_joins_the_next_span() -> None:
    assert list(matched([b"", b"a", b"b"], [b"a", b"", b"b"])) == [span((0, 2), (0, 1)), span((2, 3), (1, 3))]


def test_whole_words_end_spans_where_words_end_only() -> None:
    text, own, theirs = b"the cat", [b"th", b"e", b" ", b"c", b"at"], [b"th", b"e", b" ca", b"t"]
    assert list(matched(own, theirs, text)) == [span((0, 2), (0, 2)), span((2, 5), (2, 4))]


@given(st.text(max_size=30), st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)))
def test_spans_cover_the_text_once_in_order_and_spell_the_same(text: str, own_cuts, their_cuts) -> None:
    content = text.encode()

    def cut(places: list[int]) -> list[bytes]:
        edges = [0, *sorted({at for at in places if 0 < at < len(content)}), len(content)]
        return [content[a:b] for a, b in itertools.pairwise(edges)]

    own, theirs = cut(own_cuts), cut(their_cuts)
    spans = list(matched(own, theirs))
    for one in spans:
        ours = b"".join(own[one.student_start : one.student_stop])
        assert ours == b"".join(theirs[one.teacher_start : one.teacher_stop]) != b""
    covered = [place for one in spans for place in range(one.student_start, one.student_stop)]
    assert covered == list(range(len(own))) or not content


@pytest.mark.parametrize("text", ["a", "caf\u00e9 \U0001f40e\u4e2d", "  two\n\tlines 1999", "\ufb01"])
def test_the_pieces_of_a_text_spell_it(text: str) -> None:
    for tokenizer in (bytewise(), trained(splits_digits=True), trained(splits_digits=False)):
        spelling = Spelling(tokenizer, title="tokenizer")
        assert b"".join(spelling.pieces[token] for token in spelling.encode(text)) == text.encode()


def test_byte_fallback_and_the_leading_space_are_read() -> None:
    spelling = Spelling(read_tokenizer(stories_folder()), title="tokenizer")
    text = "One day,\n a caf\u00e9 \u4e2d"
    assert b"".join(spelling.pieces[token] for token in spelling.encode(text)) == b" " + text.encode()
    assert spelling.leads and spelling.opening == (1,)


# What is said


def test_one_tokenizer_on_both_sides_gives_one_span_per_position() -> None:
    tokenizer = trained(splits_digits=False)
    batch = rows(tokenizer, "In 2024 the cat", "the dogs saw")
    teacher = between(tokenizer, tokenizer)
    assert torch.equal(teacher(batch, EVERYTHING).features["span"], batch.mask.long())
    cover = teacher.coverage(batch)
    assert (cover.in_spans, cover.one_to_one, cover.broken) == (cover.positions, cover.spans, 0)


def test_the_teacher_is_shown_the_same_text_in_its_own_tokens() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    table = Table(random_law(len(teacher)))
    batch = rows(student, "In 2024 the cat caf\u00e9")
    aligned(table, student_tokenizer=student, teacher_tokenizer=teacher)(batch, EVERYTHING)
    [asked] = table.asked
    expected = [teacher.bos_token_id, *teacher("In 2024 the cat caf\u00e9").input_ids, teacher.eos_token_id]
    assert asked.inputs["input_ids"].tolist() == [expected]
    assert asked.labels[0, :-1].tolist() == expected[1:]


@pytest.mark.parametrize("splits", [(True, False), (False, True)], ids=["student splits", "teacher splits"])
def test_span_log_probs_add_up_to_the_log_prob_of_the_text(splits: tuple[bool, bool]) -> None:
    student, teacher = (trained(splits_digits=each) for each in splits)
    batch = rows(student, "In 2024 and 1999 caf\u00e9s")
    law = random_law(len(teacher))
    said = between(student, teacher, law)(batch, EVERYTHING)
    ids = [teacher.bos_token_id, *teacher("In 2024 and 1999 caf\u00e9s").input_ids, teacher.eos_token_id]
    steps = [law((before,)).log_softmax(-1)[after] for before, after in itertools.pairwise(ids)]
    torch.testing.assert_close(log_probs_of(said).sum(), torch.stack(steps).sum().float())


CHAIN = {
    "<s>": {"a": 0.25, "c": 0.75},
    "a": {"b": 1.0},
    "b": {"a": 0.5, "c": 0.25, "</s>": 0.25},
    "c": {"a": 0.125, "c": 0.5, "</s>": 0.375},
}
"""A Markov chain over bytes in which every a is followed by b: merging "ab" then changes nothing about any text."""


def byte_law(tokenizer) -> Callable[[tuple[int, ...]], Tensor]:
    """What the chain says of a tokenizer's next token."""
    names = {token: piece for piece, token in tokenizer.get_vocab().items()}
    merges = "ab" in tokenizer.get_vocab()

    def law(prefix: tuple[int, ...]) -> Tensor:
        last = names[prefix[-1]]
        after = CHAIN.get(last if last in SPECIALS.values() else last[-1], {"c": 1.0})
        probs = {"ab" if merges and piece == "a" else piece: p for piece, p in after.items()}
        return torch.tensor([probs.get(names[token], 0.0) for token in range(len(tokenizer))]).log()

    return law


def test_one_model_of_bytes_says_the_same_of_every_span_in_both_tokenizations() -> None:
    student, teacher = bytewise(), pairwise("ab")
    batch = rows(student, "abccab")
    said = between(student, teacher, byte_law(teacher))(batch, EVERYTHING)
    assert said.features["span"][0].tolist() == [1, 2, 1, 1, 1, 2, 1, 0]
    begins = said.features["span"] == 1
    assert log_probs_of(said)[begins].exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.125, 0.25])
    own = Table(byte_law(student))(batch, Need(logits=True))
    for loss in ("alm", "forward_kl"):
        objective = Objective(term(loss))
        assert objective(Lesson(student=own, teacher=said), batch).item() == pytest.approx(0.0, abs=1e-6)


def test_digits_survive_where_only_the_student_splits_them() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    law = random_law(len(teacher))
    said = between(student, teacher, law)(rows(student, "In 2024 the"), EVERYTHING)
    assert student.convert_ids_to_tokens(student("In 2024").input_ids) == ["In", "\u0120", "2", "0", "2", "4"]
    number = teacher.convert_tokens_to_ids("\u01202024")
    assert said.features["span"][0].tolist() == [1, 1, 2, 2, 2, 2, 1, 1, 0]
    before = teacher.convert_tokens_to_ids("In")
    assert log_probs_of(said)[0, 1].item() == pytest.approx(law((before,)).log_softmax(-1)[number].item())


def test_digits_survive_where_only_the_teacher_splits_them() -> None:
    student, teacher = trained(splits_digits=False), trained(splits_digits=True)
    law = random_law(len(teacher))
    said = between(student, teacher, law)(rows(student, "In 2024 the"), EVERYTHING)
    assert said.features["span"][0].tolist() == [1, 1, 1, 1, 0]
    path = teacher("In 2024").input_ids
    steps = [law((a,)).log_softmax(-1)[b] for a, b in itertools.pairwise(path)]
    assert log_probs_of(said)[0, 1].item() == pytest.approx(float(sum(steps)))


def test_a_character_cut_into_several_tokens_is_one_span() -> None:
    student, teacher = bytewise(), trained(splits_digits=False, corpus=["\u4e2d" * 9])
    said = between(student, teacher)(rows(student, "a\u4e2db"), EVERYTHING)
    assert said.features["span"][0].tolist() == [1, 1, 2, 2, 1, 1, 0]


def test_a_span_that_is_supervised_only_in_part_is_none() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    said = between(student, teacher)(rows(student, "In 2024 the", prompt=3), EVERYTHING)
    assert said.features["span"][0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0]


def spoken(said: Signal) -> list[bool]:
    """At which positions of the first row the logits hold something."""
    assert isinstance(said.logits, Sparse)
    return (said.logits.log_probs > -torch.inf).any(-1)[0].tolist()


def listed(said: Signal, position: int) -> dict[int, float]:
    """What they hold at one: probabilities by token."""
    assert isinstance(said.logits, Sparse)
    ids, log_probs = said.logits.ids[0, position].tolist(), said.logits.log_probs[0, position].exp().tolist()
    return {token: value for token, value in zip(ids, log_probs, strict=True) if value > 0}


def test_logits_are_given_at_every_token_that_spells_a_piece_of_the_teacher() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    assert spoken(between(student, teacher)(rows(student, "In 2024 the"), EVERYTHING)) == [True] * 8 + [False]


def test_logits_say_nothing_where_a_token_reaches_beyond_the_teachers_piece() -> None:
    student, teacher = trained(splits_digits=False), trained(splits_digits=True)
    assert spoken(between(student, teacher)(rows(student, "In 2024 the"), EVERYTHING)) == [
        True, False, True, True, False,
    ]  # fmt: skip


def test_one_tokenizer_on_both_sides_gives_the_teachers_law_at_every_position() -> None:
    tokenizer = trained(splits_digits=False)
    law, batch = random_law(len(tokenizer)), rows(tokenizer, "In 2024 the", "the cat")
    said = between(tokenizer, tokenizer, law, entries=400)(batch, Need(logits=True))
    own = Table(law)(batch, Need(logits=True))
    objective = Objective(term("forward_kl"))
    assert objective(Lesson(student=own, teacher=said), batch).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("position", range(1, 7))
def test_logits_are_the_law_over_pieces_as_the_student_spells_them(position: int) -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    law = random_law(len(teacher))
    said = between(student, teacher, law, entries=400)(rows(student, "In 2024 the"), Need(logits=True))
    # The piece " 2024" is what positions 1 to 5 predict, token by token; behind it comes " the".
    last, begin = ("In", 1) if position < 6 else ("\u01202024", 6)
    probs = law((teacher.convert_tokens_to_ids(last),)).softmax(-1)
    written = student("In 2024 the").input_ids[begin:position]
    expected: dict[int, float] = {}
    for piece, token in teacher.get_vocab().items():
        text = teacher.decode([token])
        if piece in SPECIALS.values():
            spelling = [student.convert_tokens_to_ids(piece)]
        elif text.encode() == bytes(Spelling(teacher, title="").pieces[token] or b""):
            spelling = student(text, add_special_tokens=False).input_ids
        else:  # a byte that is no text by itself
            spelling = [student.convert_tokens_to_ids(piece)]
        if spelling[: len(written)] == written and len(spelling) > len(written):
            following = spelling[len(written)]
            expected[following] = expected.get(following, 0.0) + probs[token].item()
    total = sum(expected.values())
    # One class of the student always stays in the tail.
    found = listed(said, position)
    assert len(found) >= min(len(expected), len(student) - 1)
    assert found == pytest.approx({token: expected[token] / total for token in found}, rel=1e-4)


def test_logits_leave_what_a_top_k_teacher_did_not_say_in_the_tail() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    law, batch = random_law(len(teacher)), rows(student, "In 2024 the")
    whole = between(student, teacher, law, entries=400)(batch, Need(logits=True))

    def best(prefix: tuple[int, ...]) -> Tensor:
        said = law(prefix).log_softmax(-1)
        return said.where(said >= said.topk(40).values[-1], -torch.inf)

    class Best(Table):
        def __call__(self, batch: Batch, need: Need) -> Signal:
            dense = super().__call__(batch, need).logits.logits
            log_probs, ids = dense.topk(40, dim=-1)
            return Signal(logits=Sparse(ids=ids, log_probs=log_probs, size=dense.shape[-1], kind="top"))

    few = aligned(Best(best), student_tokenizer=student, teacher_tokenizer=teacher, entries=400)(
        batch, Need(logits=True)
    )
    for position, is_spoken in enumerate(spoken(few)):
        assert not is_spoken or sum(listed(few, position).values()) < 1
        for token, value in listed(few, position).items():
            assert value <= listed(whole, position)[token] + 1e-6


def test_a_text_that_the_teacher_holds_impossible_teaches_nothing_within_its_pieces() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    certain = teacher.convert_tokens_to_ids("a")
    law = torch.full((len(teacher),), -200.0, dtype=torch.float64)
    law[certain] = 0.0
    said = between(student, teacher, lambda prefix: law)(rows(student, "In 2024 the"), Need(logits=True))
    assert not said.logits.log_probs.isnan().any()
    assert spoken(said) == [True, True, False, False, False, False, True, True, False]


def test_a_teacher_whose_head_is_smaller_than_its_tokenizer_is_read() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    law = random_law(len(teacher))
    batch = rows(student, "In the")
    whole = between(student, teacher, lambda prefix: law(prefix)[:-1])(batch, Need(logits=True))
    assert spoken(whole)[0]
    assert sum(listed(whole, 0).values()) == pytest.approx(1.0, abs=0.05)


def test_what_only_the_teacher_can_say_is_in_the_rest() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    law = random_law(len(teacher))
    said = between(student, teacher, law, entries=400)(rows(student, "In the"), EVERYTHING)
    only = [token for piece, token in teacher.get_vocab().items() if piece not in student.get_vocab()]
    expected = law((teacher.bos_token_id,)).softmax(-1)[only].sort(descending=True).values.float()
    torch.testing.assert_close(said.features["rest_probs"][0, 0, : len(only)], expected)


def test_nearest_tokens_keep_the_teachers_mass() -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    said = between(student, teacher, entries=400)(rows(student, "In the"), EVERYTHING)
    assert said.features["nearest_log_probs"][0, 0].exp().sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_nearest_token_has_the_fewest_edits() -> None:
    student, teacher = pairwise("ab", "cd"), pairwise("ab", "ce")
    names = student.get_vocab()
    nearest = between(student, teacher)._shapes.nearest
    asked = torch.tensor([teacher.get_vocab()[piece] for piece in ("ab", "ce", "f", "</s>")])
    # "ce" is one edit away from "c", "e" and "cd": the lowest id of them.
    assert nearest(asked).tolist() == [names["ab"], names["c"], names["f"], names["</s>"]]


# Texts, special tokens, padding


def test_the_side_of_the_padding_changes_nothing() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    asker = between(student, teacher)
    texts = "the cat", "In 2024 the other cat"
    right, left = (asker(rows(student, *texts, left=side), EVERYTHING) for side in (False, True))
    one = right.features["span_log_probs"][right.features["span"] == 1]
    torch.testing.assert_close(left.features["span_log_probs"][left.features["span"] == 1], one)


def test_a_packed_row_says_what_its_texts_say_alone() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    asker = between(student, teacher)
    alone = [asker(rows(student, text), EVERYTHING) for text in ("the cat", "In 2024")]
    first, second = (rows(student, text) for text in ("the cat", "In 2024"))
    lengths = [part.mask.shape[1] for part in (first, second)]
    packed = Batch(
        keys=("both",),
        inputs={
            "input_ids": torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1),
            "segments": torch.tensor([[1] * lengths[0] + [2] * lengths[1]]),
        },
        labels=torch.cat([first.labels, second.labels], 1),
        mask=torch.cat([first.mask, second.mask], 1),
    )
    said = asker(packed, EVERYTHING)
    for name in WORDS:
        torch.testing.assert_close(said.features[name], torch.cat([each.features[name] for each in alone], dim=1))


def test_a_last_label_that_is_not_among_the_inputs_is_a_token_too() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    whole = rows(student, "the cat")
    cut = Batch(
        keys=whole.keys,
        inputs={name: tensor[:, :-1] for name, tensor in whole.inputs.items()},
        labels=whole.labels[:, :-1],
        mask=whole.mask[:, :-1],
    )
    asker = between(student, teacher)
    expected, found = (asker(batch, EVERYTHING).features["span_log_probs"] for batch in (whole, cut))
    torch.testing.assert_close(found, expected[:, :-1])


def test_special_tokens_are_matched_by_the_part_they_play() -> None:
    student = bytewise()
    teacher = trained(splits_digits=False)
    teacher.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    student.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<other>"]})
    table = Table(random_law(len(teacher)))
    asker = aligned(table, student_tokenizer=student, teacher_tokenizer=teacher, special={"<|im_end|>": "<turn>"})
    said = asker(rows(student, "a<|im_end|>b<other>c"), EVERYTHING)
    ids = table.asked[0].inputs["input_ids"][0].tolist()
    other = teacher("<other>").input_ids
    piece = teacher.convert_tokens_to_ids
    assert ids == [piece("<s>"), piece("a"), piece("<turn>"), piece("b"), *other, piece("c"), piece("</s>")]
    # A special token that the teacher lacks is shown to it as text, and nobody learns to say it.
    assert said.features["span"][0].tolist() == [1, 1, 1, 0, 1, 1, 0]


def test_bytes_that_are_no_text_end_what_the_teacher_reads() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    batch = rows(student, "the cat \u4e2d ran")
    broken = batch.inputs["input_ids"].clone()
    broken[0, 10] = broken[0, 2]
    labels = torch.where(batch.mask, torch.roll(broken, -1, 1), batch.labels)
    torn = Batch(keys=("k",), inputs={**batch.inputs, "input_ids": broken}, labels=labels, mask=batch.mask)
    asker = between(student, teacher)
    assert asker(torn, EVERYTHING).features["span"][0].nonzero().max() == 7
    assert asker.coverage(torn).broken == 1


def test_a_teacher_is_not_asked_beyond_its_length() -> None:
    student, teacher = trained(splits_digits=False), bytewise()
    teacher.model_max_length = 12
    table = Table(random_law(len(teacher)))
    asker = aligned(table, student_tokenizer=student, teacher_tokenizer=teacher)
    said = asker(rows(student, "the cat saw the other cat"), EVERYTHING)
    assert table.asked[0].inputs["input_ids"].shape[1] <= 12
    assert said.features["span"].any()


def test_a_batch_in_which_nothing_is_supervised_says_nothing_and_asks_nobody() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    table = Table(random_law(len(teacher)))
    said = aligned(table, student_tokenizer=student, teacher_tokenizer=teacher)(
        rows(student, "the cat", prompt=99), EVERYTHING
    )
    assert not said.features["span"].any()
    assert not table.asked
    assert isinstance(said.logits, Sparse)


def test_spans_longer_than_allowed_teach_nothing() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    said = between(student, teacher, longest=4)(rows(student, "In 2024 the"), EVERYTHING)
    assert said.features["span"][0].tolist() == [1, 2, 0, 0, 0, 0, 0, 1, 2, 2, 2, 1, 0]


# Refusals


def test_a_batch_of_another_tokenizer_is_refused() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    with pytest.raises(SignalError, match="the batch was made with another tokenizer"):
        between(student, teacher)(rows(teacher, "the cat"), EVERYTHING)


def test_layers_of_the_teacher_are_refused() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    with pytest.raises(SignalError, match="cannot be compared across tokenizers"):
        between(student, teacher)(rows(student, "the cat"), Need(features=frozenset({"hidden/1"})))


def test_a_teacher_that_rewrites_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"rewrites text: '\\ufb01' becomes 'fi'"):
        between(bytewise(), rewriting())


def test_a_special_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"aligned\.special: no special token of the teacher is called '<end>'"):
        between(bytewise(), trained(splits_digits=False), special={"</s>": "<end>"})


def test_another_knob_is_another_identity() -> None:
    tokenizer = trained(splits_digits=False)
    made = {between(bytewise(), tokenizer, **knobs).identity for knobs in ({}, {"longest": 3}, {"ranks": 2})}
    assert len(made) == 3


# Regimes


def test_a_store_remembers_what_was_said(tmp_path) -> None:
    student, teacher = trained(splits_digits=True), trained(splits_digits=False)
    batch = rows(student, "In 2024 the", "caf\u00e9 1999")
    live = between(student, teacher, entries=8, ranks=8)
    build(tmp_path, live, Repeated(batch), batches=1, sketch=Top(k=8), layers=WORDS, dtype="float32")
    for loss in ("alm", "gold", "uld", "mined", "forward_kl"):
        objective = Objective(term(loss))
        one, other = (float(lessons(student, objective, source, batch)) for source in (live, remembered(tmp_path)))
        assert one == pytest.approx(other, rel=2e-3) and one > 0


class Repeated:
    """A source of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, index: int) -> Batch:
        return self._batch


class Bigrams(nn.Module):
    """The smallest student: logits for each last token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def lessons(tokenizer, objective: Objective, teacher, batch: Batch) -> Tensor:
    scheme = Offline(module(Bigrams(len(tokenizer)), inputs=["input_ids"]), teacher)
    scheme.prepare(objective, batch)
    [lesson] = scheme.lessons(batch, objective.need("student"), objective.need("teacher"))
    return objective(lesson, batch).detach()


@pytest.fixture(scope="module")
def stories() -> tuple[Batch, Aligned, Signal]:
    """Eight beginnings of stories in bytes, the teacher of 512 pieces, and all that it says of them."""
    with gzip.open(shared("tinystories-1k") / "stories.jsonl.gz", "rt") as file:
        texts = [json.loads(next(file))["text"][:100] for _ in range(8)]
    folder, tokenizer = str(stories_folder()), bytewise()
    teacher = aligned(hf(folder), student_tokenizer=tokenizer, teacher_tokenizer=folder, entries=16, ranks=64)
    batch = rows(tokenizer, *texts)
    return batch, teacher, teacher(batch, EVERYTHING)


@pytest.mark.parametrize("loss", ["alm", "reverse_alm", "gold", "uld", "mined", "forward_kl", "generalised_jsd"])
def test_a_byte_student_learns_from_a_teacher_of_pieces(loss: str, stories) -> None:
    batch, _, taught = stories
    objective = Objective(term(loss))
    learner = module(Bigrams(259), inputs=["input_ids"])
    [weights] = learner.parameters()
    losses = []
    # SGD by steps of a set length that shrinks: losses of any scale are served.
    for step in range(30):
        value = objective(Lesson(student=learner(batch, objective.need("student")), teacher=taught), batch)
        (gradient,) = torch.autograd.grad(value, weights)
        with torch.no_grad():
            weights -= 8 * 0.93**step * gradient / gradient.norm()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_sure_teacher_of_stories_finds_a_span_for_every_byte(stories) -> None:
    batch, teacher, said = stories
    cover = teacher.coverage(batch)
    assert cover.in_spans == cover.positions and cover.broken == 0
    # 1.45 nats per token on such stories (its README), here without their later, easier parts.
    assert -2.5 < float(log_probs_of(said).sum()) / float(teacher._cross(batch).batch.mask.sum()) < -1.0


# Beside


def test_a_teacher_beside_answers_at_its_own_tokens() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    table = Table(random_law(len(teacher)))
    asker = beside(table, student_tokenizer=student, teacher_tokenizer=teacher)
    said = asker(rows(student, "the cat", "In 2024 the", prompt=3), Need(logits=True, features=frozenset({"labels"})))
    pieces = [teacher.convert_ids_to_tokens([i for i in row if i >= 0]) for row in said.features["labels"].tolist()]
    assert pieces == [["\u0120cat", "</s>"], ["\u0120the", "</s>"]]
    assert table.asked[0].mask.shape == said.features["labels"].shape


def test_packed_rows_have_no_teacher_beside() -> None:
    student, teacher = bytewise(), trained(splits_digits=False)
    batch = rows(student, "the cat")
    halves = torch.tensor([[1] * 4 + [2] * (batch.mask.shape[1] - 4)])
    packed = Batch(keys=("k",), inputs={**batch.inputs, "segments": halves}, labels=batch.labels, mask=batch.mask)
    asker = beside(Table(random_law(len(teacher))), student_tokenizer=student, teacher_tokenizer=teacher)
    with pytest.raises(SignalError, match="one text per row"):
        asker(packed, Need(logits=True))


def test_dual_space_distillation_trains_the_student_and_its_projections() -> None:
    student, folder = bytewise(), str(stories_folder())
    learner = HfModel(tiny("llama", vocab_size=len(student)), tokenizer=student)
    scheme = Offline(learner, beside(hf(folder), student_tokenizer=student, teacher_tokenizer=folder))
    batch = rows(student, "Once upon a time", "The dog ran.")
    objective = Objective(term("dskd", at=["hidden/0"]))
    scheme.prepare(objective, batch)
    module = scheme.learners()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        [lesson] = scheme.lessons(batch, objective.need("student"), objective.need("teacher"))
        value = objective(lesson, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    heads = {name for name, parameter in module.named_parameters() if ".query" in name or "_teacher." in name}
    assert len(heads) == 3
    assert all(parameter.grad.any() for name, parameter in module.named_parameters() if name in heads)
    assert learner.model.model.layers[0].mlp.up_proj.weight.grad.any()
