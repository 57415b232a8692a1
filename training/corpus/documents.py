"""Files as one stream of text that knows where documents end.

The one idea: a `Piece` is a stretch of text and the positions in it where documents end, as an
array. Documents run on from piece to piece, so a document may be of any length and a piece may hold
a hundred thousand of them, and what is done with pieces (hashing, encoding, holding out) is done by
NumPy on all of them at once. Only the blake2b of a document costs Python a call.

    none      no document ever ends; files follow one another as they are, like `cat`
    files     each file is a document
    lines     each line without its newline (LF or CRLF; a CR elsewhere is a character)
    records   the field of each record of JSONL and CSV

Empty documents (empty lines, empty fields, empty files) are left out. With a field named and
documents other than records, a file's text is its fields, each followed by a newline.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from training.corpus.options import Documents
from training.corpus.records import read_records
from training.corpus.text import TextFile, read_text

PIECE_CHARACTERS = 1 << 20
_NO_ENDS = np.zeros(0, np.int64)
_END_HERE = np.zeros(1, np.int64)


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A stretch of text; `ends` are the character positions in it where documents end, rising.

    A position of 0 ends a document that began in an earlier piece. No document is empty.
    """

    text: str
    ends: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """The text of a list of files, to be read as often as needed."""

    files: Sequence[TextFile]
    documents: Documents
    field: str | None
    advance: Callable[[int], None]
    """Told the number of stored bytes gone by, as they go by."""

    def pieces(self) -> Iterator[Piece]:
        """Read it all once more."""
        for file in self.files:
            match self.documents:
                case "none":
                    yield from (Piece(chunk, _NO_ENDS) for chunk in self._chunks(file))
                case "files":
                    yield from _one_document(self._chunks(file))
                case "lines":
                    yield from line_documents(self._chunks(file))
                case "records":
                    yield from self._record_documents(file)

    def _chunks(self, file: TextFile) -> Iterator[str]:
        if self.field is None:
            return read_text(file, advance=self.advance)
        records = read_records(file, self.field, advance=self.advance)
        return _gather(f"{text}\n" for text, _ in records)

    def _record_documents(self, file: TextFile) -> Iterator[Piece]:
        assert self.field is not None, "records have a field"
        held: list[str] = []
        size = 0
        for text, _ in read_records(file, self.field, advance=self.advance):
            if text:
                held.append(text)
                size += len(text)
            if size >= PIECE_CHARACTERS:
                yield _whole_documents(held)
                held, size = [], 0
        if held:
            yield _whole_documents(held)


def line_documents(chunks: Iterator[str]) -> Iterator[Piece]:
    """Each line of one file as a document, however its text is cut into chunks."""
    unfinished = 0
    for chunk in _whole_newlines(chunks):
        lines = chunk.replace("\r\n", "\n")
        text = lines.replace("\n", "")
        newlines = np.flatnonzero(code_points(lines) == ord("\n"))
        # The k-th newline has k newlines before it, and the text has none of them.
        ends = newlines - np.arange(len(newlines))
        begins = np.concatenate(([-unfinished], ends[:-1])) if len(ends) else ends
        unfinished = len(text) - int(ends[-1]) if len(ends) else unfinished + len(text)
        yield Piece(text, ends[ends > begins])
    if unfinished:
        yield Piece("", _END_HERE)


def separated(pieces: Iterator[Piece]) -> Iterator[str]:
    """The text with a newline after each document, for what takes only text."""
    for piece in pieces:
        start = 0
        parts: list[str] = []
        for end in piece.ends.tolist():
            parts += piece.text[start:end], "\n"
            start = end
        parts.append(piece.text[start:])
        yield "".join(parts)


def parts_by_document(pieces: Iterator[Piece]) -> Iterator[tuple[int, str]]:
    """Each document's text under its number, in one part or, across pieces, in several."""
    number = 0
    for piece in pieces:
        start = 0
        for end in piece.ends.tolist():
            yield number, piece.text[start:end]
            start = end
            number += 1
        if start < len(piece.text):
            yield number, piece.text[start:]


def code_points(text: str) -> NDArray[np.uint8] | NDArray[np.uint32]:
    """The characters' numbers, a byte each where all are ASCII."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def byte_positions(text: str, data: bytes, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `data`, the UTF-8 of `text`, these character positions lie."""
    if len(data) == len(text) or not len(positions):
        return positions
    # Every byte but 10xxxxxx begins a character.
    starts = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
    return np.append(starts, len(data))[positions]


def _one_document(chunks: Iterator[str]) -> Iterator[Piece]:
    empty = True
    for chunk in chunks:
        empty = False
        yield Piece(chunk, _NO_ENDS)
    if not empty:
        yield Piece("", _END_HERE)


def _whole_documents(texts: Sequence[str]) -> Piece:
    return Piece("".join(texts), np.fromiter(accumulate(map(len, texts)), np.int64, len(texts)))


def _whole_newlines(chunks: Iterator[str]) -> Iterator[str]:
    """The same text, cut so that no CR LF is parted."""
    held = ""
    for chunk in chunks:
        text = held + chunk
        held = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r")
    if held:
        yield held


def _gather(texts: Iterator[str]) -> Iterator[str]:
    """The same text in fewer, longer chunks."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PIECE_CHARACTERS:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
