"""A language model that writes for many at once: texts join when there is room and leave one by one when they end.

It runs in a thread of its own, so whoever waits stays responsive. Random numbers come from each text's own seed: what
is written does not depend on who is written beside it. The sampler is that of on-policy data (data/voices).

Dimension key: B texts of one group, V vocabulary.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from potstill.core.asking import head_product
from potstill.core.errors import ServiceError
from potstill.core.types import Batch, Need, Projection
from potstill.data.generation import left_padded
from potstill.data.voices import Continued, Sampling, drawn
from potstill.students.hf import HfModel


@dataclass(slots=True, kw_only=True, eq=False)
class Text:
    """One text to be written, and what has been written of it."""

    prompt: Tensor
    """int64 [P]."""
    sampling: Sampling
    seed: int
    most_tokens: int
    alternatives: int | None
    """Log-probabilities of so many tokens beside the written one; None: of none at all."""
    prompt_alternatives: int | None
    is_over: Callable[[Sequence[int]], bool]
    """Whether a stop text has been written, asked after each token."""
    done: Callable[[Text], None]
    """Called once, in the engine's thread, when it is written."""
    failed: Callable[[Exception], None]
    is_wanted: bool = True
    """Set to False from anywhere: nobody waits for it any more."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[Told] = field(default_factory=list)
    """Of the tokens, and of the one that ends the text, where one does."""
    prompt_log_probs: list[Told] = field(default_factory=list)
    finish: str = ""
    """"stop" or "length" once it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Of one token: its own log-probability at temperature 1, and the likeliest ones with theirs."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


