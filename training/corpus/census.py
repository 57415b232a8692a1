"""The first pass over the text: which characters, how much of it, which documents, what hash.

The content hash covers the text and, apart from it, the positions where documents end, so it does
not depend on files, compression, encoding or how the text is cut into pieces. Each document's own
hash is blake2b with 8 bytes, and goes to a file: 8 bytes for each of 50 million lines are 400 MB.

Measured with `benchmarks/corpus.py`, characters, on an AMD EPYC (Zen 5) that others were using too:
2 GB of ASCII took at most 38 MB of anonymous memory, and 68 MB as more than 41 million lines. Both
passes over 0.3 GB took processor time at a rate of 141 MB/s, and of 30 MB/s as lines. A line costs
0.8 microseconds more in this pass, nearly all of it blake2b, which was kept over a polynomial hash
in NumPy (a sketch of one was ten times as fast) because anyone can check the split with it.
"""

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from charloom.errors import CorpusError
from training.corpus.documents import Piece, byte_positions, code_points

_HASH_BYTES = 8
_UNICODE = 0x110000


@dataclass(frozen=True, kw_only=True, eq=False)
class Census:
    """What the first pass finds out."""

    characters: int
    bytes: int
    """Length of the text in UTF-8."""
    documents: int
    counts: NDArray[np.int64]
    """(0x110000,) how often each code point occurs."""
    content: str
    """Hash of the text and of where its documents end."""

    @property
    def distinct(self) -> int:
        """Number of different characters."""
        return int(np.count_nonzero(self.counts))

    def character_counts(self) -> dict[str, int]:
        """Each character that occurs, by code point, with its count."""
        points = np.flatnonzero(self.counts)
        return {
            chr(point): count
            for point, count in zip(points.tolist(), self.counts[points].tolist(), strict=True)
        }


class ContentHash:
    """The hash of a stream of pieces, however it is cut."""

    def __init__(self) -> None:
        self._text = hashlib.sha256()
        self._ends = hashlib.sha256()
        self._characters = 0

    def add(self, piece: Piece, data: bytes) -> None:
        """Take in one piece, whose text in UTF-8 is `data`."""
        self._text.update(data)
        self._ends.update((piece.ends + self._characters).astype("<i8").tobytes())
        self._characters += len(piece.text)

    def hexdigest(self) -> str:
        """The hash of all that was added."""
        return hashlib.sha256(self._text.digest() + self._ends.digest()).hexdigest()


def take_census(pieces: Iterable[Piece], *, hashes: Path | None) -> Census:
    """Read all pieces once; the documents' hashes go to the file `hashes` where it is given."""
    counts = np.zeros(_UNICODE, np.int64)
    content = ContentHash()
    characters = size = documents = 0
    with nullcontext() if hashes is None else hashes.open("wb") as out:
        hasher = None if out is None else _DocumentHasher(out)
        for piece in pieces:
            data = piece.text.encode()
            content.add(piece, data)
            found = np.bincount(code_points(piece.text))
            counts[: len(found)] += found
            characters += len(piece.text)
            size += len(data)
            documents += len(piece.ends)
            if hasher is not None:
                hasher.add(data, byte_positions(piece.text, data, piece.ends))
    return Census(
        characters=characters,
        bytes=size,
        documents=documents,
        counts=counts,
        content=content.hexdigest(),
    )


class _DocumentHasher:
    """Writes the hash of each document as it ends."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._open = hashlib.blake2b(digest_size=_HASH_BYTES)

    def add(self, data: bytes, ends: NDArray[np.int64]) -> None:
        edges = ends.tolist()
        if not edges:
            self._open.update(data)
            return
        self._open.update(data[: edges[0]])
        digests = [self._open.digest()]
        digests += [
            hashlib.blake2b(data[start:end], digest_size=_HASH_BYTES).digest()
            for start, end in pairwise(edges)
        ]
        self._out.write(b"".join(digests))
        self._open = hashlib.blake2b(data[edges[-1] :], digest_size=_HASH_BYTES)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Which documents are held out: those whose hash lies below a limit, so equals go together."""

    hashes: NDArray[np.uint64]
    limit: int

    @classmethod
    def choose(cls, hashes: Path, share: float) -> "HeldOut":
        """Hold out this share of the hashes' range, but at least one and not all where share > 0.

        Raises `CorpusError` when there are no two different documents.
        """
        # A plain view of the map: slices of a memmap object cost four times as much.
        numbers = np.asarray(np.memmap(hashes, dtype=">u8", mode="r"))
        limit = int(share * 2**64)
        if share > 0:
            lowest, highest = int(numbers.min()), int(numbers.max())
            if lowest == highest:
                raise CorpusError(
                    f"The corpus has a single distinct document ({len(numbers)} in all), which "
                    "cannot be both learnt and held out; give more documents, --documents none to "
                    "hold out the end of the text, or --validation 0 to hold out nothing."
                )
            limit = min(max(limit, lowest + 1), highest)
        return cls(numbers, limit)

    def among(self, first: int, number: int) -> NDArray[np.bool_]:
        """For `number` documents from `first` on whether they are held out.

        A document beyond the last one, that is none, is not.
        """
        held = np.zeros(number, np.bool_)
        part = self.hashes[first : first + number]
        held[: len(part)] = part < np.uint64(self.limit)
        return held
