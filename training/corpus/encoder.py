"""The second pass over the text: its tokens, written side by side with where documents end.

The one idea: the tokens of a whole piece, end tokens put in between, are dealt to the two sides by
a mask, so a line costs no Python call. That needs a token's place to follow from its character's,
as it does for characters and bytes. SentencePiece encodes one document after the other.

Tokens are written through a plain file handle and mapped afterwards: pages written through a map
would count as this process's own memory until the kernel gets round to them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from charloom.errors import CorpusError
from charloom.tokenizer import Tokenizer
from training.corpus.census import ContentHash, HeldOut
from training.corpus.documents import Piece, byte_positions, parts_by_document
from training.corpus.encoded import SIDES, TOKEN_COUNTS, token_type


class SideWriter:
    """The files of one side while they grow, and the sums over them."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, *, documents: bool) -> None:
        self.tokenizer = tokenizer
        self.tokens = self.ends = self.characters = self.bytes = 0
        self.counts = np.zeros(tokenizer.vocabulary_size, np.int64)
        self._type = token_type(tokenizer.vocabulary_size)
        self._token_file = (folder / f"{name}.tokens").open("wb")
        self._boundary_file = (folder / f"{name}.boundaries").open("wb") if documents else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._token_file.close()
        if self._boundary_file is not None:
            self._boundary_file.close()

    def count_text(self, *, characters: int, size: int) -> None:
        """Add to the length of this side's text, in characters and in bytes of UTF-8."""
        self.characters += characters
        self.bytes += size

    def write(self, tokens: NDArray[Any]) -> None:
        """Append tokens; with documents, the end token that opens a side is put in here."""
        if not len(tokens):
            return
        if self._boundary_file is not None:
            if not self.tokens:
                tokens = np.concatenate(([self.tokenizer.end], tokens))
            ends = np.flatnonzero(tokens == self.tokenizer.end)
            self._boundary_file.write((ends + self.tokens).astype("<i8").data)
            self.ends += len(ends)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._token_file.write(tokens.astype(self._type).data)
        self.tokens += len(tokens)

    def facts(self) -> dict[str, int]:
        """What a model card says about this side."""
        facts = {"tokens": self.tokens, "characters": self.characters, "bytes": self.bytes}
        if self._boundary_file is not None:
            facts["documents"] = max(0, self.ends - 1)
        return facts


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two sides that the second pass has written."""

    train: SideWriter
    validation: SideWriter


def encode_corpus(
    pieces: Callable[[], Iterator[Piece]],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    kept: int,
    held_out: HeldOut | None,
    content: str,
) -> Sides:
    """Write both sides' files and the token counts into a folder.

    Without documents (`held_out` is None) the first `kept` characters are for training and the rest
    is held out. Raises `CorpusError` when the text is not the one whose hash is `content`.
    """
    documents = held_out is not None
    train, validation = (SideWriter(folder, name, tokenizer, documents=documents) for name in SIDES)
    check = ContentHash()
    stream = _hashed(pieces(), check)
    with train, validation:
        if held_out is None:
            _write_contiguous(stream, train, validation, kept)
        elif tokenizer.kind == "sentencepiece":
            _write_each_document(stream, train, validation, held_out)
        else:
            _write_all_documents(stream, train, validation, held_out)
    if check.hexdigest() != content:
        raise CorpusError(
            "The corpus was changed while it was read; run the command again once it is at rest."
        )
    train.counts.astype("<i8").tofile(folder / TOKEN_COUNTS)
    (folder / tokenizer.file_name).write_bytes(tokenizer.to_bytes())
    return Sides(train=train, validation=validation)


def _hashed(pieces: Iterator[Piece], check: ContentHash) -> Iterator[Piece]:
    for piece in pieces:
        check.add(piece, piece.text.encode())
        yield piece


def _write_contiguous(
    pieces: Iterator[Piece], train: SideWriter, validation: SideWriter, kept: int
) -> None:
    """The text in one stretch, cut after `kept` characters and each part encoded by itself."""
    rest: list[str] = []

    def beginning() -> Iterator[str]:
        left = kept
        for piece in pieces:
            if len(piece.text) > left:
                rest.append(piece.text[left:])
                yield from _counted(iter([piece.text[:left]]), train)
                return
            left -= len(piece.text)
            yield from _counted(iter([piece.text]), train)

    def remainder() -> Iterator[str]:
        yield from _counted(iter(rest), validation)
        yield from _counted((piece.text for piece in pieces), validation)

    for side, texts in ((train, beginning()), (validation, remainder())):
        for tokens in side.tokenizer.encode_stream(texts, unknown="replace"):
            side.write(tokens)


def _counted(texts: Iterator[str], side: SideWriter) -> Iterator[str]:
    """Count the text on its way to the tokenizer, which may hold some of it back."""
    for text in texts:
        side.count_text(characters=len(text), size=len(text.encode()))
        if text:
            yield text


def _write_each_document(
    pieces: Iterator[Piece], train: SideWriter, validation: SideWriter, held_out: HeldOut
) -> None:
    end = np.array([train.tokenizer.end], np.int32)
    for number, parts in groupby(parts_by_document(pieces), key=itemgetter(0)):
        side = validation if held_out.among(number, 1)[0] else train
        texts = _counted((text for _, text in parts), side)
        for tokens in side.tokenizer.encode_stream(texts, unknown="replace"):
            side.write(tokens)
        side.write(end)


def _write_all_documents(
    pieces: Iterator[Piece], train: SideWriter, validation: SideWriter, held_out: HeldOut
) -> None:
    tokenizer = train.tokenizer
    first = 0
    for piece in pieces:
        data = piece.text.encode()
        byte_ends = byte_positions(piece.text, data, piece.ends)
        tokens = tokenizer.encode(piece.text, unknown="replace")
        ends = byte_ends if tokenizer.kind == "bytes" else piece.ends
        # One stretch for each document that ends here and one for what goes on after it.
        held = held_out.among(first, len(ends) + 1)
        woven = _weave(tokens, ends, tokenizer.end)
        of_held = np.repeat(held, _stretches(ends + np.arange(1, len(ends) + 1), len(woven)))
        characters = _stretches(piece.ends, len(piece.text))
        sizes = _stretches(byte_ends, len(data))
        for side, mask, mine in ((train, ~of_held, ~held), (validation, of_held, held)):
            side.write(woven[mask])
            side.count_text(characters=int(characters[mine].sum()), size=int(sizes[mine].sum()))
        first += len(ends)


def _weave(tokens: NDArray[np.int32], ends: NDArray[np.int64], end: int) -> NDArray[np.int32]:
    """The tokens with an end token put in at each of these positions."""
    woven = np.empty(len(tokens) + len(ends), np.int32)
    text = np.ones(len(woven), np.bool_)
    text[ends + np.arange(len(ends))] = False
    woven[text] = tokens
    woven[~text] = end
    return woven


def _stretches(edges: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Lengths of the stretches that these edges cut a length into."""
    return np.diff(edges, prepend=0, append=length)
