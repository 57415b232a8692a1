"""What every tokenizer promises, and the parts that all of them share.

A subclass supplies three things: how a stream is cut into blocks (`_blocks`), the tokens of one
block (`_encode_block`), and the way back. `encode` is `encode_stream` of a single chunk, so the two
cannot drift apart; the price is one copy of the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from charloom.errors import OptionError, UnknownTextError
from charloom.params import UNKNOWN_POLICIES, UnknownPolicy

Tokens = Sequence[int] | NDArray[np.integer[Any]]

REPLACEMENT = "\ufffd"
END_NAME = "end of document"

# 64 Ki characters: the code points and tokens of a block stay in the second-level cache, which
# makes encoding two to three times as fast as in one piece, and a long text needs no more memory.
BLOCK = 1 << 16


class StreamDecoder(Protocol):
    """Turns tokens into text one at a time; its answers, joined, equal `decode` of them all."""

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain, often one character."""
        ...

    def flush(self) -> str:
        """Return what was held back, U+FFFD for an unfinished character, and start afresh."""
        ...


class Tokenizer(ABC):
    """A fixed vocabulary: immutable, equal to another one when the fingerprints are equal.

    `vocabulary_size` counts the special tokens too. `end` is the end-of-document token. `unknown`
    is the token that stands for any character outside the vocabulary, None where there is no such
    character. `fingerprint` is a SHA-256 in hexadecimal over the kind and the vocabulary in order.
    """

    kind: ClassVar[str]
    file_name: ClassVar[str]

    vocabulary_size: int
    end: int
    unknown: int | None
    fingerprint: str

    @classmethod
    @abstractmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the tokenizer file's content; raises `ValueError` saying what is wrong with it."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Return the tokenizer file's content: equal tokenizers give equal bytes."""

    def encode(self, text: str, *, unknown: UnknownPolicy = "error") -> NDArray[np.int32]:
        """Return the text's tokens, shape (n,).

        A character without a token raises `UnknownTextError`, gives a stand-in (the unknown token,
        or U+FFFD where there is none), or is left out, as `unknown` says.
        """
        blocks = self.encode_stream((text,), unknown=unknown)
        return np.concatenate([np.empty(0, np.int32), *blocks])

    def encode_stream(
        self, chunks: Iterable[str], *, unknown: UnknownPolicy = "error"
    ) -> Iterator[NDArray[np.int32]]:
        """Yield the tokens of the joined chunks block by block, in memory of a chunk and a block.

        Joined, the blocks equal `encode` of the joined chunks, wherever the chunks were cut.
        """
        if unknown not in UNKNOWN_POLICIES:
            choices = ", ".join(UNKNOWN_POLICIES)
            raise OptionError([f"unknown is {unknown!r}; choose one of {choices}."])
        return self._encode_blocks(chunks, unknown)

    def _encode_blocks(
        self, chunks: Iterable[str], unknown: UnknownPolicy
    ) -> Iterator[NDArray[np.int32]]:
        position = 0
        for block in self._blocks(chunks):
            yield self._encode_block(block, unknown, position)
            position += len(block)

    def _blocks(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut the stream where encoding may be cut: anywhere, unless tokens span characters."""
        for chunk in chunks:
            for start in range(0, len(chunk), BLOCK):
                yield chunk[start : start + BLOCK]

    @abstractmethod
    def _encode_block(self, block: str, unknown: UnknownPolicy, position: int) -> NDArray[np.int32]:
        """Return the tokens of one block that starts at character `position` of the text."""

    @abstractmethod
    def decode(self, tokens: Tokens) -> str:
        """Return the text of the tokens: "" for the end token, U+FFFD for the unknown token.

        Raises `OptionError` when a number is not a token of this vocabulary.
        """

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """Return a fresh decoder for one text that arrives token by token."""

    def drawable(self, *, documents: bool) -> NDArray[np.bool_]:
        """Return the tokens that sampling may ever draw, shape (V,); the caller owns the array.

        Never the unknown token; the end token only from models that were trained on documents.
        """
        drawable = np.ones(self.vocabulary_size, np.bool_)
        drawable[self.end] = documents
        if self.unknown is not None:
            drawable[self.unknown] = False
        return drawable

    @property
    def strangers(self) -> int:
        """How many code points the unknown token stands for; 0 where there is no such token."""
        return 0

    @abstractmethod
    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many characters and UTF-8 bytes of text each token adds, both (V,).

        A character made of several tokens counts at the one that begins it; the end token adds
        nothing, the unknown token one character of three bytes, as it is decoded.
        """

    @abstractmethod
    def describe(self, token: int) -> str:
        """Return a printable name of one token, for messages and tools."""

    def check(self, tokens: Tokens) -> NDArray[np.int64]:
        """Return the tokens as an array, shape (n,); a negative one must not count from the end.

        Raises `OptionError` when a number is not a token of this vocabulary.
        """
        array = np.asarray(tokens)
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise OptionError(["tokens is not a list of whole numbers; give one."])
        outside = np.flatnonzero((array < 0) | (array >= self.vocabulary_size))
        if outside.size:
            first = int(outside[0])
            raise OptionError(
                [
                    f"tokens holds {array[first]} at index {first}; the tokens of this model are "
                    f"0 to {self.vocabulary_size - 1}."
                ]
            )
        return array.astype(np.int64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.vocabulary_size} tokens, {self.fingerprint[:12]}>"


def fingerprint_of(kind: str, vocabulary: bytes) -> str:
    """Hash a kind and its vocabulary; NUL ends the kind, so no two pairs share their bytes."""
    return sha256(kind.encode() + b"\0" + vocabulary).hexdigest()


ON_THE_COMMAND_LINE = " (--unknown on the command line)"
"""Part of the sentence about an unknown character, which a service leaves out."""


def is_surrogate(character: str) -> bool:
    """Tell whether a code point is half of a UTF-16 pair, which alone is no text at all."""
    return "\ud800" <= character <= "\udfff"


def name_character(character: str) -> str:
    """Name one character so that it can be told from those that look like it."""
    return f"{character!r} (U+{ord(character):04X})"


def unknown_character(character: str, position: int) -> UnknownTextError:
    """Build the error about one character, `position` counted from 0 over the whole text."""
    reason = "is not text" if is_surrogate(character) else "is not in the model's vocabulary"
    return UnknownTextError(
        f"The character {name_character(character)} at position {position} (counted from 0) "
        f'{reason}; take it out, or set unknown{ON_THE_COMMAND_LINE} to "replace" for a stand-in '
        'or to "skip" to leave such characters out.'
    )
