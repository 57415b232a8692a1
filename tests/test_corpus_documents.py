"""The stream of pieces: documents found at once by arrays equal those found one by one."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import CorpusError
from training.corpus.census import HeldOut, take_census
from training.corpus.documents import (
    Piece,
    TextStream,
    byte_positions,
    code_points,
    line_documents,
    parts_by_document,
    separated,
)
from training.corpus.options import Documents
from training.corpus.text import TextFile

TEXTS = st.text(alphabet=st.sampled_from("ab\r\n\té日😀\u2028\x85"), max_size=60)


def documents_of(pieces: list[Piece]) -> list[str]:
    """The documents one by one, by the definition of `Piece.ends`."""
    documents, unfinished = [], ""
    for piece in pieces:
        start = 0
        for end in piece.ends.tolist():
            documents.append(unfinished + piece.text[start:end])
            unfinished, start = "", end
        unfinished += piece.text[start:]
    assert unfinished == ""
    return documents


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def stream(
    *texts: str, documents: Documents, field: str | None = None, suffix: str = ""
) -> TextStream:
    files = [
        TextFile(
            name=str(number),
            content=text.encode(),
            encoding="utf-8",
            layout="jsonl" if suffix == ".jsonl" else None,
        )
        for number, text in enumerate(texts)
    ]
    return TextStream(files=files, documents=documents, field=field, advance=lambda _: None)


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_lines_are_what_splitting_gives(text: str, places: list[int]) -> None:
    """LF and CRLF end lines, however the text is cut; empty lines are none; CR alone is text."""
    expected = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    assert documents_of(list(line_documents(iter(cut(text, places))))) == expected


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_parts_of_documents_add_up(text: str, places: list[int]) -> None:
    """A document in several pieces has parts under one number, none of them empty."""
    pieces = list(line_documents(iter(cut(text, places))))
    joined: dict[int, str] = {}
    for number, part in parts_by_document(iter(pieces)):
        joined[number] = joined.get(number, "") + part
    assert list(joined.values()) == documents_of(pieces)
    assert list(joined) == list(range(len(joined)))
    assert "".join(separated(iter(pieces))) == "".join(f"{d}\n" for d in joined.values())


def test_files_follow_one_another_like_cat() -> None:
    """Without documents nothing is put between files and nothing is taken away."""
    pieces = list(stream("a\n", "", "b", "c\r\n", documents="none").pieces())
    assert "".join(piece.text for piece in pieces) == "a\nbc\r\n"
    assert not any(len(piece.ends) for piece in pieces)


def test_files_are_documents() -> None:
    """Each file is one document with all its newlines; an empty file is none."""
    pieces = list(stream("a\n\n", "", "b", documents="files").pieces())
    assert documents_of(pieces) == ["a\n\n", "b"]


def test_a_line_ends_with_its_file() -> None:
    """The last line of a file and the first of the next are two."""
    assert documents_of(list(stream("a\nb", "c", documents="lines").pieces())) == ["a", "b", "c"]


def test_records_are_documents() -> None:
    """A record's field is a document with all its newlines; an empty one is none."""
    lines = '{"t": "a\\nb"}\n{"t": ""}\n{"t": "\\n"}\n'
    pieces = list(stream(lines, documents="records", field="t", suffix=".jsonl").pieces())
    assert documents_of(pieces) == ["a\nb", "\n"]


def test_a_field_without_record_documents_is_joined_by_newlines() -> None:
    """The text of a table is its fields, a newline after each, as plain text or by line."""
    lines = '{"t": "a\\nb"}\n{"t": "c"}\n'
    pieces = stream(lines, documents="none", field="t", suffix=".jsonl").pieces()
    assert "".join(piece.text for piece in pieces) == "a\nb\nc\n"
    pieces = stream(lines, documents="lines", field="t", suffix=".jsonl").pieces()
    assert documents_of(list(pieces)) == ["a", "b", "c"]


@given(TEXTS, st.lists(st.integers(0, 60)))
def test_byte_positions_are_lengths_of_prefixes(text: str, places: list[int]) -> None:
    """The place of a character in UTF-8 is the length of all before it in UTF-8."""
    positions = np.array(sorted(place % (len(text) + 1) for place in places), np.int64)
    found = byte_positions(text, text.encode(), positions)
    assert found.tolist() == [len(text[:position].encode()) for position in positions]


