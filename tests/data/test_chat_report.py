"""The start-up report: what is supervised, shown as text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from potstill.core.vocabulary import fingerprint
from potstill.data.text_report import SHOWN
from tests.data.chat_helpers import CHATML, byte_tokenizer, dialogue, read, stories_tokenizer


def test_supervised_text_stands_between_marks(tmp_path: Path) -> None:
    data = read(
        tmp_path, [{"messages": dialogue("hi", "yo", "how?", "well \U0001f642")}], byte_tokenizer(template=CHATML)
    )
    turns = "user\nhi<|im_end|>\n<|im_start|>assistant\n{+yo<|im_end|>+}\n<|im_start|>user\nhow?"
    assert turns + "<|im_end|>\n<|im_start|>assistant\n{+well \U0001f642<|im_end|>+}\n" in data.report.text()


def test_a_piece_keeps_the_space_it_begins_with(tmp_path: Path) -> None:
    data = read(tmp_path, [{"prompt": "Once upon", "completion": " a time"}], stories_tokenizer())
    assert "Once upon{+ a time<s>+}" in data.report.text()


def test_the_report_counts_rows_tokens_and_what_is_supervised(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 3, 9)]
    data = read(tmp_path, rows, byte_tokenizer(), length=8)
    facts = dict(data.report.facts)
    assert facts["rows"] == "3 for training, 0 for testing"
    assert facts["fields"] == "prompt + completion (3 rows)"
    assert facts["tokens"] == "18 for training"  # 4 + 6 + 8
    assert facts["supervised"] == "12 tokens (66.7 %)"  # 2 + 4 + 6, the last without its end
    assert facts["tokens per row"].startswith("0 %: 4, ")
    assert facts["tokens per row"].endswith("100 %: 8")
    assert facts["cut to length"] == "1 rows"
    assert fingerprint(byte_tokenizer()) in facts["tokenizer"]
    assert facts["chat template"] == "none"


def test_another_chat_template_has_another_fingerprint(tmp_path: Path) -> None:
    rows = [{"messages": dialogue("hi", "yo")}]
    found = {
        dict(read(tmp_path, rows, byte_tokenizer(template=t)).report.facts)["chat template"]
        for t in (CHATML, CHATML + " ")
    }
    assert len(found) == 2


def test_twenty_samples_are_spread_over_the_set(tmp_path: Path) -> None:
    data = read(tmp_path, [{"prompt": f"{n:02}", "completion": "a"} for n in range(40)], byte_tokenizer())
    assert [sample.pieces[0].text for sample in data.report.samples] == [f"{n:02}" for n in range(0, 40, 2)]


def test_packed_rows_are_shown_document_by_document(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "a"} for n in range(4)]
    report = read(tmp_path, rows, byte_tokenizer(), layout="packed").report
    assert len(report.samples) == 4
    assert dict(report.facts)["packed"] == "into 1 rows"


def test_a_long_sample_is_shortened_in_the_text_and_whole_on_the_page(tmp_path: Path) -> None:
    report = read(tmp_path, [{"text": "a" * 3000}], byte_tokenizer(), length=4000).report
    assert max(map(len, report.text().splitlines())) < SHOWN + 60
    assert "a" * 2999 in report.html()


def test_no_markup_of_the_data_reaches_the_page(tmp_path: Path) -> None:
    class Tags(HTMLParser):
        found: set[str]

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.found.add(tag)

    rows = [{"prompt": "<script>alert(1)</script>", "completion": "</mark><img src=x>&"}]
    page = read(tmp_path, rows, byte_tokenizer()).report.html()
    tags = Tags()
    tags.found = set()
    tags.feed(page)
    assert tags.found == {"section", "dl", "div", "dt", "dd", "ul", "li", "details", "summary", "code", "pre", "mark"}
    assert "<mark>&lt;/mark&gt;&lt;img src=x&gt;&amp;&lt;/s&gt;</mark>" in page


def test_left_out_rows_are_on_the_page(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    assert "Left out: 1 x the answer is empty" in read(tmp_path, rows, byte_tokenizer()).report.html()
