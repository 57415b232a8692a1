"""Tokens that stand for bytes of UTF-8, and the plainest such vocabulary, the 256 bytes.

Every text has an encoding here, so there is no unknown token; in return a token may be a part of a
character. `decode` and the stream decoder work on the joined bytes: a character appears when its
last byte does, and bytes that are not UTF-8 (a model can draw any) become U+FFFD. An end token ends
the text before it, so the bytes on its two sides never join into one character.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from charloom.params import UnknownPolicy
from charloom.tokenizer.base import (
    END_NAME,
    REPLACEMENT,
    Tokenizer,
    Tokens,
    fingerprint_of,
    unknown_character,
)
from charloom.tokenizer.record import read_record, write_record

SURROGATES = re.compile("[\ud800-\udfff]")


def well_formed(text: str, unknown: UnknownPolicy, position: int) -> str:
    """Return the text without lone surrogates, the only code points that UTF-8 cannot hold.

    `position` is where the text starts, for the error that the policy "error" raises.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if unknown == "error":
            raise unknown_character(text[error.start], position + error.start) from None
        return SURROGATES.sub(REPLACEMENT if unknown == "replace" else "", text)
    return text


def whole_text(data: bytes) -> str | None:
    """Return the text of bytes that are whole characters, None when they are not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class Utf8Tokenizer(Tokenizer):
    """A vocabulary in which token t stands for the bytes `token_bytes[t]`, none for the end."""

    unknown = None

    def __init__(self, token_bytes: Sequence[bytes], *, end: int) -> None:
        self.token_bytes = tuple(token_bytes)
        self.vocabulary_size = len(self.token_bytes)
        self.end = end
        self._texts = tuple(whole_text(data) for data in self.token_bytes)

    def decode(self, tokens: Tokens) -> str:
        """Return the text of the tokens: "" for the end token, U+FFFD for what is no UTF-8."""
        array = self.check(tokens)
        documents = np.split(array, np.flatnonzero(array == self.end))
        return "".join(
            b"".join([self.token_bytes[token] for token in document.tolist()]).decode(
                errors="replace"
            )
            for document in documents
        )

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many characters and UTF-8 bytes of text each token adds, both (V,)."""
        begun = [sum(byte & 0xC0 != 0x80 for byte in data) for data in self.token_bytes]
        sizes = [len(data) for data in self.token_bytes]
        return np.array(begun, np.int64), np.array(sizes, np.int64)

    def stream_decoder(self) -> "Utf8Stream":
        """Return a fresh decoder for one text that arrives token by token."""
        return Utf8Stream(self.token_bytes, self._texts, end=self.end)


class Utf8Stream:
    """The stream decoder of bytes: holds back the first bytes of an unfinished character.

    A token of whole characters, by far the most frequent case, costs one look-up (63 ns); a part of
    one takes the incremental decoder (400 ns).
    """

    def __init__(
        self, token_bytes: tuple[bytes, ...], texts: tuple[str | None, ...], *, end: int
    ) -> None:
        self._token_bytes = token_bytes
        self._texts = texts
        self._end = end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._holds = False

    def push(self, token: int) -> str:
        """Return the characters that this token completes."""
        if token == self._end:
            return self.flush()
        if not self._holds:
            text = self._texts[token]
            if text is not None:
                return text
        text = self._decoder.decode(self._token_bytes[token])
        held, _ = self._decoder.getstate()
        self._holds = held != b""
        return text

    def flush(self) -> str:
        """Return U+FFFD for an unfinished character, and start afresh."""
        self._holds = False
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(Utf8Tokenizer):
    """Tokens 0 to 255 are the bytes, 256 ends a document.

    The vocabulary of any text in any script, at two to four tokens for a character beyond ASCII.
    """

    kind = "bytes"
    file_name = "tokenizer.json"

    def __init__(self) -> None:
        super().__init__([*(bytes([byte]) for byte in range(256)), b""], end=256)
        self.fingerprint = fingerprint_of(self.kind, b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the tokenizer file's content; raises `ValueError` saying what is wrong with it."""
        read_record(cls.kind, set(), data)
        return cls()

    def to_bytes(self) -> bytes:
        """Return the file's content: the kind says it all."""
        return write_record(self.kind, {})

    def _encode_block(self, block: str, unknown: UnknownPolicy, position: int) -> NDArray[np.int32]:
        data = well_formed(block, unknown, position).encode()
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def describe(self, token: int) -> str:
        """Return a printable name of one token."""
        self.check([token])
        return END_NAME if token == self.end else name_byte(token)


def name_byte(byte: int) -> str:
    """Name one byte, with its ASCII character where that can be seen."""
    return f"byte 0x{byte:02X} ({chr(byte)!r})" if 0x20 < byte < 0x7F else f"byte 0x{byte:02X}"
