"""Which token of a student a token of its teacher corresponds to: the same bytes, or the fewest edits away.

Dimension key: V student classes, W teacher classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.teachers.spans import Interpreter
from potstill.teachers.spelling import Spelling


def same_bytes(interpreter: Interpreter) -> Tensor:
    """For each teacher token the student's token of the same bytes or role, -1 where there is none: int64 [W]."""
    student, teacher = interpreter.student, interpreter.teacher
    known = by_bytes(student)
    partner = [-1 if piece is None else known.get(piece, -1) for piece in teacher.pieces]
    for token in student.specials:
        for first in (True, False):
            other = interpreter.special_partner(token, first=first)
            if other is not None:
                partner[other] = token
    return torch.tensor(partner)


class Nearest:
    """MinED's map: the same bytes if there are any, else the student's token with the least edit distance in bytes.

    Of equally near ones the lowest id. Special tokens without a partner have none. An entry is worked out when it is
    first asked for, and kept (Wan et al. 2024, FuseLLM).
    """

    def __init__(self, interpreter: Interpreter, same: Tensor) -> None:
        self._teacher = interpreter.teacher.pieces
        ids = sorted(by_bytes(interpreter.student).values())
        pieces = [interpreter.student.pieces[token] or b"" for token in ids]
        self._candidates = torch.tensor(ids)
        self._lengths = torch.tensor([len(piece) for piece in pieces])
        self._letters = torch.full((len(pieces), int(self._lengths.max())), -1, dtype=torch.int16)
        for row, piece in enumerate(pieces):
            self._letters[row, : len(piece)] = torch.tensor(list(piece), dtype=torch.int16)
        self._map = same.clone()
        self._done = same >= 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Teacher ids of any shape -> student ids, -1 for none."""
        asked = tokens.cpu()
        for token in torch.unique(asked).tolist():
            piece = self._teacher[token]
            if not self._done[token] and piece is not None:
                self._map[token] = self._candidates[self._distances(piece).argmin()]
            self._done[token] = True
        return self._map[asked].to(tokens.device)

    def _distances(self, piece: bytes) -> Tensor:
        """Edit distances (Levenshtein) from one piece to every candidate at once: [candidates]."""
        # Nothing of more than twice its length can be nearest: a candidate as short as itself is nearer.
        longest = min(self._letters.shape[1], 2 * len(piece))
        row = torch.arange(longest + 1, dtype=torch.int16).repeat(len(self._letters), 1)
        for letter in piece:
            other = row.clone()
            other[:, 0] += 1
            for at in range(longest):
                changed = row[:, at] + (self._letters[:, at] != letter).to(torch.int16)
                other[:, at + 1] = torch.minimum(changed, torch.minimum(row[:, at + 1], other[:, at]) + 1)
            row = other
        reached = row.gather(1, self._lengths.clamp(max=longest)[:, None]).squeeze(1)
        return reached + 2 * (self._lengths - longest).clamp(min=0)


def by_bytes(spelling: Spelling) -> dict[bytes, int]:
    """The token that a tokenizer would write for some bytes: a piece rather than a byte that stands in for one."""
    known: dict[bytes, int] = {}
    for token, piece in enumerate(spelling.pieces):
        if piece and (piece not in known or spelling.is_fallback(known[piece])):
            known[piece] = token
    return known
