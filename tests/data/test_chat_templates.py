"""Conversations: which words of a rendered text are answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.core.errors import DataError
from potstill.core.types import IGNORED
from tests.data.chat_helpers import (
    BARE,
    CHATML,
    MARKED,
    OPENING,
    THINKING,
    answers,
    byte_tokenizer,
    dialogue,
    only,
    read,
    stories_tokenizer,
)

THREE_TURNS = [{"messages": dialogue("hi", "yo", "how?", "well, \U0001f642", "why?", "user")}]
EACH_TURN = ["yo<|im_end|>", "well, \U0001f642<|im_end|>", "user<|im_end|>"]


def learnt(folder: Path, rows: list[dict[str, object]], template: str, /, **settings: object) -> str:
    tokenizer = byte_tokenizer(template=template)
    return answers(only(read(folder, rows, tokenizer, **settings)), tokenizer)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["grown", "marked"])
def test_each_turn_of_the_assistant_with_its_end_mark_is_supervised_and_nothing_else(
    tmp_path: Path, template: str
) -> None:
    assert learnt(tmp_path, THREE_TURNS, template) == "".join(EACH_TURN)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["grown", "marked"])
def test_an_end_mark_that_is_spelled_in_pieces_is_supervised_whole(tmp_path: Path, template: str) -> None:
    tokenizer = stories_tokenizer(template=template)
    batch = only(read(tmp_path, THREE_TURNS, tokenizer))
    labels = batch.labels[0]
    spans = "".join("x" if label != IGNORED else " " for label in labels.tolist()).split()
    assert len(spans) == 3
    assert answers(batch, tokenizer).replace(" ", "") == "".join(EACH_TURN).replace(" ", "")


def test_marks_and_growing_agree_token_by_token(tmp_path: Path) -> None:
    grown, marked = (only(read(tmp_path, THREE_TURNS, stories_tokenizer(template=text))) for text in (CHATML, MARKED))
    assert grown.labels.tolist() == marked.labels.tolist()


@pytest.mark.parametrize("template", [CHATML, MARKED, BARE], ids=["grown", "marked", "bare"])
def test_only_the_last_answer_is_supervised_where_that_is_asked_for(tmp_path: Path, template: str) -> None:
    end = "\n" if template == BARE else "<|im_end|>"
    assert learnt(tmp_path, THREE_TURNS, template, supervise="last") == f"user{end}"


def test_all_is_the_whole_text_but_its_first_token(tmp_path: Path) -> None:
    text = "user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert learnt(tmp_path, [{"messages": dialogue("hi", "yo")}], CHATML, supervise="all") == text


def test_a_template_writes_the_special_tokens_and_no_other_is_added(tmp_path: Path) -> None:
    batch = only(read(tmp_path, THREE_TURNS, stories_tokenizer(template="{{ bos_token }}" + CHATML)))
    assert (batch.inputs["input_ids"] == 1).sum() == 1


def test_a_prompt_with_its_completion_becomes_two_messages(tmp_path: Path) -> None:
    assert learnt(tmp_path, [{"prompt": "hi", "completion": "yo"}], CHATML) == "yo<|im_end|>"


def test_a_completion_in_messages_is_learnt_and_answers_in_its_prompt_are_not(tmp_path: Path) -> None:
    rows = [{"prompt": dialogue("1", "one", "2"), "completion": [{"role": "assistant", "content": "two"}]}]
    assert learnt(tmp_path, rows, CHATML) == "two<|im_end|>"


def test_plain_joins_prompt_and_completion_although_there_is_a_template(tmp_path: Path) -> None:
    assert learnt(tmp_path, [{"prompt": "hi", "completion": "yo"}], CHATML, template="plain") == "yo</s>"


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(BARE)
    found = learnt(tmp_path, [{"messages": dialogue("hi", "yo")}], CHATML, template=str(tmp_path / "mine.jinja"))
    assert found == "yo\n"


def test_a_template_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file mine"):
        learnt(tmp_path, THREE_TURNS, CHATML, template="mine")


def test_a_system_message_is_put_before_conversations_that_have_none(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    own = {"role": "system", "content": "Mine."}
    rows = [{"messages": dialogue("hi", "yo")}, {"messages": [own, *dialogue("hi", "yo")]}]
    batch = only(read(tmp_path, rows, tokenizer, system="Be kind."))
    texts = [tokenizer.decode(row.tolist()) for row in batch.inputs["input_ids"]]
    assert ["Be kind." in text for text in texts] == [True, False]
    assert [answers(batch, tokenizer, row) for row in (0, 1)] == ["yo<|im_end|>"] * 2


def test_a_system_message_in_front_does_not_make_the_answers_of_a_prompt_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": dialogue("1", "one"), "completion": dialogue("2", "two")}]
    assert learnt(tmp_path, rows, CHATML, system="Count.") == "two<|im_end|>"


def test_marks_that_are_not_one_for_each_turn_are_not_used(tmp_path: Path) -> None:
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    assert learnt(tmp_path, THREE_TURNS, template) == "".join(EACH_TURN)


def test_results_of_tools_are_read_and_not_learnt(tmp_path: Path) -> None:
    calls = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    template = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}" + calls)
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    rows = [{"messages": messages, "tools": [{"name": "look"}]}]
    assert learnt(tmp_path, rows, template) == "<call>look</call><|im_end|>It rains.<|im_end|>"


def test_a_greeting_before_any_question_is_an_answer(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "assistant"}, *dialogue("hi", "yo")]}]
    assert learnt(tmp_path, rows, CHATML) == "assistant<|im_end|>yo<|im_end|>"


def test_what_a_template_thinks_before_the_answer_belongs_to_it(tmp_path: Path) -> None:
    rows = [{"messages": dialogue("hi", "yo")}]
    assert learnt(tmp_path, rows, THINKING) == "<think>\n\n</think>\n\nyo<|im_end|>"


def test_an_answer_that_the_template_rewrites_later_is_not_supervised_and_the_report_says_so(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=THINKING)
    rows = [{"messages": dialogue("hi", "<think>hm</think>yo", "how?", "<think>so</think>well")}]
    data = read(tmp_path, rows, tokenizer)
    assert answers(only(data), tokenizer) == "<think>so</think>well<|im_end|>"
    assert "1 x an answer is not supervised, because the chat template writes it otherwise" in data.report.text()


def test_marks_around_a_rewritten_answer_are_not_believed(tmp_path: Path) -> None:
    content = "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    template = MARKED.replace("{% generation %}{{ m.content }}", "{% generation %}" + content)
    rows = [{"messages": dialogue("hi", "<think>hm</think>yo", "how?", "<think>so</think>well")}]
    assert learnt(tmp_path, rows, template) == "<think>so</think>well<|im_end|>"


@pytest.mark.parametrize("kind", [CHATML, MARKED], ids=["grown", "marked"])
def test_a_template_that_drops_the_thinking_of_the_answer_itself_is_refused(tmp_path: Path, kind: str) -> None:
    template = kind.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template loses the answer .*<think>hm</think>yo"):
        learnt(tmp_path, [{"messages": dialogue("hi", "<think>hm</think>yo")}], template)


def test_a_template_that_strips_the_answer_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="the chat template loses the answer"):
        learnt(tmp_path, [{"messages": dialogue("say yo", "yo")}], template)


def test_reasoning_in_a_field_that_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    rows = [{"messages": [*dialogue("hi"), {"role": "assistant", "content": "yo", "reasoning_content": "greet"}]}]
    with pytest.raises(DataError, match="loses the answer or a part of it"):
        learnt(tmp_path, rows, CHATML)


@pytest.mark.parametrize("answer", ["yo", "<b>yo</b>"])
def test_an_answer_that_is_not_what_the_prompt_asks_for_begins_after_the_words_they_share(
    tmp_path: Path, answer: str
) -> None:
    tokenizer = byte_tokenizer(template=OPENING)
    data = read(tmp_path, [{"messages": dialogue("hi", answer)}], tokenizer)
    assert answers(only(data), tokenizer) == f"{answer}<|im_end|>"
    assert "begins otherwise" in data.report.text()


def test_without_a_generation_prompt_the_header_of_the_turn_is_not_supervised(tmp_path: Path) -> None:
    assert learnt(tmp_path, [{"messages": dialogue("hi", "assistant", "a", "s")}], BARE) == "assistant\ns\n"


def test_white_space_that_a_template_trims_is_no_loss(tmp_path: Path) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    assert learnt(tmp_path, [{"messages": dialogue("hi", "\n yo \n")}], template) == "yo<|im_end|>"


def test_an_answer_without_any_end_mark_is_reported(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    data = read(tmp_path, [{"messages": dialogue("hi", "yo")}], byte_tokenizer(template=template))
    assert "ends without an end-of-turn mark" in data.report.text()


def test_a_conversation_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1 is a conversation, but the tokenizer has no chat template"):
        learnt(tmp_path, THREE_TURNS, "")


def test_what_a_template_refuses_is_told_with_the_roles(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*roles must alternate.*user, assistant"):
        learnt(tmp_path, [{"messages": dialogue("hi", "yo")}], template)


def test_a_template_that_is_no_jinja_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the chat template refuses"):
        learnt(tmp_path, THREE_TURNS, "{% if %}")


def test_a_template_that_wants_a_users_message_first_is_served(tmp_path: Path) -> None:
    strict = "{% if 'user' not in messages | map(attribute='role') | list %}{{ raise_exception('no') }}{% endif %}"
    rows = [
        {"messages": [{"role": "system", "content": "yo"}, {"role": "assistant", "content": "yo"}, *dialogue("a", "b")]}
    ]
    with pytest.raises(DataError, match="refuses"):
        learnt(tmp_path, rows, strict + CHATML)
    assert learnt(tmp_path, rows, strict + CHATML, supervise="last") == "b<|im_end|>"
