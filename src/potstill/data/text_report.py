"""What a set of texts gives to learn from: how many rows and tokens, what is left out and why, and samples.

In the samples the supervised text is highlighted: a mask that is wrong is seen here before anything is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from potstill.core.types import IGNORED
from potstill.data.sequences import TokenRows
from potstill.data.tokens import Tokenizer

if TYPE_CHECKING:
    from potstill.data.chat import ChatData

NUM_SAMPLES = 20
SHOWN = 1200
"""Characters of a sample that the text report shows; the page shows all."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(slots=True)
class Told:
    """How often something was found, and where first."""

    count: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        self.first = self.first or place
        self.count += 1


@dataclass(slots=True, kw_only=True)
class Tally:
    """What reading found, counted while it goes on."""

    formats: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Told] = field(default_factory=dict)
    notes: dict[str, Told] = field(default_factory=dict)
    num_cut: int = 0
    is_divided: bool = False
    """Some row has said which part it belongs to."""

    def leave_out(self, reason: str, place: str) -> None:
        self.left_out.setdefault(reason, Told()).add(place)

    def note(self, sentence: str, place: str) -> None:
        self.notes.setdefault(sentence, Told()).add(place)

    @property
    def reasons(self) -> str:
        """Why rows were left out, in one sentence; empty where none was."""
        parts = [f"{told.count:,} because {reason} (first: {told.first})" for reason, told in self.left_out.items()]
        return f"Left out: {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a sample's text, supervised or not."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row as text."""

    key: str
    num_tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The start-up report on the data of a run."""

    facts: tuple[tuple[str, str], ...]
    """Names and values: rows, tokens, lengths, fingerprints."""
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    """What the reader should know, each a sentence."""
    samples: tuple[Sample, ...]

    def text(self) -> str:
        """For a terminal or a log: supervised text stands between {+ and +}."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        lines += [f"left out: {sentence}" for sentence in self.left_out]
        lines += [f"note: {sentence}" for sentence in self.notes]
        for number, sample in enumerate(self.samples, start=1):
            lines += ["", f"--- sample {number} of {len(self.samples)}, {sample.num_tokens} tokens, key {sample.key}"]
            lines.append(_shortened("".join(f"{{+{p.text}+}}" if p.supervised else p.text for p in sample.pieces)))
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A fragment for a page, every value escaped: supervised text is in <mark>."""
        import jinja2

        page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        return page.from_string(FRAGMENT).render(report=self)


FRAGMENT = """\
<section class="data-report">
<dl class="facts">
{% for name, value in report.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% if report.left_out or report.notes %}
<ul class="notes">
{% for sentence in report.left_out %}
<li>Left out: {{ sentence }}</li>
{% endfor %}
{% for sentence in report.notes %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{% endif %}
{% for sample in report.samples %}
<details{% if loop.first %} open{% endif %}>
<summary>Sample {{ loop.index }}: {{ sample.num_tokens }} tokens, <code>{{ sample.key }}</code></summary>
<pre style="white-space: pre-wrap">
{%- for piece in sample.pieces %}
{% if piece.supervised %}<mark>{{ piece.text }}</mark>{% else %}{{ piece.text }}{% endif %}
{% endfor %}
</pre>
</details>
{% endfor %}
</section>
"""


def describe(data: ChatData) -> Report:
    """The report on data that were read: what a person should look at before training begins."""
    documents, tally = data.reading.train, data.reading.tally
    supervised = int((documents.labels != IGNORED).sum())
    facts = [
        ("rows", f"{documents.num_rows:,} for training, {data.test.num_rows:,} for testing"),
        ("fields", ", ".join(f"{name} ({count:,} rows)" for name, count in tally.formats.items())),
        ("tokens", f"{len(documents.ids):,} for training"),
        ("supervised", f"{supervised:,} tokens ({100 * supervised / len(documents.ids):.1f} %)"),
        ("tokens per row", _lengths(documents)),
        ("cut to length", f"{tally.num_cut:,} rows"),
        ("left out", f"{sum(told.count for told in tally.left_out.values()):,} rows"),
        ("tokenizer", f"{data.tokenizer.name_or_path or type(data.tokenizer).__name__}, {data.vocabulary}"),
        ("chat template", data.reading.renderer.template.fingerprint),
    ]
    if data.train.rows.is_packed:
        facts.insert(3, ("packed", f"into {data.train.num_rows:,} rows"))
    return Report(
        facts=tuple(facts),
        left_out=tuple(f"{told.count:,} x {why}; first: {told.first}" for why, told in tally.left_out.items()),
        notes=tuple(_notes(data)),
        samples=tuple(_sample(documents, row, data.tokenizer) for row in _chosen(documents)),
    )


def _notes(data: ChatData) -> Iterator[str]:
    for sentence, told in data.reading.tally.notes.items():
        yield f"{told.count:,} x {sentence}; first: {told.first}"
    if data.tokenizer.pad_token_id is None:
        pad_id = data.reading.train.pad_id
        yield f"The tokenizer has no pad token: rows are filled up with id {pad_id}, which no mask counts."
    if not data.test.num_rows:
        yield "There is no test row: nothing can be scored."


def _chosen(documents: TokenRows) -> list[int]:
    """Rows spread evenly over the set."""
    count = min(NUM_SAMPLES, documents.num_rows)
    return [place * documents.num_rows // count for place in range(count)]


def _sample(documents: TokenRows, row: int, tokenizer: Tokenizer) -> Sample:
    start, stop = documents.borders[row : row + 2].tolist()
    ids = documents.ids[start:stop].tolist()
    # A token is supervised where the label before it names it: what is shown is what the labels say, not what they
    # were made from.
    targets = [False, *(documents.labels[start : stop - 1] != IGNORED).tolist()]
    pieces, done, end = [], 0, 0
    for supervised, some in groupby(targets):
        end += len(list(some))
        # Decoded from the start: a piece alone would lose its leading space, or half of a character.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(Piece(text=text[done:], supervised=supervised))
        done = len(text)
    return Sample(key=documents.keys[row], num_tokens=len(ids), pieces=tuple(pieces))


def _lengths(documents: TokenRows) -> str:
    marks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    # Not quantile, which refuses large sets.
    values = documents.lengths.sort().values[((documents.num_rows - 1) * marks).long()].tolist()
    return ", ".join(f"{mark} %: {value}" for mark, value in zip(PERCENTILES, values, strict=True))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} [... {len(text) - SHOWN:,} more characters]"
