"""A request on its way through the engine: what has come of it so far, and how that is told.

A task knows nothing of rows, queues and locks; it takes the tokens that a row has read and drawn
and makes pieces and the one outcome of them.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.assessment import Assessment, assess
from charloom.decoding.batch import Row
from charloom.decoding.cache import Key, Trail
from charloom.decoding.request import Ending, Handle, Outcome, Piece, Prompt, Request
from charloom.decoding.sampling import NONE
from charloom.decoding.sequence import Sequence
from charloom.errors import CharloomError, DecodingError, ModelError

Judged = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits and what the rules made of them, each (K, V)."""


@dataclass(eq=False, kw_only=True, slots=True)
class Task:
    """One request, its text in the making, and its row while it has one."""

    request: Request
    handle: Handle
    sequence: Sequence
    lead: int
    """How many of the script's tokens stand before the text."""
    script: NDArray[np.int32]
    """What is to be read: document's end, where one stands before the text, and prompt."""
    row: Row | None = None
    trail: Trail | None = None
    cached_tokens: int = 0
    _text: list[str] = field(default_factory=list)
    _prompt_scores: list[Assessment] = field(default_factory=list)
    _logprobs: list[Assessment] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        """The prompt, which other tasks may share."""
        return self.request.prompt

    @property
    def branch(self) -> int:
        """Where the choices of the prompt part: before its last token, which each reads itself."""
        return len(self.script) - 1

    @property
    def length(self) -> int:
        """Tokens of script and text; what a row was fed beyond them is not theirs."""
        return len(self.script) + len(self.sequence.tokens)

    def is_over(self, now: float) -> bool:
        """Whether it has been cancelled or its time is up."""
        deadline = self.request.deadline
        return self.handle.is_cancelled or (deadline is not None and now >= deadline)

    def judge(self, tokens: list[int], logits_KV: NDArray[np.float32]) -> None:
        """Score tokens of the prompt by the logits they follow from; raises `ModelError`."""
        if not np.isfinite(logits_KV.max(axis=1)).all():
            raise ModelError(
                "The model's logits are not numbers; its weights are damaged, so train it again."
            )
        top = self.request.params.logprobs or 0
        self._prompt_scores.append(assess(logits_KV, np.array(tokens), top=top))

    def write(self, drawn: list[int], judged: Judged | None) -> int:
        """Add drawn tokens to the text, as far as it goes, and tell the piece; how many were added.

        Raises `ModelError`, after that, where the network left no token to draw.
        """
        sequence = self.sequence
        if sequence.finish_reason is not None:
            return 0
        is_stuck = NONE in drawn
        if is_stuck:
            drawn = drawn[: drawn.index(NONE)]
        before = len(sequence.tokens)
        text = sequence.extend(drawn)
        self._text.append(text)
        added = len(sequence.tokens) - before
        logprobs = None
        if judged is not None and self.request.params.logprobs is not None:
            logprobs = assess(
                judged[0][:added],
                np.array(sequence.tokens[before:], np.int64),
                top=self.request.params.logprobs,
                weights_NV=judged[1][:added],
            )
            self._logprobs.append(logprobs)
        if self.request.is_streamed:
            piece = Piece(text=text, tokens=sequence.tokens[before:], logprobs=logprobs)
            self.handle.tell(piece)
        if is_stuck and sequence.finish_reason is None:
            raise nothing_to_draw()
        return added

    def key(self, length: int) -> Key:
        """What the first `length` tokens of script and text are called in the cache."""
        assert self.trail is not None, "only a task with a trail leaves states behind"
        # Only what is new, as a text may be long.
        read = self.trail.length
        self.trail.extend(self.script[read:length])
        drawn = slice(max(read - len(self.script), 0), max(length - len(self.script), 0))
        self.trail.extend(np.array(self.sequence.tokens[drawn], np.int32))
        return self.trail.key()

    def end(self, ending: Ending, error: BaseException | None) -> None:
        """Tell the outcome."""
        if self.sequence.finish_reason is None:
            self._text.append(self.sequence.end())
            if self.request.is_streamed and self._text[-1]:
                self.handle.tell(Piece(text=self._text[-1], tokens=[], logprobs=None))
        if error is not None and not isinstance(error, CharloomError):
            cause = error
            error = DecodingError(
                f"The network's step failed: {cause}; the text is lost, ask for it again."
            )
            error.__cause__ = cause
        self.handle.tell(
            Outcome(
                ending=ending,
                text="".join(self._text),
                tokens=self.sequence.tokens,
                stop=self.sequence.stop,
                cached_tokens=self.cached_tokens,
                prompt_scores=Assessment.join(self._prompt_scores) if self._prompt_scores else None,
                logprobs=Assessment.join(self._logprobs) if self._logprobs else None,
                error=error,
            )
        )


def nothing_to_draw() -> ModelError:
    """The error about a row in which no token is left."""
    return ModelError(
        "The model has no token to draw: among those that may be drawn none has a finite logit. "
        "Either its weights are damaged, so train it again, or logit_bias forbids too much."
    )