class Engine:
    """At most `together` texts are under way. The thread starts with the first text and ends with `close`."""

    def __init__(self, model: HfModel, *, together: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._together = together
        self._new: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, text: Text) -> None:
        self._new.put(text)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="potstill-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop when the current token is written; texts under way are dropped. The next text starts it again."""
        if self._thread is not None:
            self._new.put(None)
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _work(self) -> None:
        waiting: list[Text] = []
        groups: list[_Group] = []
        while self._take(waiting, block=not groups and not waiting):
            waiting = [text for text in waiting if text.is_wanted]
            room = self._together - sum(len(group.texts) for group in groups)
            # A group for each text that leaves would be many small ones; half of the room at a time is few.
            if waiting and (not groups or room >= min(len(waiting), self._together // 2, self._together)):
                self._start(groups, _alike(waiting, room))
            for group in groups:
                self._guarded(group.texts, group.go_on)
            for group in [group for group in groups if not group.texts]:
                group.end()
                groups.remove(group)
        for group in groups:
            group.end()

    def _take(self, waiting: list[Text], *, block: bool) -> bool:
        """Move what is new to `waiting`; False when the end has come."""
        while block or not self._new.empty():
            text = self._new.get()
            if text is None:
                return False
            waiting.append(text)
            block = False
        return True

    def _start(self, groups: list[_Group], texts: list[Text]) -> None:
        def start() -> None:
            for text in texts:
                if text.prompt_alternatives is not None:
                    text.prompt_log_probs = _read(self._model, text.prompt, text.prompt_alternatives)
            groups.append(_Group(self._model, texts))

        self._guarded(texts, start)

    def _guarded(self, texts: list[Text], work: Callable[[], None]) -> None:
        """What goes wrong is told to those who wait for these texts."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised again where the text is waited for
            for text in list(texts):
                text.failed(_in_words(error, len(texts)))
            texts.clear()


class _Group:
    """Texts that began together, side by side in one cache."""

    def __init__(self, model: HfModel, texts: list[Text]) -> None:
        self.texts = texts
        self._sampling = texts[0].sampling
        most = max(text.most_tokens for text in texts)
        self._draws = torch.stack([_draws(text, most) for text in texts]).to(model.device)
        self._ends = set(model.ends)
        self._stack = ExitStack()
        started = model.speaking(*left_padded([text.prompt for text in texts], model.device))
        self._continued = Continued(*self._stack.enter_context(started))
        self._turn = 0

    def go_on(self) -> None:
        """One token for each text."""
        logits = self._continued.after(self._continued.untold[:, :0])[:, -1]
        ids = drawn(self._sampling.law(logits), self._draws[:, self._turn])
        self._continued.end_with(ids)
        self._turn += 1
        told = _told(logits, ids, self.texts)
        going = []
        for row, (text, token) in enumerate(zip(self.texts, ids.tolist(), strict=True)):
            if self._goes_on(text, token, told[row] if told else None):
                going.append(row)
        if len(going) < len(self.texts):
            self.texts[:] = [self.texts[row] for row in going]
            if going:
                rows = torch.tensor(going, device=ids.device)
                self._continued.keep(rows)
                self._draws = self._draws[rows]

    def end(self) -> None:
        """Give the cache back."""
        self._stack.close()

    def _goes_on(self, text: Text, token: int, told: Told | None) -> bool:
        if not text.is_wanted:
            return False
        if told is not None and text.alternatives is not None:
            text.log_probs.append(told)
        if token in self._ends:
            text.finish = "stop"
        else:
            text.tokens.append(token)
            if text.is_over(text.tokens):
                text.finish = "stop"
            elif len(text.tokens) >= text.most_tokens:
                text.finish = "length"
        if text.finish:
            text.done(text)
        return not text.finish


def _alike(waiting: list[Text], room: int) -> list[Text]:
    """Take from those that wait: the oldest, and others drawn alike whose prompts are about as long."""
    first = waiting[0]
    alike = [text for text in waiting if text.sampling == first.sampling]
    taken = sorted(alike, key=lambda text: abs(len(text.prompt) - len(first.prompt)))[: max(room, 1)]
    chosen = {id(text) for text in taken}
    waiting[:] = [text for text in waiting if id(text) not in chosen]
    return taken


def _draws(text: Text, most: int) -> Tensor:
    """Random numbers of a text, from its own seed: [most]."""
    own = torch.rand(text.most_tokens, generator=torch.Generator().manual_seed(text.seed))
    return torch.nn.functional.pad(own, (0, most - text.most_tokens))


def _told(logits: Tensor, ids: Tensor, texts: Sequence[Text]) -> list[Told]:
    """[B, V], [B] -> one for each text; none where nobody asks."""
    asked = [text.alternatives for text in texts if text.alternatives is not None]
    if not asked:
        return []
    return _entries(logits.float().log_softmax(-1), ids, max(asked), [text.alternatives or 0 for text in texts])


def _entries(log_probs: Tensor, ids: Tensor, most: int, alternatives: Sequence[int]) -> list[Told]:
    own = log_probs.gather(-1, ids[:, None]).squeeze(-1).tolist()
    best = log_probs.topk(min(most, log_probs.shape[-1]), dim=-1)
    rows = zip(ids.tolist(), own, best.indices.tolist(), best.values.tolist(), alternatives, strict=True)
    return [
        Told(token=token, log_prob=value, top=tuple(zip(tokens[:k], values[:k], strict=True)))
        for token, value, tokens, values, k in rows
    ]


def _read(model: HfModel, prompt: Tensor, alternatives: int) -> list[Told]:
    """What the model thought of each token of a prompt, its first left out: nothing stands before it."""
    ids = prompt[None].to(model.device)
    said = model(Batch.of(torch.zeros_like(ids), input_ids=ids), Need(logits=True)).logits
    assert isinstance(said, Projection)
    logits = said.finish(head_product(said.hidden[0, :-1], said.weight, said.bias))
    return _entries(logits.float().log_softmax(-1), ids[0, 1:], alternatives, [alternatives] * (len(prompt) - 1))


def _in_words(error: Exception, num_texts: int) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return ServiceError(
            f"The device has no memory left for {num_texts} texts at once. Set together to a smaller number."
        )
    return error
