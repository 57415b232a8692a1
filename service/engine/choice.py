"""One text of a job: what of it has come from the engine and was not sent yet.

Text waits here, and nowhere else, for its stream's interval to pass or for room in the worker's
buffer, so that what could not be sent is one delta when it can be.
"""

import math
from collections.abc import Iterable
from typing import Literal

from charloom.decoding.assessment import Assessment
from charloom.tokenizer import Tokenizer
from service.engine.judgement import Judgement, Judgements, Spelling
from service.messages import Delta

TEXT_AT_ONCE = 1 << 20
"""Characters that a delta carries at most."""

JUDGED_AT_ONCE = 1 << 14
"""About how many log-probabilities a delta carries at most (some 300 KiB)."""


class Choice:
    """A text on its way; `index` is its number in the answer.

    `top` is how many alternatives its tokens are told with, None where nobody asked for any.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, spelling: Spelling, *, top: int | None
    ) -> None:
        self.index = index
        self.is_ended = False
        """Whether nothing more comes from the engine."""
        self.due = -math.inf
        """When the next delta may be sent, unless it is the last."""
        self._finish: Literal["stop", "length"] | None = None
        self._stop_reason: str | None = None
        self._text: list[str] = []
        self._tokens = 0
        self._judgements: Judgements | None = None
        if top is not None:
            width = 1 + min(top, tokenizer.vocabulary_size)
            self._judgements = Judgements(spelling, width=width)
            self._decoder = tokenizer.stream_decoder()

    @property
    def has_text(self) -> bool:
        """Whether some text waits to be sent."""
        return bool(self._text)

    def begin(self, text: str, judged: Iterable[Judgement]) -> None:
        """Let the text begin with its prompt, which was not drawn."""
        if text:
            self._text.append(text)
        if self._judgements is not None:
            self._judgements.add(judged)

    def add(self, text: str, tokens: int, logprobs: Assessment | None) -> None:
        """Go on with what was drawn."""
        if text:
            self._text.append(text)
        self._tokens += tokens
        if self._judgements is not None and logprobs is not None:
            ids = logprobs.tokens_N.tolist()
            pieces = list(map(self._decoder.push, ids))
            self._judgements.add([Judgement(ids=ids, pieces=pieces, assessment=logprobs)])

    def end(self, finish: Literal["stop", "length"], stop_reason: str | None) -> None:
        """Say why the text ended."""
        self.is_ended = True
        self._finish, self._stop_reason = finish, stop_reason

    def tell(self, job: int) -> tuple[Delta, bool]:
        """What waits, and whether that was all: what is very long comes in several deltas."""
        text = self._text[0] if len(self._text) == 1 else "".join(self._text)
        self._text.clear()
        if len(text) > TEXT_AT_ONCE:
            self._text.append(text[TEXT_AT_ONCE:])
            text = text[:TEXT_AT_ONCE]
        judged, is_all = None, not self._text
        if self._judgements is not None:
            judged = self._judgements.take(max(JUDGED_AT_ONCE // self._judgements.width, 1))
            is_all = is_all and not self._judgements
        is_last = is_all and self.is_ended
        delta = Delta(
            id=job,
            index=self.index,
            text=text,
            tokens=self._tokens,
            judged=judged,
            finish=self._finish if is_last else None,
            stop_reason=self._stop_reason if is_last else None,
        )
        self._tokens = 0
        return delta, is_all
