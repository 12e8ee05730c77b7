"""Answers with the log-probabilities that came with them, as a teacher: the laws, and every way in which one lacks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.core.errors import DataError, MissingRowsError, RecipeError, SignalError
from potstill.core.types import Batch, Dense, Lesson, Need, Signal, Sparse
from potstill.core.writing import JSON, Example, Lineage, Message, Request
from potstill.data.chat import ChatData, chat
from potstill.data.exports import export_rows
from potstill.knowledge import elicit
from potstill.knowledge.features import Filled, fill_told
from potstill.knowledge.label import label
from potstill.objective import Objective, term
from potstill.objective.representations import dense
from potstill.stores.requests import Requests
from potstill.teachers import HfTeacher, endpoint, remembered, told
from potstill.teachers.told import (
    NO_LAW,
    NOT_ASKED,
    NOT_STORED,
    OTHER_TOKENS,
    OTHERWISE,
    SILENT,
    Account,
    Told,
    Unasked,
)
from tests.servers import Manners, serving
from tests.teachers import letters as world
from tests.teachers.letters import HALF, QUARTER, entry

LOGITS = Need(logits=True)
V = len(world.letters())


@pytest.fixture(scope="module")
def store() -> Requests:
    return Requests.temporary()


@pytest.fixture(scope="module")
def flow(store: Requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen questions to the model of letters, every letter's log-probability with each answer, exported."""
    folder = tmp_path_factory.mktemp("flow")
    export_rows(world.written(folder, store=store), folder / "data.jsonl")
    return folder


def read(path: Path, **settings: Any) -> ChatData:
    return chat(str(path), tokenizer=world.letters(), **{"batch": 4, "test_share": 0.0, **settings})


def teacher(flow: Path, store: Requests, data: ChatData, **settings: Any) -> Told:
    # Where the model of letters wrote its padding, the text has lost it: such a row has no law.
    return told(str(flow / "data.jsonl"), reading=data.reading, store=store, **{"k": V, "at_least": 0.5, **settings})


def heard(said: Signal, batch: Batch) -> Tensor:
    assert isinstance(said.logits, Sparse)
    return (said.logits.log_probs > -torch.inf).any(-1) & batch.mask


def laws(said: Signal, where: Tensor) -> Tensor:
    """Probabilities of all classes at some positions: [N, V]."""
    logits = said.logits
    if not isinstance(logits, Sparse):
        assert logits is not None
        return dense(logits)[where].softmax(-1)
    empty = torch.zeros(int(where.sum()), logits.size)
    return empty.scatter_add(-1, logits.ids[where], logits.log_probs[where].exp())


# Laws.


def test_what_was_told_of_all_classes_is_what_the_live_teacher_says(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(0)
    said = teacher(flow, store, data)(batch, LOGITS)
    where = heard(said, batch)
    assert int(where.sum()) > 30
    torch.testing.assert_close(
        laws(said, where), laws(HfTeacher(world.model())(batch, LOGITS), where), atol=1e-5, rtol=0
    )


def test_a_told_row_has_a_law_at_every_supervised_token_its_end_included(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(0)
    where = heard(teacher(flow, store, data)(batch, LOGITS), batch)
    counts = {(int(where[row].sum()), int(batch.mask[row].sum())) for row in range(len(where))}
    assert counts and all(found in (0, expected) for found, expected in counts)
    assert any(found for found, _ in counts)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "generalised_jsd"])
