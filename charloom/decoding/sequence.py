"""One text in the making: what has been drawn, what of it is certain, and when it ends.

A `Sequence` knows nothing of networks: tokens go in, text comes out. What leaves `extend` is final.
A character whose bytes are not all there is held back, and so is the end of the text while it may
still become a stop string; nothing else is, and the pieces together are the text.

A character that was begun in the prompt and completed in the text is shown whole: then a text and
its continuation from any of its tokens are together the text written in one go.
"""

from collections.abc import Sequence as Tokens
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.alphabet import Alphabet
from charloom.decoding.stops import StopMatcher
from charloom.params import SamplingParams

FinishReason = Literal["stop", "length"]


class Sequence:
    """The progress of one text."""

    def __init__(
        self, params: SamplingParams, alphabet: Alphabet, *, script: NDArray[np.int32] | None = None
    ) -> None:
        """`script` is what stands before the text, of which only the last tokens matter."""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = "length" if params.max_tokens == 0 else None
        self._max_tokens = params.max_tokens
        self._min_tokens = params.min_tokens
        can_end = alphabet.documents and not params.ignore_eos
        self._end = alphabet.tokenizer.end if can_end else None
        self._decoder = alphabet.tokenizer.stream_decoder()
        for token in () if script is None else alphabet.find_unfinished(script):
            self._decoder.push(token)
        self._stops = StopMatcher(params.stop, is_shown=params.include_stop_str_in_output)
        # Nothing but the limit ends such a text, and every token is whole characters.
        self._is_plain = self._stops.is_idle and self._end is None and not alphabet.has_states

    @property
    def remaining(self) -> int:
        """How many more tokens the text may have."""
        return self._max_tokens - len(self.tokens)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text; None where something else did."""
        return self._stops.matched

    def extend(self, drawn: Tokens[int]) -> str:
        """Append the tokens just drawn, as far as the text goes, and give the text now certain."""
        if self._is_plain and len(drawn) < self.remaining:
            self.tokens += drawn
            return "".join(map(self._decoder.push, drawn))
        drawn = drawn[: self.remaining]
        if self._end is not None and self._end in drawn:
            drawn = drawn[: drawn.index(self._end) + 1]
            self.finish_reason = "stop"
        if self._stops.is_idle:
            piece = "".join(map(self._decoder.push, drawn))
            self.tokens += drawn
        else:
            piece = ""
            for token in drawn:
                self.tokens.append(token)
                piece += self._push(self._decoder.push(token))
                if self.stop is not None:
                    self.finish_reason = "stop"
                    return piece
        if self.finish_reason is None and self.remaining == 0:
            self.finish_reason = "length"
        return piece if self.finish_reason is None else piece + self.end()

    def _push(self, text: str) -> str:
        """Look for stop strings in what the last token has added."""
        return self._stops.push(text, may_end=len(self.tokens) >= self._min_tokens)

    def end(self) -> str:
        """What was held back, but for the bytes of a character that will not be completed."""
        return self._stops.flush()
