"""Which tokens may be drawn after which, the same for every text of a model.

Where tokens are bytes, or pieces with bytes beneath them, only those may be drawn that go on with a
character that has begun, so that a text is always whole characters. The rule is an automaton of
eight states, walked for all rows of a batch at once; other models have one state.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from charloom.tokenizer import Tokenizer, Utf8Tokenizer

WHOLE = 0
"""State of `utf8_moves` between characters."""

REACH = 4
"""No character has more bytes."""


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
    """The automaton of a tokenizer's texts.

    `documents` says whether the model was trained on documents: only then may the end token be
    drawn. `moves_SV` holds the state after each token; one that is not legal, as a prompt of tokens
    may hold, begins anew; `barrier_SV` is 0 for the tokens that may be drawn in a state and
    -inf for the others.
    """

    def __init__(self, tokenizer: Tokenizer, *, documents: bool) -> None:
        self.tokenizer = tokenizer
        self.documents = documents
        if isinstance(tokenizer, Utf8Tokenizer):
            moves_SV = np.full((len(utf8_moves()), tokenizer.vocabulary_size), -1, np.int8)
            for token, data in enumerate(tokenizer.token_bytes):
                if len(data) == 1:
                    moves_SV[:, token] = utf8_moves()[:, data[0]]
                else:  # a piece of whole characters, or the end
                    moves_SV[WHOLE, token] = WHOLE
        else:
            moves_SV = np.full((1, tokenizer.vocabulary_size), WHOLE, np.int8)
        is_allowed_SV = (moves_SV >= 0) & tokenizer.drawable(documents=documents)
        # What interrupts a character begins anew, so a state depends on the last tokens alone.
        begin_V = np.maximum(moves_SV[WHOLE], WHOLE)
        self.moves_SV = np.where(moves_SV >= 0, moves_SV, begin_V).astype(np.int8)
        self.barrier_SV = np.where(is_allowed_SV, 0.0, -np.inf).astype(np.float32)

    @property
    def has_states(self) -> bool:
        """Whether what may be drawn depends on what was."""
        return len(self.moves_SV) > 1

    def walk(self, tokens: Iterable[int], state: int = WHOLE) -> int:
        """The state after these tokens; it depends on the last `REACH` of them alone."""
        if self.has_states:
            for token in tokens:
                state = int(self.moves_SV[state, token])
        return state

    def find_unfinished(self, tokens: NDArray[np.int32]) -> list[int]:
        """The last tokens as far as they are a character that is not finished; none if it is."""
        tails = (tokens[-size:].tolist() for size in range(1, REACH))
        return next((tail for tail in tails if self.walk(tail) != WHOLE), [])