def test_value_and_gradient_are_those_of_the_live_teacher(flow: Path, store: Requests, loss: str) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(1)
    said, live = (one(batch, LOGITS) for one in (teacher(flow, store, data), HfTeacher(world.model())))
    there = replace(batch, mask=heard(said, batch))
    logits = torch.randn(*batch.mask.shape, V, generator=torch.Generator().manual_seed(0))
    found = []
    for one in (said, live):
        student = logits.clone().requires_grad_()
        value = Objective(term(loss))(Lesson(student=Signal(logits=Dense(logits=student)), teacher=one), there)
        found.append((value, *torch.autograd.grad(value, student)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_fewer_listed_classes_are_the_likeliest_with_one_tail(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(0)
    said = teacher(flow, store, data, k=3)(batch, LOGITS)
    where = heard(said, batch)
    best = laws(HfTeacher(world.model())(batch, LOGITS), where).topk(3)
    assert said.logits.ids.shape[-1] == 3  # type: ignore[union-attr]
    torch.testing.assert_close(said.logits.log_probs[where].exp(), best.values, atol=1e-5, rtol=0)  # type: ignore[union-attr]


def test_where_nothing_was_told_nothing_is_learnt(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(0)
    said = teacher(flow, store, data)(batch, LOGITS)
    student = torch.randn(*batch.mask.shape, V).requires_grad_()
    objective = Objective(term("forward_kl"))
    value = objective(Lesson(student=Signal(logits=Dense(logits=student)), teacher=said), batch)
    (gradient,) = torch.autograd.grad(value, student)
    assert bool(value.isfinite())
    assert not gradient[~heard(said, batch)].any()


def test_packed_rows_are_told_as_they_are_alone(flow: Path, store: Requests) -> None:
    alone, packed = (read(flow / "data.jsonl", layout=layout, length=128, batch=16) for layout in ("padded", "packed"))
    counts = []
    for data in (alone, packed):
        rows = next(iter(data.train.batches(99)))  # type: ignore[union-attr]
        said = teacher(flow, store, data)(rows, LOGITS)
        counts.append(said.logits.log_probs[heard(said, rows)].double().sort(dim=0).values)  # type: ignore[union-attr]
    torch.testing.assert_close(*counts)


def test_a_row_that_is_cut_is_told_as_far_as_it_goes(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl", length=16)
    account = teacher(flow, store, data).account
    assert int(data.train.rows.lengths.max()) == 16  # type: ignore[union-attr]
    assert account.told > 5 and account.heard == account.positions


def test_of_several_turns_the_last_has_a_law(store: Requests, tmp_path: Path) -> None:
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="yes"))
    rows = [Example.of("q?", turns=turns)]
    account, batch, said = spoken(rows, store, tmp_path, told_of("abc"), batch=1)
    assert heard(said, batch).sum() == 3 and batch.mask.sum() == len("yes") + 1 + len("abc") + 1
    assert account.told == 1


def test_an_answer_is_found_behind_a_later_one_that_judged_it(store: Requests, tmp_path: Path) -> None:
    rows = list(world.canned(told_of("abc"), tmp_path / "flow", store=store))
    grades = list(world.canned(told_of("7"), tmp_path / "judge", store=store, seed=1))
    judged = [
        replace(row, lineage=replace(row.lineage, requests=(*row.lineage.requests, *grade.lineage.requests)))
        for row, grade in zip(rows, grades, strict=True)
    ]
    filled = fill(judged, tmp_path / "filled", store)
    assert filled.account is not None and filled.account.untold == {}


# How servers speak.


def told_of(text: str) -> Any:
    """A server that writes this and tells of each letter, at 1/2, the one after it, at 1/4, and another."""

    def answer(request: Request) -> JSON:
        return world.chat(text, [entry(letter, *others(letter)) for letter in text])

    return answer


def others(letter: str) -> tuple[str, str]:
    at = world.LETTERS.index(letter)
    return world.LETTERS[(at + 1) % len(world.LETTERS)], world.LETTERS[(at + 2) % len(world.LETTERS)]


def fill(rows: Iterable[Example], folder: Path, store: Requests, **settings: Any) -> Filled:
    given = {"tokenizer": world.letters(), "k": 3, "batch": 2, "test_share": 0.0, "at_least": 0.0, **settings}
    return fill_told(rows, folder, store=store, **given)


def spoken(
    rows: list[Example], store: Requests, folder: Path, answer: Any, **settings: Any
) -> tuple[Account, Batch, Signal]:
    """What is known of the rows that such a server gives, one batch of them, and what is remembered of it."""
    elicited = world.canned(answer, folder / "flow", store=store, rows=rows)
    filled = fill(elicited, folder / "filled", store, **settings)
    batch = filled.data.train.batch(0)
    assert filled.account is not None
    return filled.account, batch, remembered(filled.signals)(batch, LOGITS)


def fresh() -> Requests:
    return Requests.temporary()


def account_of(answer: Any, folder: Path, **settings: Any) -> Account:
    return spoken(world.questions(4), fresh(), folder, answer, **settings)[0]


def test_the_mark_that_a_server_does_not_tell_has_no_law(tmp_path: Path) -> None:
    account, batch, said = spoken(world.questions(4), fresh(), tmp_path, told_of("abc"))
    assert (account.heard, account.positions) == (4 * 3, 4 * 4)
    ends = batch.labels == world.letters().eos_token_id
    assert int(ends.sum()) == 2 and not bool((heard(said, batch) & ends).any())


def test_the_mark_that_a_server_tells_has_one(tmp_path: Path) -> None:
    def answer(request: Request) -> JSON:
        return world.chat("ab", [entry("a", "b"), entry("b", "c"), entry("<end>", "d")])

    assert account_of(answer, tmp_path).heard == 4 * 3


def test_the_listed_tokens_and_their_chances_are_the_law(tmp_path: Path) -> None:
    _, batch, said = spoken(world.questions(4), fresh(), tmp_path, told_of("a"))
    logits = said.logits
    assert isinstance(logits, Sparse)
    (law,) = {tuple(row) for row in laws(said, heard(said, batch)).tolist()}
    a = world.letters().convert_tokens_to_ids("a")
    assert law[a : a + 3] == pytest.approx((0.5, 0.25, 0.125), abs=1e-3) and sum(law) == pytest.approx(0.875, abs=1e-3)


def test_tokens_named_by_their_ids_are_found(tmp_path: Path) -> None:
    ids = world.letters().convert_tokens_to_ids

    def answer(request: Request) -> JSON:
        return world.chat("ab", [entry(f"token_id:{ids(x)}", f"token_id:{ids(y)}") for x, y in ("ac", "bd")])

    assert account_of(answer, tmp_path).untold == {}


def test_the_older_form_of_columns_is_read(tmp_path: Path) -> None:
    def answer(request: Request) -> JSON:
        columns: JSON = {
            "tokens": ["a", "b"],
            "token_logprobs": [HALF, HALF],
            "top_logprobs": [{"a": HALF, "c": QUARTER}, {"b": HALF, "d": QUARTER}],
        }
        said: Any = world.chat("ab", [])
        said["choices"][0]["logprobs"] = columns
        return said

    assert account_of(answer, tmp_path).untold == {}


def test_what_a_server_marks_as_not_told_counts_with_the_tail(tmp_path: Path) -> None:
    def answer(request: Request) -> JSON:
        told = entry("a", logprob=-9999.0)
        told["top_logprobs"] = [{"token": "b", "logprob": HALF}, {"token": "c", "logprob": QUARTER}]
        return world.chat("a", [told])

    _, batch, said = spoken(world.questions(4), fresh(), tmp_path, answer)
    (law,) = {tuple(row) for row in laws(said, heard(said, batch)).tolist()}
    assert law[world.letters().convert_tokens_to_ids("a")] == 0.0
    assert sum(law) == pytest.approx(0.75, abs=1e-3)


def test_how_the_answers_were_drawn_is_written_down(tmp_path: Path) -> None:
    elicited = world.canned(told_of("abc"), tmp_path / "flow", store=(requests := fresh()), temperature=2)
    filled = fill(elicited, tmp_path / "filled", requests)
    assert filled.account is not None and filled.account.samplings == {"temperature 2": 4}


def test_a_real_address_is_asked_once_and_its_words_are_the_law(tmp_path: Path) -> None:
    async def run() -> tuple[Filled, int]:
        def tells(text: str) -> list[dict[str, JSON]]:
            return [entry(letter, *others(letter)) for letter in text]

        async with serving(Manners(), answer=lambda body: "abc", tells=tells) as provider:
            path = str(tmp_path / "requests.sqlite")
            writer = endpoint("mock", url=provider.url, price=0.0, store=path)
            asking = label(teacher=writer, log_probs=3)
            elicited = await asyncio.to_thread(elicit, world.questions(5), asking, out=tmp_path / "flow")
            filled = await asyncio.to_thread(fill, elicited, tmp_path / "filled", Requests(path))
            assert all(body["top_logprobs"] == 3 for body in provider.seen)
            return filled, len(provider.seen)

    filled, num_asked = asyncio.run(run())
    assert num_asked == 5
    assert filled.account is not None and (filled.account.told, filled.account.heard) == (5, 15)


# What lacks a law, and why.


def silent(request: Request) -> JSON:
    return world.chat("abc", None)


def other_tokenizer(request: Request) -> JSON:
    return world.chat("abc", [entry("ab", "cd"), entry("c", "d")])


def other_vocabulary(request: Request) -> JSON:
    return world.chat("abc", [entry(letter, f"{letter}{letter}", f"{letter}!") for letter in "abc"])


def no_probabilities(request: Request) -> JSON:
    return world.chat("abc", [entry(letter, logprob=3.0) for letter in "abc"])


def lost_a_letter(request: Request) -> JSON:
    return world.chat("abc", [entry(letter, *others(letter)) for letter in "abx"])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (silent, SILENT),
        (other_tokenizer, OTHER_TOKENS),
        (other_vocabulary, OTHER_TOKENS),
        (no_probabilities, NO_LAW),
        (lost_a_letter, OTHERWISE),
    ],
)
def test_a_row_without_a_law_says_why_and_teaches_by_its_label(answer: Any, why: str, tmp_path: Path) -> None:
    account, batch, said = spoken(world.questions(4), fresh(), tmp_path, answer)
    assert account.untold == {why: 4}
    assert bool(batch.mask.any()) and not bool(heard(said, batch).any())


@pytest.mark.parametrize("changed", ["abd", "abcd", "ab", "xabc"])
def test_an_answer_that_a_later_step_changed_has_no_law(changed: str, tmp_path: Path) -> None:
    requests = fresh()
    rows = [replace(row, answer=changed) for row in world.canned(told_of("abc"), tmp_path / "flow", store=requests)]
    account = fill(rows, tmp_path / "filled", requests).account
    # A shorter answer was written, too, as far as it goes.
    assert account is not None and account.untold == ({} if changed == "ab" else {OTHERWISE: 4})


def test_rows_that_nobody_was_asked_for_have_no_law(tmp_path: Path) -> None:
    rows = [replace(row, answer="abc") for row in world.questions(4)]
    account = fill(rows, tmp_path, fresh()).account
    assert account is not None and account.untold == {NOT_ASKED: 4}


def test_another_store_has_no_answers(tmp_path: Path) -> None:
    rows = world.canned(told_of("abc"), tmp_path / "flow", store=fresh())
    account = fill(rows, tmp_path / "filled", fresh()).account
    assert account is not None and account.untold == {NOT_STORED: 4}


def test_too_few_rows_are_refused_with_the_reasons_counted(tmp_path: Path) -> None:
    requests = fresh()
    rows = list(world.canned(told_of("abc"), tmp_path / "flow", store=requests))
    rows[0] = replace(rows[0], answer="other")
    with pytest.raises(SignalError, match=r"of 4 rows 3 have .* 90% were expected \(1: its answer is not, token by"):
        fill(rows, tmp_path / "filled", requests, at_least=0.9)


@pytest.mark.parametrize(("settings", "sentence"), [({"k": 0}, "told.k"), ({"at_least": 2.0}, "told.at_least")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    rows = [replace(row, answer="abc") for row in world.questions(2)]
    with pytest.raises(RecipeError, match=sentence):
        fill(rows, tmp_path, fresh(), **settings)


def test_a_file_without_its_flow_is_refused(store: Requests, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "abc"}) + "\n")
    with pytest.raises(DataError, match=r"no accepted\.jsonl"):
        told(str(path), reading=read(path).reading, store=store)


def test_rows_of_another_file_are_refused(flow: Path, store: Requests, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "abc"}) + "\n")
    one = teacher(flow, store, read(flow / "data.jsonl"))
    with pytest.raises(MissingRowsError, match="does not hold a row"):
        one(read(path).train.batch(0), LOGITS)


