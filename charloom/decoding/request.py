"""What is asked of the engine, and what it answers.

A `Request` is one text: one choice of one prompt under one seed. Choices of one prompt share its
`Prompt`, which is then read once. The answer comes through a `Handle`: pieces of text as they
become certain, if asked for, and exactly one `Outcome`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding.assessment import Assessment
from charloom.params import SamplingParams

Ending = Literal["stop", "length", "cancelled", "deadline", "failed"]


class Prompt:
    """The tokens of a prompt, shared by its choices; belongs to one engine, state and salt.

    What the engine keeps in it: the state before the last token, from which every choice branches,
    who is reading it, and who waits for that, in their order.
    """

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self.tokens = tokens
        self.state: State | None = None
        self.reader: object | None = None
        self.waiting: dict[Any, None] = {}
        self._after_end: NDArray[np.int32] | None = None

    def after(self, end: int) -> NDArray[np.int32]:
        """The tokens after the end of another document; one array for all choices."""
        if self._after_end is None:
            self._after_end = np.concatenate([np.array([end], np.int32), self.tokens])
        return self._after_end


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One text to write, or to score; `params.n` plays no part here."""

    prompt: Prompt
    params: SamplingParams
    seed: int
    choice: int = 0
    bias_V: NDArray[np.float32] | None = None
    """`params.logit_bias` for every token of the vocabulary."""
    is_streamed: bool = False
    """Whether pieces are told as they become certain, or all with the outcome."""
    is_scored: bool = False
    """Whether the prompt's own tokens are judged too; the whole prompt is then read."""
    state: State | None = None
    """The state that the prompt's first token is fed to; zeros where there is none."""
    is_beginning: bool = True
    """Whether a model of documents reads its end token before a prompt that has no state."""
    deadline: float | None = None
    """By the engine's clock, in seconds."""
    owner: str = ""
    """Owners take turns when requests wait."""
    salt: bytes = b""
    """Requests of other salts share no cached states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that has become certain, and the tokens drawn meanwhile, with their
    log-probabilities.
    """

    text: str
    tokens: list[int]
    logprobs: Assessment | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of a request; there is exactly one."""

    ending: Ending
    text: str
    tokens: list[int]
    stop: str | None
    """The stop string that ended the text."""
    cached_tokens: int
    """How many of the prompt's tokens were not read, since the cache knew their state."""
    prompt_scores: Assessment | None
    logprobs: Assessment | None
    error: BaseException | None


class Handle:
    """A request under way, as its owner sees it; safe to use from any thread."""

    def __init__(self, *, on_cancel: Callable[[], None]) -> None:
        self.is_cancelled = False
        self._on_cancel = on_cancel
        self.outcome: Outcome | None = None
        self._events: SimpleQueue[Piece | Outcome] = SimpleQueue()

    def tell(self, event: Piece | Outcome) -> None:
        """Pass on an event; the engine's side of the handle."""
        self._events.put(event)

    def cancel(self) -> None:
        """End the request soon; the outcome still comes."""
        if self.outcome is None:
            self.is_cancelled = True
            self._on_cancel()

    def take(self) -> list[Piece | Outcome]:
        """The events that have come since the last call, without waiting."""
        events: list[Piece | Outcome] = []
        while self.outcome is None:
            try:
                events.append(self._note(self._events.get_nowait()))
            except Empty:
                break
        return events

    def next(self) -> Piece | None:
        """The next piece, waiting for it; None after the outcome."""
        if self.outcome is None:
            event = self._note(self._events.get())
            if isinstance(event, Piece):
                return event
        return None

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, waiting for each, until the outcome; iterating again goes on."""
        return iter(self.next, None)

    def result(self) -> Outcome:
        """Wait for the outcome; raises its error where the request failed."""
        for _ in self:
            pass
        assert self.outcome is not None, "the pieces end with the outcome"
        if self.outcome.error is not None:
            raise self.outcome.error
        return self.outcome

    def _note(self, event: Piece | Outcome) -> Piece | Outcome:
        if isinstance(event, Outcome):
            self.outcome = event
            self._events.put(event)  # for another thread that waits here too
        return event
