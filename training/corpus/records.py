"""The chosen field of JSONL, CSV and TSV files, record by record.

A field is named, never guessed: a table without `--field` is refused with the fields it holds (its
raw lines can still be learnt by giving it on standard input, where it has no name to tell its
layout). Lines end at LF, so that JSON strings may hold U+2028 and CSV fields line breaks of any
kind; a broken or missing field is an error with its file and line, never a record skipped.

One record is held in memory at a time, and may have `MAXIMUM_RECORD` characters.
"""

import csv
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from charloom.errors import CorpusError
from training.corpus.text import Layout, TextFile, read_text

MAXIMUM_RECORD = 1 << 24
_LAYOUT_NAMES = {"jsonl": "JSONL", "csv": "CSV", "tsv": "TSV"}


def layout_of(name: str) -> Layout | None:
    """What a file's name, less the suffix of its compression, says about its inside."""
    name = name.lower()
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith(".csv"):
        return "csv"
    return "tsv" if name.endswith((".tsv", ".tab")) else None


def read_records(
    file: TextFile, field: str, *, advance: Callable[[int], None]
) -> Iterator[tuple[str, int]]:
    """Yield the field's text in each record with the line it begins on, counted from 1.

    A file whose name says nothing is JSONL when it begins with a brace, else CSV.
    """
    chunks = read_text(file, advance=advance)
    first = next(chunks, "")
    layout = file.layout
    if layout is None:
        layout = "jsonl" if first.lstrip().startswith(("{", "[")) else "csv"
    lines = _lines(file.name, first, chunks)
    if layout == "jsonl":
        yield from _json_records(file.name, field, lines)
    else:
        yield from _csv_records(file.name, field, lines, "\t" if layout == "tsv" else ",")


def refuse_unnamed_field(file: TextFile) -> None:
    """Raise `CorpusError` with the fields that a table without `--field` has to offer."""
    if file.layout is None:
        return
    fields: list[str] = []
    with closing(_text(file)) as chunks:
        lines = _lines(file.name, "", chunks)
        if file.layout == "jsonl":
            fields = next((list(record) for record, _ in _json_objects(file.name, lines)), [])
        else:
            delimiter = "\t" if file.layout == "tsv" else ","
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            header = _next_row(rows, file.name, 1)
            fields = [] if header is None else header
    if not fields:
        raise CorpusError(f"{file.name} is empty; give a file that holds text.")
    raise CorpusError(
        f"{file.name} is {_LAYOUT_NAMES[file.layout]} with the fields {_listed(fields)}; say "
        "with --field which of them holds the text, or give the file on standard input (-) to "
        "learn its lines as they are."
    )


def _text(file: TextFile) -> Generator[str, None, None]:
    yield from read_text(file, advance=lambda _: None)


def _lines(name: str, first: str, chunks: Iterator[str]) -> Iterator[str]:
    """Lines with their LF (the last may lack it), from `first` and the chunks after it."""
    rest = first
    number = 1
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            yield line + "\n"
        number += len(whole)
        if len(rest) > MAXIMUM_RECORD:
            raise _too_long(name, number)
    *whole, rest = rest.split("\n")
    for line in whole:
        yield line + "\n"
    if rest:
        yield rest


def _too_long(name: str, line: int) -> CorpusError:
    return CorpusError(
        f"{name}, line {line}: a record or field is longer than {MAXIMUM_RECORD:,} characters; "
        "look for an unclosed quotation mark, or cut the record up."
    )


def _json_records(name: str, field: str, lines: Iterator[str]) -> Iterator[tuple[str, int]]:
    for record, number in _json_objects(name, lines):
        if field not in record:
            raise _lacking(name, number, field, list(record))
        text = record[field]
        if not isinstance(text, str):
            raise CorpusError(
                f"{name}, line {number}: field {field!r} holds {json.dumps(text)[:40]}, not text; "
                "name another field with --field, or leave such records out."
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{name}, line {number}: field {field!r} holds half of a surrogate pair "
                    f"(\\u{ord(text[error.start]):04x}), which is no character; mend the record."
                ) from error
        yield text, number


def _json_objects(name: str, lines: Iterator[str]) -> Iterator[tuple[dict[str, object], int]]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{name}, line {number} is not JSON ({error}); JSONL has one object on each line "
                "(`jq -c` makes it from other JSON)."
            ) from error
        if not isinstance(record, dict):
            raise CorpusError(
                f"{name}, line {number} holds a JSON {type(record).__name__}, not an object; JSONL "
                "has one object on each line (`jq -c '.[]'` makes it from an array)."
            )
        yield record, number


def _csv_records(
    name: str, field: str, lines: Iterator[str], delimiter: str
) -> Iterator[tuple[str, int]]:
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    column = begun = 0
    while (row := _next_row(rows, name, begun + 1)) is not None:
        number, begun = begun + 1, rows.line_num
        if not row:
            continue
        if header is None:
            header = row
            if header.count(field) != 1:
                raise _lacking(name, number, field, header)
            column = header.index(field)
        elif len(row) != len(header):
            raise CorpusError(
                f"{name}, line {number}: the row has {len(row)} fields where the header has "
                f"{len(header)} ({_listed(header)}); mend the row, or its quotation marks."
            )
        else:
            yield row[column], number


def _next_row(rows: Iterator[list[str]], name: str, line: int) -> list[str] | None:
    """The next row, which begins on this line, or None; errors get the file and the line."""
    # The limit is one for the whole process, so it is raised for no longer than a row takes.
    before = csv.field_size_limit(MAXIMUM_RECORD)
    try:
        return next(rows, None)
    except csv.Error as error:
        if "field larger than field limit" in str(error):
            raise _too_long(name, line) from error
        raise CorpusError(
            f"{name}, line {line} is not CSV ({error}); mend its quotation marks, or give the "
            "file on standard input (-) to learn its lines as they are."
        ) from error
    finally:
        csv.field_size_limit(before)


def _lacking(name: str, line: int, field: str, present: list[str]) -> CorpusError:
    if present.count(field) > 1:
        return CorpusError(f"{name} has several columns named {field!r}; rename all but one.")
    return CorpusError(
        f"{name}, line {line}: there is no field {field!r}; the fields are {_listed(present)}. "
        "Name one of them with --field."
    )


def _listed(fields: list[str]) -> str:
    """The names of fields, as many and as much of them as a sentence can hold."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in fields[:20]]
    return ", ".join(shown) + (f" and {len(fields) - 20} more" if len(fields) > 20 else "")