@given(TEXTS)
def test_code_points_are_ord(text: str) -> None:
    """The fast way to code points gives what `ord` gives."""
    assert code_points(text).tolist() == [ord(character) for character in text]


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_the_census_counts_what_counting_gives(text: str, places: list[int]) -> None:
    """Characters, bytes, documents and counts equal those of plain Python on the whole text."""
    census = take_census(line_documents(iter(cut(text, places))), hashes=None)
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    whole = "".join(lines)
    assert census.characters == len(whole)
    assert census.bytes == len(whole.encode())
    assert census.documents == len(lines)
    assert census.character_counts() == {c: whole.count(c) for c in sorted(set(whole))}
    assert census.distinct == len(set(whole))


@given(TEXTS, st.lists(st.integers(0, 100)), TEXTS)
def test_the_content_hash_is_of_documents_not_of_pieces(
    text: str, places: list[int], other: str
) -> None:
    """Equal documents hash alike however they were cut; other documents, or other ends, do not."""

    def content(pieces: list[Piece]) -> str:
        return take_census(pieces, hashes=None).content

    whole = list(line_documents(iter([text])))
    assert content(list(line_documents(iter(cut(text, places))))) == content(whole)
    others = list(line_documents(iter([other])))
    assert (content(others) == content(whole)) == (documents_of(others) == documents_of(whole))


@given(st.lists(st.text("abé日", min_size=1, max_size=5), min_size=1), st.lists(st.integers(0, 99)))
def test_document_hashes_are_blake2b(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], places: list[int]
) -> None:
    """Each document's 8-byte hash is the one that anyone can compute with hashlib."""
    path = tmp_path_factory.mktemp("hashes") / "hashes"
    take_census(line_documents(iter(cut("\n".join(documents), places))), hashes=path)
    expected = [hashlib.blake2b(d.encode(), digest_size=8).digest() for d in documents]
    assert path.read_bytes() == b"".join(expected)


def held_out(tmp_path: Path, numbers: list[int], share: float) -> list[bool]:
    path = tmp_path / "hashes"
    path.write_bytes(b"".join(number.to_bytes(8, "big") for number in numbers))
    held: list[bool] = HeldOut.choose(path, share).among(0, len(numbers)).tolist()
    return held


def test_documents_below_the_limit_are_held_out(tmp_path: Path) -> None:
    """A quarter of the range of hashes is held out, its upper edge excluded."""
    quarter = 2**62
    assert held_out(tmp_path, [0, quarter - 1, quarter, 2**64 - 1], 0.25) == [
        True,
        True,
        False,
        False,
    ]


def test_an_empty_side_gets_the_nearest_documents(tmp_path: Path) -> None:
    """The lowest hashes move to an empty held-out side, the highest to an empty training side."""
    assert held_out(tmp_path, [2**63, 2**62, 2**62, 2**64 - 1], 0.1) == [False, True, True, False]
    assert held_out(tmp_path, [5, 9, 9, 7], 0.9) == [True, False, False, True]
    assert held_out(tmp_path, [0, 2**64 - 1], 0.000001) == [True, False]


def test_nothing_is_held_out_of_a_share_of_zero(tmp_path: Path) -> None:
    """A share of 0 takes no document, not even one of hash 0 or a single one."""
    assert held_out(tmp_path, [0], 0.0) == [False]


def test_a_single_distinct_document_cannot_be_split(tmp_path: Path) -> None:
    """Three times the same document is one document, and the error says what to do."""
    with pytest.raises(CorpusError, match=r"single distinct document \(3 in all\).*--validation 0"):
        held_out(tmp_path, [7, 7, 7], 0.5)


def test_beyond_the_last_document_nothing_is_held_out(tmp_path: Path) -> None:
    """The stretch after the last document is empty, and asking about it is safe."""
    path = tmp_path / "hashes"
    path.write_bytes(bytes(8) + b"\xff" * 8)
    assert HeldOut.choose(path, 0.5).among(1, 2).tolist() == [False, False]
