"""Reading one file of text: kept as it is, whatever its compression and encoding, or refused."""

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import CorpusError
from training.corpus import text as text_module
from training.corpus.text import TextFile, guess_encoding, read_text

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HOSTILE = (
    "a\r\nb\rc\n\ttab \0 nul\u2028 床前明月光 مرحبا \u200d👩‍👩‍👧 e\u0301 \ufeff \x85\x1c end\r"
)


def read(data: bytes, encoding: str = "utf-8") -> str:
    file = TextFile(name="some.txt", content=data, encoding=encoding)
    return "".join(read_text(file, advance=lambda _: None))


def refusal(data: bytes, encoding: str = "utf-8") -> str:
    with pytest.raises(CorpusError) as caught:
        read(data, encoding)
    return str(caught.value)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-7", "gb18030", "utf-8-sig"]
)
def test_text_comes_back_as_it_is(encoding: str) -> None:
    """Line ends of every kind, NUL, joiners and combining marks survive every Unicode encoding."""
    assert read(HOSTILE.encode(encoding), encoding) == HOSTILE


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1), st.integers(1, 7))
def test_the_size_of_chunks_changes_nothing(text: str, size: int) -> None:
    """However small the chunks are, no character is cut: the text is what one decode gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK_BYTES", size)
        if text.count("\0") < 16:
            assert read(text.encode()) == text.removeprefix("\ufeff")
            assert read(text.encode("utf-16"), "utf-16") == text


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-32-be", b"\0\0\xfe\xff")],
)
def test_one_mark_at_the_start_is_dropped(encoding: str, mark: bytes) -> None:
    """A byte order mark belongs to the encoding; a second one, or one further on, is text."""
    text = "\ufeffab\ufeffc"
    assert read(mark + text.encode(encoding), encoding) == text


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstd.compress],
    ids=["gz", "bz2", "xz", "zst"],
)
def test_compressed_text_is_recognised_by_content(compress: Callable[[bytes], bytes]) -> None:
    """A name is not asked: two compressed members in a row read as their texts in a row."""
    data = HOSTILE.encode()
    assert read(compress(data) + compress(b"more")) == HOSTILE + "more"


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstd.compress],
    ids=["gz", "bz2", "xz", "zst"],
)
def test_cut_off_compressed_text_is_an_error(compress: Callable[[bytes], bytes]) -> None:
    """Half an archive never passes for a whole text."""
    data = compress(HOSTILE.encode() * 50)
    assert "some.txt is cut off" in refusal(data[:-9])


def test_damaged_compressed_text_is_an_error() -> None:
    """A flipped byte inside an archive is told as damage, not as bad UTF-8."""
    data = bytearray(gzip.compress(bytes(range(256)) * 40))
    data[30] ^= 0xFF
    assert "some.txt is damaged and cannot be unpacked" in refusal(bytes(data))
    assert "some.txt is damaged" in refusal(gzip.compress(b"text") + b"rubbish")


def test_plain_text_that_begins_like_bzip2_is_text() -> None:
    """Three letters are no proof of compression."""
    assert read(b"BZh9 is how it begins") == "BZh9 is how it begins"


def test_unpacking_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpacks beyond the limit is refused with a remedy; a plain file of that size is not."""
    monkeypatch.setattr(text_module, "MAXIMUM_BYTES", 1000)
    assert "unpacks to more than 1,000 bytes" in refusal(gzip.compress(b"a" * 1001))
    assert "unpack it yourself" in refusal(gzip.compress(b"a" * 1001))
    assert read(gzip.compress(b"a" * 1000)) == read(b"a" * 1000)
    assert len(read(b"a" * 1001)) == 1001


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [
        ("naïve".encode("cp1252"), 2, "0xEF"),
        (b"\xef\xbb\xbfabc\xff", 6, "0xFF"),
        ("ab日本".encode()[:-1], 5, "0xE6"),
    ],
)
def test_the_offset_of_the_first_bad_byte_is_named(
    data: bytes, offset: int, byte: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offset counts from the start of the file, mark included, however the file is cut."""
    monkeypatch.setattr(text_module, "CHUNK_BYTES", size)
    sentence = refusal(data)
    assert f"some.txt is not utf-8 text: byte {byte} at offset {offset} " in sentence
    assert "--encoding NAME" in sentence
    assert "--encoding auto" in sentence


def test_the_offset_is_right_in_multibyte_encodings() -> None:
    """Decoders that hold back half a character do not shift the offset."""
    assert "at offset 4 " in refusal("中文".encode("gb18030") + b"\xff\xff", "gb18030")
    assert "at offset 6 " in refusal("中文".encode("utf-16") + b"\x00", "utf-16")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_foreign_byte_order_mark_names_its_encoding(encoding: str) -> None:
    """UTF-16 read as UTF-8 is told what it is, not called binary."""
    sentence = refusal("plain text".encode(encoding))
    assert f"byte order mark of {encoding}; say --encoding {encoding}." in sentence


def test_binary_data_gets_its_own_sentence() -> None:
    """Bytes that no text holds are called binary, with the offset where decoding failed."""
    assert "looks like a binary file" in refusal(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0")
    assert "byte offset 0" in refusal(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0")


def test_nul_is_text_until_there_is_too_much_of_it() -> None:
    """Up to a tenth of the text, or fifteen in all, NUL is a character like any other."""
    assert read(b"a\0b\0c") == "a\0b\0c"
    assert read(b"\0" * 15) == "\0" * 15
    assert read(b"123456789\0" * 100) == "123456789\0" * 100
    assert "NUL" in refusal(b"12345678\0" * 100)
    assert "--encoding utf-16-le" in refusal("UTF-16 without a mark".encode("utf-16-le"))


def test_half_a_surrogate_pair_is_refused() -> None:
    """Codecs that let lone surrogates through do not bring them into a corpus."""
    assert "half of a surrogate pair" in refusal(b"a+2AA-b", "utf-7")


def test_progress_adds_up_to_the_stored_bytes(tmp_path: Path) -> None:
    """Progress counts what lies on the disk, so it fits the file's size when compressed too."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(HOSTILE, "utf-8") * 1000))
    steps: list[int] = []
    file = TextFile(name="a", path=path, encoding="utf-8")
    for _ in read_text(file, advance=steps.append):
        pass
    assert sum(steps) == path.stat().st_size == file.size()


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"", "utf-8"),
        (b"plain ascii", "utf-8"),
        ("ab日本".encode()[:-1] + b"\xac", "utf-8"),
        ("床前明月光,疑是地上霜。\n举头望明月,低头思故乡。\n" * 20, "gb18030"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 20, "shift_jis"),
        ("Я помню чудное мгновенье: передо мной явилась ты.\n" * 20, "cp1251"),
        ("any text", "utf-16"),
        ("any text", "utf-32"),
    ],
)
def test_guesses_lead_back_to_the_text(data: str | bytes, encoding: str) -> None:
    """Marks and valid UTF-8 settle the encoding; else the guess decodes to the same text."""
    raw = data if isinstance(data, bytes) else data.encode(encoding)
    guessed = guess_encoding(TextFile(name="some.txt", content=raw))
    assert read(raw, guessed) == raw.decode(encoding)


def test_a_sample_cut_inside_a_character_is_still_utf8() -> None:
    """The guess reads a bounded sample, and its last character may be cut."""
    raw = b"a" + "日".encode() * (text_module.SAMPLE_BYTES // 3 + 10)
    assert guess_encoding(TextFile(name="some.txt", content=raw)) == "utf-8"


def test_a_guess_about_binary_data_is_refused() -> None:
    """Where no encoding fits there is no guess but a sentence."""
    noise = bytes((i * i * 7 + i // 3) % 256 for i in range(4096))
    with pytest.raises(CorpusError, match="fits no known encoding"):
        guess_encoding(TextFile(name="some.txt", content=noise))
