"""One token per code point: the default, and what "character-level" means.

Tokens: 0 ends a document, 1 stands for any character outside the vocabulary, then come the
characters of the training text by code point. Both directions are a look-up in a NumPy array over
UTF-32 code points, never a loop over characters: measured on one core of an AMD EPYC (Zen 5), 850
million characters a second of English and 530 of Chinese, back 190 and 280. The table from code
point to token is as long as the highest code point of the vocabulary, so it takes a few hundred
bytes for English and at most 4.5 MB, where there is a character of a high plane.

A code point is not always what a reader calls a character: a family emoji is seven of them. The
model learns to spell those like any other sequence; in return no text is out of reach for want of
a rare combination, and the vocabulary stays small.
"""

from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from charloom.errors import OptionError
from charloom.params import UnknownPolicy
from charloom.tokenizer.base import (
    END_NAME,
    REPLACEMENT,
    Tokenizer,
    Tokens,
    fingerprint_of,
    is_surrogate,
    name_character,
    unknown_character,
)
from charloom.tokenizer.record import read_record, write_record

END = 0
UNKNOWN = 1
SPECIALS = 2  # the first character's token
CODE_POINTS = 0x110000  # of Unicode, whatever they are assigned to

# Little-endian on any machine, so that files, fingerprints and tables agree everywhere.
CODE_POINT = np.dtype("<u4")


class CharacterTokenizer(Tokenizer):
    """A vocabulary of code points, in the order given.

    Raises `ValueError` when there is none, or one is given twice, is not exactly one code point or
    is a lone surrogate.
    """

    kind = "characters"
    file_name = "tokenizer.json"
    end = END
    unknown: int = UNKNOWN

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = tuple(characters)
        if not self.characters:
            raise ValueError("it has no characters")
        seen: set[str] = set()
        for character in self.characters:
            if type(character) is not str or len(character) != 1:
                raise ValueError(f"its entry {character!r} is not one character")
            if is_surrogate(character):
                raise ValueError(f"its entry {name_character(character)} is not text")
            if character in seen:
                raise ValueError(f"it has {name_character(character)} twice")
            seen.add(character)
        code_points = np.array([ord(character) for character in self.characters], CODE_POINT)
        self.vocabulary_size = SPECIALS + len(self.characters)
        self.fingerprint = fingerprint_of(self.kind, code_points.tobytes())
        self._texts = ("", REPLACEMENT, *self.characters)
        # The end token's entry is never read: `decode` leaves the token out.
        self._code_points: NDArray[np.uint32] = np.concatenate(
            [np.array([0, ord(REPLACEMENT)], CODE_POINT), code_points]
        )
        # One entry beyond the highest code point, still unknown: all higher ones are clipped to it.
        self._tokens: NDArray[np.int32] = np.full(int(code_points.max()) + 2, UNKNOWN, np.int32)
        self._tokens[code_points] = np.arange(SPECIALS, self.vocabulary_size)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, min_count: int = 1) -> Self:
        """Take every character that occurs at least `min_count` times, by code point.

        Raises `OptionError` when that leaves none.
        """
        characters = sorted(character for character, count in counts.items() if count >= min_count)
        if counts and not characters:
            most = max(counts.values())
            raise OptionError(
                [
                    f"min_count is {min_count}, but the most frequent character of the text "
                    f"occurs {most} times; give at most {most}."
                ]
            )
        return cls(characters)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the tokenizer file's content; raises `ValueError` saying what is wrong with it."""
        characters = read_record(cls.kind, {"characters"}, data)["characters"]
        if not isinstance(characters, list):
            raise ValueError("its characters are not a list")
        return cls(characters)

    def to_bytes(self) -> bytes:
        """Return the file's content: the characters in order, each a JSON string of its own."""
        return write_record(self.kind, {"characters": self.characters})

    def _encode_block(self, block: str, unknown: UnknownPolicy, position: int) -> NDArray[np.int32]:
        # A lone surrogate passes here as a number, which no vocabulary holds.
        data = block.encode("utf-32-le", "surrogatepass")
        tokens: NDArray[np.int32] = np.take(
            self._tokens, np.frombuffer(data, CODE_POINT), mode="clip"
        )
        if unknown == "replace":
            return tokens
        is_unknown: NDArray[np.bool_] = tokens == UNKNOWN
        if not is_unknown.any():
            return tokens
        if unknown == "skip":
            known: NDArray[np.int32] = tokens[~is_unknown]
            return known
        first = int(is_unknown.argmax())
        raise unknown_character(block[first], position + first)

    def decode(self, tokens: Tokens) -> str:
        """Return the text of the tokens: "" for the end token, U+FFFD for the unknown token."""
        array = self.check(tokens)
        code_points: NDArray[np.uint32] = self._code_points[array[array != END]]
        return code_points.tobytes().decode("utf-32-le")

    def stream_decoder(self) -> "CharacterStream":
        """Return a fresh decoder for one text that arrives token by token."""
        return CharacterStream(self._texts)

    @property
    def strangers(self) -> int:
        """How many code points the unknown token stands for."""
        return CODE_POINTS - len(self.characters)

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many characters and UTF-8 bytes of text each token adds, both (V,)."""
        characters = np.array([len(text) for text in self._texts], np.int64)
        return characters, np.array([len(text.encode()) for text in self._texts], np.int64)

    def describe(self, token: int) -> str:
        """Return a printable name of one token."""
        self.check([token])
        if token == END:
            return END_NAME
        if token == UNKNOWN:
            return "unknown character"
        return name_character(self.characters[token - SPECIALS])


class CharacterStream:
    """The stream decoder of characters: each token is a whole one, so nothing is held back."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts = texts

    def push(self, token: int) -> str:
        """Return the token's character."""
        return self._texts[token]

    def flush(self) -> str:
        """Return nothing, as nothing is ever held back."""
        return ""
