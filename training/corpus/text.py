"""One file of text: opened, decompressed, decoded, or refused with a sentence that says why.

The one idea: content decides, never the name. Compression is recognised by its first bytes, text by
the strict decoder of its encoding. What is text is kept as it is, to the last carriage return; only
a byte order mark at the very start, which belongs to the encoding, is dropped.

NUL is a character like any other. Text that decodes but of whose first megabyte more than a tenth
(and at least 16 characters) is NUL is refused, since that is UTF-16 read as something else, or a
binary file.

Decompression is bounded by `MAXIMUM_BYTES`: a few kilobytes can unpack to petabytes. A file that is
not compressed has no bound.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import charset_normalizer

from charloom.errors import CorpusError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Layout = Literal["jsonl", "csv", "tsv"]

CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 19
# More than any corpus that a small recurrent network can read in a year.
MAXIMUM_BYTES = 64 * 2**30


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


_COMPRESSED: tuple[tuple[bytes, Callable[[IO[bytes]], _Readable]], ...] = (
    (b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", zstd.ZstdFile),
)
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a first block, or the end of an empty stream
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """Where a part of the text lies: a file on disk, or bytes that Python brings along."""

    name: str
    """What messages call it."""
    path: Path | None = None
    content: bytes | None = None
    layout: Layout | None = None
    """What its name says about its inside; None is text."""
    encoding: str | None = None
    """None until it is settled by the options or guessed."""

    def open(self) -> IO[bytes]:
        """The stored bytes, compressed or not."""
        if self.path is None:
            assert self.content is not None, "a text file has a path or a content"
            return io.BytesIO(self.content)
        try:
            return self.path.open("rb")
        except OSError as error:
            raise unreadable(self.name, error) from error

    def size(self) -> int:
        """Number of stored bytes."""
        return self.stamp()[1]

    def stamp(self) -> tuple[str, int, int | str]:
        """What tells cheaply whether it changed: place, size and time of change in nanoseconds."""
        if self.path is None:
            assert self.content is not None, "a text file has a path or a content"
            return self.name, len(self.content), hashlib.sha256(self.content).hexdigest()
        try:
            status = self.path.stat()
        except OSError as error:
            raise unreadable(self.name, error) from error
        return str(self.path.resolve()), status.st_size, status.st_mtime_ns


def unreadable(name: str, error: OSError) -> CorpusError:
    """The sentence for a file that the system does not let us read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CorpusError(f"{name} does not exist; check the path.")
    if isinstance(error, PermissionError):
        return CorpusError(f"{name} cannot be read: permission denied; check who may read it.")
    reason = error.strerror if error.strerror is not None else str(error)
    return CorpusError(f"{name} cannot be read: {reason}; check the path and the disk.")