def test_another_tokenizer_s_batch_and_features_are_refused(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    one, batch = teacher(flow, store, data), data.train.batch(0)
    with pytest.raises(SignalError, match="another tokenizer"):
        one(replace(batch, vocabulary="other"), LOGITS)
    with pytest.raises(SignalError, match="probabilities only"):
        one(batch, Need(features=frozenset({"hidden/1"})))
    assert one(batch, Need()).logits is None


def test_a_teacher_that_is_yet_to_be_asked_says_nothing_in_the_same_shape(flow: Path, store: Requests) -> None:
    data = read(flow / "data.jsonl")
    batch = data.train.batch(0)
    said, later = (one(batch, LOGITS) for one in (Unasked(size=V, k=5), teacher(flow, store, data, k=5)))
    assert said.logits.ids.shape == later.logits.ids.shape  # type: ignore[union-attr]
    assert not bool(heard(said, batch).any())


# On disk.


def test_what_is_remembered_is_what_was_told(flow: Path, store: Requests, tmp_path: Path) -> None:
    rows = world.written(tmp_path / "flow", store=store)
    filled = fill(rows, tmp_path / "filled", store, k=V)
    batch = filled.data.train.batch(0)
    told_live = Told(
        filled.signals.parent / "rows.jsonl",
        {row.id: row.lineage for row in rows},
        reading=filled.data.reading,
        k=V,
        store=store,
    )(batch, LOGITS)
    kept = remembered(filled.signals)(batch, LOGITS)
    where = heard(told_live, batch)
    assert torch.equal(where, heard(kept, batch))
    torch.testing.assert_close(laws(kept, where), laws(told_live, where), atol=1e-3, rtol=0)


def test_filling_again_adds_nothing(store: Requests, tmp_path: Path) -> None:
    rows = world.written(tmp_path / "flow", store=store)
    added = [fill(rows, tmp_path / "filled", store).built.rows for _ in range(2)]
    assert added[0] > 8 and added[1] == 0


class Mortal(Requests):
    """A store whose reader is stopped at its nth look at an answer."""

    left = 0

    def exchange(self, key: str) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().exchange(key)


def test_a_build_that_was_stopped_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    requests = Mortal(tmp_path / "requests.sqlite")
    rows = list(world.canned(told_of("abc"), tmp_path / "flow", store=requests, rows=world.questions(8)))
    requests.left = 8 + 5  # every row is looked at before the first is stored
    with pytest.raises(KeyboardInterrupt):
        fill(rows, tmp_path / "stopped", requests)
    resumed, whole = (fill(rows, tmp_path / name, requests) for name in ("stopped", "whole"))
    assert 0 < resumed.built.rows < whole.built.rows == 8
    for index in range(4):
        batch = whole.data.train.batch(index)
        one, other = (remembered(filled.signals)(batch, LOGITS).logits for filled in (resumed, whole))
        assert isinstance(one, Sparse) and isinstance(other, Sparse)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.log_probs, other.log_probs)


