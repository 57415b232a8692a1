"""One text in the making: what may be drawn next, what is certain to be said, and when it ends.

A `Sequence` knows nothing of networks: tokens go in, text comes out. What leaves `push` is final. A
character whose bytes are not all there is held back, and so is the end of the text while it may
still become a stop string; nothing else is, and the pieces together are the text.
"""

from collections.abc import Iterable
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.sampling import Mask, uniforms
from charloom.params import SamplingParams
from charloom.tokenizer import Tokenizer, Utf8Tokenizer

FinishReason = Literal["stop", "length"]

DRAWS_AT_ONCE = 256
"""Uniform numbers made in one go: made singly they would cost as much as the network's step."""


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed in it.

    The stop whose last character comes first wins, and of several completed by one character the
    longest, so the result does not depend on how the text is cut into pieces. Held back is the
    longest end of the text that begins some stop string.

    That end is also the state of the automaton of Aho & Corasick 1975 (Communications of the ACM
    18:333), so each character costs one look-up; moves are worked out when first made.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.matched: str | None = None
        self._held = ""
        # Every prefix of a stop -> the longest stop that it ends with.
        self._ended: dict[str, str | None] = {"": None}
        by_length = sorted(set(stops), key=len, reverse=True)
        for stop in by_length:
            for length in range(1, len(stop) + 1):
                prefix = stop[:length]
                self._ended[prefix] = next((end for end in by_length if prefix.endswith(end)), None)
        self._moves: dict[tuple[str, str], str] = {}

    def push(self, text: str) -> str:
        """Take more text and give what can no longer belong to a stop string; "" after a match."""
        if self.matched is not None:
            return ""
        if len(self._ended) == 1:
            return text
        released = []
        for character in text:
            grown = self._held + character
            self._held = self._move(self._held, character)
            released.append(grown[: len(grown) - len(self._held)])
            self.matched = self._ended[self._held]
            if self.matched is not None:
                released.append(self._held.removesuffix(self.matched))
                self._held = ""
                break
        return "".join(released)

    def flush(self) -> str:
        """Give what is still held back, since the text has ended."""
        held, self._held = self._held, ""
        return held

    def _move(self, held: str, character: str) -> str:
        """The longest end of `held` + `character` that begins some stop."""
        move = self._moves.get((held, character))
        if move is None:
            move = held + character
            while move not in self._ended:
                move = move[1:]
            self._moves[held, character] = move
        return move


WHOLE = 0
"""State of `utf8_moves` between characters."""


@cache
def utf8_moves() -> NDArray[np.int8]:
    """The automaton of well-formed UTF-8, (8 states, 256 bytes): the next state, -1 where illegal.

    From the Unicode Standard, table 3-7: no overlong form, no surrogate, nothing above U+10FFFF.
    """
    one, two, three, after_e0, after_ed, after_f0, after_f4 = range(1, 8)
    moves = np.full((8, 256), -1, np.int8)
    moves[WHOLE, 0x00:0x80] = WHOLE
    moves[WHOLE, 0xC2:0xE0] = one
    moves[WHOLE, 0xE0:0xF0] = two
    moves[WHOLE, 0xE0] = after_e0
    moves[WHOLE, 0xED] = after_ed
    moves[WHOLE, 0xF0:0xF4] = three
    moves[WHOLE, 0xF0] = after_f0
    moves[WHOLE, 0xF4] = after_f4
    moves[one, 0x80:0xC0] = WHOLE
    moves[two, 0x80:0xC0] = one
    moves[three, 0x80:0xC0] = two
    moves[after_e0, 0xA0:0xC0] = one
    moves[after_ed, 0x80:0xA0] = one
    moves[after_f0, 0x90:0xC0] = two
    moves[after_f4, 0x80:0x90] = two
    moves.flags.writeable = False
    return moves


class Alphabet:
    """What may be drawn after what, the same for every text of a model.

    `documents` says whether the model was trained on documents: only then may the end token be
    drawn. Where tokens are bytes, or pieces with bytes beneath them, only those may be drawn that
    go on with a character that has begun; the state is that of `utf8_moves`. Other models have the
    one state WHOLE.
    """

    def __init__(self, tokenizer: Tokenizer, *, documents: bool) -> None:
        self.tokenizer = tokenizer
        if isinstance(tokenizer, Utf8Tokenizer):
            moves_SV = np.full((len(utf8_moves()), tokenizer.vocabulary_size), -1, np.int8)
            for token, data in enumerate(tokenizer.token_bytes):
                if len(data) == 1:
                    moves_SV[:, token] = utf8_moves()[:, data[0]]
                else:  # a piece of whole characters, or the end
                    moves_SV[WHOLE, token] = WHOLE
        else:
            moves_SV = np.full((1, tokenizer.vocabulary_size), WHOLE, np.int8)
        self.moves_SV = moves_SV
        self.allowed_SV: Mask = (moves_SV >= 0) & tokenizer.drawable(documents=documents)


class Sequence:
    """The progress of one text: choice `choice` of a prompt under one seed."""

    def __init__(
        self,
        prompt: NDArray[np.int32],
        params: SamplingParams,
        alphabet: Alphabet,
        *,
        seed: int,
        choice: int,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.choice = choice
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = "length" if params.max_tokens == 0 else None
        self.seen = np.zeros(alphabet.tokenizer.vocabulary_size, np.bool_)
        self.seen[prompt] = True
        self._alphabet = alphabet
        self._character = WHOLE
        self._decoder = alphabet.tokenizer.stream_decoder()
        self._stops = StopMatcher(params.stop)
        self._draws = np.empty(0, np.float64)
        self._draws_from = 0

    @property
    def position(self) -> int:
        """Where the next token will stand in the text, prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def allowed(self) -> Mask:
        """The tokens that may be drawn next, (V,)."""
        allowed: Mask = self._alphabet.allowed_SV[self._character]
        return allowed

    def uniform(self) -> float:
        """The random number in [0, 1) that belongs to the next position."""
        index = self.position - self._draws_from
        if index >= len(self._draws):
            self._draws_from = self.position
            positions = np.arange(self.position, self.position + DRAWS_AT_ONCE)
            self._draws = uniforms(self.seed, self.choice, positions)
            index = 0
        return float(self._draws[index])

    def push(self, token: int) -> str:
        """Append the token just drawn and give the text that is now certain, perhaps none."""
        self.tokens.append(token)
        self.seen[token] = True
        if token == self._alphabet.tokenizer.end:
            self.finish_reason = "stop"
            return self._finish("")
        self._character = int(self._alphabet.moves_SV[self._character, token])
        piece = self._stops.push(self._decoder.push(token))
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish_reason = "length"
            return self._finish(piece)
        return piece

    def _finish(self, piece: str) -> str:
        """Add what was held back, except the bytes of a character that will not be completed."""
        if self._character == WHOLE:
            piece += self._stops.push(self._decoder.flush())
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        return piece + self._stops.flush()