def read_text(file: TextFile, *, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the text in chunks of about a megabyte; `advance` hears of stored bytes as they go by.

    Raises `CorpusError` for what is unreadable, damaged, binary or encoded otherwise.
    """
    assert file.encoding is not None, "the encoding is settled before the text is read"
    codec = codecs.lookup(file.encoding).name
    codec = "utf-8" if codec == "utf-8-sig" else codec
    decoder = codecs.getincrementaldecoder(codec)()
    # These two take their own mark off; a second one is text.
    marked = codec not in ("utf-16", "utf-32")
    offset = 0
    at_start = True
    for data in _read_bytes(file, advance):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, not data)
            if codec != "utf-8" and not text.isascii():
                text.encode()  # a few codecs let halves of surrogate pairs through
        except UnicodeError as error:
            raise _undecodable(file, codec, error, offset - pending, data) from error
        offset += len(data)
        if at_start and text:
            at_start = False
            _refuse_binary(file, text)
            text = text.removeprefix("\ufeff") if marked else text
        if text:
            yield text


def _read_bytes(file: TextFile, advance: Callable[[int], None]) -> Generator[bytes, None, None]:
    """The decompressed bytes in chunks; the last one, and only that, is empty."""
    with file.open() as raw:
        stream = _decompress(raw, file.name)
        total = position = 0
        while True:
            try:
                data = stream.read(CHUNK_BYTES)
                advance(raw.tell() - position)
                position = raw.tell()
            except (OSError, *_DAMAGE) as error:
                raise _damaged(file.name, error) from error
            total += len(data)
            if stream is not raw and total > MAXIMUM_BYTES:
                raise CorpusError(
                    f"{file.name} unpacks to more than {MAXIMUM_BYTES:,} bytes, which looks like a "
                    "trap; if it is meant, unpack it yourself and give the unpacked file."
                )
            yield data
            if not data:
                return


def _decompress(raw: IO[bytes], name: str) -> _Readable:
    """The stream of decompressed bytes, or `raw` itself where nothing is compressed."""
    try:
        head = raw.read(10)
        raw.seek(0)
    except OSError as error:
        raise unreadable(name, error) from error
    for magic, opened in _COMPRESSED:
        if head.startswith(magic) and (magic != b"BZh" or head[4:] in _BZIP2_BLOCKS):
            return opened(raw)
    return raw


def _damaged(name: str, error: Exception) -> CorpusError:
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(name, error)
    if isinstance(error, EOFError):
        return CorpusError(f"{name} is cut off: its compressed data ends too soon; fetch it again.")
    return CorpusError(f"{name} is damaged and cannot be unpacked ({error}); fetch it again.")


def _refuse_binary(file: TextFile, text: str) -> None:
    nuls = text.count("\0")
    if nuls >= 16 and nuls * 10 > len(text):
        raise CorpusError(
            f"{file.name} does not look like {file.encoding} text: {nuls / len(text):.0%} of its "
            "beginning is NUL. If it is text in UTF-16, say --encoding utf-16-le or utf-16-be; a "
            "binary file cannot be learnt."
        )


def _undecodable(
    file: TextFile, codec: str, error: UnicodeError, base: int, data: bytes
) -> CorpusError:
    """The sentence for bytes that are not text in this encoding; `base` is where `data` begins."""
    if base == 0:
        for mark, name in _MARKS:
            if data.startswith(mark) and name != codec:
                return CorpusError(
                    f"{file.name} is not {codec} text: it begins with the byte order mark of "
                    f"{name}; say --encoding {name}."
                )
    if not isinstance(error, UnicodeDecodeError):
        half = isinstance(error, UnicodeEncodeError)
        reason = "it holds half of a surrogate pair" if half else str(error)
        return CorpusError(
            f"{file.name} is not {codec} text: {reason}; say --encoding NAME with its encoding, or "
            "--encoding auto to have it guessed."
        )
    offset = base + error.start
    near = error.object[max(0, error.start - 512) : error.start + 512]
    controls = sum(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in near)
    # UTF-16 and UTF-32 are full of such bytes themselves.
    if controls * 20 > len(near) and not codec.startswith(("utf-16", "utf-32")):
        return CorpusError(
            f"{file.name} looks like a binary file, not {codec} text (first at byte offset "
            f"{offset}); give a text file, and for a folder a pattern such as 'FOLDER/**/*.txt'."
        )
    return CorpusError(
        f"{file.name} is not {codec} text: byte 0x{error.object[error.start]:02X} at offset "
        f"{offset} cannot be decoded ({error.reason}); say --encoding NAME with its encoding "
        "(often cp1252 or latin-1), or --encoding auto to have it guessed."
    )


def guess_encoding(file: TextFile) -> str:
    """The likeliest encoding by the first half megabyte; a mark or valid UTF-8 settles it.

    A guess: other single-byte encodings are confused with one another (research on this very
    library: cp1252 taken for mac_latin2, koi8_r for cp1251), so the caller says what was guessed.
    """
    with closing(_read_bytes(file, lambda _: None)) as chunks:
        sample = next(chunks)[:SAMPLE_BYTES]
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        pass
    else:
        return "utf-8"
    # Cut after a line, not inside a character of several bytes.
    whole = sample[: sample.rfind(b"\n") + 1] if len(sample) >= SAMPLE_BYTES else sample
    best = charset_normalizer.from_bytes(whole if whole else sample).best()
    if best is None:
        raise CorpusError(
            f"{file.name} fits no known encoding, so it is probably a binary file; give a text "
            "file, or say --encoding NAME."
        )
    return codecs.lookup(best.encoding).name