def test_rows_that_are_added_to_a_flow_continue_its_store(tmp_path: Path) -> None:
    requests = fresh()
    for num, added in ((4, 4), (6, 2)):
        rows = world.canned(told_of("abc"), tmp_path / "flow", store=requests, rows=world.questions(num))
        assert fill(rows, tmp_path / "filled", requests).built.rows == added


def test_another_teacher_s_answers_do_not_continue_it(tmp_path: Path) -> None:
    one, other = (
        Told(tmp_path / "data.jsonl", {"1": Lineage(requests=("k",), writers=(who,), prompts=("p",))},
             reading=reading_of(tmp_path), k=3, store=fresh()).identity
        for who in ("a", "b")
    )  # fmt: skip
    assert one != other


def reading_of(folder: Path) -> Any:
    path = folder / "data.jsonl"
    path.write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "q"},
                                                        {"role": "assistant", "content": "abc"}]}) + "\n")  # fmt: skip
    return read(path).reading


def test_the_account_is_told_in_lines(flow: Path, store: Requests) -> None:
    account = teacher(flow, store, read(flow / "data.jsonl")).account
    lines = dict(account.lines())
    assert lines["rows with log-probabilities"] == f"{account.told} of {account.rows}"
    assert lines["rows drawn at temperature 1"] == f"{account.told}"
    assert Counter(account.untold).total() == account.rows - account.told
