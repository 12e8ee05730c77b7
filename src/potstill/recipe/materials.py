"""What a run learns from, pictures or texts, and all that follows from its kind. Nothing else tells the two apart."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from potstill.core.errors import DataError, RecipeError
from potstill.recipe.calls import FROM_DATA, Call
from potstill.recipe.text import Tree

if TYPE_CHECKING:
    from torch import nn

    from potstill.core.types import Batch, Teacher
    from potstill.data import ChatData, ImageData, ImageSource, TokenSource
    from potstill.evaluate import Scores

Rows = tuple[tuple[str, str], ...]
Line = dict[str, str]
"""A line of examples.jsonl."""


class Material(ABC):
    """Data that were read."""

    @property
    @abstractmethod
    def train(self) -> ImageSource | TokenSource: ...

    @property
    @abstractmethod
    def test(self) -> ImageSource | TokenSource: ...

    @property
    @abstractmethod
    def offers(self) -> Mapping[str, Tree]:
        """Knobs of a model that follow from the data."""

    @property
    @abstractmethod
    def num_scored(self) -> int:
        """Examples to score at a time; the scores do not depend on it."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Tree]:
        """What must be known of the data to use a student of them."""

    @abstractmethod
    def check(self, call: Call) -> None:
        """RecipeError for a model that cannot be one of these data."""

    @abstractmethod
    def check_teacher(self, teacher: Teacher) -> None:
        """DataError for a teacher that would read these data otherwise than its own."""

    @abstractmethod
    def read_for(self, call: Call) -> Mapping[str, object]:
        """How the data were read, for a teacher that speaks of these very rows. RecipeError where they are no rows of
        text."""

    @abstractmethod
    def rows(self) -> Rows:
        """(what, value) lines for `potstill check`."""

    @abstractmethod
    def longest(self) -> Batch | None:
        """The row most likely to be too much for a model; None where all rows are alike."""

    @abstractmethod
    def page(self) -> str:
        """What a person should see of the data, as a piece of HTML; empty where there is nothing to see."""

    @abstractmethod
    def scores(self, scores: Scores, latency_ms: float) -> dict[str, object]:
        """For scores.json: the scores of a model with what they mean for these data."""

    @abstractmethod
    def examples(self, model: nn.Module) -> list[Line]:
        """Answers of a model for people to read."""

    def knobs_for(self, call: Call) -> dict[str, Tree]:
        """What the model of a section still lacks, from the data. RecipeError where they do not have it."""
        lacking = [name for name in sorted(FROM_DATA) if call.takes(name)]
        for name in lacking:
            if name not in self.offers:
                raise RecipeError(
                    f"{call.kind}.use: {call.use} is made for data that have {name}, which these have not. "
                    "Texts are for hf, hf_fresh, hf_inherited and lora."
                )
        return {name: self.offers[name] for name in lacking}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures(Material):
    """Labelled images."""

    data: ImageData

    @property
    def train(self) -> ImageSource:
        return self.data.train

    @property
    def test(self) -> ImageSource:
        return self.data.test

    @property
    def offers(self) -> Mapping[str, Tree]:
        return {"channels": self.data.shape[0], "classes": self.data.num_classes}

    @property
    def num_scored(self) -> int:
        return 256

    @property
    def facts(self) -> Mapping[str, Tree]:
        pictures = self.train.pictures
        return {
            "image": list(self.data.shape),
            "mean": pictures.mean.flatten().tolist(),
            "std": pictures.std.flatten().tolist(),
            "class_names": list(self.data.class_names),
        }

    def check(self, call: Call) -> None:
        classes = call.knobs.get("classes", self.data.num_classes)
        if classes < self.data.num_classes:
            raise RecipeError(
                f"{call.kind}.classes: found {classes}, but the data have {self.data.num_classes} classes. Leave it "
                "out, or give at least as many."
            )

    def check_teacher(self, teacher: Teacher) -> None:
        pass

    def read_for(self, call: Call) -> Mapping[str, object]:
        if call.takes("reading"):
            raise RecipeError(f"teacher.use: {call.use} speaks of texts, and these data are pictures.")
        return {}

    def rows(self) -> Rows:
        return (
            ("training rows", f"{self.train.num_rows:,}"),
            ("labelled", f"{len(self.train.pictures.labelled):,}"),
            ("test rows", f"{self.test.num_rows:,}"),
            ("classes", str(self.data.num_classes)),
            ("image", " x ".join(map(str, self.data.shape))),
        )

    def longest(self) -> None:
        return None

    def page(self) -> str:
        return ""

    def scores(self, scores: Scores, latency_ms: float) -> dict[str, object]:
        return {**scores.as_dict(), "latency_ms": latency_ms}

    def examples(self, model: nn.Module) -> list[Line]:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Material):
    """Rows of tokens."""

    data: ChatData

    @property
    def train(self) -> TokenSource:
        return self.data.train  # type: ignore[return-value]

    @property
    def test(self) -> TokenSource:
        return self.data.test  # type: ignore[return-value]

    @property
    def offers(self) -> Mapping[str, Tree]:
        # A tokenizer is the student's before it is the data's: see sections.
        return {}

    @property
    def num_scored(self) -> int:
        # What fits into memory while training fits while scoring.
        return self.train.stream.batch_size

    @property
    def facts(self) -> Mapping[str, Tree]:
        reading = self.data.reading
        return {"vocabulary": self.data.vocabulary, "template": reading.renderer.template.fingerprint}

    def check(self, call: Call) -> None:
        if not self.test.num_rows:
            raise DataError("data: there is no test row, so no student could be scored. Give test_path or test_share.")

    def check_teacher(self, teacher: Teacher) -> None:
        from potstill.data.chat import check_same_text
        from potstill.data.rendering import template_of
        from potstill.teachers import HfTeacher

        theirs = teacher.student.tokenizer if isinstance(teacher, HfTeacher) else None
        written = self.data.reading.renderer.template.text
        # A template that was given is meant for both sides, and another tokenizer has an error of its own.
        if (
            theirs is not None
            and teacher.fingerprint == self.data.vocabulary
            and written == template_of(self.data.tokenizer, "own").text
        ):
            check_same_text(self.data, theirs)

    def read_for(self, call: Call) -> Mapping[str, object]:
        return {"reading": self.data.reading} if call.takes("reading") else {}

    def rows(self) -> Rows:
        report = self.data.report
        sample = "".join(
            f"{{+{piece.text}+}}" if piece.supervised else piece.text for piece in report.samples[0].pieces
        )
        return (
            *report.facts,
            *(("left out", sentence) for sentence in report.left_out),
            *(("note", sentence) for sentence in report.notes),
            ("first row, {+supervised+}", " ".join(sample.split())[:240]),
        )

    def longest(self) -> Batch:
        import torch

        source = max((self.train, self.test), key=lambda part: int(part.rows.lengths.max()))
        return source.rows.batch(torch.tensor([int(source.rows.lengths.argmax())]))

    def page(self) -> str:
        return self.data.report.html()

    def scores(self, scores: Scores, latency_ms: float) -> dict[str, object]:
        tokens = int(self.test.batch(0).inputs["attention_mask"][0].ne(0).sum())
        told = {name: value for name, value in asdict(scores).items() if name not in ("per_class", "ece")}
        return {
            "perplexity": math.exp(min(scores.nll, 700.0)),
            "bits_per_byte": scores.nll * scores.num_items / math.log(2) / max(self._num_bytes(), 1),
            **told,
            "latency_ms": latency_ms,
            "tokens_per_second": 1000.0 * tokens / latency_ms,
            "vocabulary": self.data.vocabulary,
        }

    def examples(self, model: nn.Module) -> list[Line]:
        from potstill.recipe.generating import continuations

        return continuations(model, self.data)

    def _num_bytes(self) -> int:
        """Bytes of the supervised text of the test part: what models of different tokenizers are compared by."""
        from potstill.core.types import IGNORED

        rows, decode = self.test.rows, self.data.tokenizer.decode
        said = (labels[labels != IGNORED].tolist() for labels in rows.labels.split(rows.borders.diff().tolist()))
        return sum(len(decode(ids, skip_special_tokens=True).encode()) for ids in said)


def material(data: object, *, use: str) -> Material:
    """What was read, by its kind. Raises RecipeError for anything a run cannot learn from."""
    from potstill.data import ChatData, ImageData

    if isinstance(data, ImageData):
        return Pictures(data=data)
    if isinstance(data, ChatData):
        return Texts(data=data)
    raise RecipeError(f"data.use: {use} gives {type(data).__name__}, expected what images or chat give.")
