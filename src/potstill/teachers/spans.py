"""One text in two tokenizations: which tokens of the one spell the same bytes as which tokens of the other.

Ends of tokens are counted in bytes; where both tokenizations have an end, a span ends. Pure Python, knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from potstill.teachers.spelling import Spelling


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Student tokens [student_start, student_stop) spell what teacher tokens [teacher_start, teacher_stop) spell."""

    student_start: int
    student_stop: int
    teacher_start: int
    teacher_stop: int
    comparable: bool = True
    """Both sides begin at the same byte of their own text. Not so behind a space that only one tokenizer puts in
    front: there a piece of the one has another meaning than the same piece of the other."""

    @property
    def one_to_one(self) -> bool:
        both = self.student_stop - self.student_start, self.teacher_stop - self.teacher_start
        return self.comparable and both == (1, 1)


@dataclass(slots=True, kw_only=True)
class Rendering:
    """A student's row as the teacher reads it."""

    ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    whole: bool = True
    """False where the teacher's tokenizer does not give the bytes back, or the bytes are no UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """Renders a student's tokens as a teacher's. `special` maps special tokens, content to content, by name."""

    student: Spelling
    teacher: Spelling
    special: Mapping[str, str]
    whole_words: bool

    def render(self, ids: Sequence[int]) -> Rendering:
        """The teacher's tokens for a student's row, and the spans in which both agree.

        Special tokens are mapped by `special`, by role (begin, end) or, where both have it, by name; any other is shown
        as its text, without a span. Where the bytes stop being UTF-8 or come back otherwise, the teacher stops
        reading: what follows would not follow the same text.
        """
        made = Rendering()
        for start, stop in _parts(ids, self.student):
            if self.student.pieces[ids[start]] is None:
                self._special(made, ids[start], start)
            else:
                self._text(made, ids, start, stop)
            if not made.whole:
                break
        opening = self.teacher.opening
        if opening and made.ids[:1] != [opening[0]]:
            made.ids[:0] = opening
            made.spans = [_shifted(span, len(opening)) for span in made.spans]
        return made

    def special_partner(self, token: int, *, first: bool) -> int | None:
        """The teacher's token with the part in the text that the student's special token has."""
        names = {name: known for known, name in self.teacher.specials.items()}
        name = self.student.specials.get(token, "")
        if name in self.special:
            return names.get(self.special[name])
        # Where one token both begins and ends texts, it begins them at their first place only.
        roles = [(self.student.bos, self.teacher.bos), (self.student.eos, self.teacher.eos)]
        for own, partner in roles if first else reversed(roles):
            if token == own and partner is not None:
                return partner
        return names.get(name)

    def _special(self, made: Rendering, token: int, place: int) -> None:
        partner = self.special_partner(token, first=place == 0)
        if partner is None:
            made.ids += self.teacher.encode(self.student.specials.get(token, ""))
            return
        at = len(made.ids)
        made.ids.append(partner)
        made.spans.append(Span(student_start=place, student_stop=place + 1, teacher_start=at, teacher_stop=at + 1))

    def _text(self, made: Rendering, ids: Sequence[int], start: int, stop: int) -> None:
        own = [self.student.pieces[token] or b"" for token in ids[start:stop]]
        own, student_led = _without_lead(own, self.student)
        text = _readable(b"".join(own))
        made.whole = sum(map(len, own)) == len(text)
        theirs_ids = self.teacher.encode(text.decode())
        theirs, teacher_led = [self.teacher.pieces[token] or b"" for token in theirs_ids], False
        if b"".join(theirs) != text:
            theirs, teacher_led = _without_lead(theirs, self.teacher)
        if b"".join(theirs) != text:
            made.whole = False
            return
        at = len(made.ids)
        made.ids += theirs_ids
        for span in matched(own, theirs, text if self.whole_words else b""):
            moved = _shifted(span, at, by_student=start)
            made.spans.append(replace(moved, comparable=span.student_start > 0 or student_led == teacher_led))


def matched(own: Sequence[bytes], theirs: Sequence[bytes], words_of: bytes = b"") -> Iterator[Span]:
    """The shortest spans of equal bytes, in order (METHODS_LLM P3); given the text, only ends of words end a span.

    [he|llo| |world] and [hello| wor|ld] -> (0..2, 0..1), (2..4, 1..3). A token without bytes joins the next span.
    """
    ours, other = list(accumulate(map(len, own))), list(accumulate(map(len, theirs)))
    i = j = student_start = teacher_start = done = 0
    while i < len(ours) and j < len(other):
        if ours[i] != other[j]:
            i, j = (i + 1, j) if ours[i] < other[j] else (i, j + 1)
            continue
        if ours[i] > done and (not words_of or _ends_word(words_of, ours[i])):
            yield Span(student_start=student_start, student_stop=i + 1, teacher_start=teacher_start, teacher_stop=j + 1)
            student_start, teacher_start, done = i + 1, j + 1, ours[i]
        i, j = i + 1, j + 1


def _parts(ids: Sequence[int], spelling: Spelling) -> Iterator[tuple[int, int]]:
    """Runs of text, and special tokens one by one: [start, stop)."""
    start = 0
    while start < len(ids):
        stop = start + 1
        while spelling.pieces[ids[start]] is not None and stop < len(ids) and spelling.pieces[ids[stop]] is not None:
            stop += 1
        yield start, stop
        start = stop


def _without_lead(pieces: list[bytes], spelling: Spelling) -> tuple[list[bytes], bool]:
    """The pieces without the space that the tokenizer put in front of the text, and whether there was one."""
    if not (spelling.leads and pieces and pieces[0].startswith(b" ")):
        return pieces, False
    return [pieces[0][1:], *pieces[1:]], True


def _readable(content: bytes) -> bytes:
    """The bytes up to the first that is no UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content[: error.start]
    return content


def _ends_word(text: bytes, end: int) -> bool:
    """A letter, a digit or a byte of a longer character on both sides would mean: within a word."""
    return end == len(text) or not (_in_word(text[end - 1]) and _in_word(text[end]))


def _in_word(byte: int) -> bool:
    return byte >= 128 or bytes([byte]).isalnum()


def _shifted(span: Span, by_teacher: int, *, by_student: int = 0) -> Span:
    return replace(
        span,
        student_start=span.student_start + by_student,
        student_stop=span.student_stop + by_student,
        teacher_start=span.teacher_start + by_teacher,
        teacher_stop=span.teacher_stop + by_teacher,
    )
